"""What every test shares: where kernels run, poisoned memory, and markers that skip by name."""

import os

import pytest
import torch

# Without a GPU, CPU tensors go through the Triton kernels themselves, interpreted. The mode is
# fixed when a kernel is decorated, so it is set here, before any module of ours is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    have = torch.cuda.device_count()
    for item in items:
        for marker, need in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(marker) and have < need:
                item.add_marker(pytest.mark.skip(reason=f"needs {need} CUDA GPU(s), found {have}"))
