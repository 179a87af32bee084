"""Runs with figures that are known beforehand, written through the store as a sweep writes them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.record import Record, Status, TraceRow
from harness.store import RunStore

MIB = 2**20
SLOPES_MIB = {"stored": 8.5, "checkpointed": 1.25, "reconstructed": 0.125}
STEP_S = {"stored": 0.2, "checkpointed": 0.28, "reconstructed": 0.27}
STUDY = {"name": "planted", "question": "Does memory grow?", "predict": "reconstructed stays flat"}

Make = Callable[..., RunStore]


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
        id=f"{number:012x}",
        spec=made,
        status=status,
        reason=reason,
        metrics=metrics,
        unmeasured={"parameter_count": "nobody counted"},
        machine={"device_name": "Test CPU", "cpu_count": 2, "memory_bytes": 8 * 2**30},
        versions={"torch": "2.13.0"},
        git={"commit": "0123456789abcdef", "dirty": True},
    )


def with_metrics(record: Record, **metrics: int | float) -> Record:
    return record.model_copy(update={"metrics": record.metrics | metrics})


def predicted(record: Record, *, peak_off: float = 0, saved_off: float = 0) -> Record:
    """The record with predictions that are too high by these fractions."""
    peak, saved = record.metrics["activation_peak_bytes"], record.metrics["activation_saved_bytes"]
    return with_metrics(
        record,
        predicted_activation_peak_bytes=round(peak * (1 + peak_off)),
        predicted_activation_saved_bytes=round(saved * (1 + saved_off)),
    )


def drift_rows(record: Record) -> Iterator[TraceRow]:
    for block in range(int(record.metrics.get("blocks", 0))):
        yield TraceRow("drift", block, "rel", record.metrics["drift_max_rel"] / (block + 1))


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Write a run of these records; `missing` more were planned and have none."""

    def make(records: list[Record], *, missing: int = 0, study: dict[str, Any] | None = STUDY) -> RunStore:
        store = RunStore(tmp_path / "run")
        planned = [record.id for record in records] + [f"f{number:011x}" for number in range(missing)]
        if study is not None:
            store.open_for(study, planned)
        for record in records:
            store.write_trial(record, list(drift_rows(record)), b"log")
        return store

    return make


@pytest.fixture
def sweep() -> list[Record]:
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
