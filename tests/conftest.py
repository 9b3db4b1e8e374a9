"""What every test shares: where and how kernels run, and markers that skip by name."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Without a GPU, CPU tensors go through the Triton kernels themselves, interpreted. The mode is
# fixed when a kernel is decorated, so it is set here, before any module of ours is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# PyTorch's deterministic mode, in which tests poison memory, asks for it; read when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.set_num_threads(1)


def round_to_bf16_when_interpreted() -> None:
    """Triton's interpreter cuts fp32 to bf16 where GPUs round; this makes it round to nearest even.

    Triton decorates functions of its own when it is imported, so that is done in here.
    """
    import triton.language as tl
    from triton import knobs
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        return
    cut = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert


def patch_the_language_once_a_launch() -> None:
    """Once for each module is enough: Triton's interpreter replaces its language's functions at
    every call of a function by a kernel, 40 % of the time that decoding takes in its test."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        if not patched:
            restore = scope.restore

            def restore_at_the_launchs_end():
                patched.clear()
                restore()

            scope.restore = restore_at_the_launchs_end
        patched.add(module)
        return scope

    interpreter._patch_lang = patch_once


round_to_bf16_when_interpreted()
patch_the_language_once_a_launch()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    have = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
        for marker, need in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(marker) and have < need:
                item.add_marker(pytest.mark.skip(reason=f"needs {need} CUDA GPU(s), found {have}"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Gives back what PyTorch still caches: other processes test on the same GPU."""
    if item.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


@pytest.fixture
def not_under_nohup() -> Iterator[None]:
    """SIGHUP is not ignored, however the tests were started."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)
