"""What decides how fast one NVIDIA GPU runs at the moment: its driver, its clocks, the power it may draw."""

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What the kernel module says of itself, where NVML's Python binding is not installed.
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Of a CUDA device, now; what cannot be read is left out.

    cuda_driver               version of the driver
    cuda_driver_supports      newest CUDA version that it runs
    sm_clock_mhz, memory_clock_mhz          at this moment
    sm_clock_max_mhz, memory_clock_max_mhz  what they can reach
    power_limit_w             that is enforced
    """
    known = _by_torch(device) | _by_nvml(device)
    return {name: value for name, value in known.items() if value}


def _by_torch(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    known: dict[str, Any] = {
        "sm_clock_max_mhz": getattr(properties, "clock_rate", 0) // 1000,
        "memory_clock_max_mhz": getattr(properties, "memory_clock_rate", 0) // 1000,
    }
    with contextlib.suppress(OSError):
        known["cuda_driver"] = DRIVER_FILE.read_text().splitlines()[0]
    return known


def _by_nvml(device: torch.device) -> dict[str, Any]:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return {}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return {}
    try:
        return _ask_nvml(nvml, device)
    finally:
        nvml.nvmlShutdown()


def _ask_nvml(nvml: Any, device: torch.device) -> dict[str, Any]:
    known: dict[str, Any] = {}

    def note(name: str, ask: Callable[[], Any]) -> None:
        # A virtual GPU, or a slice of one, answers some questions and refuses others.
        with contextlib.suppress(nvml.NVMLError):
            known[name] = ask()

    note("cuda_driver", nvml.nvmlSystemGetDriverVersion)
    note("cuda_driver_supports", lambda: _cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2()))
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return known
    for name, kind in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
        note(f"{name}_clock_mhz", lambda kind=kind: nvml.nvmlDeviceGetClockInfo(handle, kind))
        note(f"{name}_clock_max_mhz", lambda kind=kind: nvml.nvmlDeviceGetMaxClockInfo(handle, kind))
    note("power_limit_w", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)
    return known


def _cuda_version(number: int) -> str:
    """NVML's 12080 is CUDA 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"
