"""A step's memory over time in few enough points to keep, and its owners, as rows of the trace."""

from collections.abc import Iterable, Sequence

from harness.measure.attribution import CATEGORIES, Attribution
from harness.record import TraceRow

POINTS = 400
OWNERS = 20


def thin(levels: Sequence[int], keep: Iterable[int] = ()) -> list[int]:
    """Positions in order: the lowest and the highest of each of at most POINTS stretches, and those to keep."""
    stretch = max(1, -(-len(levels) // POINTS))
    positions = set(keep)
    for start in range(0, len(levels), stretch):
        part = range(start, min(start + stretch, len(levels)))
        positions |= {min(part, key=levels.__getitem__), max(part, key=levels.__getitem__)}
    return sorted(positions)


def memory_rows(attribution: Attribution) -> list[TraceRow]:
    """The level of each category over the step; start, forward's end, peak and end are among the points."""
    history, by_category = attribution.history, attribution.levels()
    total = history.levels
    rows = []
    for index, position in enumerate(thin(total, (0, history.forward_end, len(total) - 1))):
        rows.append(TraceRow("memory", index, "time_s", history.seconds(position)))
        rows.append(TraceRow("memory", index, "live_bytes", total[position]))
        rows += [
            TraceRow("memory", index, f"{category}_bytes", by_category[category][position]) for category in CATEGORIES
        ]
    return rows


def phase_rows(attribution: Attribution) -> list[TraceRow]:
    """When the backward begins, to the last event of the allocator in the forward, and when it is over."""
    history = attribution.history
    return [
        TraceRow("phases", 0, "backward_s", history.seconds(history.forward_end)),
        TraceRow("phases", 1, "end_s", (history.end_ns - history.start_ns) / 1e9),
    ]


def owner_rows(attribution: Attribution) -> list[TraceRow]:
    """Whose the bytes at the peak are, the largest first."""
    rows = []
    for rank, owner in enumerate(attribution.owners(OWNERS)):
        name = f"{owner.category}: {owner.name}" if owner.category else owner.name
        rows.append(TraceRow("owners", rank, name, owner.nbytes))
    return rows
