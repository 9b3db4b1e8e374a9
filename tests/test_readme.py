"""Every command of README and CONTRIBUTING is run by something, and says so if it needs a GPU."""

import ast
import json
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import tyro
from torch.distributed.run import get_args_parser

from gptfast.config import DEFAULT_CACHE
from tests.tuning_cases import plain_newton_schulz, write_conversations

__all__ = ["plain_newton_schulz"]

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
_COMMAND = re.compile(r"(python|torchrun .*train/|pytest|pip|ruff|pyrefly|\.ci/run)\b")

CI, HERE = ".ci/run", "tests/test_readme.py::test_the_chain_at_toy_size"
# Who runs each command: a test, at toy size where the command is large; CI; or, with the kept
# results that it gave, a person on GPUs.
RUN_BY = {
    "pip install -e .": CI,
    "pip install -e '.[test]'": CI,
    # Their packages are in [test], but for what needs a GPU.
    "pip install -e '.[serve]'": CI,
    "pip install -e '.[bench]'": "bench/results/kernels-h200.json",
    "pip install -e '.[gpu]'": "bench/results/base-h200.json",
    "pytest": CI,
    "pytest -n 0 tests/test_squared_relu.py -k tiny": "tests/test_squared_relu.py::test_tiny",
    # By hand: it takes what CI has no time for.
    "pytest --slow": "tests/test_chain.py",
    "ruff check .": CI,
    "ruff format --check .": CI,
    "pyrefly check": CI,
    ".ci/run": CI,
    # Training.
    "torchrun --nproc_per_node=8 train/base.py": (
        "tests/test_train_base.py::test_a_run_ends_with_everything_it_promises"
    ),
    "torchrun --nproc_per_node=4 train/base.py --total-batch-size 262144 --num-iterations 90 "
    "--eval-every 0 --save-every 0": "bench/results/base-h200.json",
    "torchrun --nproc_per_node=2 train/base.py --data my_texts/ --depth 8 --vocab-size 16384 "
    "--total-batch-size 262144 --target-tokens 200000000 --eval-every 50 --save-every 100 "
    "--deterministic": "bench/results/d8-h200.json",
    "torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train/base.py "
    "--out /shared/base-d20": "tests/test_train_base.py::test_two_nodes_train_as_one",
    "python train/speedrun.py --nodes 2 --node-rank 0 --master-addr HOST --out /shared/runs": (
        "tests/test_speedrun.py::test_two_nodes_run_what_the_first_decides"
    ),
    "python train/speedrun.py --dry-run": "tests/test_readme.py::test_the_plan",
    "python train/speedrun.py --check": (
        "tests/test_selfcheck.py::test_the_toy_is_well_and_says_what_was_not_tried"
    ),
    "python train/speedrun.py": (
        "tests/test_speedrun_toy.py::test_a_toy_speedrun_killed_twice_ends_in_a_complete_report"
    ),
    "python train/base.py --data my_texts/ --depth 12 --vocab-size 32768": HERE,
    "python train/evaluate.py base runs/base-d12": HERE,
    "python train/mid.py --source base": HERE,
    "python train/tokenizer.py show runs/base-d12/tokenizer my.jsonl": HERE,
    "python train/sft.py --source mid --train my.jsonl:2 gsm8k": HERE,
    "python train/rl.py --source sft": HERE,
    "python train/evaluate.py chat --source sft": HERE,
    "python train/chat.py --source sft": HERE,
    "python train/serve.py --source sft": (
        "tests/test_serve_recipe.py::test_the_recipe_from_start_to_sigterm"
    ),
    "python train/convert.py to-hf sft --out my_model": HERE,
    "python train/report.py": HERE,
    # Measuring.
    "pytest bench/": "tests/test_bench_sessions.py::test_session_without_a_gpu",
    "pytest bench/test_squared_relu.py --json kept.json": (
        "tests/test_bench_sessions.py::test_session_on_a_fake_gpu"
    ),
    "pytest bench/test_squared_relu.py --compare kept.json": (
        "tests/test_bench_sessions.py::test_session_on_a_fake_gpu"
    ),
    "python -m bench.aot": "tests/test_aot.py::test_table_is_true",
    "python -m bench.aot --write": "tests/test_aot.py::test_table_is_true",
    "python -m bench.loader --data my_texts/": HERE,
    "python -m bench.serve": "tests/test_bench_serve.py::test_a_toy",
    "python -m bench.sft": "tests/test_bench_sft.py::test_both_ways_are_measured_and_written",
    "python -m bench.mfu": "tests/test_mfu.py::test_one_call_gives_everything",
    "python -m bench.mfu --out before.json": "tests/test_mfu.py::test_one_call_gives_everything",
    "python -m bench.mfu --out after.json": "tests/test_mfu.py::test_one_call_gives_everything",
    "python -m bench.mfu compare before.json after.json": (
        "tests/test_mfu.py::test_compare_exits_1_beyond_the_threshold"
    ),
    "python -m bench.mfu predict": (
        "tests/test_mfu_predict.py::test_predictions_are_labelled_and_the_check_comes_first"
    ),
}
# What makes README's chain small enough for a test and keeps it off the network. What a command
# says besides is run as it stands.
RUN = "--device cpu --eval-every 0 --eval-tokens 500 --cache cache"
TOY = {
    "train/base.py": f"{RUN} --depth 2 --sequence-len 64 --vocab-size 300 --device-batch-size 2 "
    "--total-batch-size 128 --num-iterations 4 --tokenizer-chars 20000 --out runs/base-d12",
    "train/evaluate.py base": "--device cpu --only bpb samples --split-tokens 500",
    "train/mid.py": f"{RUN} --train embedded[:9] --val embedded[:4]",
    "train/sft.py": f"{RUN} --chat-data hub --val embedded[:4] --accuracy-problems 2 "
    "--accuracy-every 0 --target-examples-per-step 16",
    "train/rl.py": f"{RUN} --chat-data hub --num-iterations 1 --examples-per-step 2 "
    "--num-samples 2 --normalise-together 2 --device-batch-size 4 --max-new-tokens 3 "
    "--eval-examples 2 --eval-samples 1",
    "train/evaluate.py chat": "--device cpu --chat-data hub --task GSM8K -x 2 -m 3",
    "-m bench.loader": "--cache cache --tokenizer runs/base-d12/tokenizer --rounds 1",
    "train/chat.py": "--device cpu --max-tokens 3 -p Hello",
}


