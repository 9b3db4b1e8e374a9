"""Who may import whom (the house's one rule), and that importing does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"kernels", "gptfast", "train", "bench", "tests"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "gptfast": {"gptfast", "kernels"},
    "train": {"gptfast", "kernels"},
    "bench": {"bench", "gptfast", "kernels"},
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    ] + [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted((imported(path) & OURS) - MAY_IMPORT[room])
        for path in files
        if (imported(path) & OURS) - MAY_IMPORT[room]
    }
    assert wrong == {}


def test_kernels_know_nothing_but_torch_and_triton():
    allowed = {"torch", "triton", "kernels"} | sys.stdlib_module_names
    for path in sorted((ROOT / "kernels").glob("*.py")):
        assert imported(path) <= allowed, path.name


def test_what_every_module_imports_pip_asks_for_everywhere():
    """So that it refuses where there is none, instead of the first import."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    required = [line.strip() for line in block.splitlines() if line.strip().startswith('"')]
    assert {'"torch>=2.11,<2.14",', '"triton>=3.6",'} <= set(required)
    assert not [line for line in required if ";" in line]


def test_another_package_named_kernels_is_refused(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import gptfast"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "another package named kernels is installed" in done.stderr


def test_every_module_imports_in_silence_and_without_a_process_group():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in ("kernels", "gptfast", "train")
        for path in sorted((ROOT / room).rglob("*.py"))
    ]
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import torch; assert not torch.distributed.is_initialized()\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
