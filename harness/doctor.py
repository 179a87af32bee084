"""What `revnet doctor` looks at: versions, devices, browser, and one tiny trial; or each node of a cluster."""

import contextlib
import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from harness.storage_check import REMEDY, marked
from harness.supervise import supervise
from harness.trials import TrialSpec
from harness.versions import installed

if TYPE_CHECKING:
    from harness.schedule.checkup import Node

NEEDED = ("torch", "deepspeed", "ray", "pandas", "pyarrow", "plotly", "itables", "pydantic", "fsspec")
BROWSERS = ("chromium", "google-chrome", "chrome", "chromium-browser")
TRIAL_TIMEOUT_S = 120


class Finding(NamedTuple):
    level: Literal["ok", "note", "FAIL"]
    text: str


def examine() -> Iterator[Finding]:
    """One finding after another, the slow ones last."""
    yield Finding("ok", f"python {sys.version.split()[0]}")
    for package in NEEDED:
        try:
            yield Finding("ok", f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", f"{package} is not installed. Install it with: pip install revnet-harness")
    yield from _devices()
    browser = next(filter(shutil.which, BROWSERS), None)
    if browser:
        yield Finding("ok", f"browser {browser}")
    else:
        yield Finding(
            "note", "no browser, so `revnet report --png` draws nothing, and the tests of a report are skipped"
        )
    yield _tiny_trial()


def examine_cluster(address: str, storage: str | None) -> Iterator[Finding]:
    """Of each node: its versions against this machine's, its devices, whether it reaches `storage`; and one tiny trial
    whose ranks are on two nodes."""
    from harness.schedule import ray_session
    from harness.schedule.checkup import over_two_nodes, seen_from_each

    with ray_session(address), marked(storage) if storage else contextlib.nullcontext(("", None)) as (token, error):
        found = [Finding("FAIL", f"here: {storage}: {error}. {REMEDY}")] if error else []
        nodes = list(seen_from_each(None if error else storage, token))
        found += [finding for node in nodes for finding in _of_node(node, versions(), None if error else storage)]
        if storage is None:
            found.append(Finding("note", "storage was not looked at; give --storage with where runs are to be kept"))
        elif apart := [node.name for node in nodes if not node.sees_first]:
            found.append(Finding("FAIL", f"{', '.join(apart)}: {storage} is another place there than here. {REMEDY}"))
        yield from found
        if len(nodes) < 2:
            yield Finding("note", "one node, so that no trial can be spread over two")
            return
        if any(finding.level == "FAIL" for finding in found):
            yield Finding("note", "no trial over two nodes was tried; mend the above first")
            return
        done = over_two_nodes(_tiny(workers=2), TRIAL_TIMEOUT_S).record
        if done.status == "ok":
            yield Finding("ok", f"one trial with its ranks on {done.attempts[0].node} and collectives between them")
        else:
            remedy = "Nodes must reach each other on all ports; GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME name interfaces."
            yield Finding("FAIL", f"a tiny trial over two nodes ended as {done.status}: {done.reason}. {remedy}")


def _of_node(node: "Node", here: dict[str, str], storage: str | None) -> Iterator[Finding]:
    if node.error is not None:
        yield Finding("FAIL", f"{node.name}: does not run a task: {node.error}")
        return
    theirs = [(package, node.versions.get(package, "absent"), version) for package, version in here.items()]
    different = [f"{package} {there} rather than {version}" for package, there, version in theirs if there != version]
    if different:
        remedy = "Install the same versions on all nodes; records of different ones cannot be compared."
        yield Finding("FAIL", f"{node.name}: {', '.join(different)}. {remedy}")
    else:
        gpus = ", ".join(node.gpus) or "no GPU"
        yield Finding("ok", f"{node.name}: the versions of this machine; {gpus}; {node.cpus:g} CPU for Ray")
    if storage is not None and node.storage_error is None:
        yield Finding("ok", f"{node.name}: {storage} can be written and read")
    elif storage is not None:
        yield Finding("FAIL", f"{node.name}: {storage}: {node.storage_error}. {REMEDY}")


def versions() -> dict[str, str]:
    """Of this project and of what it needs, here; a package that is not installed is left out."""
    return installed(("revnet-harness", *NEEDED))


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("FAIL", f"torch cannot be imported: {error}")
        return
    if not torch.cuda.is_available():
        yield Finding("note", f"no CUDA ({torch.__version__}): trials run on the CPU")
    for index, name in enumerate(gpu_names()):
        yield Finding("ok", f"cuda:{index} {name}")


def gpu_names() -> list[str]:
    """Of each GPU of this machine, with its memory."""
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in found]


def _tiny(workers: int) -> TrialSpec:
    return TrialSpec(
        model="revnet",
        depth=14,
        batch_size=2,
        workers=workers,
        warmup_steps=0,
        measured_steps=1,
        audit_batch_size=2,
    )


def _tiny_trial() -> Finding:
    done = supervise(_tiny(workers=1), TRIAL_TIMEOUT_S)
    if done.record.status == "ok":
        return Finding("ok", f"one trial under DeepSpeed, start to record, in {done.record.attempts[0].wall_s:.1f} s")
    return Finding("FAIL", f"a tiny trial ended as {done.record.status}: {done.record.reason}")
