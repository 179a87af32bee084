"""Figures and a table to one HTML file that opens from disk, without a network."""

import base64
import gzip
import json
import math
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from harness.store import LAWS, RunStore
from reports import amplification, fidelity, verdict
from reports.columns import columns_of
from reports.datatables import datatables_css, datatables_js
from reports.frames import frame_of, laws, missing_ids
from reports.origins import facts_of
from reports.sections import Section, sections_of
from reports.summary import headings_of, summary
from reports.table import SYMBOLS
from reports.tails import tails

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("data.js", "rows.js", "filter.js", "kept.js", "figures.js", "table.js", "report.js")
# Sections that are there where a study asks for them.
ASKED_FOR = ("amplification", "training")
# From so many points on a figure is drawn by WebGL.
MANY_POINTS = 2000


def build_report(store: RunStore, refresh_s: int | None = None) -> str:
    """The report of a run, finished or not, as one HTML page, which a browser reads again every `refresh_s` seconds, if
    given. Raises RecordError for an unreadable record."""
    records = store.read_records()
    frame = frame_of(records)
    missing = missing_ids(store)
    study = store.read_study() or {}
    summary_rows = summary(frame) if len(frame) else []
    sections = sections_of(store, frame)
    columns = columns_of(frame, records) if len(frame) else None
    lines = laws(frame)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        name=study.get("name") or "trials",
        refresh_s=refresh_s,
        question=study.get("question"),
        prediction=study.get("predict"),
        status=verdict.status_sentence(frame, len(missing)),
        trouble=verdict.trouble_sentence(frame),
        answers=_answers(frame, sections),
        summary=summary_rows,
        summary_headings=headings_of(summary_rows),
        laws=LAWS if len(lines) else None,
        missing=missing,
        unplanned=sorted(store.unplanned_ids()),
        unmeasured=[record for record in records if record.status != "ok"],
        tails=tails(store, records),
        symbols=SYMBOLS,
        sections=sections,
        origins=[(name, " / ".join(values)) for name, values in facts_of(frame).items() if values],
        columns=columns,
        step_bars=verdict.bars_sentence(frame),
        command=f"revnet run {store.uri}/study.yaml --out {store.uri}",
        log_command=f"revnet logs {store.uri}",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        harness_version=version("revnet-harness"),
        plotly_js=Markup(get_plotlyjs()),
        table_js=packed(datatables_js()) if columns else "",
        data=packed(
            json.dumps(
                {"columns": columns, "figures": _figures(sections), "laws": lines.to_csv(index=False)}, allow_nan=False
            )
        ),
        style=Markup(datatables_css() + (TEMPLATES / "report.css").read_text()),
        script=Markup("\n".join((TEMPLATES / name).read_text() for name in SCRIPTS)),
    )


def packed(text: str) -> str:
    """As the page unpacks it: a tenth of the size, and no text of anybody's that a browser could take for HTML."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _figures(sections: list[Section]) -> dict[str, Any]:
    views = [view for section in sections for view in (*section.views, *section.choices)]
    return {view.anchor: _plain(view.figure) for view in views if view.figure is not None}


def _plain(figure: go.Figure) -> dict[str, Any]:
    """The figure as plotly.js reads it; its traces' `meta` stay, by which the page filters them."""
    plain = _listed(figure.to_plotly_json())
    drawn = [trace for trace in plain["data"] if trace.get("type") == "scatter"]
    shown = [trace for trace in drawn if {"points", "segments"} & trace.get("meta", {}).keys()]
    if sum(len(trace["x"]) for trace in shown) > MANY_POINTS:
        for trace in shown:
            trace["type"] = "scattergl"
    return plain


def _listed(value: Any) -> Any:
    """Arrays as lists, and what is no number as null."""
    if isinstance(value, dict) and "bdata" in value:
        flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        shape = value.get("shape")
        return _listed(flat.reshape([int(length) for length in str(shape).split(",")]) if shape else flat)
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _listed(value.tolist())
    if isinstance(value, list | tuple | pd.Series | pd.Index):
        return [_listed(each) for each in value]
    if isinstance(value, np.generic):
        return _listed(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _answers(frame: pd.DataFrame, sections: list[Section]) -> list[str]:
    """What a study asked for expressly comes first."""
    if frame.empty:
        return []
    asked = [view for section in sections if section.anchor in ASKED_FOR for view in section.views if view.figure]
    return [
        *(finding for view in asked for finding in view.findings if finding != amplification.ADVICE),
        *verdict.mode_sentences(frame),
        *verdict.growth_sentences(frame, "activation_peak_bytes", "growth of the activation peak"),
        *verdict.saving_sentences(frame),
        *(sentence for sentence in verdict.time_sentences(frame) if "reconstructed" in sentence),
        *fidelity.drift_sentences(frame),
        *fidelity.guard_sentences(frame),
    ]
