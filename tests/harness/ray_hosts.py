"""A Ray cluster over several hosts of this machine, closed to whoever lacks its token."""

import contextlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from tests.harness.hosts import Host, network

PORT = 6379
CLIENT_PORT = 10001
START_S = 60.0
POLL_S = 0.05
# A cut host counts as dead after 3 checks of 0.5 + 2 s, not after a minute as by default; one that waits for a core
# does not.
SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    # gRPC's care for forked processes breaks one in seven of those that serve Ray's clients on a busy machine.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}
RAY_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--include-log-monitor=false"]
RAY_START += [f"--object-store-memory={80 * 2**20}"]
AWAIT_ALIVE = """
import sys, time, ray
address, within_s, *names = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + float(within_s)
while (alive := sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])) != names:
    if time.monotonic() > deadline:
        sys.exit(f"alive after {within_s} s: {alive}, not {names}")
    time.sleep(0.1)
"""


class RayHost(Host):
    """A host with at most one raylet."""

    _ray: subprocess.Popen[str] | None = None

    def launch_ray(self, *options: str) -> None:
        """Start Ray here. An earlier one must be at its end, as it is when its raylet was killed or taken for dead."""
        if self._ray is not None:
            self._ray.wait(START_S)
        with self._log.open("w") as log:
            self._ray = self.run(
                [*RAY_START, *options, f"--node-ip-address={self.address}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def await_ray(self) -> None:
        assert self._ray is not None
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in self._log.read_text():
            if self._ray.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"Ray did not start on {self.name}:\n{self._log.read_text()}")
            time.sleep(POLL_S)

    @property
    def raylet_pid(self) -> int:
        """As this process sees it; not the number that it has on its host."""
        assert self._ray is not None
        children = psutil.Process(self._ray.pid).children(recursive=True)
        [raylet] = [child for child in children if child.name() == "raylet"]
        return raylet.pid

    def kill_raylet(self) -> None:
        psutil.Process(self.raylet_pid).send_signal(signal.SIGKILL)

    @property
    def _log(self) -> Path:
        return self.folder / "ray-start.log"


class Hosts:
    """The host `head`, and `w1`, `w2`, ... that joined it; made by `ray_hosts`."""

    def __init__(self, hosts: dict[str, RayHost], cpus: int) -> None:
        self._hosts, self._cpus = hosts, cpus
        self.names = list(hosts)
        self.address = f"{hosts['head'].address}:{PORT}"
        self.client_address = f"ray://{hosts['head'].address}:{CLIENT_PORT}"

    def __getitem__(self, name: str) -> RayHost:
        return self._hosts[name]

    def start(self, *names: str) -> None:
        """Let these hosts join, again if need be; returns when they have."""
        for name in names:
            role = ["--head", f"--port={PORT}", f"--ray-client-server-port={CLIENT_PORT}", "--include-dashboard=false"]
            if name != "head":
                role = [f"--address={self.address}"]
            self[name].launch_ray(*role, f"--num-cpus={self._cpus}")
        for name in names:
            self[name].await_ray()

    def await_alive(self, names: Collection[str], within_s: float) -> None:
        """Return as soon as Ray on the head takes these hosts for alive and no others; else raise TimeoutError."""
        command = [sys.executable, "-c", AWAIT_ALIVE, self.address, str(within_s), *sorted(names)]
        with self["head"].run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            output, _ = process.communicate(timeout=within_s + START_S)
        if process.returncode:
            raise TimeoutError(output)


@contextlib.contextmanager
def ray_hosts(workers: int, cpus: int) -> Iterator[Hosts]:
    """A cluster of a head and `workers` hosts more, each with `cpus`, that ends with the block."""
    names = ["head", *(f"w{number}" for number in range(1, workers + 1))]
    with tempfile.TemporaryDirectory(prefix="revnet-hosts-") as folder:
        token = Path(folder, "token")
        token.write_text(secrets.token_hex())
        with network(Path(folder), names, RayHost) as by_name:
            for host in by_name.values():
                host.environment |= SETTINGS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            hosts = Hosts(by_name, cpus)
            hosts.start("head")
            hosts.start(*names[1:])
            yield hosts
