"""What of the `revnet` command looks at results: report, export, compare. Imports the heavy rooms when needed."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.errors import HarnessError
from harness.plain_text import say

if TYPE_CHECKING:
    from harness.store import RunStore
    from reports.compare import Comparison

RunArgument = Annotated[str, typer.Argument(help="A run directory (or any fsspec URI).", metavar="RUN")]
FailOption = Annotated[list[str] | None, typer.Option(help="E.g. step_median_s:+5%; again for more.", metavar="LIMIT")]
# From one look at a run that is watched to the next, and of its page to the next reading of the file.
WATCH_S = 5


def report(
    run: RunArgument,
    png: Annotated[
        str | None, typer.Option(help="Each figure as a PNG file too, for a paper; needs a browser.", metavar="DIR")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it anew as trials finish, until all have; an open page follows.")
    ] = False,
) -> None:
    """Write report.html of a run, finished or not."""
    store = open_run(run)
    if watch:
        if png is not None:
            raise HarnessError("--watch: writes the page only. Leave --png out, and give it when the run is finished.")
        _watch(store)
        return
    if png is None:
        say(write_report(store))
        return
    from reports.pictures import find_browser, report_figures, write_pictures

    browser = find_browser()
    say(write_report(store))
    written = write_pictures(report_figures(store), Path(png), browser)
    say("\n".join(map(str, written)) or f"no pictures: {run} has no figure yet.")


def export(
    run: RunArgument,
    mlflow: Annotated[str | None, typer.Option(help="A tracking URI, or a directory.", metavar="URI")] = None,
    wandb: Annotated[str | None, typer.Option(help="A directory for offline runs.", metavar="DIR")] = None,
    tensorboard: Annotated[str | None, typer.Option(help="A directory for event files.", metavar="DIR")] = None,
    name: Annotated[str | None, typer.Option(help="Of the experiment or project; RUN's if not given.")] = None,
) -> None:
    """Hand the records of a run, finished or not, to MLflow, Weights & Biases or TensorBoard; again, what is new."""
    from reports.exporters import export_run

    for line in export_run(open_run(run), mlflow=mlflow, wandb=wandb, tensorboard=tensorboard, name=name):
        say(line)


def compare(
    base: Annotated[str, typer.Argument(help="The run that it is compared with.", metavar="BASE")],
    run: RunArgument,
    fail: FailOption = None,
    markdown: Annotated[str | None, typer.Option(help="For a pull request; - is stdout.", metavar="FILE")] = None,
    json: Annotated[str | None, typer.Option(help="As data; - is stdout.", metavar="FILE")] = None,
    html: Annotated[str | None, typer.Option(help="A page to look at; - is stdout.", metavar="FILE")] = None,
) -> None:
    """Compare memory, time, drift and statuses of the trials that two runs have in common, finished or not."""
    from reports.compare import compare_sides, read_side
    from reports.compare_markdown import as_markdown
    from reports.compare_view import as_json, as_text
    from reports.limits import parse_limit

    targets = {"--markdown": markdown, "--json": json, "--html": html}
    if len(to_stdout := [option for option, target in targets.items() if target == "-"]) > 1:
        raise HarnessError(f"{' -, '.join(to_stdout)} -: stdout takes one of them. Give a file for the others.")
    limits = [parse_limit(text) for text in fail or ()]
    comparison = compare_sides(read_side(open_run(base)), read_side(open_run(run)), limits)
    if not to_stdout:
        say(as_text(comparison), nl=False)
    for option, view in (("--markdown", as_markdown), ("--json", as_json), ("--html", _as_page)):
        target = targets[option]
        if target is not None:
            _write_to(option, target, view(comparison))
    raise typer.Exit(comparison.exit_code)


def open_run(run: str) -> "RunStore":
    from harness.store import existing_run

    return existing_run(run)


def write_report(store: "RunStore", refresh_s: int | None = None) -> str:
    """Write the report and the lines of `laws.csv`; returns where the report lies."""
    from reports.frames import laws, trials_frame
    from reports.page import build_report

    store.write_laws(laws(trials_frame(store)).to_csv(index=False))
    return store.write_report(build_report(store, refresh_s))


def _watch(store: "RunStore") -> None:
    """Write the report whenever there are other trials in it, and once more for good when none is missing."""
    plan, before = store.read_plan(), None
    try:
        while True:
            finished = store.finished_ids()
            missing = set(plan.trials if plan else ()) - finished
            if not missing:
                break
            if finished != before:
                where = write_report(store, WATCH_S)
                say(f"{len(finished)} trials, {len(missing)} missing: {where}")
            before = finished
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        say("no longer watched.")
    say(write_report(store))


def _write_to(option: str, target: str, text: str) -> None:
    if target == "-":
        say(text, nl=False)
        return
    try:
        # What is no character, as half of a pair, is said so and does not keep the rest from being written.
        Path(target).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise HarnessError(f"{option} {target}: cannot be written ({error.strerror}). Give another file.") from None


def _as_page(comparison: "Comparison") -> str:
    # Plotly takes a second to import.
    from reports.compare_page import as_html

    return as_html(comparison)
