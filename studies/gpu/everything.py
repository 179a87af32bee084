"""The GPU tests, the benchmarks and the studies, in order of worth, each in a process of its own and all within a time.

What fails or is not reached ends nothing else: it stands in the summary with its reason. Below `out` comes a folder for
the device and the day, with results/ (JSON of each benchmark), logs/, records/ (run directories of the studies, for
`revnet report` and `revnet compare`), machine.json and summary.md.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from harness.measure.machine import describe_git, describe_machine, describe_versions, device_name
from studies.gpu.summary import Ran, summary

ROOT = Path(__file__).resolve().parents[2]
NOT_STARTED = "not started: the time was over"
TESTS = "tests"
# A benchmark that is not begun with at least so much left would only be cut off.
LEAST_S = 20.0
# With the seconds that each may take.
STUDIES = (("graphs", 240), ("revnet110", 600), ("imagenet", 240))


@dataclass(frozen=True, kw_only=True)
class Item:
    """What to run.

    most_s  seconds after which it is ended
    needs   packages without which it cannot run
    """

    name: str
    arguments: tuple[str, ...]
    most_s: float
    needs: tuple[str, ...] = ()


def items(folder: Path, device: torch.device, *, small: bool, data: str | None, seconds: float) -> list[Item]:
    """In order of worth."""
    results, records = folder / "results", folder / "records"
    place = ("--device", device.type, *(["--small"] if small else []))

    def benchmark(name: str, *arguments: str, most_s: float, kind: str | None = None) -> Item:
        kept = ("--json", str(results / f"{name}.json"))
        return Item(name=name, arguments=("-m", "studies.gpu", kind or name, *place, *kept, *arguments), most_s=most_s)

    def study(name: str, most_s: float) -> Item:
        limit = ("--limit", "1") if small else ()
        out = str(records / name.rpartition("/")[2])
        arguments = ("-m", "studies.gpu", "study", name, "--out", out, "--minutes", f"{most_s / 60:.3f}", *limit)
        return Item(name=f"study {name}", arguments=arguments, most_s=most_s + 30, needs=("deepspeed", "ruamel.yaml"))

    def train(model: str, most_s: float) -> Item:
        given = ("--model", model, "--out", str(results / f"train-{model}"), "--minutes", f"{most_s / 60:.3f}")
        given += ("--data", data) if data else ()
        return Item(name=f"train {model}", arguments=("-m", "studies.gpu", "train", *place, *given), most_s=most_s + 60)

    tests = ("-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", f"--junitxml={results / 'tests.xml'}")
    # What the training gets of a long run; of a short one the rest.
    training_s = max(30.0, 0.3 * (seconds - 600))
    computes = ("fp32",) if device.type == "cpu" else ("fp32", "tf32")
    return [
        Item(name=TESTS, arguments=tests, most_s=240, needs=("pytest", "hypothesis")),
        benchmark("steps-bf16", "--compute", "bf16", most_s=150, kind="steps"),
        benchmark("imagenet-fp32", "--compute", "fp32", most_s=120, kind="imagenet"),
        benchmark("predictions-fp32", "--minutes", "1.5", most_s=120, kind="predictions"),
        benchmark("depth", most_s=240),
        *(benchmark(f"steps-{c}", "--compute", c, most_s=150, kind="steps") for c in computes),
        *(
            benchmark(f"measures-{n}", "--batch-size", str(n), most_s=180, kind="measures")
            for n in ((128,) if small else (128, 16))
        ),
        *((train("revnet38", training_s), train("resnet32", training_s)) if data or small else ()),
        *((study("quickstart", 60),) if small else (study(f"gpu/{name}", most_s) for name, most_s in STUDIES)),
    ]


def run(device: torch.device, out: Path, seconds: float, *, small: bool, data: str | None) -> int:
    """Returns an exit code: 1 where a test or a benchmark failed; a target that was missed is a result."""
    small = small or device.type == "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder = out / f"{name}-{date.today().isoformat()}"
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    machine = {"machine": describe_machine(device), "versions": describe_versions(), "git": describe_git()}
    (folder / "machine.json").write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")
    end_s, ran = time.monotonic() + seconds, []
    for item in items(folder, device, small=small, data=data, seconds=seconds):
        print(f"{item.name} ...", flush=True)
        ran.append(one := run_item(item, end_s - time.monotonic(), folder, device))
        print(f"{item.name}: {one.outcome} ({one.wall_s:.0f} s)", flush=True)
        # Each time, so that what ends this process takes no summary with it.
        (folder / "summary.md").write_text(summary(folder, machine, ran, small=small), encoding="utf-8")
    for run_folder in sorted((folder / "records").glob("*")):
        print(_report(run_folder), flush=True)
    print(f"{folder}/summary.md")
    return int(any(one.failed for one in ran))


def run_item(item: Item, left_s: float, folder: Path, device: torch.device) -> Ran:
    if missing := [package for package in item.needs if not _is_there(package)]:
        return Ran(item.name, f"not run: not installed: {', '.join(missing)}")
    if left_s < min(LEAST_S, item.most_s):
        return Ran(item.name, f"not run: {NOT_STARTED}")
    log_path = folder / "logs" / f"{item.name.replace(' ', '-').replace('/', '-')}.log"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "99", "REVNET_TEST_DEVICE": device.type}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    start_s = time.monotonic()
    with log_path.open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                [sys.executable, *item.arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=min(item.most_s, left_s),
            )
        except subprocess.TimeoutExpired as error:
            return Ran(item.name, f"not run to its end: ended after {error.timeout:.0f} s", error.timeout, log_path)
    wall_s = time.monotonic() - start_s
    if done.returncode:
        return Ran(item.name, f"failed: {_last_words(log_path)}", wall_s, log_path, failed=True)
    # pytest counts in its last line.
    told = f": {_last_words(log_path).strip('= ')}" if item.name == TESTS else ""
    return Ran(item.name, f"done{told}", wall_s, log_path)


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _last_words(log_path: Path) -> str:
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def _report(run_folder: Path) -> str:
    """The study's report, where what it takes is installed; else how to get it later."""
    if missing := [package for package in ("pandas", "plotly", "jinja2", "itables") if not _is_there(package)]:
        return f"no report of {run_folder} here, without {', '.join(missing)}; elsewhere: revnet report {run_folder}"
    command: Sequence[str] = [sys.executable, "-m", "harness.cli", "report", str(run_folder.resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else f"no report of {run_folder}: exit code {done.returncode}"
