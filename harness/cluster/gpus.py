"""What a roofline knows of GPUs, by the names that people give them: their makers' figures, which nobody exceeds.

Memory bandwidth and NVLink from NVIDIA's data sheets: V100 (2020), A100 (40GB 2020, 80GB 2022), H100 (SXM5 and PCIe),
H200 (SXM), HGX B200 (2025), L4 and L40S (2023). NVLink is stated for both directions together; here is one of them.
FLOP/s are those of `harness.measure.peaks`, by the name that the driver gives.
"""

from typing import NamedTuple

from harness.cluster.description import NodeGroup

_GB = 10**9
# PCIe 3.0, 4.0 and 5.0 with 16 lanes, one direction.
_PCIE3, _PCIE4, _PCIE5 = 16 * _GB, 32 * _GB, 64 * _GB


class Gpu(NamedTuple):
    """driver_name: as in a record's machine; link: between two of a node."""

    driver_name: str
    memory_bytes_per_s: float
    link_bytes_per_s: float


_BY_NAME = {
    "V100-SXM2-16GB": Gpu("Tesla V100-SXM2-16GB", 900 * _GB, 150 * _GB),
    "V100-SXM2-32GB": Gpu("Tesla V100-SXM2-32GB", 900 * _GB, 150 * _GB),
    "V100-PCIE-16GB": Gpu("Tesla V100-PCIE-16GB", 900 * _GB, _PCIE3),
    "V100-PCIE-32GB": Gpu("Tesla V100-PCIE-32GB", 900 * _GB, _PCIE3),
    "A100-40GB": Gpu("NVIDIA A100-SXM4-40GB", 1555 * _GB, 300 * _GB),
    "A100-80GB": Gpu("NVIDIA A100-SXM4-80GB", 2039 * _GB, 300 * _GB),
    "A100-SXM4-40GB": Gpu("NVIDIA A100-SXM4-40GB", 1555 * _GB, 300 * _GB),
    "A100-SXM4-80GB": Gpu("NVIDIA A100-SXM4-80GB", 2039 * _GB, 300 * _GB),
    "A100-PCIE-40GB": Gpu("NVIDIA A100-PCIE-40GB", 1555 * _GB, _PCIE4),
    "A100-PCIE-80GB": Gpu("NVIDIA A100 80GB PCIe", 1935 * _GB, _PCIE4),
    "H100-80GB": Gpu("NVIDIA H100 80GB HBM3", 3350 * _GB, 450 * _GB),
    "H100-SXM-80GB": Gpu("NVIDIA H100 80GB HBM3", 3350 * _GB, 450 * _GB),
    "H100-PCIE-80GB": Gpu("NVIDIA H100 PCIe", 2000 * _GB, _PCIE5),
    "H200-141GB": Gpu("NVIDIA H200", 4800 * _GB, 450 * _GB),
    "B200-180GB": Gpu("NVIDIA B200", 7700 * _GB, 900 * _GB),
    "L4-24GB": Gpu("NVIDIA L4", 300 * _GB, _PCIE4),
    "L40S-48GB": Gpu("NVIDIA L40S", 864 * _GB, _PCIE4),
}
KNOWN = tuple(_BY_NAME)


def gpu_of(group: NodeGroup) -> Gpu | None:
    """Of the GPU that its maker calls so, memory included; None for others, also those that are only like it."""
    return _BY_NAME.get(f"{group.kind.upper()}-{group.memory_bytes / _GB:g}GB")
