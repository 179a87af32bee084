"""Memory over one step of a trial: what the bytes are from moment to moment, and whose they are at the peak."""

import html
import math
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative

from harness.store import RunStore
from reports.dress import dressed
from reports.frames import trace_frames
from reports.pairs import pairs
from reports.summary import at_depth

MIB = 2**20
# Of the trace; "phases" and "owners" are absent where the step could not be attributed, and "phases" from older traces.
TABLES = ("memory", "phases", "owners")
COLUMNS = ["id", "table", "index", "name", "value"]
# From the bottom up, with a fill pattern, so that they are told apart without colour; see docs/measures.md.
CATEGORIES = {
    "saved": "",
    "reconstruction": "/",
    "temporary": ".",
    "parameter": "\\",
    "gradient": "x",
    "optimizer": "-",
    "buffer": "|",
    "batch": "+",
    "unattributed": "",
}
# All there is of a step that was not attributed.
UNKNOWN = "not attributed"
OWNERS = 3
OWNER_LETTERS = 34
# What the axis leaves free above the peak, for its owners.
HEADROOM = 1.6


class Step(NamedTuple):
    """One trial's step; bytes above the level at its start.

    levels      a column for each category that rises, or UNKNOWN, and `time_s`; a row a moment
    held_bytes  what the rank held at the start; None where that is not known
    backward_s  when the backward begins; None where that is not known
    is_inferred whether that was taken from the levels, which is right to a few moments
    end_s       when the backward is over
    """

    levels: pd.DataFrame
    held_bytes: int | None
    backward_s: float | None
    is_inferred: bool
    end_s: float

    @property
    def total_bytes(self) -> pd.Series:
        return self.levels.drop(columns="time_s").sum(axis=1)

    @property
    def peak(self) -> pd.Series:
        """The moment of the peak: `time_s` and the bytes of each category."""
        return self.levels.iloc[int(self.total_bytes.to_numpy().argmax())]

    @property
    def at_peak(self) -> pd.Series:
        """Bytes of each category at the peak that has any, in order."""
        bytes_of = self.peak.drop("time_s")
        return bytes_of[bytes_of > 0]


def timelines(store: RunStore, trial_ids: Iterable[str]) -> pd.DataFrame:
    """The rows of these trials' traces that `memory_over_step` draws: columns id, table, index, name, value."""
    tables = trace_frames(store, trial_ids, TABLES)
    return pd.concat([rows.assign(table=table) for table, rows in tables.items()], ignore_index=True)[COLUMNS]


def chosen(frame: pd.DataFrame, *, most: int = 24) -> list[str]:
    """Ids of the finished trials to draw where there are too many for all: the deepest of each strategy and batch size
    first, then the next ones; among equals the largest batch. One of repeats."""
    if frame.empty:
        return []
    trials = frame[frame["status"] == "ok"].drop_duplicates(["strategy", "depth", "batch_size"])
    trials = trials.sort_values("depth", ascending=False, kind="stable")
    trials = trials.assign(rank=trials.groupby(["strategy", "batch_size"]).cumcount())
    order = ["rank", "batch_size", "strategy"]
    return trials.sort_values(order, ascending=[True, False, True])["id"].head(most).tolist()


