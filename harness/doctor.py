"""What `revnet doctor` looks at: the versions, the devices, the browser, and one tiny trial."""

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple

from harness.supervise import supervise
from harness.trials import TrialSpec

NEEDED = ("torch", "deepspeed", "ray", "pandas", "pyarrow", "plotly", "pydantic", "fsspec")
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
        yield Finding("note", "no browser, so the tests that look at a report in one are skipped")
    yield _tiny_trial()


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("FAIL", f"torch cannot be imported: {error}")
        return
    if not torch.cuda.is_available():
        yield Finding("note", f"no CUDA ({torch.__version__}): trials run on the CPU")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _tiny_trial() -> Finding:
    spec = TrialSpec(model="revnet", depth=14, batch_size=2, warmup_steps=0, measured_steps=1, audit_batch_size=2)
    done = supervise(spec, TRIAL_TIMEOUT_S)
    if done.record.status == "ok":
        return Finding("ok", f"one trial under DeepSpeed, start to record, in {done.record.attempts[0].wall_s:.1f} s")
    return Finding("FAIL", f"a tiny trial ended as {done.record.status}: {done.record.reason}")
