"""Figures and a table to one HTML file that opens from disk, without a network."""

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from harness.record import Record
from harness.store import LAWS, RunStore
from reports import amplification, figures, predictions, training, verdict
from reports.frames import laws, missing_ids, trace_frame, trials_frame
from reports.summary import headings_of, summary
from reports.table import SYMBOLS, trials_table

TEMPLATES = Path(__file__).parent / "templates"


class Section(NamedTuple):
    """A figure with what it says; without a figure, the sentence says why there is none."""

    anchor: str
    title: str
    findings: list[str]
    definition: str
    figure: Markup | None


def build_report(store: RunStore) -> str:
    """The report of a run, finished or not, as one HTML page. Raises RecordError for an unreadable record."""
    frame = trials_frame(store)
    missing = missing_ids(store)
    records = store.read_records()
    study = store.read_study() or {}
    summary_rows = summary(frame) if len(frame) else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        name=study.get("name") or "trials",
        question=study.get("question"),
        prediction=study.get("predict"),
        status=verdict.status_sentence(frame, len(missing)),
        trouble=verdict.trouble_sentence(frame),
        answers=_answers(frame),
        summary=summary_rows,
        summary_headings=headings_of(summary_rows),
        laws=LAWS if len(laws(frame)) else None,
        missing=missing,
        unplanned=sorted(store.unplanned_ids()),
        unmeasured=[record for record in records if record.status != "ok"],
        symbols=SYMBOLS,
        sections=_sections(store, frame),
        origins=_origins(records),
        table=trials_table(frame, records),
        step_bars=verdict.bars_sentence(frame),
        command=f"revnet run {store.uri}/study.yaml --out {store.uri}",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        harness_version=version("revnet-harness"),
        plotly_js=Markup(get_plotlyjs()),
        style=Markup((TEMPLATES / "report.css").read_text()),
        script=Markup((TEMPLATES / "report.js").read_text()),
    )


def _answers(frame: pd.DataFrame) -> list[str]:
    if frame.empty:
        return []
    return [
        *verdict.growth_sentences(frame, "activation_peak_bytes", "growth of the activation peak"),
        *verdict.saving_sentences(frame),
        *(sentence for sentence in verdict.time_sentences(frame) if "reconstructed" in sentence),
        *verdict.drift_sentences(frame),
        *verdict.guard_sentences(frame),
    ]


def _sections(store: RunStore, frame: pd.DataFrame) -> list[Section]:
    measured = frame[frame["status"] == "ok"] if len(frame) else frame
    traces = trace_frame(store, list(measured["id"]), "drift")
    peak, saved = "activation_peak_bytes", "activation_saved_bytes"
    bars = verdict.bars_sentence(frame)
    sections = [
        _section(
            "peak",
            "Activation peak against depth",
            lambda: figures.memory_against_depth(frame, peak, "activation peak"),
            lambda: [
                *verdict.growth_sentences(frame, peak, "growth of the activation peak"),
                *verdict.line_sentences(frame, peak),
            ],
            "Activation peak: the highest rise of live bytes above the level at the start of a step, with parameters, "
            "gradients, optimizer state and the batch allocated before it; so activations, reconstruction buffers and "
            "temporaries. Under ZeRO 1 to 3 also the engine's buckets of reduced gradients. Lines: least squares per "
            "block, through the medians of repeats. Bars: lowest to highest of the repeats. An open cross ran out of "
            "memory.",
        ),
        _section(
            "saved",
            "Saved activations against depth",
            lambda: figures.memory_against_depth(frame, saved, "saved activations"),
            lambda: [
                *verdict.growth_sentences(frame, saved, "growth of the saved activations"),
                *verdict.line_sentences(frame, saved),
            ],
            "Saved activations: bytes alive between forward and backward, above the level at the start of the step.",
        ),
        _section(
            "time",
            "Time against memory",
            lambda: figures.time_against_memory(frame),
            lambda: verdict.time_sentences(frame),
            "Step time: forward, backward and optimizer, from idle device to idle device, warm-up thrown away; median. "
            + (f"Bars: {bars}. " if bars else "")
            + "A thin line joins the stored trial to the others of the same network and batch.",
        ),
        _section(
            "drift",
            "Drift by block",
            lambda: figures.drift_by_block(frame, traces),
            lambda: verdict.drift_sentences(frame),
            "Drift: error of a block's rebuilt input against the input that the forward saw, relative L2 norm, on the "
            "initial weights. Gradient angle: degrees between the gradient by all parameters with the chosen "
            "activations and the one with stored, same weights, batch and precision.",
        ),
    ]
    causes = trace_frame(store, list(measured["id"]), amplification.TABLE)
    if len(causes):
        sections.append(
            _section(
                "amplification",
                "Amplification",
                lambda: amplification.amplification_by_block(frame, causes, traces),
                lambda: amplification.amplification_sentences(frame, causes, traces),
                "Measured: the drift of each block, as above. Predicted: what rounding, of the streams and within F "
                "and G, becomes on its way back through the Jacobians of the inverses, to first order and before "
                "anything is rebuilt. Bound: the same if every error met the worst direction of every inverse. A gap: "
                "the blocks behind it are rebuilt from another stored output. Lines may leave a panel, so that the "
                "measured errors can be told apart.",
            )
        )
    followed = trace_frame(store, list(measured["id"]), training.TABLE)
    if len(followed):
        sections.append(
            _section(
                "training",
                "Drift over training",
                lambda: training.angle_over_training(frame, followed),
                lambda: training.training_sentences(frame, followed),
                "Gradient angle: as above, on the weights after so many steps of training, on images of the trained "
                "split, of the test split where it has images of its own, and on noise. Dotted: the stored gradient "
                "against float64: how far off that is itself. The stored twin sees the same batches in the same order.",
            )
        )
    if predictions.is_mentioned(frame):
        sections.insert(2, _prediction_section(frame))
    return sections


