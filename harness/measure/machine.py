"""The machine, the library versions and the commit that a figure belongs to."""

import contextlib
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from harness.cores import cores_held
from harness.measure.gpu import describe_gpu
from harness.versions import installed

PACKAGES = ("torch", "deepspeed", "ray", "numpy", "scipy", "revnet-harness")
# Settings that change the figures: of OpenMP in its three makes, of MKL, of the two allocators, of CUDA's libraries.
SETTINGS_BEGIN = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_")
SETTINGS = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
CPUS = Path("/sys/devices/system/cpu")
CPU_INFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a figure, as it is now; what cannot be read is left out.

    memory_bytes  of the whole host
    cpu_mhz       of the fastest core at this moment; cpu_max_mhz what a core can reach; cpu_governor who decides
    own_cores     those that no other trial had meanwhile; all ranks of this node together
    load_average  processes that ran or wanted to, over the last minute, this one among them
    environment   settings that change the figures, where they are set

    On CUDA also what `describe_gpu` says.
    """
    machine: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
    }
    machine["device_name"] = device_name(device)
    if cores := cores_held():
        machine["own_cores"] = cores
    machine |= _cpu_clock()
    with contextlib.suppress(OSError):
        machine["load_average"] = round(os.getloadavg()[0], 2)
    machine["environment"] = _settings()
    if device.type == "cuda":
        machine |= {
            "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        } | describe_gpu(device)
    return machine


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def describe_versions() -> dict[str, str]:
    """Python and the packages that the figures depend on; one that is not installed is left out."""
    return installed(PACKAGES)


def describe_git() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this package runs from; empty when it is installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _cpu_name() -> str:
    names = _cpu_info("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_clock() -> dict[str, Any]:
    """From the kernel's frequency scaling; a virtual machine has none, and at most says how fast its cores run."""
    current_khz, max_khz = _of_each_cpu("scaling_cur_freq"), _of_each_cpu("cpuinfo_max_freq")
    current_mhz = [int(khz) / 1000 for khz in current_khz] or [float(mhz) for mhz in _cpu_info("cpu MHz")]
    clock: dict[str, Any] = {}
    if current_mhz:
        clock["cpu_mhz"] = max(current_mhz)
    if max_khz:
        clock["cpu_max_mhz"] = max(map(int, max_khz)) / 1000
    if governors := sorted(set(_of_each_cpu("scaling_governor"))):
        clock["cpu_governor"] = ", ".join(governors)
    return clock


def _of_each_cpu(name: str) -> list[str]:
    values: list[str] = []
    for path in CPUS.glob(f"cpu[0-9]*/cpufreq/{name}"):
        with contextlib.suppress(OSError):  # of a core that is switched off
            values.append(path.read_text().strip())
    return values


def _cpu_info(key: str) -> list[str]:
    if not CPU_INFO.exists():
        return []
    lines = (line.split(":", 1) for line in CPU_INFO.read_text().splitlines() if ":" in line)
    return [value.strip() for name, value in lines if name.strip() == key]


def _settings() -> dict[str, str]:
    return {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS_BEGIN) or name in SETTINGS
    }
