"""Why rebuilt activations drift: by block, the error that was measured beside what the blocks' Jacobians predict."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reports.dress import dressed, marked, strategy_styles

TABLE = "amplification"
COLUMNS = 3
# Of a panel with its title of two lines and the title of its axis, and of these alone.
PANEL_PX, TITLES_PX = 300, 115
# Of compute and of streams, from coarse to fine; tf32 rounds to as many digits as fp16. A prediction is made in fp32 at
# least, so that it knows what F and G round there.
_DIGITS = {"bf16": 8, "fp16": 11, "tf32": 11, "fp32": 24, "fp64": 24}
ADVICE = (
    "Where the error explodes: take the exact grid if the couplings are additive; if they are affine, a smaller clamp, "
    "smaller initial log-scales or a regularizer of them, or fewer blocks between stored points (activations "
    "budgeted); wider streams help only as far as F and G compute as widely."
)


class Chains(NamedTuple):
    """One network's blocks. `row`: of the frame, whose they are; `blocks`: by block, the columns of TABLE and `rel`,
    the measured error."""

    row: int
    name: str
    strategy: str
    coarse: bool
    blocks: pd.DataFrame

    @property
    def title(self) -> str:
        first, _, rest = self.name.partition(" · ")
        return f"{first}<br>{rest}" if rest else first

    @property
    def ratio(self) -> pd.Series:
        """Predicted over measured, of the blocks that have an error."""
        return (self.blocks["predicted_rel"] / self.blocks["rel"])[self.blocks["rel"] > 0].dropna()


def amplification_by_block(frame: pd.DataFrame, causes: pd.DataFrame, drift: pd.DataFrame) -> go.Figure | None:
    """Relative error on a logarithmic axis against the block, one panel for each network: measured, predicted, and the
    bound. A gap is between chains, each of which is rebuilt from its own stored output.

    An error of 0 stands on a line of its own at the bottom. The axis ends where what was measured does, so that a bound
    leaves the panel. None when no trial looked for causes.
    """
    networks = list(_networks(frame, causes, drift))
    if not networks:
        return None
    styles = strategy_styles(frame)
    zero, top = _range(networks)
    rows = math.ceil(len(networks) / COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=min(COLUMNS, len(networks)),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=TITLES_PX / (PANEL_PX * rows - TITLES_PX),
        subplot_titles=[network.title for network in networks],
    )
    for place, network in enumerate(networks):
        color, marker, _ = styles[network.strategy]
        where = {"row": place // COLUMNS + 1, "col": place % COLUMNS + 1}
        looks = {
            "measured": ("rel", {"mode": "markers"}),
            "predicted": ("predicted_rel", {"mode": "lines", "line": {"color": color, "width": 2}}),
            "bound": ("bound_rel", {"mode": "lines", "line": {"color": color, "width": 1, "dash": "dot"}}),
        }
        for label, (column, look) in looks.items():
            x, y = _with_gaps(network.blocks, column)
            figure.add_scatter(
                x=x,
                y=[zero if value == 0 else value for value in y],
                customdata=y,
                name=label,
                legendgroup=label,
                showlegend=False,
                marker=marked(color, marker) | {"size": 7},
                meta={"all": [network.row]},
                hovertemplate=f"block %{{x}}: %{{customdata:.2e}} {label}<extra>{network.name}</extra>",
                **look,
                **where,
            )
        figure.update_xaxes(title_text="block, from the input", row=where["row"], col=where["col"])
        if where["col"] == 1:
            figure.update_yaxes(title_text="relative error", row=where["row"], col=1)
    _add_legend(figure)
    has_zero = any((network.blocks["rel"] == 0).any() for network in networks)
    powers = range(math.ceil(math.log10(zero)) + has_zero, math.floor(math.log10(top)) + 1)
    step = max(1, len(powers) // 6)
    ticks = ({zero: "0"} if has_zero else {}) | {
        10.0**power: f"1e{power}" if power else "1" for power in powers if power % step == 0
    }
    limits = [math.log10(zero) - 0.4, math.log10(top)]
    figure.update_yaxes(type="log", range=limits, tickvals=list(ticks), ticktext=list(ticks.values()))
    description = (
        "Relative error of the rebuilt input of each block on a logarithmic axis, by network: measured, predicted from "
        "the Jacobians of the blocks, and bounded by their largest singular values"
    )
    figure = dressed(figure, description)
    return figure.update_layout(height=40 + PANEL_PX * rows, margin={"t": 60})


def amplification_sentences(frame: pd.DataFrame, causes: pd.DataFrame, drift: pd.DataFrame) -> list[str]:
    """Of each network how fast the error grows, its steepest inverse, and how good the prediction is; the one of the
    largest error comes first, and behind it what to do."""
    networks = sorted(
        _networks(frame, causes, drift), key=lambda network: -network.blocks["rel"].fillna(math.inf).max()
    )
    sentences = [*map(_sentence, networks)]
    return [*sentences[:1], *([ADVICE] if networks else []), *sentences[1:]]


def growth_of(blocks: pd.DataFrame, column: str = "rel") -> float | None:
    """What the error is multiplied by from one block to the one in front of it: the slope of its logarithm within
    chains, by least squares. None where no chain has two blocks with a finite error above 0."""
    usable = blocks[np.isfinite(blocks[column]) & (blocks[column] > 0)]
    x = pd.Series(usable.index, index=usable.index, dtype=float)
    y = pd.Series(np.log10(usable[column]), index=usable.index, dtype=float)
    x, y = (values - values.groupby(usable["chain"]).transform("mean") for values in (x, y))
    spread = float((x * x).sum())
    return 10 ** (-float((x * y).sum()) / spread) if spread else None


def _sentence(network: Chains) -> str:
    blocks = network.blocks
    if blocks[["rel", "smallest"]].isna().to_numpy().any():
        return f"{network.name}: not all errors are numbers; what is rebuilt is lost."
    smallest, steepest = min(zip(blocks["smallest"], blocks.index, strict=True))
    bound = 1 / smallest if smallest else math.inf
    inverse = f"an inverse enlarges an error at most {_times(bound)}, in block {steepest}"
    if (blocks["rel"] == 0).all():
        return f"{network.name}: every rebuilt input equals the original bit for bit, although {inverse}."
    rel, worst = max(zip(blocks["rel"], blocks.index, strict=True))
    parts = [f"the error is at most {rel:.2g}, in block {worst}"]
    if (growth := growth_of(blocks)) is not None:
        predicted = growth_of(blocks, "predicted_rel")
        expected = f" (predicted: {predicted:.2g})" if predicted else ""
        parts.append(f"from block to block towards the input it is multiplied by {growth:.2g}{expected}")
    parts.append(inverse)
    ratio = network.ratio
    if len(ratio):
        farthest = max(ratio, key=lambda value: abs(math.log10(value or 1e-300)))
        parts.append(f"predicted over measured is {ratio.median():.2g} in the median and {farthest:.2g} at worst")
        if network.coarse:
            parts[-1] += ", since F and G compute in fewer digits than the streams have, which it leaves out"
    high = (blocks["bound_rel"] / blocks["rel"]).replace(math.inf, math.nan).max()
    if high > 1:
        parts.append(f"the bound is up to {_times(high)} too high")
    return f"{network.name}: {'; '.join(parts)}."


def _times(factor: float) -> str:
    return f"{factor:.2g} times" if factor < 1e3 else f"{factor:.0e} times"


def _networks(frame: pd.DataFrame, causes: pd.DataFrame, drift: pd.DataFrame) -> Iterator[Chains]:
    """Of repeats and of batches that differ in the timed size alone, the first."""
    if causes.empty:
        return
    trials = frame[frame["id"].isin(set(causes["id"]))]
    first = trials.drop_duplicates([key for key in ("strategy", "depth") if key in trials])
    for row, (_, trial) in zip(first.index.tolist(), first.iterrows(), strict=True):
        own = causes[causes["id"] == trial["id"]]
        rel = drift[(drift["id"] == trial["id"]) & (drift["name"] == "rel")].set_index("index")["value"]
        blocks = own.pivot_table(index="index", columns="name", values="value", dropna=False)
        blocks = blocks.assign(rel=rel.reindex(blocks.index).astype(float))
        depth = "" if pd.isna(trial["depth"]) else f"{trial['depth']:.0f}"
        model, _, rest = trial["strategy"].partition(" · ")
        name = f"{model}{depth}" + (f" · {rest}" if rest else "")
        coarse = _DIGITS.get(trial["compute"], 0) < _DIGITS.get(trial["reconstruction"], 0)
        yield Chains(row, name, trial["strategy"], coarse, blocks)


def _with_gaps(blocks: pd.DataFrame, column: str) -> tuple[list[float | None], list[float | None]]:
    xs: list[float | None] = []
    ys: list[float | None] = []
    for _, chain in blocks.groupby("chain"):
        xs += [*map(float, chain.index), None]
        ys += [*map(float, chain[column]), None]
    return xs[:-1], ys[:-1]


def _range(networks: list[Chains]) -> tuple[float, float]:
    """Where an error of 0 is drawn, and the end of the axis; by what was measured, and predicted of F and G as fine as
    their streams."""
    shown = [network.blocks["rel"] for network in networks]
    shown += [network.blocks["predicted_rel"] for network in networks if not network.coarse]
    values = pd.concat(shown)
    values = values[np.isfinite(values) & (values > 0)]
    if values.empty:
        return 1e-16, 1.0
    low, high = (math.log10(value) for value in (values.min(), values.max()))
    return 10.0 ** (math.floor(low) - 1), 10.0 ** (math.ceil(high) + 1)


def _add_legend(figure: go.Figure) -> None:
    """One entry for each kind of figure, in grey, since colours are the networks'."""
    looks = {
        "measured": {"mode": "markers", "marker": {"color": "#666", "symbol": "circle", "size": 7}},
        "predicted": {"mode": "lines", "line": {"color": "#666", "width": 2}},
        "bound": {"mode": "lines", "line": {"color": "#666", "width": 1, "dash": "dot"}},
    }
    for label, look in looks.items():
        figure.add_scatter(x=[None], y=[None], name=label, legendgroup=label, hoverinfo="skip", **look)
