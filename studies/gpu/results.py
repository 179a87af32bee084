"""What a benchmark found, as JSON: its rows, the targets with their figures, the machine and the versions."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from harness.measure.machine import describe_git, describe_machine, describe_versions

MIB = 2**20
Outcome = Literal["met", "missed", "not run"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure that was aimed at.

    figure  None where it was not measured; then `reason` says why
    most    the largest figure that meets it
    """

    what: str
    most: float
    figure: float | None = None
    reason: str | None = None

    @property
    def outcome(self) -> Outcome:
        if self.figure is None:
            return "not run"
        return "met" if self.figure <= self.most else "missed"

    @property
    def in_words(self) -> str:
        if self.figure is None:
            return f"{self.what}: not run: {self.reason}"
        return f"{self.what}: {self.figure:.4g} (at most {self.most:g}): {self.outcome}"


@dataclass(kw_only=True)
class Result:
    """settings    what was asked for
    rows        what was measured, a mapping each; a row that has no figures has its `reason`
    unmeasured  what was left out, and why
    """

    benchmark: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    unmeasured: dict[str, str] = field(default_factory=dict)

    def as_json(self, device: torch.device) -> dict[str, Any]:
        return {
            **asdict(self),
            "targets": [asdict(target) | {"outcome": target.outcome} for target in self.targets],
            "machine": describe_machine(device),
            "versions": describe_versions(),
            "git": describe_git(),
        }

    def write(self, path: Path, device: torch.device) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(device), indent=2) + "\n", encoding="utf-8")

    def closing_lines(self) -> list[str]:
        left_out = [f"{what}: not measured; {why}" for what, why in self.unmeasured.items()]
        return [*left_out, *(target.in_words for target in self.targets)]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ("-" if i == 0 else ":")) if w > 1 else "-" for i, w in enumerate(widths)]
    return "\n".join([line(headings), line(rule), *map(line, rows)])


def mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:.1f}"
