"""Whether two trials may be compared: which facts of machine and versions must agree, by the kind of metric.

kind      must agree
memory    kind of device, torch and deepspeed to the minor version; on CUDA also the device's name, CUDA, cuDNN, and the
          settings that change figures
status    the same, and resources.memory
numerics  the same as memory, the device's name, and threads on the CPU
time      the same as numerics, the CPU's model, threads, the driver's major version, the power limit, the settings, and
          whether there is a memory limit
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["memory", "numerics", "time", "status"]
# Of the process or of the moment, whatever their unit.
_AS_TIME = ("device_used_bytes", "measuring_time_ratio", "mfu", "hfu", "compile_cache_hits")
_COUNTS = ("blocks", "reversible_blocks", "parameter_count", "device_peak_flops_per_s")


def kind_of(metric: str) -> Kind:
    """Only `time` is noisy: the others are equal to the last bit when a trial is run again."""
    if metric in _AS_TIME:
        return "time"
    if metric in _COUNTS or metric.endswith("_bytes") or metric.startswith("flops_"):
        return "memory"
    return "time" if metric.endswith("_s") else "numerics"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], kind: Kind) -> list[str]:
    """What keeps two trials (rows of `trials_frame`) from being compared, such as `torch 2.13 / 2.14`."""
    first, second = _facts(before, kind), _facts(now, kind)
    return [
        f"{name} {first.get(name) or 'none'} / {second.get(name) or 'none'}"
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]


def _facts(trial: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    machine, versions = trial["machine"], trial["versions"]
    on_cuda = machine.get("device") == "cuda"
    limit_bytes = (trial["spec"].get("resources") or {}).get("memory_bytes")
    facts: dict[str, Any] = {
        "kind of device": machine.get("device"),
        "torch": _minor(versions.get("torch")),
        "deepspeed": _minor(versions.get("deepspeed")),
    }
    if on_cuda or kind in ("numerics", "time"):
        facts["device"] = machine.get("device_name")
    if kind == "time" or (kind == "numerics" and not on_cuda):
        facts["threads"] = machine.get("threads")
    if on_cuda:
        facts |= {"CUDA": machine.get("cuda"), "cuDNN": machine.get("cudnn")}
    if on_cuda or kind == "time":
        facts |= machine.get("environment") or {}
    if kind == "time":
        facts |= {
            "CPU": machine.get("cpu"),
            "driver": _major(machine.get("cuda_driver")),
            "power limit (W)": machine.get("power_limit_w"),
            "memory limit": "no" if limit_bytes is None else "yes",
        }
    if kind == "status":
        facts["resources.memory (bytes)"] = limit_bytes
    return facts


def _minor(version: str | None) -> str | None:
    return None if version is None else ".".join(version.split("+")[0].split(".")[:2])


def _major(driver: str | None) -> str | None:
    """Of NVML's `580.95.05`, or of the line in which the kernel module says so."""
    found = re.search(r"\b(\d{2,})\.\d+", driver or "")
    return found[1] if found else driver
