"""`python -m studies.peers`: measure and print the table."""

import json
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from studies.peers.contenders import SUITES
from studies.peers.measure import compare
from studies.peers.table import as_json, as_text
from studies.peers.workload import Workload


def main(
    blocks: Annotated[int, typer.Option(min=2, help="Couplings; the slope is from half of them to all.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Each runs one step of every contender.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, on the CPU.")] = 2,
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "peers",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """The same F and G in memcnn, RevTorch, torch.utils.checkpoint, plain autograd and ours: time, memory, error."""
    torch.set_num_threads(threads)
    # memcnn's storage calls are deprecated, which torch says once in every run.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
    if suite not in SUITES:
        raise typer.BadParameter(f"--suite {suite}; allowed: {', '.join(SUITES)}.")
    comparison = compare(Workload(blocks=blocks), rounds=rounds, contenders=SUITES[suite])
    typer.echo(as_text(comparison))
    if json_path:
        json_path.write_text(json.dumps(as_json(comparison), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
