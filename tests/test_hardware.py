"""MFU has a denominator, and an unknown GPU has none."""

import pytest

from gptfast.hardware import REPORT_PEAK_FLOPS, mfu, peak


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
    ],
)
def test_dense_bf16_peaks(name, tflops):
    assert peak(name).bf16_flops == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce GTX 1080",
        "NVIDIA L400",
        "Tesla V100-SXM2-16GB",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H100 NVL MIG 1g.12gb",
        "AMD Instinct MI300X",
        "NVIDIA H100 80GB HBM2e",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA H100",
        "NVIDIA A100-SXM-64GB",
    ],
)
def test_an_unknown_gpu_gets_no_invented_figure(name):
    assert peak(name) is None


def test_the_reports_21_percent_is_two_thirds_of_an_a100s_peak():
    """59,540 tokens/s a GPU at the report's last step, 3.491758e9 FLOPs a token."""
    flops = 59_540 * 3_491_758_080
    assert mfu(flops, REPORT_PEAK_FLOPS) == pytest.approx(0.2102, abs=1e-4)
    assert mfu(flops, peak("NVIDIA A100-SXM4-80GB").bf16_flops) == pytest.approx(0.666, abs=1e-3)
