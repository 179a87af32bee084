"""Where a value stands in a file, for errors. Apart from reading YAML, which a worker has no need of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Where a value is in the data: ("grid", "depth", 2)
Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Places:
    """The lines of a file, counted from 1. All Places are equal: where a study was read from is no part of
    what it says."""

    path: str = field(default="study", compare=False)
    lines: Mapping[Loc, int] = field(default_factory=dict, compare=False)

    def at(self, loc: Loc) -> str:
        """`path:line` of a value, of what encloses it where it has no line of its own, or the path alone."""
        for length in range(len(loc), 0, -1):
            if loc[:length] in self.lines:
                return f"{self.path}:{self.lines[loc[:length]]}"
        return self.path

    def of(self, loc: Loc) -> str:
        """`path:line: grid.depth[2]`."""
        return f"{self.at(loc)}: {dotted(loc)}" if loc else self.path


def dotted(loc: Loc) -> str:
    """("grid", "depth", 2) as `grid.depth[2]`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
