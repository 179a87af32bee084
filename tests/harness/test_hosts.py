"""Programs on hosts find each other over the network and not when it is cut, and nothing of a host outlives it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness.conftest import environment, eventually
from tests.harness.hosts import Host, Process, needs_hosts, network

pytestmark = needs_hosts
Network = dict[str, Host]
ALL_REDUCE = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
where, rank, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
timeout = timedelta(seconds=timeout_s)
dist.init_process_group("gloo", init_method=f"tcp://{where}:29500", rank=rank, world_size=2, timeout=timeout)
total = torch.tensor([3.0, 40.0][rank])
dist.all_reduce(total)
print(total.item())
dist.destroy_process_group()
"""
TWO_HOSTS = """
import sys
from pathlib import Path
from tests.harness.hosts import network
with network(Path(sys.argv[1]), ["a", "b"]) as hosts:
    sleeping = hosts["b"].run(["sleep", "1000"])
    print(*(process.pid for host in hosts.values() for process in host.processes()), flush=True)
    input()
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with network(tmp_path_factory.mktemp("hosts"), ["a", "b"]) as hosts:
        yield hosts


def python(host: Host, program: str, *arguments: str) -> Process:
    return host.run([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def all_reduce(hosts: Network, timeout_s: float) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each of two ranks that meet on host a."""
    ranks = [
        python(host, ALL_REDUCE, hosts["a"].address, str(rank), str(timeout_s))
        for rank, host in enumerate(hosts.values())
    ]
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


def test_each_host_has_its_name_and_address_and_knows_the_others(hosts: Network) -> None:
    program = "import socket; print(socket.gethostname(), socket.gethostbyname('a'), socket.gethostbyname('b'))"
    addresses = [host.address for host in hosts.values()]
    assert len(set(addresses)) == 2
    for host in hosts.values():
        assert python(host, program).communicate()[0].split() == [host.name, *addresses]


def test_two_ranks_on_two_hosts_reduce_and_do_not_when_one_is_cut(hosts: Network) -> None:
    for code, output, errors in all_reduce(hosts, timeout_s=60):
        assert (code, output) == (0, "43.0\n"), errors
    hosts["b"].cut()
    try:
        for code, output, errors in all_reduce(hosts, timeout_s=3):
            assert (code, output) == (1, "")
            assert "torch.distributed.Dist" in errors
    finally:
        hosts["b"].mend()
    for code, output, errors in all_reduce(hosts, timeout_s=60):
        assert (code, output) == (0, "43.0\n"), errors


def test_a_signal_reaches_the_program_and_how_it_ended_is_told(hosts: Network) -> None:
    handles = python(
        hosts["a"], "import signal; signal.signal(2, lambda *_: exit(7)); print(flush=True); signal.pause()"
    )
    assert handles.stdout is not None
    handles.stdout.readline()
    handles.send_signal(signal.SIGINT)
    assert handles.wait(20) == 7
    sleeps = hosts["a"].run(["sleep", "1000"])
    sleeps.kill()
    assert sleeps.wait(20) == -signal.SIGKILL


def test_a_host_that_is_switched_off_ends_what_runs_on_it(tmp_path: Path) -> None:
    with network(tmp_path, ["a", "b"]) as hosts:
        sleeping = hosts["b"].run(["sh", "-c", "sleep 1000 & sleep 1000"])
        assert eventually(lambda: len(hosts["b"].processes()) == 4)
        there = hosts["b"].processes()
        hosts["b"].power_off()
        assert sleeping.returncode == -signal.SIGKILL
        assert not any(process.is_running() for process in there)
        assert python(hosts["a"], "print(1)").communicate()[0] == "1\n"


def test_hosts_end_with_the_process_that_made_them_however_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_HOSTS, str(tmp_path)]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout is not None
        pids = [int(pid) for pid in maker.stdout.readline().split()]
        assert len(pids) >= 3
        assert all(map(psutil.pid_exists, pids))
        maker.kill()
    assert eventually(lambda: not any(map(psutil.pid_exists, pids)))


def test_no_process_of_a_host_is_in_this_machines_network(hosts: Network) -> None:
    python(hosts["a"], "pass").communicate()
    own = os.readlink("/proc/self/ns/net")
    networks = [{os.readlink(f"/proc/{process.pid}/ns/net") for process in host.processes()} for host in hosts.values()]
    assert all(len(one) == 1 for one in networks)
    assert len({own}.union(*networks)) == 3