@dataclass(frozen=True)
class Command:
    text: str
    """As it is typed, without the comment behind it."""
    beside: str
    """The comment, and the paragraph or list item around it."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def paragraphs(document: str) -> list[str]:
    """Fenced blocks, each with the paragraph before it; and the other paragraphs and list items."""
    parts = re.split(r"\n\n+|\n(?=\d+\. |- )", (ROOT / document).read_text(encoding="utf-8"))
    found: list[str] = []
    for part in parts:
        inside = bool(found) and found[-1].count("```") % 2
        if inside or (part.startswith("```") and found):
            found[-1] += "\n\n" + part
        else:
            found.append(part)
    return found


def commands(document: str) -> list[Command]:
    found = []
    for paragraph in paragraphs(document):
        lines = [
            line for block in re.findall(r"```bash\n(.*?)```", paragraph, re.DOTALL)
            for line in block.splitlines()
        ]  # fmt: skip
        prose = re.sub(r"```.*?```", "", paragraph, flags=re.DOTALL)
        lines += [span for span in re.findall(r"`([^`\n]+)`", prose) if "…" not in span]
        for line in lines:
            line, _, comment = line.partition("  #")
            for text in line.split(" && "):
                if _COMMAND.match(text.strip()):
                    found.append(Command(text.strip(), f"{comment}\n{prose}"))
    return found


EVERY = [command for document in DOCUMENTS for command in commands(document)]


def test_every_command_is_known_and_no_other():
    assert {command.text for command in EVERY} == set(RUN_BY)


@pytest.mark.parametrize("runner", sorted(set(RUN_BY.values())))
def test_what_runs_a_command_exists(runner):
    path, _, name = runner.partition("::")
    assert (ROOT / path).is_file()
    if name:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_ci_runs_what_is_said():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "pyrefly check"):
        assert command in script
    pattern = (
        re.search(r"sed -n 's/(.*?)/\\1/p'", script)[1].replace(r"\(", "(").replace(r"\)", ")")
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(pattern, readme, re.MULTILINE) == ["pip install -e '.[test]' && pytest"]


def test_what_needs_a_gpu_says_so():
    for command in EVERY:
        if RUN_BY[command.text].startswith("bench/results/"):
            assert re.search(r"\bGPUs?\b|H200", command.beside), command


class ParsedError(BaseException):
    """Raised once a recipe has read its flags, instead of running it."""


@pytest.mark.parametrize(
    "text", [c for c in RUN_BY if re.search(r"train/\w+\.py|bench\.\w+", c) and RUN_BY[c] != HERE]
)
def test_flags_are_the_programs_own(text, monkeypatch):
    parse = tyro.cli

    def stop_behind(*arguments, **options):
        parse(*arguments, **options)
        raise ParsedError

    monkeypatch.setattr(tyro, "cli", stop_behind)
    words = shlex.split(text)
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        words = ["python", launch.training_script, *launch.training_script_args]
    if "bench.aot" in text:
        # No parser: its one flag is in its docstring.
        assert set(words[3:]) <= {"--write"}
        return
    if words[0] == "pytest":
        known = re.findall(r'addoption\("(--[a-z-]+)"', (ROOT / "bench/conftest.py").read_text())
        assert {word for word in words if word.startswith("--")} <= set(known)
        assert all((ROOT / w).exists() for w in words if w.startswith("bench/"))
        return
    with pytest.raises(ParsedError):
        run(words, monkeypatch)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python` with these words, in this process."""
    _, first, *flags = words
    if first == "-m":
        first, *flags = flags
        first = first.replace(".", "/") + ".py"
    monkeypatch.setattr(sys, "argv", [first, *flags])
    code = 0
    try:
        runpy.run_path(str(ROOT / first), run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code, words


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty folder with what README calls one's own texts and conversations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The defaults without a GPU are small.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Several threads would wait for each other longer than they compute.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (tmp_path / "my_texts").mkdir()
    for number in range(3):
        text = "\n\n".join(f"{n} bottles of beer on the wall, {n} bottles." for n in range(300))
        (tmp_path / "my_texts" / f"{number}.txt").write_text(text * 2)
    write_conversations(tmp_path / "my.jsonl", 20)
    folder = tmp_path / "hub" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": f"{n} and {n}?", "answer": f"<<{n}+{n}={2 * n}>>#### {2 * n}"}
            for n in range(6)]  # fmt: skip
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return tmp_path


