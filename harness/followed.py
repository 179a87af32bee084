"""Drift over training: a run of the trial's own beside one with stored activations, audited on the way."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harness.data import CHANNELS, load_data
from harness.engine import TrainingEngine
from harness.guarded import TrialGuard
from harness.measure.drift import Metrics, largest
from harness.models import create, loss_of
from harness.record import TraceRow
from harness.trials import TrialSpec
from revnet_core import DriftReport, audit_gradients, audit_model_inverse

FOLLOWED_METRICS = (
    *("followed_drift_max_rel", "followed_gradient_angle_max_deg", "followed_parted_step"),
    *("followed_loss_last", "followed_stored_loss_last"),
)
HELD_OUT_METRIC = "followed_held_out_gradient_angle_max_deg"
# Two losses have parted where they differ by more than this share of the stored run's.
PARTED = 0.01
Batch = tuple[Tensor, Tensor]


def follow_drift(
    spec: TrialSpec, device: torch.device, guard: TrialGuard
) -> tuple[Metrics, list[TraceRow], dict[str, str]]:
    """Train `drift_steps` steps from the initial weights, twice: as the trial does, and with stored activations.

    Both see the same batches in the same order. At `drift_audits` steps, before the first and after the last among
    them, the trial's weights are audited on data of up to three kinds: `train`, of the trained split; `held_out`, of
    the test split, where it has other images than the trained one; `random`, independent normal pixels and labels.
    An inverse can be good on one and not on another (Behrmann et al. 2021, arXiv:2006.09347).

    Returns metrics, the table `followed`, and why a metric is missing. Needs one rank. Raises DriftError where the
    guard stops the trial's own training.
    """
    if reason := _why_not(spec):
        return {}, [], dict.fromkeys((*FOLLOWED_METRICS, HELD_OUT_METRIC), reason)
    own, stored = _Run(spec, device), _Run(_as_stored(spec), device)
    audited = audit_steps(spec.drift_steps, spec.drift_audits)
    data = _audit_data(spec, device)
    rows: list[TraceRow] = []
    try:
        batches = _load(spec, "train", spec.batch_size, spec.drift_steps, seed=spec.seed)
        with guard.over(own.model, rows, _compared_row):
            for step in range(spec.drift_steps + 1):
                if step in audited:
                    rows += _audit(own.weights(), data, step)
                if step < spec.drift_steps:
                    x, labels = (tensor.to(device) for tensor in batches[step])
                    rows.append(TraceRow("followed", step, "loss", own.train(x, labels)))
                    rows.append(TraceRow("followed", step, "stored_loss", stored.train(x, labels)))
    finally:
        own.close()
        stored.close()
    metrics, unmeasured = _summary(rows, spec.drift_steps)
    if held_out := [row.value for row in rows if row.name == "held_out gradient_angle_deg"]:
        metrics[HELD_OUT_METRIC] = largest(held_out)
    else:
        unmeasured[HELD_OUT_METRIC] = "the shipped sample has no images apart; give data.path"
    return metrics, rows, unmeasured


def audit_steps(steps: int, audits: int) -> list[int]:
    """Steps after which to audit, evenly spaced from 0 to the last; at least these two."""
    count = max(2, min(audits, steps + 1))
    return sorted({round(index * steps / (count - 1)) for index in range(count)})


class _Run:
    def __init__(self, spec: TrialSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._engine = TrainingEngine(
            create(spec).to(device),
            batch_size=spec.batch_size,
            compute=spec.compute,
            zero_stage=spec.zero_stage,
            learning_rate=spec.learning_rate,
            extra_config=spec.deepspeed,
            compiled=spec.compile,
        )

    def train(self, x: Tensor, labels: Tensor) -> float:
        """One step; its loss, before the weights change."""
        loss = loss_of(self._engine.forward(x), labels)
        self._engine.backward(loss)
        self._engine.step()
        return loss.item()

    @property
    def model(self) -> nn.Module:
        return self._engine.model

    def weights(self) -> nn.Module:
        """A copy of the model as it is, without what DeepSpeed hung on it."""
        model = create(self._spec).to(self._device)
        model.load_state_dict(self.model.state_dict())
        return model

    def close(self) -> None:
        self._engine.close()


def _why_not(spec: TrialSpec) -> str | None:
    if spec.drift_steps == 0:
        return "the study's drift_steps is 0"
    if spec.workers > 1 or spec.zero_stage == 3:
        return "drift over training is followed on one rank that has all parameters, and this trial divides them"
    return "the study's audit_batch_size is 0" if spec.audit_batch_size == 0 else None


def _compared_row(report: DriftReport) -> TraceRow:
    return TraceRow("followed", report.step - 1, f"guard {report.where}", report.rel)


def has_held_out(spec: TrialSpec) -> bool:
    """The sample that ships with the harness serves as either split."""
    return spec.data.name == "synthetic" or spec.data.path is not None


def _as_stored(spec: TrialSpec) -> TrialSpec:
    return spec.model_copy(update={"activations": "stored", "budget_bytes": None})


def _audit_data(spec: TrialSpec, device: torch.device) -> dict[str, Batch]:
    size, count = spec.data.image_size, spec.audit_batch_size
    generator = torch.Generator().manual_seed(spec.seed)
    images = torch.randn(count, CHANNELS, size, size, generator=generator)
    # Another seed than the training's, whose first batch is the first one trained on.
    (train,) = _load(spec, "train", count, 1, seed=spec.seed + 1)
    kinds = {"train": train, "random": (images, train[1][torch.randperm(count, generator=generator)])}
    if has_held_out(spec):
        (kinds["held_out"],) = _load(spec, "test", count, 1, seed=spec.seed + 1)
    return {kind: (x.to(device), labels.to(device)) for kind, (x, labels) in kinds.items()}


def _load(spec: TrialSpec, split: str, batch_size: int, batches: int, *, seed: int) -> Sequence[Batch]:
    return load_data(
        spec.data.name,
        spec.data.path,
        spec.data.image_size,
        batch_size=batch_size,
        batches=batches,
        seed=seed,
        split="train" if split == "train" else "test",
    )


def _audit(model: nn.Module, data: dict[str, Batch], step: int) -> list[TraceRow]:
    rows: list[TraceRow] = []

    def note(name: str, value: float | None) -> None:
        if value is not None:
            rows.append(TraceRow("followed", step, name, value))

    for kind, batch in data.items():
        blocks = audit_model_inverse(model, batch[0])
        for block in blocks:
            note(f"{kind} rel {block.block}", block.rel)
        if blocks:
            note(f"{kind} drift_max_rel", max(block.rel for block in blocks))
        parity = audit_gradients(model, loss_of, batch)
        note(f"{kind} gradient_angle_deg", parity.angle_deg)
        note(f"{kind} gradient_reference_angle_deg", parity.reference_angle_deg)
        note(f"{kind} stored_reference_angle_deg", parity.stored_reference_angle_deg)
    return rows


def _summary(rows: list[TraceRow], steps: int) -> tuple[Metrics, dict[str, str]]:
    def values(ending: str) -> list[float]:
        return [row.value for row in rows if row.name.endswith(ending)]

    own, stored = ([row.value for row in rows if row.name == name] for name in ("loss", "stored_loss"))
    metrics: Metrics = {"followed_loss_last": own[-1], "followed_stored_loss_last": stored[-1]}
    unmeasured: dict[str, str] = {}
    metrics["followed_gradient_angle_max_deg"] = largest(values(" gradient_angle_deg"))
    if drifts := values(" drift_max_rel"):
        metrics["followed_drift_max_rel"] = largest(drifts)
    else:
        unmeasured["followed_drift_max_rel"] = "the model has no reversible block"
    parted = [step for step, (a, b) in enumerate(zip(own, stored, strict=True)) if not abs(a - b) <= PARTED * abs(b)]
    if parted:
        metrics["followed_parted_step"] = parted[0]
    else:
        unmeasured["followed_parted_step"] = f"in {steps} steps the losses never differed by more than {PARTED:.0%}"
    return metrics, unmeasured
