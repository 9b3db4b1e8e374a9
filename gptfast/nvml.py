"""What NVIDIA's management library tells of this node's GPUs: names, energy, links.

Everything is None or empty where there is no NVIDIA driver, and where it does not tell.
"""

import ctypes
import os
from contextlib import suppress
from functools import cache

_SUCCESS = 0
_MAX_LINKS = 18
# nvml.h: NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON.
_NVLINK_SPEED_FIELD = 90
# GB/s that one PCIe lane carries each way, by generation, after encoding.
_PCIE_LANE_GB_S = {3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}


class _FieldValue(ctypes.Structure):
    """nvml.h: nvmlFieldValue_t; the value is a union of eight bytes."""

    _fields_ = (
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency", ctypes.c_longlong),
        ("kind", ctypes.c_int),
        ("failed", ctypes.c_int),
        ("value", ctypes.c_uint),
        ("rest", ctypes.c_uint),
    )


class _Memory(ctypes.Structure):
    """nvml.h: nvmlMemory_t, bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class EnergyMeter:
    """Joules that GPUs take from its making on.

    Each card counts for itself since its driver was loaded (Volta and newer), so reading costs
    microseconds, and what other programs draw is in it.
    """

    def __init__(self, gpus: range) -> None:
        """Of the GPUs with these numbers, among those of this node that CUDA shows to us."""
        self._which = slice(gpus.start, gpus.stop)
        self._start = energy_counters()[self._which]

    def joules(self) -> float | None:
        """None without GPUs, or if one of them does not count."""
        now = energy_counters()[self._which]
        used = [
            after - before
            for before, after in zip(self._start, now)
            if before is not None and after is not None
        ]
        return sum(used) / 1e3 if used and len(used) == len(now) else None


def energy_counters() -> list[int | None]:
    """Millijoules that each visible GPU has taken since its driver was loaded."""
    counters: list[int | None] = []
    for nvml, handle in _handles():
        value = ctypes.c_ulonglong()
        done = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value))
        counters.append(value.value if done == _SUCCESS else None)
    return counters


def gpu_names() -> list[tuple[str, int]]:
    """(name, bytes of memory) of each visible GPU; unlike torch, this takes no memory there."""
    found = []
    for nvml, handle in _handles():
        name, memory = ctypes.create_string_buffer(96), _Memory()
        failed = nvml.nvmlDeviceGetName(handle, name, len(name))
        failed = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) or failed
        if not failed:
            found.append((name.value.decode(), memory.total))
    return found


def link_gb_per_second(index: int = 0) -> tuple[float, str] | None:
    """(GB/s each way between this GPU and the others, by what): all its active NVLinks, or PCIe.

    The raw rate of the links that the driver says are up; None if it says nothing.
    """
    handles = _handles()
    if index >= len(handles):
        return None
    nvml, handle = handles[index]
    links, active = 0, ctypes.c_uint()
    for link in range(_MAX_LINKS):
        failed = nvml.nvmlDeviceGetNvLinkState(handle, link, ctypes.byref(active))
        links += not failed and active.value == 1
    speed = _FieldValue(field=_NVLINK_SPEED_FIELD)
    failed = nvml.nvmlDeviceGetFieldValues(handle, 1, ctypes.byref(speed)) or speed.failed
    if links and not failed and speed.value:
        return links * speed.value / 1e3, f"{links} NVLinks"
    generation, width = ctypes.c_uint(), ctypes.c_uint()
    failed = nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle, ctypes.byref(generation))
    failed = nvml.nvmlDeviceGetMaxPcieLinkWidth(handle, ctypes.byref(width)) or failed
    lane = _PCIE_LANE_GB_S.get(generation.value)
    if failed or lane is None:
        return None
    return lane * width.value, f"PCIe {generation.value} x{width.value}"


@cache
def _library() -> ctypes.CDLL | None:
    """The library, started; None where there is none."""
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == _SUCCESS:
            return nvml
    return None


def _handles() -> list[tuple[ctypes.CDLL, ctypes.c_void_p]]:
    """The library, and a handle of each GPU that CUDA shows to this process, in its order."""
    nvml = _library()
    if nvml is None:
        return []
    handles = []
    for name in _visible(nvml):
        handle = ctypes.c_void_p()
        if name.isdecimal():
            failed = nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
        else:
            failed = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        if not failed:
            handles.append((nvml, handle))
    return handles


def _visible(nvml: ctypes.CDLL) -> list[str]:
    """Numbers or UUIDs. torch is not asked: it would take memory on every GPU."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip() not in ("", "-1")]
    count = ctypes.c_uint()
    failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return [] if failed else [str(i) for i in range(count.value)]
