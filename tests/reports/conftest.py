"""Runs with figures that are known beforehand, written through the store as a sweep writes them."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.ids import id_of
from harness.record import Record, Status, TraceRow
from harness.store import RunStore
from reports.compare import Comparison, compare_sides, read_side
from reports.limits import parse_limit
from reports.page import build_report
from tests.reports.browser import Opened, browser_page

MIB = 2**20
SLOPES_MIB = {"stored": 8.5, "checkpointed": 1.25, "reconstructed": 0.125}
STEP_S = {"stored": 0.2, "checkpointed": 0.28, "reconstructed": 0.27}
MACHINE = {
    "device": "cpu",
    "device_name": "Test CPU",
    "cpu": "Test CPU",
    "cpu_count": 2,
    "threads": 1,
    "memory_bytes": 8 * 2**30,
    "environment": {"OMP_WAIT_POLICY": "PASSIVE"},
}
STUDY = {"name": "planted", "question": "Does memory grow?", "predict": "reconstructed stays flat"}

PEAK = "activation_peak_bytes"

Make = Callable[..., RunStore]
# Of the records of BASE and RUN and any number of limits.
Compare = Callable[..., Comparison]


def spec(**changes: Any) -> dict[str, Any]:
    plain = {
        "model": "revnet",
        "depth": 38,
        "channels": None,
        "data": {"name": "cifar10", "path": None, "image_size": 32},
        "batch_size": 32,
        "activations": "stored",
        "compute": "fp32",
        "reconstruction": "fp32",
        "zero_stage": 0,
        "workers": 1,
        "seed": 0,
        "resources": {"gpus_per_worker": None, "cpus_per_worker": 1, "memory_bytes": None},
        "deepspeed": {},
    }
    return plain | changes


def trial(number: int, *, status: Status = "ok", reason: str | None = None, **changes: Any) -> Record:
    """A record whose activation peak is 20 MiB and SLOPES_MIB more for each block."""
    made = spec(**changes)
    blocks = (made["depth"] - 2) // 4 if made["depth"] else 3
    metrics: dict[str, int | float] = {}
    if status == "ok":
        activations = made["activations"]
        metrics = {
            "blocks": blocks,
            "activation_peak_bytes": round((20 + SLOPES_MIB[activations] * blocks) * MIB),
            "activation_saved_bytes": round(SLOPES_MIB[activations] * blocks * MIB),
            "step_median_s": STEP_S[activations] * blocks,
            "step_q1_s": STEP_S[activations] * blocks * 0.9,
            "step_q3_s": STEP_S[activations] * blocks * 1.1,
            "samples_per_s": 100.0,
            "drift_max_rel": 0.0 if made["reconstruction"] == "exact" else 3e-7,
            "gradient_angle_deg": 0.0 if made["reconstruction"] == "exact" else 2e-5,
            "stored_reference_angle_deg": 5e-5,
            "loss_last": 2.25,
        }
    return Record(
        id=id_of(made),
        spec=made,
        status=status,
        reason=reason,
        metrics=metrics,
        unmeasured={"parameter_count": "nobody counted"},
        machine=MACHINE,
        versions={"torch": "2.13.0+cpu", "deepspeed": "0.19.8"},
        git={"commit": "0123456789abcdef", "dirty": True},
    )


def with_spec(record: Record, **changes: Any) -> Record:
    made = record.spec | changes
    return record.model_copy(update={"id": id_of(made), "spec": made})


def with_metrics(record: Record, **metrics: int | float) -> Record:
    return record.model_copy(update={"metrics": record.metrics | metrics})


def scaled(record: Record, **factors: float) -> Record:
    """The record with these metrics multiplied; bytes stay whole."""
    return with_metrics(
        record,
        **{
            name: round(record.metrics[name] * factor) if name.endswith("_bytes") else record.metrics[name] * factor
            for name, factor in factors.items()
        },
    )


def without(record: Record, metric: str, reason: str) -> Record:
    metrics = {name: value for name, value in record.metrics.items() if name != metric}
    return record.model_copy(update={"metrics": metrics, "unmeasured": record.unmeasured | {metric: reason}})


def on(record: Record, **facts: Any) -> Record:
    """The record of another machine or, by the name of a package, of another version."""
    machine = {name: value for name, value in facts.items() if name not in record.versions}
    versions = {name: value for name, value in facts.items() if name in record.versions}
    return record.model_copy(update={"machine": record.machine | machine, "versions": record.versions | versions})


def repeats(count: int = 3, **changes: Any) -> list[Record]:
    return [trial(seed, seed=seed, **changes) for seed in range(count)]


def in_steps(record: Record, low_s: float, middle_s: float, high_s: float) -> Record:
    return with_metrics(record, step_median_s=middle_s, step_median_low_s=low_s, step_median_high_s=high_s)


def predicted(record: Record, *, peak_off: float = 0, saved_off: float = 0) -> Record:
    """The record with predictions that are too high by these fractions."""
    peak, saved = record.metrics["activation_peak_bytes"], record.metrics["activation_saved_bytes"]
    return with_metrics(
        record,
        predicted_activation_peak_bytes=round(peak * (1 + peak_off)),
        predicted_activation_saved_bytes=round(saved * (1 + saved_off)),
    )


def drift_rows(record: Record) -> Iterator[TraceRow]:
    blocks = record.metrics.get("blocks", 0) if "drift_max_rel" in record.metrics else 0
    for block in range(int(blocks)):
        yield TraceRow("drift", block, "rel", record.metrics["drift_max_rel"] / (block + 1))


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Write a run of these records; `missing` more were planned and have none."""

    def make(
        records: list[Record], *, missing: int = 0, study: dict[str, Any] | None = STUDY, name: str = "run"
    ) -> RunStore:
        store = RunStore(tmp_path / name)
        planned = [record.id for record in records] + [f"f{number:011x}" for number in range(missing)]
        if study is not None:
            store.open_for(study, planned)
        elif store.read_plan() is not None:
            (tmp_path / name / "plan.json").unlink()
        for record in records:
            store.write_trial(record, list(drift_rows(record)), b"log")
        return store

    return make


