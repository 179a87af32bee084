"""The table of all trials. A column that says the same of all of them is left out and said once."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from harness.record import Record
from reports.frames import has_guard, modes_of, step_bars

SYMBOLS = {"ok": "✓", "oom": "✗", "diverged": "∞", "unsupported": "–", "timeout": "…", "crashed": "!", "failed": "!"}
MIB = 2**20
UNSET = "–"


class Column(NamedTuple):
    """A metric's column: its name in a record, the heading with its unit, and how a number is shown.

    more  hidden until the reader asks for all columns
    """

    name: str
    heading: str
    show: Callable[[float], str]
    more: bool = False


class Cell(NamedTuple):
    """`value` is as in the record; `why` is the reason of what was not measured."""

    text: str
    value: float | None
    why: str


class Row(NamedTuple):
    id: str
    status: str
    symbol: str
    attempts: int
    spec: list[str]
    metrics: list[Cell]


class Table(NamedTuple):
    """What all trials have in common is in `same` as text, and in `shared_spec` and `shared_metrics`, by heading and by
    name, as the cell that each trial would have."""

    spec: list[str]
    metrics: list[Column]
    rows: list[Row]
    same: list[str]
    shared_spec: dict[str, str]
    shared_metrics: dict[str, Cell]


def _mib(value: float) -> str:
    return "0" if value == 0 else "<0.01" if value < 0.005 * MIB else f"{value / MIB:.2f}"


def _ms(value: float) -> str:
    return "0" if value == 0 else f"{value * 1e3:.{0 if value >= 0.1 else 1}f}"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= value < 1e7 else f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


MAIN_METRICS = (
    Column("activation_peak_bytes", "activation peak (MiB)", _mib),
    Column("activation_saved_bytes", "saved activations (MiB)", _mib),
    Column("step_median_s", "step, median (ms)", _ms),
    Column("samples_per_s", "samples/s", "{:.1f}".format),
    Column("drift_max_rel", "largest relative drift", _small),
    Column("gradient_angle_deg", "gradient angle (°)", _small),
    Column("gradient_reference_angle_deg", "angle to float64 (°)", _small),
    Column("loss_last", "last loss", "{:.4f}".format),
    Column("parameter_count", "parameters", "{:,.0f}".format),
    Column("blocks", "blocks", "{:.0f}".format),
)
_SPELLED = {
    "mfu": Column("mfu", "MFU (%)", _percent, more=True),
    "hfu": Column("hfu", "HFU (%)", _percent, more=True),
    "guard_rel_max": Column("guard_rel_max", "largest error that a guard found, relative", _small, more=True),
}
# By the unit at the end of a metric's name; the first that fits.
_UNITS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("_bytes", " (MiB)", _mib),
    ("_per_s", "/s", _number),
    ("_s", " (ms)", _ms),
    ("_deg", " (°)", _small),
    ("_rel", ", relative", _small),
)
MAIN_SPEC = ("model", "depth", "batch_size", "activations")
SPEC = (
    *("model", "depth", "channels", "log_scale_gain", "data.name", "data.image_size", "batch_size"),
    *("activations", "budget_bytes"),
    *("compute", "reconstruction", "zero_stage", "workers", "seed"),
)
# Where any trial has a guard.
GUARD_SPEC = ("guard_every", "guard_tolerance", "guard_action")


def trials_table(frame: pd.DataFrame, records: list[Record]) -> Table:
    """A row for each of the frame's, with every metric that a record has or says why not."""
    by_id = {record.id: record for record in records}
    ordered = [by_id[trial_id] for trial_id in frame["id"]]
    brackets = _step_brackets(frame)
    fields = (*SPEC, *modes_of(frame), *(GUARD_SPEC if has_guard(frame) else ()))
    spec = {name: [_spec_text(name, value) for value in frame[name]] for name in fields if name in frame}
    metrics = {
        column: [_cell(column, record, brackets[record.id]) for record in ordered] for column in _columns(ordered)
    }
    same_spec = [name for name, texts in spec.items() if name not in MAIN_SPEC and _says_one_thing(texts)]
    same_metrics = [column for column, cells in metrics.items() if column.more and _says_one_thing(cells)]
    shared_spec = {_spec_heading(name): spec.pop(name)[0] for name in same_spec}
    shared_metrics = {column: metrics.pop(column)[0] for column in same_metrics}
    # What is not set at all says least.
    told = sorted(shared_spec.items(), key=lambda said: said[1] == UNSET)
    same = [f"{heading} {text}" for heading, text in told] + _said_once(shared_metrics)
    rows = [
        Row(
            id=record.id,
            status=record.status,
            symbol=SYMBOLS[record.status],
            attempts=len(record.attempts),
            spec=[texts[index] for texts in spec.values()],
            metrics=[cells[index] for cells in metrics.values()],
        )
        for index, record in enumerate(ordered)
    ]
    named = {column.name: cell for column, cell in shared_metrics.items()}
    return Table([_spec_heading(name) for name in spec], list(metrics), rows, same, shared_spec, named)


def _columns(records: list[Record]) -> list[Column]:
    """The main ones, and then all others in the order in which records have them."""
    main = {column.name for column in MAIN_METRICS}
    others = {name: None for record in records for name in (*record.metrics, *record.unmeasured) if name not in main}
    return [*MAIN_METRICS, *map(_column, others)]


def _column(name: str) -> Column:
    if name in _SPELLED:
        return _SPELLED[name]
    words = name.replace("_", " ")
    if name.startswith("flops_"):
        return Column(name, f"{words} (GFLOP)", lambda value: _number(value / 1e9), more=True)
    for ending, unit, show in _UNITS:
        if name.endswith(ending):
            return Column(name, words[: -len(ending)] + unit, show, more=True)
    return Column(name, words, "{:.6g}".format, more=True)


def _cell(column: Column, record: Record, step_bracket: str) -> Cell:
    value = record.metrics.get(column.name)
    if value is None:
        return Cell("n/a", None, record.unmeasured.get(column.name) or record.reason or "not recorded")
    return Cell(column.show(value) + step_bracket * (column.name == "step_median_s"), value, "")


def _step_brackets(frame: pd.DataFrame) -> dict[str, str]:
    bars = step_bars(frame)
    ends = zip(frame["id"], bars["low_s"], bars["high_s"], strict=True)
    return {trial_id: "" if math.isnan(low) else f" ({_ms(low)} to {_ms(high)})" for trial_id, low, high in ends}


def _says_one_thing(values: list[str] | list[Cell]) -> bool:
    # Of one trial there is nothing to compare, and the table would be empty.
    return len(values) > 1 and len(set(values)) == 1


def _said_once(cells: dict[Column, Cell]) -> list[str]:
    """What was measured first; then what was not, together where the reason is the same."""
    by_reason: dict[str, list[str]] = {}
    for column, cell in cells.items():
        if cell.why:
            by_reason.setdefault(cell.why.removeprefix("n/a: "), []).append(column.heading)
    said = [f"{column.heading} {cell.text}" for column, cell in cells.items() if not cell.why]
    return said + [f"{', '.join(headings)}: n/a, {why}" for why, headings in by_reason.items()]


def _spec_heading(name: str) -> str:
    return "budget (MiB)" if name == "budget_bytes" else name.replace("_", " ")


def _spec_text(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return UNSET
    if name == "budget_bytes" and isinstance(value, int | float):
        return f"{value / MIB:g}"
    return f"{value:g}" if isinstance(value, float) else str(value)
