"""What `revnet plan` prints: each trial with its predicted memory, and a summary by strategy."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from harness.forecast import Unpredicted
from harness.predict import Prediction
from harness.sizes import in_words
from harness.trials import AXES, MODES, TrialSpec

MIB = 2**20
Predictions = Mapping[str, Prediction | Unpredicted]
# What makes a strategy: the family, its input, what becomes of the activations, under which precision and engine.
STRATEGY = (
    *("model", "channels", "log_scale_gain", "data.name", "data.image_size"),
    *("activations", "budget_bytes", "compute", "reconstruction", *MODES, "zero_stage", "workers"),
)
# Above this share of the memory a trial may still run out of it: allocators leave gaps.
TIGHT = 0.95


class Fit(NamedTuple):
    """Whether a trial fits into `memory_bytes`: yes, tight or no; and why not."""

    word: str
    why: str = ""

    @classmethod
    def of(cls, prediction: Prediction, memory_bytes: int) -> "Fit":
        needed_bytes = prediction.allocated_peak_bytes
        if needed_bytes <= memory_bytes:
            return cls("yes" if needed_bytes <= TIGHT * memory_bytes else "tight")
        others_bytes = prediction.activation_peak_bytes - prediction.activation_saved_bytes
        parts = {
            "saved activations": prediction.activation_saved_bytes,
            f"other activations and temporaries ({prediction.peak_at})": others_bytes,
            "parameters": prediction.parameter_bytes,
            "gradients": prediction.gradient_bytes,
            "optimizer": prediction.optimizer_bytes,
        }
        name, size_bytes = max(parts.items(), key=lambda part: part[1])
        return cls("no", f"{in_words(needed_bytes)}, {in_words(size_bytes)} of it {name}")


def wide_console() -> Console:
    """As wide as its content where nobody sees it: a file or a pipe has no width. Text is no markup."""
    return Console(width=None if Console().is_terminal else 200, markup=False)


def print_plan(
    trials: Sequence[TrialSpec],
    predictions: Predictions,
    done: Collection[str],
    memory_bytes: Callable[[TrialSpec], int | None],
) -> None:
    """A table of the trials with the fields that differ between them; those that do not are listed once.

    memory_bytes  of a trial's device; None: as the study's resources say, and no verdict where they say nothing
    """
    console = wide_console()
    varying = [name for name in AXES if len({trial.value(name) for trial in trials}) > 1]
    fits = {trial.id: _fit(trial, predictions[trial.id], memory_bytes(trial)) for trial in trials}
    with_fits = any(fits.values())
    measures = ["saved MiB", "peak MiB", "total MiB"]
    table = Table("id", *varying, box=None, pad_edge=False)
    for name in measures:
        table.add_column(name, justify="right")
    for name in ["fits"] * with_fits + ["state"]:
        table.add_column(name)
    for trial in trials:
        fit = fits[trial.id]
        verdict = [("" if fit is None else f"{fit.word}: {fit.why}" if fit.why else fit.word)] if with_fits else []
        state = "done" if trial.id in done else "to run"
        own = (str(trial.value(name)) for name in varying)
        table.add_row(trial.id, *own, *_sizes(predictions[trial.id]), *verdict, state)
    console.print(table)
    constant = {name: trials[0].value(name) for name in AXES if name not in varying}
    same = ", ".join(f"{name} {value}" for name, value in constant.items() if value is not None)
    console.print(f"all: {same}", highlight=False)
    console.print()
    console.print(_summary(trials, predictions, fits, varying))
    for reason, count in _reasons(predictions).items():
        console.print(f"{count} trials without a prediction: {reason}", highlight=False)
    left = sum(trial.id not in done for trial in trials)
    misfits = sum(fit is not None and fit.word == "no" for fit in fits.values())
    fitting = f", {misfits} predicted not to fit" if with_fits else ""
    console.print(f"{len(trials)} trials, {len(trials) - left} done, {left} to run{fitting}", highlight=False)


def _summary(
    trials: Sequence[TrialSpec], predictions: Predictions, fits: Mapping[str, Fit | None], varying: Collection[str]
) -> Table:
    strategies: dict[tuple[str, ...], list[TrialSpec]] = defaultdict(list)
    for trial in trials:
        strategies[tuple(str(trial.value(name)) for name in STRATEGY if name in varying)].append(trial)
    with_fits = any(fits.values())
    table = Table(*(name for name in STRATEGY if name in varying), box=None, pad_edge=False)
    for name in ["trials", "peak MiB/block", "highest peak MiB", "highest total MiB", *["not fitting"] * with_fits]:
        table.add_column(name, justify="right")
    for names, members in strategies.items():
        found = [p for t in members if isinstance(p := predictions[t.id], Prediction)]
        peak, total = (
            f"{max(getattr(p, name) for p in found) / MIB:.1f}" if found else "-"
            for name in ("activation_peak_bytes", "allocated_peak_bytes")
        )
        misfits = sum(fit is not None and fit.word == "no" for t in members if (fit := fits[t.id]))
        last = [str(misfits)] if with_fits else []
        table.add_row(*names, str(len(members)), _slope(members, predictions), peak, total, *last)
    return table


def _slope(trials: Sequence[TrialSpec], predictions: Predictions) -> str:
    """Of the peak, from the shallowest to the deepest at the largest batch size."""
    largest = max(trial.batch_size for trial in trials)
    points = sorted(
        (p.blocks, p.activation_peak_bytes)
        for t in trials
        if t.batch_size == largest and isinstance(p := predictions[t.id], Prediction) and p.blocks is not None
    )
    if not points or points[0][0] == points[-1][0]:
        return "-"
    (low, low_bytes), (high, high_bytes) = points[0], points[-1]
    return f"{(high_bytes - low_bytes) / (high - low) / MIB:.3f}"


def _fit(trial: TrialSpec, prediction: Prediction | Unpredicted, memory_bytes: int | None) -> Fit | None:
    limit_bytes = memory_bytes or trial.resources.memory_bytes
    if limit_bytes is None or not isinstance(prediction, Prediction):
        return None
    return Fit.of(prediction, limit_bytes)


def _sizes(prediction: Prediction | Unpredicted) -> list[str]:
    if isinstance(prediction, Unpredicted):
        return [prediction.kind, "", ""]
    names = ("activation_saved_bytes", "activation_peak_bytes", "allocated_peak_bytes")
    return [f"{getattr(prediction, name) / MIB:.1f}" for name in names]


def _reasons(predictions: Predictions) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for prediction in predictions.values():
        if isinstance(prediction, Unpredicted):
            counts[prediction.reason] += 1
    return counts
