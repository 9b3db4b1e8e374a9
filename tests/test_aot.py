"""What needs a process of its own: kernels compiled, not interpreted; operators without kernels.

Triton decides between compiler and interpreter when a kernel is decorated, so each test starts a
Python that decides anew.
"""

import json
import os
import subprocess
import sys

import pytest

from bench.aot import TABLE

REGENERATE = "run `python -m bench.aot --write` and look at what changed"
# Most bytes a thread where any may spill: before its loop, once, so that two programs fit on an SM
# (kernels/newton_schulz.py).
SPILLS = {"newton_schulz polynomial": 128, "newton_schulz polynomial first": 128}
OPERATORS = ("embedding", "rms_norm", "rotary", "qk_norm", "squared_relu", "mlp")


def run_python(*arguments: str, **env: str) -> str:
    env = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled(pytestconfig) -> tuple[list, dict]:
    """(every launch there is, the table of those that were compiled here), of one process."""
    every = pytestconfig.getoption("--slow")
    program = (
        "import json; from bench.aot import chosen, measure; "
        f"print(json.dumps([chosen(True), measure({every})]))"
    )
    return json.loads(run_python("-c", program))


def test_every_launch_is_in_the_table(compiled):
    now = {(label, f"sm_{arch}") for label, arch in compiled[0]}
    kept = json.loads(TABLE.read_text())["kernels"]
    assert now == {(label, arch) for label, row in kept.items() for arch in row}, REGENERATE


def test_no_kernel_spills(compiled):
    spilled = {
        f"{label} on {arch}": figures["spill_bytes"]
        for label, row in compiled[1]["kernels"].items()
        for arch, figures in row.items()
        if figures["spill_bytes"] > SPILLS.get(label, 0)
    }
    assert spilled == {}, "bytes of registers spilled to memory"


def test_table_is_true(compiled):
    """Registers and shared memory are this Triton's own; another version's differ by a few."""
    now, kept = compiled[1], json.loads(TABLE.read_text())
    rows = {
        label: {arch: kept["kernels"].get(label, {}).get(arch) for arch in row}
        for label, row in now["kernels"].items()
    }
    if now["triton"] != kept["triton"]:
        pytest.skip(f"the table is Triton {kept['triton']}'s, this is {now['triton']}")
    assert now["kernels"] == rows, REGENERATE


@pytest.mark.slow
def test_operators_run_their_reference_on_a_cpu():
    """The accuracy tests once more, where there is neither a GPU nor the interpreter."""
    files = [f"tests/test_{name}.py" for name in OPERATORS]
    options = ["-n0", "-q", "-p", "no:cacheprovider", "-k", "accurate or empty or apart or edges"]
    said = run_python("-m", "pytest", *options, *files, CUDA_VISIBLE_DEVICES="")
    assert " passed" in said
