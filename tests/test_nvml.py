"""What the driver tells, from one that is made up."""

import pytest

from gptfast.nvml import EnergyMeter, gpu_names, link_gb_per_second


def test_without_a_driver_energy_and_links_are_unknown(monkeypatch):
    monkeypatch.setattr("gptfast.nvml._library", lambda: None)
    assert EnergyMeter(range(8)).joules() is None
    assert link_gb_per_second() is None
    assert gpu_names() == []


class FakeDriver:
    """Two GPUs, each of 18 links of 26.562 GB/s, that draw 700 W."""

    def __init__(self) -> None:
        self.millijoules = 5_000_000

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = 100 + index
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        handle._obj.value = 200
        return 0 if uuid == b"GPU-here" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        value._obj.value = self.millijoules
        return 0

    def nvmlDeviceGetName(self, handle, name, length):
        name.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total = 141 * 10**9
        return 0

    def nvmlDeviceGetNvLinkState(self, handle, link, active):
        active._obj.value = 1
        return 0

    def nvmlDeviceGetFieldValues(self, handle, count, values):
        assert values._obj.field == 90
        values._obj.value = 26_562
        return 0


def test_energy_and_links_as_the_driver_tells_them(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr("gptfast.nvml._library", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_names() == [("NVIDIA H200", 141 * 10**9)] * 2
    meters = EnergyMeter(range(2)), EnergyMeter(range(1, 2))
    driver.millijoules += 700_000
    assert [meter.joules() for meter in meters] == [1400.0, 700.0]
    rate, by = link_gb_per_second()
    assert (rate, by) == (pytest.approx(478.116), "18 NVLinks")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-here,GPU-gone")
    meter = EnergyMeter(range(2))
    driver.millijoules += 1_000
    assert meter.joules() == 1.0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert EnergyMeter(range(8)).joules() is None
