"""A cluster as people write it: `64x8xH200-141GB`, nodes times devices of a kind with so much memory each."""

import re
from typing import NamedTuple

from harness.errors import HarnessError
from harness.placing import Amounts
from harness.sizes import in_words

FORM = "NODESxDEVICESxKIND-MEMORY, e.g. 64x8xH200-141GB or 4x32xCPU-256GiB, several joined by +"
_GROUP = re.compile(r"(\d{1,6})x(\d{1,4})x([A-Za-z][A-Za-z0-9._-]*)-(\d+(?:\.\d+)?)(GB|GiB)(?:/(\d{1,5})cores)?")
_UNITS = {"GB": 10**9, "GiB": 2**30}
MOST_NODES = 10_000
# Of a node whose cores are not given: more than anybody asks for.
ANY_CORES = 2**20


class NodeGroup(NamedTuple):
    """Nodes that are alike.

    kind          of a device: "CPU", whose devices are cores, or a GPU's name
    memory_bytes  of one GPU; of a node of CPUs, which its cores share
    cores         of a node; None where they were not given
    """

    nodes: int
    devices: int
    kind: str
    memory_bytes: int
    cores: int | None

    @property
    def has_gpus(self) -> bool:
        return self.kind != "CPU"

    @property
    def amounts(self) -> Amounts:
        """Of one node."""
        if not self.has_gpus:
            return {"CPU": float(self.devices)}
        return {"CPU": float(self.cores or ANY_CORES), "GPU": float(self.devices)}

    def in_words(self) -> str:
        cores = "" if self.cores is None else f" and {self.cores} cores"
        if not self.has_gpus:
            return f"{_times(self.nodes, 'node')} of {self.devices} cores with {in_words(self.memory_bytes)}"
        gpus = f"{_times(self.devices, self.kind)} with {in_words(self.memory_bytes)}{' each' * (self.devices > 1)}"
        return f"{_times(self.nodes, 'node')} of {gpus}{cores}"


def parse_cluster(text: str) -> tuple[NodeGroup, ...]:
    """Raises HarnessError that says what is allowed. GB are 10**9 bytes, GiB 2**30."""
    groups = tuple(_parse_group(text, part) for part in text.split("+"))
    if sum(group.nodes for group in groups) > MOST_NODES:
        raise HarnessError(f"--cluster {text}: more than {MOST_NODES} nodes. Give a smaller cluster.")
    return groups


def _parse_group(text: str, part: str) -> NodeGroup:
    match = _GROUP.fullmatch(part.strip())
    if match is None:
        raise HarnessError(f"--cluster {text}: {part!r} is no group of nodes. Write {FORM}.")
    nodes, devices, kind, amount, unit, cores = match.groups()
    kind = "CPU" if kind.upper() == "CPU" else kind
    memory_bytes = int(float(amount) * _UNITS[unit])
    if not (int(nodes) and int(devices) and memory_bytes and cores != "0"):
        raise HarnessError(f"--cluster {text}: {part!r} has none of something. Give at least one of each.")
    if kind == "CPU" and cores is not None:
        raise HarnessError(f"--cluster {text}: {part!r} gives its cores twice. Leave out /{cores}cores.")
    return NodeGroup(int(nodes), int(devices), kind, memory_bytes, int(cores) if cores else None)


def _times(count: int, what: str) -> str:
    plural = "s" if what == "node" and count > 1 else ""
    return f"{count} {what}{plural}"
