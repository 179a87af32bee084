"""What came of all that was run, in Markdown: each target with its figure, each table, and what was not run and why."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Ran(NamedTuple):
    """What came of an item; `outcome` begins with "done", "failed" or "not run"."""

    name: str
    outcome: str
    wall_s: float = 0.0
    log_path: Path | None = None
    failed: bool = False


def summary(folder: Path, machine: dict[str, Any], ran: Sequence[Ran], *, small: bool) -> str:
    lines = [f"# {machine['machine']['device_name']}", "", _machine_line(machine), ""]
    if small:
        lines += ["Tiny sizes: this shows that everything runs, and no figure in it means anything.", ""]
    lines += ["| target | figure | outcome |", "|---|---:|---|", *map(_target_row, _targets(folder)), ""]
    lines += ["| run | seconds | outcome |", "|---|---:|---|"]
    lines += [f"| {one.name} | {one.wall_s:.0f} | {_in_cell(one.outcome)} |" for one in ran]
    for one in ran:
        if one.log_path is not None:
            lines += ["", f"## {one.name}", "", *_shown(one)]
    return "\n".join(lines) + "\n"


def _machine_line(machine: dict[str, Any]) -> str:
    about, versions, git = machine["machine"], machine["versions"], machine["git"]
    memory = about.get("device_memory_bytes")
    parts = [
        f"{memory / 2**30:.1f} GiB" if memory else "",
        f"driver {about['cuda_driver']}" if "cuda_driver" in about else "",
        f"CUDA {about['cuda']}" if about.get("cuda") else "",
        *(f"{name} {version}" for name, version in versions.items()),
        f"commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "",
    ]
    return ", ".join(part for part in parts if part) + "."


def _targets(folder: Path) -> list[dict[str, Any]]:
    results = [json.loads(path.read_text()) for path in sorted((folder / "results").rglob("*.json"))]
    return [target for result in results for target in result["targets"]]


def _target_row(target: dict[str, Any]) -> str:
    figure = "" if target["figure"] is None else f"{target['figure']:.4g} (at most {target['most']:g})"
    outcome = target["outcome"] if target["reason"] is None else f"{target['outcome']}: {target['reason']}"
    return f"| {_in_cell(target['what'])} | {figure} | {_in_cell(outcome)} |"


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _shown(one: Ran) -> list[str]:
    assert one.log_path is not None
    text = one.log_path.read_text(errors="replace").strip().splitlines()
    tables = [line for line in text if line.startswith("|")]
    # A table and what follows it; of what is no table, its last lines.
    return text[text.index(tables[0]) :] if tables else ["```", *text[-12:], "```"]
