"""What each GPU can do at best, with sources. One table, used for every MFU that is printed."""

from typing import NamedTuple

import torch

# The denominator of the training report's "MFU 21.02 %": an H100's dense bf16 rate, although it
# ran on A100s. Every MFU is printed against this and against the GPU's own peak.
REPORT_PEAK_FLOPS = 989e12


class Peak(NamedTuple):
    """Dense bf16 FLOP/s without sparsity, as the vendor states it, and where."""

    bf16_flops: float
    source: str


# Matched against the device name in this order, so longer names come first.
_PEAKS = {
    "GB200": Peak(2500e12, "NVIDIA GB200 NVL72 datasheet, per GPU"),
    "B200": Peak(2250e12, "NVIDIA DGX B200 datasheet, per GPU"),
    "H200": Peak(989e12, "NVIDIA H200 datasheet, SXM"),
    "GH200": Peak(989e12, "NVIDIA GH200 datasheet"),
    "H100 PCIe": Peak(756e12, "NVIDIA H100 datasheet, PCIe"),
    "H100 NVL": Peak(835e12, "NVIDIA H100 NVL datasheet"),
    "H100 80GB HBM3": Peak(989e12, "NVIDIA H100 datasheet, SXM"),
    "A100": Peak(312e12, "NVIDIA A100 datasheet"),
    "L40S": Peak(362e12, "NVIDIA L40S datasheet"),
    "L4": Peak(121e12, "NVIDIA L4 datasheet"),
    "A10": Peak(125e12, "NVIDIA A10 datasheet"),
    "RTX 4090": Peak(165.2e12, "NVIDIA Ada architecture paper, fp32 accumulation"),
    "RTX 3090": Peak(71e12, "NVIDIA Ampere GA102 paper, fp32 accumulation"),
}
# Behind a name of the table, a word that makes it a GPU of another rate: H200 NVL, RTX 4090 Laptop
# GPU, RTX 4090 D, RTX 3090 Ti, A100-SXM4-40GB MIG 1g.5gb, A100-SXM-64GB.
_ANOTHER = {"NVL", "Laptop", "D", "Ti", "MIG", "64GB"}


def peak(device_name: str) -> Peak | None:
    """The peak of the GPU of this name, or None: an unknown GPU gets no invented figure."""
    words = device_name.replace("-", " ").split()
    for name, value in _PEAKS.items():
        parts = name.split()
        for i in range(len(words)):
            end = i + len(parts)
            if words[i:end] == parts:
                return None if _ANOTHER & set(words[end:]) else value
    return None


def mfu(flops_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilisation of one GPU, a fraction."""
    return flops_per_second / peak_flops


def describe(device: torch.device) -> str:
    """One line: the device and the denominators of its MFU."""
    if device.type != "cuda":
        found = "not used" if torch.cuda.is_available() else "found"
        return f"no GPU {found}: training on CPU with gloo; no MFU is shown"
    name = torch.cuda.get_device_name(device)
    own = peak(name)
    if own is None:
        return f"{name}: dense bf16 peak unknown, MFU is shown of the report's 989 TFLOP/s only"
    return (
        f"{name}: MFU of the report's 989 TFLOP/s and of its own dense bf16 peak, "
        f"{own.bf16_flops / 1e12:g} TFLOP/s ({own.source})"
    )
