"""Where the figures of a run come from: commit, machine, settings and versions."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

# Always there, even where nothing is recorded.
MAIN_FACTS = ("commit", "device", "torch", "deepspeed")
# By the name in a record; called as the reasons of what is not comparable call them.
_OF_MACHINE = {
    "device": "kind of device",
    "device_name": "device",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "cuda_driver": "driver",
    "power_limit_w": "power limit (W)",
    "cpu": "CPU",
    "cpu_count": "cores",
    "threads": "threads",
    "platform": "system",
    "hostname": "host",
}


def facts_of(frame: pd.DataFrame) -> dict[str, list[str]]:
    """By the name of the fact every value that occurs in the trials (of `trials_frame`), since a run may span machines;
    only MAIN_FACTS are there without any."""
    facts: dict[str, dict[str, None]] = {name: {} for name in MAIN_FACTS}
    for row in frame.to_dict("records"):
        for name, value in _facts(row["machine"], row["versions"], row["git"]).items():
            if value not in (None, ""):
                facts.setdefault(name, {})[str(value)] = None
    return {name: list(values) for name, values in facts.items()}


def _facts(machine: Mapping[str, Any], versions: Mapping[str, Any], git: Mapping[str, Any]) -> dict[str, Any]:
    commit = git["commit"][:12] + (" and uncommitted changes" if git["dirty"] else "") if git else None
    memory_bytes = machine.get("memory_bytes")
    return {
        "commit": commit,
        **{name: machine.get(key) for key, name in _OF_MACHINE.items()},
        "host memory": f"{memory_bytes / 2**30:.1f} GiB" if isinstance(memory_bytes, int) else None,
        **(machine.get("environment") or {}),
        **versions,
    }