@pytest.fixture
def compared(make_run: Make) -> Compare:
    """Both runs written and read again."""

    calls = itertools.count()

    def compare(base: list[Record], run: list[Record], *limits: str, missing: int = 0) -> Comparison:
        call = next(calls)
        before = read_side(make_run(base, name=f"base{call}"))
        now = read_side(make_run(run, missing=missing, name=f"run{call}"))
        return compare_sides(before, now, [parse_limit(text) for text in limits])

    return compare


def sweep_of_trials() -> list[Record]:
    """Three depths, two batch sizes, four strategies; all finished."""
    cells = [
        {"depth": depth, "batch_size": batch, "activations": activations, "reconstruction": reconstruction}
        for depth in (14, 26, 38)
        for batch in (16, 32)
        for activations, reconstruction in (
            ("stored", "fp32"),
            ("checkpointed", "fp32"),
            ("reconstructed", "fp32"),
            ("reconstructed", "exact"),
        )
    ]
    return [trial(number, **cell) for number, cell in enumerate(cells)]


@pytest.fixture
def sweep() -> list[Record]:
    return sweep_of_trials()


@pytest.fixture(scope="module")
def records() -> list[Record]:
    sweep = [predicted(record) for record in sweep_of_trials()]
    reason = "too large: <b>1 GiB</b>, =cmd()"
    return [*sweep, trial(99, depth=50, batch_size=32, status="oom", reason=reason)]


@pytest.fixture(scope="module")
def report(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = RunStore(tmp_path_factory.mktemp("browser") / "run")
    store.open_for(STUDY, [record.id for record in records])
    for record in records:
        store.write_trial(record, [*drift_rows(record), *step_rows(record)], b"log")
    return Path(store.write_report(build_report(store)))


def step_rows(record: Record) -> Iterator[TraceRow]:
    """A step whose saved bytes rise to the record's and fall again."""
    peak = record.metrics.get("activation_peak_bytes", 0)
    for index, share in enumerate((0, 0.5, 1, 0.5, 0)):
        yield TraceRow("memory", index, "time_s", 0.01 * index)
        yield TraceRow("memory", index, "live_bytes", share * peak)
        yield TraceRow("memory", index, "saved_bytes", share * peak)
        yield TraceRow("memory", index, "unattributed_bytes", 0)
    yield from (TraceRow("phases", 0, "backward_s", 0.02), TraceRow("phases", 0, "end_s", 0.04))


@pytest.fixture(scope="module")
def session() -> Iterator[Opened]:
    with browser_page(viewport={"width": 1280, "height": 900}) as opened:
        yield opened


@pytest.fixture
def opened(session: Opened, report: Path) -> Opened:
    session.complaints.clear()
    session.page.goto("about:blank")
    session.page.emulate_media(media="screen")
    session.open(report)
    return session
