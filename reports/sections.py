"""The figures of a report in their order, each with what it says and what it defines."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from harness.store import RunStore
from reports import amplification, drift_figures, fidelity, figures, predictions, timeline, training, verdict
from reports.frames import trace_frames
from reports.memory_figures import memory_against

PEAK, SAVED = "activation_peak_bytes", "activation_saved_bytes"
ARROWS = "A thin line leads from the stored trial to the others of the same network and batch. "
NOTHING = "Not drawn: no finished trial has these figures."


class View(NamedTuple):
    """A figure with what it says, the most important first; without a figure, the sentence says why there is none.

    label  what tells it from the other views of its section
    """

    anchor: str
    label: str
    findings: list[str]
    figure: go.Figure | None


class Choice(NamedTuple):
    """One trial's figure, of those that two views can show; `row` is the trial's in the frame."""

    anchor: str
    name: str
    row: int
    figure: go.Figure


class Section(NamedTuple):
    """One question that a report answers, in one view or in several to choose from; with `choices` in two views side by
    side, each of any of these."""

    anchor: str
    title: str
    views: list[View]
    definition: str
    choices: Sequence[Choice] = ()


def sections_of(store: RunStore, frame: pd.DataFrame) -> list[Section]:
    """All sections of the trials in `frame`, those that have nothing to draw among them."""
    measured = frame[frame["status"] == "ok"] if len(frame) else frame
    tables = trace_frames(store, measured["id"], ("drift", amplification.TABLE, training.TABLE))
    traces, causes, followed = tables.values()
    sections = [_memory(frame), _time(frame)]
    if predictions.is_mentioned(frame):
        sections.append(_prediction(frame))
    if (step := _step(store, frame)) is not None:
        sections.append(step)
    sections.append(_drift(frame, traces))
    if len(causes):
        sections.append(_amplification(frame, causes, traces))
    if len(followed):
        sections.append(_training(frame, followed))
    return sections


def _memory(frame: pd.DataFrame) -> Section:
    names = {"peak": (PEAK, "activation peak"), "saved": (SAVED, "saved activations")}
    views = []
    for anchor, (metric, label) in names.items():
        views.append(
            _view(
                anchor,
                f"{label}, by depth",
                lambda metric=metric, label=label: memory_against(frame, metric, label),
                lambda metric=metric, label=label: [
                    *verdict.growth_sentences(frame, metric, f"growth of the {label}"),
                    *verdict.line_sentences(frame, metric),
                ],
            )
        )
    for anchor, (metric, label) in names.items():
        view = _view(
            f"{anchor}-batch",
            f"{label}, by batch",
            lambda metric=metric, label=label: memory_against(frame, metric, label, "batch_size"),
            lambda metric=metric, label=label: verdict.batch_sentences(frame, metric, label),
        )
        if view.figure is not None:
            views.append(view)
    return Section(
        "memory",
        "Memory against depth and batch",
        views,
        "Activation peak: the highest rise of live bytes above the level at the start of a step, with parameters, "
        "gradients, optimizer state and the batch allocated before it; so activations, reconstruction buffers and "
        "temporaries. Under ZeRO 1 to 3 also the engine's buckets of reduced gradients. Saved activations: bytes alive "
        "between forward and backward, above the same level. Lines: least squares per block, or per sample, through "
        "the medians of repeats; at their ends, where there is room, the slope ± half of its 95 % interval, which of "
        "three points is wide. "
        "Bars: lowest to highest of the repeats. Dashed: predicted before the trial ran. An "
        "open cross ran out of memory; dotted: where the memory ends.",
    )


def _time(frame: pd.DataFrame) -> Section:
    bars = verdict.bars_sentence(frame)
    few = len(frame) <= figures.BARS
    view = _view(
        "time",
        "",
        lambda: figures.time_against_memory(frame),
        lambda: verdict.mode_sentences(frame) + verdict.time_sentences(frame),
    )
    return Section(
        "time",
        "Time against memory",
        [view],
        "Step time: forward, backward and optimizer, from idle device to idle device, warm-up thrown away; median. "
        + (f"Bars: {bars}. " if bars and few else "")
        + (ARROWS if len(frame) <= figures.LINES else "")
        + "A ring, the Pareto front: no other trial of the same depth, batch, data and ranks is better in one of the "
        "two and no worse in the other; equals are all in it, or none.",
    )


def _step(store: RunStore, frame: pd.DataFrame) -> Section | None:
    """None where no trial has its memory over time."""
    rows = timeline.timelines(store, timeline.chosen(frame))
    places = dict(zip(frame["id"], frame.index.tolist(), strict=True))
    choices = []
    for trial_id, own in rows.groupby("id", sort=False):
        row = places[trial_id]
        name = _trial_name(frame.loc[row])
        figure = timeline.memory_over_step(own, title=name)
        if figure is not None:
            choices.append(Choice(f"step-{trial_id}", name, row, figure))
    if not choices:
        return None
    findings = timeline.peak_sentences(frame, rows) or ["No trial has a stored one of its cell to compare with."]
    pair = _pair_of(choices, frame)
    return Section(
        "step",
        "Memory over one step",
        [View(choice.anchor, choice.name, findings * (choice is pair[0]), choice.figure) for choice in pair],
        "Bytes alive at each moment of one step, above the level at its start, by what they are: saved for the "
        "backward, rebuilt inputs and their gradients (reconstruction), of a running operation (temporary), and so on; "
        "unattributed is what could not be told. The deepest trial of each strategy and batch is here, and some more; "
        "what the others left is in the run directory.",
        choices,
    )


def _pair_of(choices: Sequence[Choice], frame: pd.DataFrame) -> list[Choice]:
    """A trial that stores its activations and one of the same cell that does not, as far as there are any."""
    by_row = {choice.row: choice for choice in choices}
    shown = frame.loc[list(by_row)]
    pairs = figures.from_stored(shown)
    rebuilt = set(shown.index[shown["activations"] == "reconstructed"])
    best = next((pair for pair in pairs if pair[1] in rebuilt), next(iter(pairs), tuple(list(by_row)[:2])))
    return [by_row[row] for row in best]


def _trial_name(trial: pd.Series) -> str:
    model, _, rest = str(trial["strategy"]).partition(" · ")
    depth = "" if pd.isna(trial["depth"]) else f"{trial['depth']:.0f}"
    return f"{model}{depth} · {rest}, batch {trial['batch_size']}"


def _drift(frame: pd.DataFrame, traces: pd.DataFrame) -> Section:
    views = [
        _view(
            "drift",
            "error by block",
            lambda: drift_figures.drift_by_block(frame, traces),
            lambda: fidelity.error_sentences(frame, traces),
        )
    ]
    angles = _view(
        "angle",
        "gradient angle by depth",
        lambda: drift_figures.angle_against_depth(frame),
        lambda: fidelity.angle_sentences(frame),
    )
    if angles.figure is not None:
        views.append(angles)
    return Section(
        "drift",
        "Drift",
        views,
        "Drift: error of a block's rebuilt input against the input that the forward saw, relative L2 norm, on the "
        "initial weights. Gradient angle: degrees between the gradient by all parameters with the chosen "
        "activations and the one with stored, same weights, batch and precision; dotted, the stored one against "
        "float64, how far off that is itself.",
    )


def _prediction(frame: pd.DataFrame) -> Section:
    figure = figures.predicted_against_measured(frame)
    findings = predictions.prediction_sentences(frame) or ["Not drawn: no trial has finished."]
    return Section(
        "predicted",
        "Predicted against measured",
        [View("predicted", "", findings, figure)],
        "Predicted: the same step on tensors without contents, before it runs, as revnet plan shows it. Off by: "
        "predicted over measured, less one; with + more was predicted. On the line both are equal.",
    )


def _amplification(frame: pd.DataFrame, causes: pd.DataFrame, traces: pd.DataFrame) -> Section:
    view = _view(
        "amplification",
        "",
        lambda: amplification.amplification_by_block(frame, causes, traces),
        lambda: amplification.amplification_sentences(frame, causes, traces),
    )
    return Section(
        "amplification",
        "Amplification",
        [view],
        "Measured: the drift of each block, as above. Predicted: what rounding, of the streams and within F "
        "and G, becomes on its way back through the Jacobians of the inverses, to first order and before "
        "anything is rebuilt. Bound: the same if every error met the worst direction of every inverse. A gap: "
        "the blocks behind it are rebuilt from another stored output. Lines may leave a panel, so that the "
        "measured errors can be told apart.",
    )


def _training(frame: pd.DataFrame, followed: pd.DataFrame) -> Section:
    view = _view(
        "training",
        "",
        lambda: training.angle_over_training(frame, followed),
        lambda: training.training_sentences(frame, followed),
    )
    return Section(
        "training",
        "Drift over training",
        [view],
        "Gradient angle: as above, on the weights after so many steps of training, on images of the trained "
        "split, of the test split where it has images of its own, and on noise. Dotted: the stored gradient "
        "against float64: how far off that is itself. The stored twin sees the same batches in the same order.",
    )


def _view(anchor: str, label: str, draw: Callable[[], go.Figure | None], find: Callable[[], list[str]]) -> View:
    try:
        figure = draw()
    except KeyError as absent:
        return View(anchor, label, [f"Not drawn: no trial recorded {absent}."], None)
    if figure is None:
        return View(anchor, label, [NOTHING], None)
    return View(anchor, label, find() or ["No line can be fitted or pair compared yet."], figure)
