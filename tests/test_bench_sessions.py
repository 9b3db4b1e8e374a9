"""`pytest bench/` as it is typed, in a process of its own: without a GPU, and on a fake one."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from bench.report import Row, write_json
from tests.warm_start import start

ROOT = Path(__file__).parents[1]

FAKE_GPU = '''
"""A GPU for which every call takes 2 ms, and a model small enough for the CPU, named d20."""
import bench.case, bench.providers, bench.suite, bench.timing
from bench.timing import Ceilings, Stretch

SIZE = bench.case.Size("d20", bench.case.sizes(False, False)[0].config, batch=4)


class Gpu:
    name = "Fake H200"
    l2_bytes = 1

    def stretch(self, stages, sets, load, head_start):
        for buffers in sets:
            stages.run(stages.prepare(buffers))
        return Stretch(2.0, True, 1.5)

    def peak_bytes(self, stages, buffers):
        return 2**30

    def do_bench(self, call, ms):
        call()
        return 1.0, 1.5

    def ceilings(self, load_ms):
        return Ceilings(copy=1e9, product=1e12, special_functions=1e9)

    def release(self):
        pass


bench.suite.SECONDS = 0.0
bench.timing.gpu_here = Gpu
bench.case.sizes = lambda on_gpu, every: [SIZE]
bench.providers.compiled = lambda call: call
'''


def session(folder, *arguments):
    """`pytest` as typed in the repository's root, in a process like a user's: its exit code and
    what it said. Modules are found in `folder`, too."""
    process = start(
        folder / "session",
        *("-m", "pytest", "-p", "no:cacheprovider", *arguments),
        variables={"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT)))},
        working_folder=ROOT,
    )
    code = process.wait(280)
    return code, process.said()[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_session_without_a_gpu(tmp_path):
    code, said = session(tmp_path, "bench/")
    assert code == 0, said
    assert "No CUDA GPU here, so nothing is timed" in said
    assert "rms_norm" in said.split("registers / spilled bytes / shared bytes")[1]
    # In one process, whatever pyproject.toml says of the tests; every operator was compared.
    assert "workers" not in said
    assert int(re.search(r"(\d+) passed", said)[1]) >= 46


def test_session_on_a_fake_gpu(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "fake_gpu.py").write_text(FAKE_GPU)
    kept = [
        Row("rms_norm", "d20", "backward", provider, ms=ms)
        for provider, ms in (("ours", 1.0), ("compile", 1.2))
    ]
    write_json(tmp_path / "kept.json", kept, gpu="Fake H200")
    files = {name: tmp_path / name for name in ("now.json", "chart.png", "benchmark.json")}
    code, said = session(
        tmp_path,
        *("-p", "fake_gpu", "bench/test_rms_norm.py::test_rms_norm"),
        "bench/test_cross_entropy.py::test_linear_cross_entropy",
        *("--json", files["now.json"], "--chart", files["chart.png"]),
        *("--compare", tmp_path / "kept.json", "--benchmark-json", files["benchmark.json"]),
    )
    # 1.2 x torch.compile became 1.0 x.
    assert code == 1, said
    assert "rms_norm d20 backward: 1.200 x torch.compile before, 1.000 x now" in said
    assert "16.7% lost, 5% allowed" in said
    assert " failed" not in said
    assert "open    newton_schulz" in said
    assert "1.000 x (2.00 ms, products 2.00 ms)" in said
    assert "NOT MET medians of long calls" in said
    assert "+100.0%" in said.split("Ours beside triton.testing.do_bench")[1]
    assert files["chart.png"].read_bytes().startswith(b"\x89PNG")

    now = json.loads(files["now.json"].read_text())
    assert now["versions"]["torch"] == torch.__version__
    assert "quack-kernels" in now["versions"]
    assert len(now["marks"]) == 15
    found = [r for r in now["rows"] if (r["case"], r["direction"]) == ("rms_norm", "both")]
    assert [r["provider"] for r in found] == ["ours", "eager", "compile", "liger", "quack"]
    assert (found[0]["ms"], found[0]["gb_per_s"]) == (2.0, 64 * 64 * 2 * 5 / 2e-3 / 1e9)

    # pytest-benchmark holds our samples, not times of its own.
    theirs = json.loads(files["benchmark.json"].read_text())["benchmarks"]
    ours = next(b for b in theirs if b["name"] == "test_rms_norm[d20-forward-ours]")
    assert ours["group"] == "rms_norm d20 forward"
    assert ours["stats"]["median"] == pytest.approx(2e-3)
    assert ours["stats"]["rounds"] == 10
    assert ours["extra_info"]["of_ceiling"] == pytest.approx(2 * 64 * 64 * 2 / 1e9 / 2e-3)
