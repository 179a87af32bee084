"""A Ray of several hosts: each does work, a lost one is noticed and joins again, and nobody joins without the token."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness.hosts import SUBNET, Host, needs_hosts
from tests.harness.ray_hosts import PORT, Hosts, ray_hosts

pytestmark = needs_hosts
# Enough for a busy machine; Ray notices a cut host in 8 s.
NOTICED_S = 40
ONE_TASK_EACH = """
import json, socket, sys, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
where, nodes = ray.remote(lambda: socket.gethostname()), ray.nodes()
on = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
names = ray.get([where.options(scheduling_strategy=each).remote() for each in on])
print(json.dumps([[node["NodeManagerAddress"], node["Resources"]["CPU"], name] for node, name in zip(nodes, names)]))
"""
JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False); print('joined')"
LISTENING = """
import json, psutil
print(json.dumps([each.laddr.port for each in psutil.net_connections("inet") if each.status == psutil.CONN_LISTEN]))
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ray_hosts(workers=3, cpus=1) as hosts:
        yield hosts


def python(host: Host, program: str, *arguments: str, env: dict[str, str] | None = None) -> tuple[str, str]:
    command = [sys.executable, "-c", program, *arguments]
    process = host.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return process.communicate(timeout=100)


def listening(pids: set[int]) -> list[int]:
    """Ports of this machine, on any of its interfaces, on which one of these processes listens."""
    sockets = [each for each in psutil.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    return [each.laddr.port for each in sockets if each.laddr and each.pid in pids]


def test_each_host_is_a_node_that_does_tasks(hosts: Hosts) -> None:
    output, errors = python(hosts["head"], ONE_TASK_EACH, hosts.address)
    assert sorted(json.loads(output)) == sorted([hosts[name].address, 1.0, name] for name in hosts.names), errors


def test_nothing_of_it_listens_on_this_machine(hosts: Hosts) -> None:
    assert PORT in json.loads(python(hosts["head"], LISTENING)[0])
    theirs = {process.pid for name in hosts.names for process in hosts[name].processes()}
    assert {hosts[name].raylet_pid for name in hosts.names} < theirs
    assert listening(theirs) == []
    addresses = [each.address for interface in psutil.net_if_addrs().values() for each in interface]
    assert not any(address.startswith(SUBNET) for address in addresses)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] in listening({psutil.Process().pid})


@pytest.mark.parametrize(
    "env", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "another"}], ids=["no token", "wrong"]
)
def test_no_one_joins_without_the_token(hosts: Hosts, env: dict[str, str]) -> None:
    once = {"RAY_NUM_REDIS_GET_RETRIES": "1"}
    assert python(hosts["w1"], JOIN, hosts.address, env=once)[0] == "joined\n"
    output, errors = python(hosts["w1"], JOIN, hosts.address, env=once | env)
    assert output == ""
    assert "InvalidAuthToken" in errors


def test_a_cut_host_is_noticed_and_joins_again_when_mended(hosts: Hosts) -> None:
    hosts["w3"].cut()
    hosts.await_alive(["head", "w1", "w2"], NOTICED_S)
    hosts["w3"].mend()
    hosts.start("w3")
    hosts.await_alive(hosts.names, NOTICED_S)


def test_a_killed_raylet_is_noticed_and_its_host_joins_again(hosts: Hosts) -> None:
    before = hosts["w2"].raylet_pid
    hosts["w2"].kill_raylet()
    hosts.await_alive(["head", "w1", "w3"], NOTICED_S)
    hosts.start("w2")
    hosts.await_alive(hosts.names, NOTICED_S)
    assert hosts["w2"].raylet_pid != before


def test_a_host_that_stays_alive_is_not_taken_for_dead(hosts: Hosts) -> None:
    with pytest.raises(TimeoutError, match="alive after 1 s"):
        hosts.await_alive(["head", "w1", "w2"], 1)


@pytest.mark.parametrize(
    "env",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "another"}, {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}],
    ids=["no token", "wrong", "no file"],
)
def test_who_lacks_the_token_is_told_so(hosts: Hosts, env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.cli", "run", "quickstart", "--limit=1", f"--address={hosts.address}"]
    process = hosts["w1"].run(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, output) == (2, "")
    assert f"--address {hosts.address}: this Ray cluster wants its token" in errors
    assert "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file" in errors
    assert "Traceback" not in errors
