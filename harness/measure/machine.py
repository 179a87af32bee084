"""The machine, the library versions and the commit that a figure belongs to."""

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "ray", "numpy", "revnet-harness")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a figure; bytes are of the whole host."""
    machine: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
    }
    machine["device_name"] = machine["cpu"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        driver = Path("/proc/driver/nvidia/version")
        if driver.exists():
            machine["cuda_driver"] = driver.read_text().splitlines()[0]
    return machine


def describe_versions() -> dict[str, str]:
    """Python and the packages that the figures depend on; one that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


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
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