def memory_over_step(timeline: pd.DataFrame, *, title: str, top_mib: float | None = None) -> go.Figure | None:
    """Stacked MiB above the level at the step's start, by category; forward and backward, the peak and its owners.

    timeline  of `timelines`, the rows of one trial
    top_mib   the highest peak of several figures that are to have one scale

    None when the trace has no memory over time, as of a step on CUDA that could not be attributed.
    """
    step = step_of(timeline)
    if step is None:
        return None
    figure = go.Figure()
    time_ms = [*(step.levels["time_s"] * 1e3).round(3), round(step.end_s * 1e3, 3)]
    for category in step.levels.columns.drop("time_s"):
        color = _color(category)
        figure.add_scatter(
            x=time_ms,
            y=_until_the_end((step.levels[category] / MIB).round(4)),
            name=category,
            mode="lines",
            # The level stays until the next allocation or release.
            line={"shape": "hv", "width": 0.5, "color": color},
            stackgroup="bytes",
            fillcolor=color,
            fillpattern={
                "shape": CATEGORIES.get(category, ""),
                "bgcolor": color,
                "fgcolor": "#222",
                "fgopacity": 0.55,
                "size": 7,
                "solidity": 0.18,
            },
            hovertemplate="%{y:.2f} MiB",
        )
    peak_mib = step.total_bytes.max() / MIB
    _mark_phases(figure, step)
    _mark_peak(figure, step, peak_mib, _owners(timeline))
    start = "level" if step.held_bytes is None else f"{step.held_bytes / MIB:.1f} MiB"
    end_ms = step.end_s * 1e3
    figure.update_xaxes(title_text="time in a step slowed by measuring (ms)", range=[0, end_ms * 1.05 or 1])
    figure.update_yaxes(
        title_text=f"MiB above the {start} at the start", range=[0, HEADROOM * max(peak_mib, top_mib or 0) or 1]
    )
    return dressed(figure, _description(step, title)).update_layout(
        title={"text": html.escape(title, quote=False), "font": {"size": 14}, "x": 0.01, "y": 0.98, "yanchor": "top"},
        margin={"t": 60},
        hovermode="x unified",
        legend={"traceorder": "normal"},
    )


