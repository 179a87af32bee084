"""A Ray that a command starts for itself on a machine with other users: they neither reach it nor get its token."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.harness.conftest import environment

HOLD = """
import json, os, sys, ray
from harness.schedule import ray_session
with ray_session(None, cpus=1):
    token = os.environ.get("RAY_AUTH_TOKEN_PATH")
    print(json.dumps([ray.get_runtime_context().gcs_address, token]), flush=True)
    sys.stdin.read()
print(json.dumps([os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH")]))
"""
ASK = """
import sys
from ray._raylet import GcsClient
try:
    print(len(GcsClient(address=sys.argv[1]).get_all_node_info()), "node")
except Exception as error:
    print(type(error).__name__)
"""


class Own(NamedTuple):
    address: str
    token: Path
    home: Path
    process: "subprocess.Popen[str]"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    """Held by a process of a user who has no token yet and knows of no such thing."""
    home = tmp_path_factory.mktemp("home")
    env = {name: value for name, value in environment().items() if not name.startswith("RAY_")} | {"HOME": str(home)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    address, token = json.loads(process.stdout.readline())
    yield Own(address, Path(token), home, process)
    process.stdin.close()
    assert json.loads(process.stdout.readline()) == [None, None]
    assert process.wait(60) == 0
    assert not Path(token).exists()


def asked(own: Own, **settings: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", ASK, own.address]
    done = subprocess.run(command, env=env | {"HOME": str(own.home)} | settings, capture_output=True, text=True)
    return done.stdout.strip()


def test_who_has_its_token_gets_an_answer_and_who_has_not_does_not(own: Own) -> None:
    assert asked(own, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(own.token)) == "1 node"
    assert asked(own, RAY_AUTH_MODE="disabled") == "AuthenticationError"
    assert asked(own, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another") == "AuthenticationError"


def test_only_this_user_can_read_its_token_and_none_is_left_in_the_home_directory(own: Own) -> None:
    assert stat.S_IMODE(own.token.stat().st_mode) == 0o600
    assert stat.S_IMODE(own.token.parent.stat().st_mode) == 0o700
    assert not (own.home / ".ray").exists()


def test_it_listens_on_loopback_only(own: Own) -> None:
    pids = {each.pid for each in psutil.Process(own.process.pid).children(recursive=True)} | {own.process.pid}
    sockets = [each for each in psutil.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    addresses = {each.laddr.ip.removeprefix("::ffff:") for each in sockets if each.laddr and each.pid in pids}
    assert addresses <= {"127.0.0.1", "::1"}
    assert addresses