@pytest.mark.usefixtures("plain_newton_schulz")
def test_the_chain_at_toy_size(elsewhere, monkeypatch, capsys):
    chain = [command for command in EVERY if RUN_BY[command.text] == HERE]
    assert len(chain) == len({command.text for command in chain}) == 11
    cached = set(DEFAULT_CACHE.rglob("my_texts-*"))
    for command in chain:
        toy = next((flags for name, flags in TOY.items() if name in command.text), "")
        run([*command.words, *shlex.split(toy)], monkeypatch)
    assert set(DEFAULT_CACHE.rglob("my_texts-*")) == cached
    said = capsys.readouterr().out
    for name in ("base-d12", "mid-d2", "sft-d2", "rl-d2"):
        summary = json.loads((elsewhere / "runs" / name / "summary.json").read_text())
        assert summary["step"] > 0
    assert "val bpb" in said
    assert "conversation 1 of 20: " in said
    assert (elsewhere / "my_model" / "model.safetensors").stat().st_size > 0
    assert "<svg" in (elsewhere / "report" / "report.html").read_text()


def test_the_plan(elsewhere, monkeypatch, capsys):
    run(["python", "train/speedrun.py", "--dry-run"], monkeypatch)
    said = capsys.readouterr().out
    assert "base" in said
    assert not (elsewhere / "runs").exists()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    ours = r"(?:kernels|gptfast|train|bench|tests|docs)/[\w./*-]*"
    named = re.findall(rf"(?<![\w./-])({ours}|CONTRIBUTING\.md|\.ci/run)", text)
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", text)
    assert named
    assert [name for name in [*named, *links] if not list(ROOT.glob(name.rstrip("/.")))] == []


def test_the_tree_is_the_tree():
    """Folders with a slash; behind a package, and below, all of its modules; or words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", text, re.DOTALL)[1]
    room, named = ROOT, {"kernels": set(), "gptfast": set(), "train": set()}
    for line in tree.splitlines():
        first, *rest = line.split()
        if not line.startswith(" "):
            room = ROOT / first
            assert room.is_dir(), line
        else:
            rest.insert(0, first)
        folders = [word for word in rest if word.endswith("/") and room.name != "bench"]
        assert all((room / folder).is_dir() for folder in folders), line
        if not folders and room.name in named:
            named[room.name] |= set(rest)
    for name, modules in named.items():
        assert modules == {file.stem for file in (ROOT / name).glob("*.py")} - {"__init__"}, name


def test_flags_in_prose_are_some_programs(monkeypatch, capsys):
    prose = re.sub(r"```.*?```", "", "\n".join(p for d in DOCUMENTS for p in paragraphs(d)),
                   flags=re.DOTALL)  # fmt: skip
    named = {flag for span in re.findall(r"`([^`\n]+)`", prose) for flag in _flags(span)}
    for name in ("base", "evaluate base", "sft", "serve", "speedrun"):
        recipe, *subcommand = name.split()
        run(["python", f"train/{recipe}.py", *subcommand, "--help"], monkeypatch)
    known = _flags(capsys.readouterr().out) | {"--slow"}
    known |= _flags((ROOT / "bench/conftest.py").read_text(encoding="utf-8"))
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    assert len(named) > 10
    assert sorted(named - known) == []


def _flags(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z_-]+", text))
