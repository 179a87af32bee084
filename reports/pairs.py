"""Trials beside the stored ones of the same cells, for what becomes of the activations to be the only difference."""

from typing import NamedTuple

import pandas as pd

from reports.frames import CELL, MODES


class Pair(NamedTuple):
    """The trials of one strategy beside the stored ones of the same cells (columns with the suffix _stored)."""

    model: str
    strategy: str
    table: pd.DataFrame

    @property
    def name(self) -> str:
        return without_model(self.strategy)

    @property
    def stored(self) -> str:
        """What the trials beside them are called: as much is executed in another way as of these."""
        return " · ".join(["stored", *(word for word in self.name.split(" · ") if word in MODES.values())])


def pairs(frame: pd.DataFrame, metric: str) -> list[Pair]:
    """One for each strategy that has `metric` in a cell where a stored trial has it too, in the order of
    `answer_first`."""
    if metric not in frame:
        return []
    usable = answer_first(frame[frame["status"] == "ok"].dropna(subset=[metric]))
    cell = [field for field in CELL if field in usable]
    stored = usable[usable["activations"] == "stored"]
    found = []
    for (model, strategy), rows in usable[usable["activations"] != "stored"].groupby(["model", "strategy"], sort=False):
        base = stored.drop_duplicates(cell)[[*cell, metric]]
        table = rows.merge(base, on=cell, suffixes=("", "_stored"))
        if len(table):
            found.append(Pair(str(model), str(strategy), table))
    return found


def mode_pairs(frame: pd.DataFrame, mode: str, metric: str) -> list[tuple[str, str, str, pd.DataFrame]]:
    """Trials whose step is executed in one of MODES beside those of the same cells and activations whose step is not.

    Of each strategy: model, name, the name of what is beside it, and the table (columns with the suffix _plain).
    """
    if metric not in frame or mode not in frame:
        return []
    usable = answer_first(frame[frame["status"] == "ok"].dropna(subset=[metric]))
    kinds = ("activations", "reconstruction", "budget_bytes")
    cell = [field for field in (*CELL, *kinds) if field in usable and field != mode]
    plain = usable[~usable[mode]].drop_duplicates(cell)[[*cell, "strategy", metric]]
    found = []
    for (model, strategy), rows in usable[usable[mode]].groupby(["model", "strategy"], sort=False):
        table = rows.merge(plain, on=cell, suffixes=("", "_plain"))
        if len(table):
            other = without_model(str(table["strategy_plain"].iloc[0]))
            found.append((str(model), without_model(str(strategy)), other, table))
    return found


def answer_first(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order of their answer: networks that rebuild activations, then the others; of each what rebuilds,
    then what else does not store, then stored. Otherwise as they were."""
    kinds = frame["activations"].map({"reconstructed": 0, "budgeted": 1, "stored": 3}).fillna(2)
    models = kinds.groupby(frame["model"], dropna=False).transform("min") if len(frame) else kinds
    ranks = pd.DataFrame({"model": models.clip(lower=1), "kind": kinds})
    first = frame["model"].map({name: place for place, name in enumerate(frame["model"].unique())})
    order = ranks.assign(first=first)[["model", "first", "kind"]].sort_values(["model", "first", "kind"], kind="stable")
    return frame.loc[order.index]


def without_model(strategy: str) -> str:
    return strategy.split(" · ", 1)[-1]
