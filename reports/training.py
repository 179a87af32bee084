"""Drift over training: the gradient angle of rebuilt activations against the steps trained, by kind of data."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reports.dress import FLOOR_LOOK, add_key, darkened, dressed, lined, marked, strategy_styles
from reports.largest import amount

TABLE = "followed"
KINDS = {"train": "training images", "held_out": "held-out images", "random": "noise"}
ANGLE, FLOOR = "gradient_angle_deg", "stored_reference_angle_deg"


def angle_over_training(frame: pd.DataFrame, followed: pd.DataFrame) -> go.Figure | None:
    """Degrees against steps trained, one panel for each kind of data; dotted, the stored gradient against float64.

    An angle of 0, which a logarithmic axis has no place for, stands on a line of its own at the bottom. None when no
    trial was followed.
    """
    rows = _angles(frame, followed)
    if rows.empty:
        return None
    positive = rows["value"][rows["value"] > 0]
    zero = 10.0 ** (math.floor(math.log10(positive.min())) - 1) if len(positive) else 1e-16
    kinds = [kind for kind in KINDS if kind in set(rows["kind"])]
    titles = [KINDS[kind] for kind in kinds]
    named: set[str] = set()
    places = dict(zip(frame["id"], frame.index, strict=True))
    figure = make_subplots(cols=len(kinds), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    for column, kind in enumerate(kinds, start=1):
        for strategy, (color, marker, dash) in strategy_styles(frame).items():
            for name, look in (
                (ANGLE, {"mode": "lines+markers"} | lined(color, marker, dash)),
                (FLOOR, {"mode": "lines", "line": FLOOR_LOOK | {"color": darkened(color)}, "zorder": 3}),
            ):
                own = rows[(rows["kind"] == kind) & (rows["metric"] == name) & (rows["strategy"] == strategy)]
                if own.empty:
                    continue
                middle = own.groupby("index")["value"].median()
                label = strategy if name == ANGLE else f"{strategy}: stored against float64"
                figure.add_scatter(
                    x=middle.index,
                    y=middle.where(middle > 0, zero),
                    customdata=middle,
                    name=label,
                    legendgroup=strategy,
                    showlegend=name == ANGLE and label not in named,
                    marker=marked(color, marker),
                    meta={"all": sorted({places[trial_id] for trial_id in own["id"]})},
                    hovertemplate="%{customdata:.3g} degrees after %{x} steps<extra>%{fullData.name}</extra>",
                    row=1,
                    col=column,
                    **look,
                )
                named.add(label)
        figure.update_xaxes(title_text="steps trained", row=1, col=column)
    if (rows["metric"] == FLOOR).any():
        add_key(figure, "stored against float64", FLOOR_LOOK)
    powers = range(round(math.log10(zero)) + 1, 3)
    ticks = {zero: "0"} | {10.0**power: f"1e{power}" if power else "1" for power in powers}
    figure.update_yaxes(type="log", tickvals=list(ticks), ticktext=list(ticks.values()))
    figure.update_yaxes(title_text="gradient angle (degrees)", row=1, col=1)
    description = "Gradient angle in degrees against steps trained, by strategy and kind of data"
    return dressed(figure, description).update_layout(height=440)


def training_sentences(frame: pd.DataFrame, followed: pd.DataFrame) -> list[str]:
    """The largest angle of each strategy by kind of data, in how many measurements it is no number, and when its loss
    left that of the stored twin."""
    sentences = []
    rows = _angles(frame, followed)
    for strategy, own in rows[rows["metric"] == ANGLE].groupby("strategy", sort=False) if len(rows) else ():
        values = {name: own.loc[own["kind"] == kind, "value"].astype(float) for kind, name in KINDS.items()}
        angles = ", ".join(f"{_largest(each)} on {name}" for name, each in values.items() if len(each))
        if (own["value"] == 0).all():
            angles = "0° on each kind of data"
        trials = frame[frame["strategy"] == strategy]
        sentences.append(
            f"{strategy}: over {own['index'].max():.0f} steps the gradient's largest angle to that with stored "
            f"activations is {angles}; {_parting(trials)}."
        )
    return sentences


def _largest(values: pd.Series) -> str:
    finite = values[np.isfinite(values)]
    lost = len(values) - len(finite)
    if finite.empty:
        return "not a number"
    return f"{amount(finite.max())}°" + (f" (not a number in {lost} of {len(values)} measurements)" if lost else "")


def _parting(trials: pd.DataFrame) -> str:
    steps = trials.get("followed_parted_step", pd.Series(dtype=float)).dropna()
    if steps.empty:
        return "its loss stays within 1 % of the stored twin's"
    return f"its loss parts from the stored twin's by more than 1 % in step {steps.min():.0f}"


def _angles(frame: pd.DataFrame, followed: pd.DataFrame) -> pd.DataFrame:
    """Columns id, index, value, kind, metric, strategy."""
    if followed.empty:
        return pd.DataFrame(columns=["id", "index", "value", "kind", "metric", "strategy"])
    parts = followed["name"].str.split(" ", n=1, expand=True).reindex(columns=[0, 1])
    rows = followed.assign(kind=parts[0], metric=parts[1])
    rows = rows[rows["metric"].isin([ANGLE, FLOOR])].drop(columns="name")
    return rows.merge(frame[["id", "strategy"]], on="id")
