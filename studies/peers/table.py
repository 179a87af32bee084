"""The comparison as a table in Markdown, and as JSON."""

import dataclasses
import io
import os
import textwrap
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from harness.measure.machine import describe_git, describe_machine, describe_versions
from studies.peers.measure import CPU, Comparison, Row, quartiles

MIB = 2**20
KIB = 2**10
TABLE, LINE = 160, 120
# A step whose memory was kept has fewer than 20; one that gets it anew, tens of thousands.
MANY_PAGE_FAULTS = 2000


def as_text(comparison: Comparison) -> str:
    """The table, the note that belongs to it, and our time over each peer's, round by round."""
    table = Table(box=MARKDOWN, show_edge=True)
    table.add_column("contender", no_wrap=True)
    for heading in (f"time / {comparison.base} [quartiles]", "step ms", "peak MiB", "saved MiB", "slope KiB/block"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("gradient error", justify="right", no_wrap=True)
    table.add_column("to float64", justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(*_cells(comparison, row))
    console = Console(file=io.StringIO(), width=TABLE)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
    rest = [*_reasons(comparison), *_faulting(comparison), *_note(comparison), *_head_to_head(comparison)]
    return "\n".join([*lines, "", *rest])


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All that was measured, each step's time too, with the machine and the versions that it belongs to."""
    return {
        **dataclasses.asdict(comparison),
        "machine": describe_machine(CPU),
        "versions": describe_versions(),
        "git": describe_git(),
        "omp_wait_policy": _wait_policy(),
    }


def _cells(comparison: Comparison, row: Row) -> list[str]:
    name = f"{row.name} {row.version}" if row.version else row.name
    figures = row.figures
    ratios = comparison.ratios(row.name, comparison.base)
    if figures is None or ratios is None:
        return [name, "not measured", *[""] * 6]
    return [
        name,
        _spread(ratios),
        f"{quartiles(figures.step_s)[1] * 1e3:.0f}",
        f"{figures.activation_peak_bytes / MIB:.1f}",
        f"{figures.activation_saved_bytes / MIB:.1f}",
        f"{figures.slope_bytes_per_block / KIB:.1f}",
        f"{figures.gradient_rel:.1e}" if figures.gradient_rel else "0",
        f"{figures.float64_rel:.1e}",
    ]


def _spread(ratios: list[float]) -> str:
    q1, q2, q3 = quartiles(ratios)
    return f"{q2:.2f} [{q1:.2f}, {q3:.2f}]"


def _reasons(comparison: Comparison) -> list[str]:
    lines = [f"{row.name}: not measured; {row.reason}" for row in comparison.rows if row.reason]
    return [*lines, ""] if lines else []


def _faulting(comparison: Comparison) -> list[str]:
    faults = {row.name: quartiles(row.figures.page_faults)[1] for row in comparison.rows if row.figures}
    named = ", ".join(f"{name} {count:.0f}" for name, count in faults.items() if count > MANY_PAGE_FAULTS)
    if not named:
        return []
    text = f"""Page faults a step: {named}. The allocator gave memory back between steps, and whoever needs it again
        pays, whoever freed it. `make peers` keeps it from doing so."""
    return _wrapped(text)


def _note(comparison: Comparison) -> list[str]:
    load = comparison.workload
    note = f"""{load.blocks} couplings, {load.channels} channels in all, batch {load.batch_size}, {load.image_size} x
        {load.image_size}, fp32, CPU, {comparison.threads} threads, OMP_WAIT_POLICY {_wait_policy()};
        {comparison.rounds} rounds. All have the very same F and G: BN, ReLU, conv3x3, BN, ReLU, conv3x3, whose first
        operation is not in place (RevTorch fails on one that is). Time: median and quartiles over the rounds. Slope: of
        the peak, per block from half of the blocks to all; one block's parameter gradients are
        {comparison.block_gradient_bytes / KIB:.1f} KiB. Gradient error: relative L2 of all parameters' gradients
        against stored of the same arithmetic; to float64: against stored in float64, so that stored's own is the floor,
        and exact's holds what rounding to the grid changes in the forward."""
    return _wrapped(note)


def _wrapped(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), LINE), ""]


def _wait_policy() -> str:
    return os.environ.get("OMP_WAIT_POLICY", "not set")


def _head_to_head(comparison: Comparison) -> list[str]:
    """Each of ours, but for what merely checkpoints, over each peer."""
    lines = []
    measured = [row for row in comparison.rows if row.figures]
    for ours in (row for row in measured if row.name.startswith("ours") and "checkpointed" not in row.name):
        for peer in (row for row in measured if row.version):
            ratios = comparison.ratios(ours.name, peer.name)
            assert ratios
            assert ours.figures
            assert peer.figures
            peak = ours.figures.activation_peak_bytes / peer.figures.activation_peak_bytes
            lines.append(f"{ours.name} / {peer.name}: time {_spread(ratios)} per round, peak {peak:.2f}")
    return lines
