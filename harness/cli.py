"""The `revnet` command: parse, call, print, exit code. On top of everything; imports the heavy rooms when needed.

Exit codes: 0 done; 1 trials failed; 2 bad input; 3 not comparable; 4 incomplete.
"""

import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.store import RunStore
    from harness.study import Study
    from harness.trials import TrialSpec

DONE, FAILED, BAD_INPUT, INCOMPLETE = 0, 1, 2, 4


class DeviceKind(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


app = typer.Typer(
    help="Measure what reversible networks save in activation memory, and what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

StudyArgument = Annotated[str, typer.Argument(help="A study file, or the name of a shipped study.", metavar="STUDY")]
OutOption = Annotated[str | None, typer.Option(help="The run directory or fsspec URI; runs/NAME if not given.")]
MemoryOption = Annotated[str | None, typer.Option(help="Of a rank's device, e.g. 80GiB.", metavar="SIZE")]
RunArgument = Annotated[str, typer.Argument(help="A run directory (or any fsspec URI).", metavar="RUN")]


@app.command()
def doctor() -> None:
    """Check this machine: libraries, devices, browser, and one tiny trial from start to record."""
    from harness.doctor import examine

    findings = []
    for finding in examine():
        typer.echo(f"{finding.level:<5} {finding.text}")
        findings.append(finding)
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(FAILED)


@app.command()
def models() -> None:
    """List the network families: depths, and what may become of their activations."""
    from revnet_core.networks import FAMILIES

    for name, family in FAMILIES.items():
        typer.echo(f"{name:<24} depth {family.depths:<9} {family.summary}")
        typer.echo(f"{'':<24} {', '.join(family.activations)}")
    typer.echo("package.module:factory   a model of your own; see docs/studies.md")


@app.command()
def plan(
    study: StudyArgument,
    out: OutOption = None,
    memory: MemoryOption = None,
    device: Annotated[
        DeviceKind | None, typer.Option(help="Predict for it; by default the one that trials would run on here.")
    ] = None,
) -> None:
    """Check a study, predict the memory of its trials, and list which of them are done; starts nothing."""
    from harness.forecast import forecast
    from harness.plan_view import print_plan
    from harness.predict import Device, device_of
    from harness.store import RunStore

    memory_bytes = _memory(memory)
    loaded, trials = _load(study)

    def chosen(trial: "TrialSpec") -> Device:
        return Device(device.value, trial.resources.cpus_per_worker) if device else device_of(trial)

    print_plan(trials, forecast(trials, chosen), RunStore(out or _default_out(loaded)).finished_ids(), memory_bytes)


@app.command()
def run(
    study: StudyArgument,
    out: OutOption = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to join, rather than one of our own here.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, spread over the strategies.")] = None,
    only: Annotated[str | None, typer.Option(help="Only the trials whose id begins so, done or not.")] = None,
    retry: Annotated[str | None, typer.Option(help="Also trials that ended so, e.g. failed,crashed,timeout.")] = None,
) -> None:
    """Run the trials of a study that are not done yet, then write the report."""
    from harness.planning import select_trials
    from harness.store import RunStore

    loaded, trials = _load(study)
    store = RunStore(out or _default_out(loaded))
    store.open_for(loaded.resolved(), [trial.id for trial in trials])
    selected = select_trials(trials, store, only=only, retry=retry, limit=limit)
    interrupted = _run_selected(selected, len(trials), store, loaded.resources.timeout_s, address)
    report_path = _write_report(store)
    counts = Counter(record.status for record in store.read_records())
    left = len(trials) - len(store.finished_ids() & {trial.id for trial in trials})
    in_words = "  ".join(f"{status} {count}" for status, count in counts.items())
    typer.echo(f"{len(selected)} run now; {len(trials) - left} of {len(trials)} trials done: {in_words or 'none'}")
    broken = sum(counts[status] for status in ("failed", "crashed", "timeout"))
    if broken:
        typer.echo(f"{broken} came to no result; their logs lie in {store.uri}/logs.")
        typer.echo(f"Run them again with: {_again(study, out)} --retry failed,crashed,timeout")
    if interrupted:
        typer.echo(f"stopped; what is finished is kept. Go on with: {_again(study, out)}")
    elif left:
        typer.echo(f"{left} trials not run yet. Run them with: {_again(study, out)}")
    typer.echo(f"report: {report_path}")
    raise typer.Exit(INCOMPLETE if interrupted else FAILED if broken else DONE)


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html of a run, finished or not."""
    from harness.store import RunStore

    store = RunStore(run)
    if store.read_plan() is None and not store.finished_ids():
        raise HarnessError(f"{run}: no run here (neither plan.json nor trials/). Give the directory of `revnet run`.")
    typer.echo(_write_report(store))


def _run_selected(
    selected: "list[TrialSpec]", planned: int, store: "RunStore", timeout_s: float, address: str | None
) -> bool:
    """Run them with a progress bar; returns whether somebody pressed Ctrl-C."""
    if not selected:
        return False
    from harness.progress import SweepProgress
    from harness.schedule import ray_session, run_trials

    try:
        with ray_session(address), SweepProgress(len(selected), planned) as progress:
            for tick in run_trials(selected, store, timeout_s):
                progress.update(tick)
    except KeyboardInterrupt:
        return True
    return False


def _load(study: str) -> "tuple[Study, list[TrialSpec]]":
    from harness.study import check_trials, load_study
    from harness.trials import expand

    loaded = load_study(study)
    trials = expand(loaded)
    check_trials(loaded, trials)
    return loaded, trials


def _memory(given: str | None) -> int | None:
    from harness.sizes import parse_memory

    try:
        return parse_memory(int(given) if given and given.isdecimal() else given)
    except ValueError as error:
        raise HarnessError(f"--memory {given}: {error}.") from None


def _default_out(study: "Study") -> str:
    return str(Path("runs", study.name))


def _again(study: str, out: str | None) -> str:
    return f"revnet run {study}" + (f" --out {out}" if out else "")


def _write_report(store: "RunStore") -> str:
    from reports.frames import laws, trials_frame
    from reports.page import build_report

    store.write_laws(laws(trials_frame(store)).to_csv(index=False))
    return store.write_report(build_report(store))


def main() -> None:
    try:
        app()
    except HarnessError as error:
        typer.echo(str(error), err=True)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
