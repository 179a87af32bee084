"""What a GPU computes at most: floating-point operations per second of dense matrices, as its maker states them.

    fp32   outside the tensor cores
    tf32, bf16, fp16   by the tensor cores, accumulated in fp32, without sparsity: half of what a datasheet states
                       with it

Sources, NVIDIA's data sheets: V100 (2020) and V100S; A100 (40GB 2020, 80GB 2022); H100 (the SXM5 and PCIe columns) and
the H100 architecture white paper, table 2; H200 (the SXM column); Blackwell (2025, one GPU of an HGX B200, whose TF32
it rounds to 2.2 PFLOPS with sparsity); L4 (2023); L40S (2023).
"""

from collections.abc import Mapping

_TERA = 10**12
Peaks = Mapping[str, float]


def _tera(**by_compute: float) -> Peaks:
    return {compute: tera * _TERA for compute, tera in by_compute.items()}


# Volta has neither TF32 nor BF16.
_V100_SXM2 = _tera(fp32=15.7, fp16=125)
_V100_PCIE = _tera(fp32=14, fp16=112)
_V100S_PCIE = _tera(fp32=16.4, fp16=130)
_A100 = _tera(fp32=19.5, tf32=156, bf16=312, fp16=312)
_H100_SXM = _tera(fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4)
_H100_PCIE = _tera(fp32=51.2, tf32=378, bf16=756, fp16=756)
_B200 = _tera(fp32=75, tf32=1100, bf16=2250, fp16=2250)
_L4 = _tera(fp32=30.3, tf32=60, bf16=121, fp16=121)
_L40S = _tera(fp32=91.6, tf32=183, bf16=362.05, fp16=362.05)

# By the whole name that the driver gives, but for "NVIDIA " or "Tesla " in front: a part of it is also in the name of a
# slice of the GPU (MIG), of another variant (H100 NVL, A100X) or of another product (L4, L40S).
_BY_NAME: Mapping[str, Peaks] = {
    "V100-SXM2-16GB": _V100_SXM2,
    "V100-SXM2-32GB": _V100_SXM2,
    "V100-PCIE-16GB": _V100_PCIE,
    "V100-PCIE-32GB": _V100_PCIE,
    "V100S-PCIE-32GB": _V100S_PCIE,
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    "H100 80GB HBM3": _H100_SXM,
    "H100 PCIe": _H100_PCIE,
    "H200": _H100_SXM,
    "B200": _B200,
    "L4": _L4,
    "L40S": _L40S,
}


def peak_flops_per_s(device_name: str, compute: str) -> float | None:
    """Of the device that the driver calls so, in this precision of compute; None where it is not known.

    Never that of a device like it: the share of a wrong peak looks like any other.
    """
    peaks = _BY_NAME.get(device_name.removeprefix("NVIDIA ").removeprefix("Tesla "))
    return None if peaks is None else peaks.get(compute)
