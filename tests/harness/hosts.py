"""Hosts on this machine, each with a network, an address, a name, processes and a temporary folder of Ray of its own.

A host is a set of Linux namespaces, held by a first process that reads from the one that made it. When that one ends,
in whatever way, the first process reads the end of its input, and the kernel ends all others with it. The switch
between the hosts is a namespace too: no interface of this machine leads to them, and two networks never meet.
"""

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from tests.harness.conftest import environment

INTERFACE = "eth0"
SUBNET = "10.77.0"
# Two raylets that share it collide on their sockets.
RAY_FOLDER = Path("/tmp/ray")
TOOLS = ("ip", "unshare", "nsenter", "mount")
KINDS = ("--net", "--mount", "--uts", "--pid")
UNSHARE = ("unshare", *KINDS, "--fork", "--mount-proc", "--kill-child", "sh", "-ec")
# Parent of what is orphaned on its host; as it ignores SIGCHLD, no zombies stay.
HOLD = "echo up; exec env --ignore-signal=CHLD cat"
SWITCH = f"ip link add switch type bridge; ip link set switch up; {HOLD}"
HOST = f"""
echo "$0" > /proc/sys/kernel/hostname
mount --bind "$1" {RAY_FOLDER}
mount --bind "$2" /etc/hosts
ip link set lo up
{HOLD}
"""
END_S = 20.0


@functools.cache
def why_no_hosts() -> str | None:
    """What this machine lacks to have hosts, in words; None when it has everything."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"hosts need {' and '.join(absent)}: apt-get install iproute2 util-linux mount"
    if os.geteuid() != 0:
        return "hosts need root, to make network namespaces"
    probe = subprocess.run([*UNSHARE, "ip link add type veth; ip link add type bridge"], capture_output=True, text=True)
    return f"no network namespaces on this machine: {probe.stderr.strip()}" if probe.returncode else None


needs_hosts = pytest.mark.skipif(why_no_hosts() is not None, reason=why_no_hosts() or "")


class Namespaces:
    """One namespace of each of KINDS, from `script` on until `end`, or until this process ends."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._holder = subprocess.Popen(
            [*UNSHARE, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout is not None
        if (line := self._holder.stdout.readline()) != "up\n":
            raise OSError(f"namespaces {arguments}: {line}{self._holder.communicate()[0]}")
        [first] = psutil.Process(self._holder.pid).children()
        self.first_pid = first.pid

    def enter(self, kinds: Sequence[str] = KINDS) -> list[str]:
        """What to put before a command that is to run there."""
        return ["nsenter", f"--target={self.first_pid}", *kinds, "--"]

    def ip(self, command: str) -> None:
        subprocess.run([*self.enter(["--net"]), "ip", *command.split()], check=True)

    def end(self) -> None:
        """End every process there; returns when the last is gone."""
        self._holder.communicate(timeout=END_S)


class Process(subprocess.Popen[str]):
    """A process on a host. Signals reach it, and not the `nsenter` outside that waits for it and ends as it does."""

    def send_signal(self, sig: int) -> None:
        # A loop, since it may not be there yet.
        while self.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.pid).children():
                    child.send_signal(sig)
                    return


class Host:
    """One host of a `network`."""

    def __init__(self, name: str, address: str, folder: Path, inside: Namespaces, switch: Namespaces) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.environment = environment() | {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}
        self._inside, self._switch = inside, switch
        self._started: list[Process] = []

    def run(
        self, command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, **to_popen: Any
    ) -> Process:
        """Start a process here; `env` is added to this host's environment, the rest is as for `subprocess.Popen`."""
        # Not Popen's cwd, since who enters a mount namespace is put in its root.
        directory = ["env", f"--chdir={cwd or self.folder}"]
        whole = [*self._inside.enter(), *directory, *command]
        self._started.append(Process(whole, env={**self.environment, **(env or {})}, text=True, **to_popen))
        return self._started[-1]

    def processes(self) -> list[psutil.Process]:
        """All that run here, the first included, with the numbers that they have outside."""
        here = _host_of(self._inside.first_pid)
        return [process for process in psutil.process_iter() if _host_of(process.pid) == here]

    def cut(self) -> None:
        """Pull the cable: nothing passes in either direction, and no program is told."""
        self._switch.ip(f"link set dev {self.name} down")

    def mend(self) -> None:
        self._switch.ip(f"link set dev {self.name} up")

    def power_off(self) -> None:
        """End every process here at once; returns when the last is gone. There is no way back."""
        self._inside.end()
        for process in self._started:
            process.wait(END_S)


AnyHost = TypeVar("AnyHost", bound=Host)


@contextlib.contextmanager
def network(folder: Path, names: Sequence[str], kind: type[AnyHost] = Host) -> Iterator[dict[str, AnyHost]]:
    """Hosts that reach each other, by address and by name, and nothing else.

    folder  for what the hosts keep: Ray's temporary folder on host `name` is folder/name
    """
    addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, 1)}
    names_file = folder / "hosts"
    names_file.write_text("".join(f"{at} {name}\n" for name, at in {"localhost": "127.0.0.1", **addresses}.items()))
    RAY_FOLDER.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        switch = Namespaces(SWITCH)
        stack.callback(switch.end)
        hosts: dict[str, AnyHost] = {}
        for name, address in addresses.items():
            own_folder = folder / name
            own_folder.mkdir()
            inside = Namespaces(HOST, name, str(own_folder), str(names_file))
            hosts[name] = kind(name, address, own_folder, inside, switch)
            stack.callback(hosts[name].power_off)
            switch.ip(f"link add name {name} type veth peer name {INTERFACE} netns {inside.first_pid}")
            switch.ip(f"link set dev {name} master switch up")
            inside.ip(f"address add {address}/24 dev {INTERFACE}")
            inside.ip(f"link set dev {INTERFACE} up")
        yield hosts


def _host_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:  # Gone, or not ours to look at.
        return None
