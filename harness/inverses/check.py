"""One check: measure, find the baseline, compare, and say what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from harness.inverses.baseline import Change, as_json, compare, machine_key, not_finite
from harness.inverses.baseline_file import DEFAULT_TOLERANCES, SCHEMA, read, refuse_tolerances, write
from harness.inverses.causes import doubts, likely_cause
from harness.inverses.chain import Streams, refuse_inputs
from harness.inverses.measurement import Figures, measure
from harness.inverses.precisions import FP64, own_precision
from harness.inverses.structure import Structure, structure_of

UPDATE, REQUIRE = "--inverse-update", "--inverse-require"


@dataclass(frozen=True)
class Verdict:
    """`passed`, `failed`, or `not comparable` when the baseline is of other hardware or versions only."""

    outcome: Literal["passed", "failed", "not comparable"]
    message: str
    figures: dict[str, Figures]


def check_inverse(
    module: nn.Module,
    *inputs: Any,
    path: Path,
    test: str,
    precisions: Sequence[str] | None = None,
    tolerances: dict[str, float] | None = None,
    update: bool = False,
    require: bool = False,
) -> Verdict:
    """Measure a module's inverse in each precision and compare with the baseline file at `path`.

    module      as `harness.inverses.chain.blocks_of` takes it, or any with a ReversibleSequence in it; stays as it is
    precisions  see `harness.inverses.precisions.at_precision`; None: its own and fp64
    tolerances  other limits than a new baseline has by default, by metric
    update      write what was measured; `require`: fail where there is nothing to compare with
    Raises SubjectError, PrecisionError and BaselineError for what cannot be used.
    """
    streams = refuse_inputs(inputs)
    refuse_tolerances(tolerances or {})
    stored = read(path)
    own = own_precision(module)
    chosen = list(dict.fromkeys(precisions if precisions is not None else (own, FP64)))
    figures = {precision: measure(module, streams, precision) for precision in chosen}
    for precision, found in figures.items():
        if reason := not_finite(found):
            return Verdict("failed", f"{precision}: {reason}; nothing is written or compared", figures)
    keys = {precision: machine_key(streams[0].device, precision) for precision in chosen}
    structure = structure_of(module)
    contents = _merged(stored, test, keys, figures, structure, tolerances or {})
    doubt = doubts(module, streams, figures)
    if update:
        return _updated(path, stored, contents, figures, doubt)
    if stored is None or _is_new(stored, keys):
        if require:
            return Verdict("failed", f"{REQUIRE}: no baseline for this test at {path}", figures)
        write(path, contents)
        return Verdict("failed", f"no baseline: written to {path}. Read it, commit it, run again.{doubt}", figures)
    missing = [precision for precision in chosen if keys[precision] not in stored["baselines"]]
    if missing:
        have = "; ".join(sorted(stored["baselines"]))
        message = f"not comparable: the baseline is of {have}; this is {keys[missing[0]]}. {UPDATE} adds it."
        return Verdict("failed" if require else "not comparable", message, figures)
    return _compared(module, streams, stored, keys, figures, structure, path)


def _compared(
    module: nn.Module,
    streams: Streams,
    stored: dict[str, Any],
    keys: dict[str, str],
    figures: dict[str, Figures],
    structure: Structure,
    path: Path,
) -> Verdict:
    lines: list[str] = []
    causes: list[str] = []
    # Where nothing rounds, a cause is plainest, and what shows there needs no other explanation.
    for precision in sorted(figures, key=lambda name: name != FP64):
        before = stored["baselines"][keys[precision]]
        changes = compare(
            before, figures[precision], precision, stored["tolerances"], exact=precision.endswith("/exact")
        )
        if changes and not causes:
            structures = stored["structure"], structure
            causes.append(likely_cause(module, streams, changes, before, figures[precision], structures))
        lines += [f"  {line}" for line in _worst(changes)]
    if not lines:
        return Verdict("passed", "", figures)
    ending = f"If this is meant: {UPDATE} rewrites {path}."
    return Verdict(
        "failed", "\n".join([f"the inverse is not what it was; likely cause: {causes[0]}", *lines, ending]), figures
    )


def _worst(changes: list[Change], most: int = 6) -> list[str]:
    """The first ones; a fault in one block shows in many."""
    rest = len(changes) - most
    return [str(c) for c in changes[:most]] + ([f"and {rest} more"] if rest > 0 else [])


def _is_new(stored: dict[str, Any], keys: dict[str, str]) -> bool:
    """Whether the file is of this machine, but not of all the precisions."""
    machines = {key.rpartition(", ")[0] for key in stored["baselines"]}
    missing = [key for key in keys.values() if key not in stored["baselines"]]
    return bool(missing) and missing[0].rpartition(", ")[0] in machines


def _updated(path: Path, stored: object, contents: dict[str, Any], figures: dict[str, Figures], doubt: str) -> Verdict:
    if stored == contents:
        return Verdict("passed", "", figures)
    write(path, contents)
    return Verdict("failed", f"{UPDATE}: {path} is rewritten; without it the next run compares.{doubt}", figures)


def _merged(
    stored: dict[str, Any] | None,
    test: str,
    keys: dict[str, str],
    figures: dict[str, Figures],
    structure: Structure,
    tolerances: dict[str, float],
) -> dict[str, Any]:
    # Limits that were changed in the file stay.
    old = stored or {"baselines": {}, "tolerances": DEFAULT_TOLERANCES | tolerances}
    return {
        "schema": SCHEMA,
        "test": test,
        "structure": structure,
        "tolerances": old["tolerances"],
        "baselines": old["baselines"] | {keys[p]: as_json(found) for p, found in figures.items()},
    }
