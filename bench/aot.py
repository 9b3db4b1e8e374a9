"""Which registers, spills and shared memory does every kernel take, on GPUs that are not here?

    python -m bench.aot            # compile and print
    python -m bench.aot --write    # and keep the table in bench/aot.json, which tests/test_aot.py
                                   # compares with

Triton and its ptxas need no GPU to compile. Every module of kernels/ that defines aot_cases() says
which launches matter on a GPU of a compute capability; they are compiled for sm_80, sm_90 and
sm_100, and the figures are what ptxas reports. Shared memory is in bytes a program, registers are
per thread, spills in bytes a thread.
"""

import importlib
import io
import json
import pkgutil
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import triton
import tyro
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

import kernels
from kernels.launch import FUSED_MULTIPLY_ADD, AotCase

ARCHS = (80, 90, 100)
TABLE = Path(__file__).with_suffix(".json")


def cases(arch: int) -> dict[str, AotCase]:
    """Label -> case as launched on sm_{arch}, of every module of kernels/ that lists some."""
    modules = (
        importlib.import_module(f"kernels.{info.name}")
        for info in pkgutil.iter_modules(kernels.__path__)
    )
    listing = [m.aot_cases for m in modules if hasattr(m, "aot_cases")]
    listed = [case for aot_cases in listing for case in aot_cases(divmod(arch, 10))]
    found = {case.label: case for case in listed}
    if len(found) != len(listed):
        raise ValueError(f"two cases of one label among {sorted(case.label for case in listed)}")
    return found


def compile_case(case: AotCase, arch: int) -> dict[str, int]:
    """Compiles one case for sm_{arch} and says what ptxas did."""
    types = {name: kind.partition(":") for name, kind in case.signature.items()}
    names = case.kernel.arg_names
    source = (GluonASTSource if case.kernel.is_gluon() else ASTSource)(
        case.kernel,
        {name: types[name][0] if name in types else "constexpr" for name in names},
        dict(case.constexprs),
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in types and types[name][2] == "16"
        },
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "maxnreg": case.maxnreg,
        **FUSED_MULTIPLY_ADD,
    }
    # Triton hands on what ptxas says if asked to, and only when it compiles anew.
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    with redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    return {
        "registers": int(registers[0]),
        "spill_bytes": sum(map(int, spills)),
        "shared_bytes": compiled.metadata.shared,
    }


def _compile_labelled(job: tuple[str, int]) -> dict[str, int]:
    label, arch = job
    return compile_case(cases(arch)[label], arch)


def _branches(case: AotCase) -> tuple:
    """What decides which of a kernel's branches are compiled, whatever the sizes and the tensors'
    dtypes: which arguments are there, and constants that are no number."""
    others = [
        (name, value)
        for name, value in case.constexprs.items()
        if isinstance(value, bool) or not isinstance(value, int | float)
    ]
    return case.kernel, frozenset(case.signature), frozenset(others)


def chosen(every: bool) -> list[tuple[str, int]]:
    """(label, arch): all launches for all of ARCHS, or, half of them, the first of those for sm_90
    that take the same branches of a kernel and one of each kernel for the others."""
    jobs = []
    for arch in ARCHS:
        listed = cases(arch)
        alike = {
            label: _branches(case) if arch == 90 else case.kernel for label, case in listed.items()
        }
        first = {kind: label for label, kind in reversed(alike.items())}
        jobs += [(label, arch) for label, kind in alike.items() if every or first[kind] == label]
    return jobs


def measure(every: bool = True) -> dict:
    """The table: {"triton": version, "kernels": {label: {"sm_80": {...}, ...}}}."""
    jobs = chosen(every)
    table: dict[str, dict] = {}
    with ProcessPoolExecutor(2) as pool:
        for (label, arch), figures in zip(jobs, pool.map(_compile_labelled, jobs)):
            table.setdefault(label, {})[f"sm_{arch}"] = figures
    return {"triton": triton.__version__, "kernels": table}


def lines(table: dict) -> list[str]:
    """`measure()`'s table as text: a line a case, a column an architecture."""
    rows = [("registers / spilled bytes / shared bytes", [f"sm_{arch}" for arch in ARCHS])]
    for label, row in table["kernels"].items():
        figures = [row.get(f"sm_{arch}") for arch in ARCHS]
        rows.append((label, [" / ".join(map(str, f.values())) if f else "-" for f in figures]))
    return [f"{label:44}" + "".join(f"{cell:>20}" for cell in cells) for label, cells in rows]


@dataclass(frozen=True)
class Settings:
    write: bool = False
    """Keep the table."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    table = measure()
    print(*lines(table), sep="\n")
    if settings.write:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
