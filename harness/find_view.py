"""What `revnet run --find` prints: a line for each cell as it is searched, then one table."""

from collections.abc import Sequence

from rich.table import Table

from harness.find import Cell, Limit, Search, differing
from harness.plan_view import wide_console
from harness.record import Record
from harness.sizes import in_words
from harness.store import RunStore

MIB = 2**20
CONFIRMED = "confirmed"


def outcome(search: Search, store: RunStore) -> str:
    """`confirmed`, the status of the trial that was to confirm the value, `not run`, or `none` without a value."""
    if search.trial is None:
        return "unsupported" if search.unsupported else "none"
    record = store.find_record(search.trial.id)
    return "not run" if record is None else CONFIRMED if record.status == "ok" else record.status


def print_found(searches: Sequence[Search], store: RunStore, limit: Limit) -> None:
    """One row a cell: its own fields, the value, what it was predicted to need and found to, and what confirmed it."""
    cells = [search.cell for search in searches]
    axis, varying = cells[0].axis, differing(cells)
    console = wide_console()
    table = Table(*varying, box=None, pad_edge=False)
    for name in (axis, "predicted MiB", "allocated MiB", "activation peak MiB", "limit MiB"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for search in searches:
        own = [str(search.cell.base.value(name)) for name in varying]
        table.add_row(*own, *_figures(search, store), f"{limit.memory_bytes / MIB:.1f}", _in_words(search, store))
    console.print(table)
    besides = f" and {in_words(limit.process_bytes)} that its process holds besides tensors" * bool(limit.process_bytes)
    console.print(
        f"The largest {axis} whose predicted total is at most {max(0, limit.budget_bytes) / MIB:.1f} MiB: "
        f"{in_words(limit.memory_bytes)} less {float(100 * limit.headroom):g} % headroom{besides}.",
        highlight=False,
    )


def searched(search: Search, varying: Sequence[str]) -> str:
    """A cell and what the predictions say of it, in one line."""
    cell = search.cell
    words = [str(cell.base.model), *(f"{name} {cell.base.value(name)}" for name in varying if name != "model")]
    found = _none(search) if search.value is None else f"{cell.axis} {search.value} by prediction"
    return f"{' '.join(words)}: {found}"


def _figures(search: Search, store: RunStore) -> list[str]:
    if search.value is None or search.trial is None:
        return ["-"] * 4
    record = store.find_record(search.trial.id)
    measured = (_mib(record, name) for name in ("allocated_peak_bytes", "activation_peak_bytes"))
    return [str(search.value), f"{search.tried[search.value] / MIB:.1f}", *measured]


def _mib(record: Record | None, metric: str) -> str:
    size_bytes = None if record is None else record.metrics.get(metric)
    return "-" if size_bytes is None else f"{size_bytes / MIB:.1f}"


def _in_words(search: Search, store: RunStore) -> str:
    result = outcome(search, store)
    if search.value is None:
        return _none(search)
    if search.trial is not None and result not in (CONFIRMED, "oom", "not run"):
        result = f"{result}: {store.read_record(search.trial.id).reason}"
    if too_much := [str(value) for value in search.tried if value != search.value]:
        result = f"{result}, after oom at {', '.join(too_much)}"
    return f"{result}; {_end(search.cell)}" if search.at_the_end else result


def _end(cell: Cell) -> str:
    if cell.has_no_more:
        return f"not the memory ended the search: {cell.base.model} comes no deeper"
    return f"not the memory ended the search, but --at-most {cell.values[-1]}"


def _none(search: Search) -> str:
    if search.unsupported:
        return f"unsupported: {search.unsupported}"
    cell = search.cell
    return f"not even {cell.axis} {cell.values[0]} fits, which needs {in_words(search.smallest_bytes)}"
