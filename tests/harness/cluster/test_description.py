"""A cluster as people write it, and what is no cluster."""

import pytest

from harness.cluster.description import NodeGroup, parse_cluster
from harness.cluster.gpus import KNOWN, gpu_of
from harness.errors import HarnessError
from harness.measure.peaks import peak_flops_per_s


def test_groups_are_nodes_times_devices_with_memory() -> None:
    assert parse_cluster("64x8xH200-141GB+4x32xcpu-256GiB") == (
        NodeGroup(64, 8, "H200", 141 * 10**9, None),
        NodeGroup(4, 32, "CPU", 256 * 2**30, None),
    )
    [group] = parse_cluster("2x4xA100-SXM4-80GB/64cores")
    assert (group.kind, group.cores, group.amounts) == ("A100-SXM4", 64, {"CPU": 64.0, "GPU": 4.0})
    assert group.in_words() == "2 nodes of 4 A100-SXM4 with 74.5 GiB each and 64 cores"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no group of nodes. Write NODESxDEVICESxKIND-MEMORY"),
        ("8xH200-141GB", "'8xH200-141GB' is no group"),
        ("64x8xH200", "is no group"),
        ("64x8xH200-141MB", "is no group"),
        ("64x8xH200-141GB+", "'' is no group"),
        ("0x8xH200-141GB", "has none of something"),
        ("64x8xH200-0GB", "has none of something"),
        ("99999x8xH200-141GB", "more than 10000 nodes"),
        ("4x32xCPU-256GiB/32cores", "gives its cores twice"),
    ],
)
def test_what_is_no_cluster_is_refused_with_what_is_one(text: str, says: str) -> None:
    with pytest.raises(HarnessError) as refused:
        parse_cluster(text)
    assert str(refused.value).startswith(f"--cluster {text}: ")
    assert says in str(refused.value)


@pytest.mark.parametrize("name", KNOWN)
def test_each_gpu_of_the_table_has_a_peak(name: str) -> None:
    [group] = parse_cluster(f"1x1x{name}")
    gpu = gpu_of(group)
    assert gpu is not None
    assert peak_flops_per_s(gpu.driver_name, "fp32")


def test_a_gpu_that_is_only_like_one_is_unknown() -> None:
    assert gpu_of(parse_cluster("1x1xH200-140GB")[0]) is None
    assert gpu_of(parse_cluster("1x1xH200NVL-141GB")[0]) is None