def peak_sentences(frame: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """What the bytes are at the peak, reconstructed and stored, in the deepest cell of each model that `rows`, of
    `timelines`, has both of."""
    sentences = []
    steps = {trial_id: step for trial_id, own in rows.groupby("id") if (step := step_of(own)) is not None}
    attributed = {trial_id for trial_id, step in steps.items() if UNKNOWN not in step.levels}
    for pair in pairs(frame, "id"):
        if "reconstructed" not in pair.name:
            continue
        table = pair.table[pair.table["id"].isin(attributed) & pair.table["id_stored"].isin(attributed)]
        if table.empty:
            continue
        row = table.sort_values(["depth", "batch_size"]).iloc[-1]
        sentences.append(
            f"{pair.model}{at_depth(row['depth'])}, batch {row['batch_size']:.0f}: the peak is "
            f"{_shares(steps[row['id_stored']])} {pair.stored}, and {_shares(steps[row['id']])} {pair.name}."
        )
    return sentences


def step_of(timeline: pd.DataFrame) -> Step | None:
    """The step in one trial's rows of `timelines`; None where there is none."""
    memory = timeline[timeline["table"] == "memory"]
    points = memory.pivot_table(index="index", columns="name", values="value", aggfunc="first").sort_index()
    if points.empty or not {"time_s", "live_bytes"} <= set(points):
        return None
    points = points.replace([math.inf, -math.inf], math.nan).dropna(subset=["time_s", "live_bytes"]).fillna(0.0)
    if points.empty:
        return None
    phases = timeline[(timeline["table"] == "phases") & timeline["value"].abs().lt(math.inf)]
    phases = phases.drop_duplicates("name").set_index("name")["value"]
    end_s = float(phases.get("end_s", points["time_s"].iloc[-1]))
    categories = [category for category in CATEGORIES if f"{category}_bytes" in points]
    if not categories:
        levels = pd.DataFrame({"time_s": points["time_s"], UNKNOWN: points["live_bytes"]})
        return Step(levels, None, None, False, end_s)
    # What is held before the step is no part of a peak; what is more of it, such as gathered parameters, is.
    held = points[[f"{category}_bytes" for category in categories]].set_axis(categories, axis=1)
    rise = held - held.iloc[0]
    levels = rise.loc[:, (rise > 0).any()]
    if levels.empty:
        levels = rise[categories[:1]]
    inferred = "backward_s" not in phases
    backward_s = _backward_began(points) if inferred else float(phases["backward_s"])
    return Step(levels.assign(time_s=points["time_s"]), int(held.iloc[0].sum()), backward_s, inferred, end_s)


def _backward_began(points: pd.DataFrame) -> float | None:
    """From the levels: what is saved only grows in the forward and only shrinks in the backward, and between the two
    nothing else is live."""
    if "saved_bytes" not in points:
        return None
    most = points[points["saved_bytes"] == points["saved_bytes"].max()]
    return float(most.loc[most["live_bytes"].idxmin(), "time_s"])


def _owners(timeline: pd.DataFrame) -> list[tuple[str, int]]:
    """The largest owners of the peak, by name."""
    rows = timeline[(timeline["table"] == "owners") & (timeline["name"] != "others")]
    readable = rows["name"].map(_readable)
    sums = (
        rows["value"]
        .replace([math.inf, -math.inf], math.nan)
        .groupby(readable, sort=False)
        .sum()
        .sort_values(ascending=False, kind="stable")
    )
    return [(str(name), int(value)) for name, value in sums.head(OWNERS).items() if value > 0]


def _readable(name: str) -> str:
    """An owner, then its category; one name for an operation whoever calls it."""
    category, _, owner = name.partition(": ")
    owner = owner.removeprefix("aten::").removeprefix("aten.").removesuffix(".default")
    if len(owner) > OWNER_LETTERS:
        owner = "…" + owner[-OWNER_LETTERS:]
    return f"{owner} ({category})"


def _mark_phases(figure: go.Figure, step: Step) -> None:
    if step.backward_s is None:
        return
    middle_ms, end_ms = step.backward_s * 1e3, step.end_s * 1e3
    for at_ms in (middle_ms, end_ms):
        figure.add_vline(x=at_ms, line={"color": "#444", "width": 1, "dash": "dash"})
    label = {"showarrow": False, "yref": "paper", "font": {"size": 12, "color": "#444"}}
    figure.add_annotation(x=middle_ms / 2, y=1, yanchor="bottom", text="forward", **label)
    if step.is_inferred:
        begins = "backward, from about here"
        figure.add_annotation(x=middle_ms, y=1, xanchor="left", yanchor="bottom", text=begins, **label)
    else:
        figure.add_annotation(x=(middle_ms + end_ms) / 2, y=1, yanchor="bottom", text="backward", **label)
    figure.add_annotation(x=end_ms, y=1, xanchor="left", yanchor="top", textangle=90, text="optimizer's step", **label)


def _mark_peak(figure: go.Figure, step: Step, peak_mib: float, owners: list[tuple[str, int]]) -> None:
    peak_s = float(step.peak["time_s"])
    place = peak_s / step.end_s if step.end_s else 0
    lines = [f"<b>peak {peak_mib:.1f} MiB</b>"]
    lines += [f"{nbytes / MIB:.1f} {html.escape(name, quote=False)}" for name, nbytes in owners]
    others_mib = peak_mib - sum(nbytes for _, nbytes in owners) / MIB
    if owners and others_mib > 0:
        lines.append(f"{others_mib:.1f} others")
    side = "left" if place < 1 / 3 else "right" if place > 2 / 3 else "center"
    figure.add_annotation(
        x=peak_s * 1e3,
        y=peak_mib,
        text="<br>".join(lines),
        align="left",
        xanchor=side,
        yanchor="bottom",
        ax=0,
        ay=-14,
        arrowhead=2,
        arrowcolor="#222",
        bgcolor="rgba(255, 255, 255, 0.85)",
        font={"size": 11, "color": "#222"},
    )


def _until_the_end(levels: pd.Series) -> list[float]:
    return [*levels, levels.iloc[-1]]


def _color(category: str) -> str:
    if category in ("unattributed", UNKNOWN):
        return qualitative.Safe[-1]
    return qualitative.Safe[list(CATEGORIES).index(category)]


def _shares(step: Step) -> str:
    at_peak = step.at_peak
    shares = [f"{percent} % {category}" for category, percent in percents(at_peak).items() if percent]
    listed = " and ".join([", ".join(shares[:-1])] * (len(shares) > 1) + shares[-1:])
    return f"{at_peak.sum() / MIB:.1f} MiB" + (f" ({listed})" if listed else "")


def percents(parts: pd.Series) -> dict[str, int]:
    """Whole percents that add up to 100: those that lose most by rounding down are rounded up."""
    total = parts.sum()
    if not total:
        return {}
    exact = {str(name): 100 * float(value) / float(total) for name, value in parts.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    short = 100 - sum(whole.values())
    for name in sorted(exact, key=lambda name: whole[name] - exact[name])[:short]:
        whole[name] += 1
    return whole


def _description(step: Step, title: str) -> str:
    phase = ""
    if step.backward_s is not None:
        phase = " in the forward" if step.peak["time_s"] < step.backward_s else " in the backward"
    return (
        f"Memory over one step, {title}: MiB above the level at the step's start, stacked by category. The peak{phase} "
        f"is {_shares(step)}"
    )