def _prediction_section(frame: pd.DataFrame) -> Section:
    anchor, title = "predicted", "Predicted against measured"
    definition = (
        "Predicted: the same step on tensors without contents, before it runs, as revnet plan shows it. Off by: "
        "predicted over measured, less one; with + more was predicted. On the line both are equal."
    )
    figure = figures.predicted_against_measured(frame)
    findings = predictions.prediction_sentences(frame) or ["Not drawn: no trial has finished."]
    return Section(anchor, title, findings, definition, None if figure is None else _figure_html(figure, anchor))


def _section(
    anchor: str,
    title: str,
    draw: Callable[[], go.Figure | None],
    find: Callable[[], list[str]],
    definition: str,
) -> Section:
    try:
        figure = draw()
    except KeyError as absent:
        return Section(anchor, title, [f"Not drawn: no trial recorded {absent}."], definition, None)
    if figure is None:
        return Section(anchor, title, ["Not drawn: no finished trial has these figures."], definition, None)
    return Section(anchor, title, find(), definition, _figure_html(figure, anchor))


def _figure_html(figure: go.Figure, anchor: str) -> Markup:
    description = figure.layout["meta"]["description"]
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{anchor}",
        config={
            "responsive": True,
            "displaylogo": False,
            "toImageButtonOptions": {"format": "svg", "filename": anchor},
        },
    )
    return Markup('<div class="figure" role="img" aria-label="{}">{}</div>').format(description, Markup(html))


def _origins(records: list[Record]) -> list[tuple[str, str]]:
    """Device, libraries and commit; each line with every value that occurs, since a run may span machines."""
    facts: dict[str, dict[str, None]] = {}

    def note(key: str, value: object) -> None:
        if value not in (None, ""):
            facts.setdefault(key, {})[str(value)] = None

    for record in records:
        machine = record.machine
        note("device", machine.get("device_name"))
        note("driver", machine.get("cuda_driver"))
        if "memory_bytes" in machine:
            note("host", f"{machine.get('cpu_count')} cores, {machine['memory_bytes'] / 2**30:.0f} GiB")
        note("threads", machine.get("threads"))
        note("system", machine.get("platform"))
        for package, number in record.versions.items():
            note(package, number)
        if record.git:
            note("commit", record.git["commit"][:12] + (" and uncommitted changes" if record.git["dirty"] else ""))
    return [(key, " / ".join(values)) for key, values in facts.items()]
