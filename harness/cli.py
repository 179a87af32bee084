"""The `revnet` command: parse, call, print, exit code. On top of everything; imports the heavy rooms when needed.

Exit codes: 0 done; 1 a regression, or trials failed; 2 bad input; 3 not comparable; 4 incomplete.
"""

import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli_results import RunArgument, compare, export, open_run, report, write_report
from harness.errors import HarnessError
from harness.plain_text import say

if TYPE_CHECKING:
    from harness.find import Axis
    from harness.store import RunStore
    from harness.study import Study, StudyResources
    from harness.trials import TrialSpec

DONE, FAILED, BAD_INPUT, INCOMPLETE = 0, 1, 2, 4


class DeviceKind(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Sought(StrEnum):
    DEPTH = "depth"
    BATCH_SIZE = "batch_size"


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


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Check each node of this Ray cluster instead.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="With --address: a directory or URI for runs, to be written from each node.")
    ] = None,
) -> None:
    """Check this machine: libraries, devices, browser, and one tiny trial from start to record; or a cluster."""
    from harness.doctor import examine, examine_cluster

    findings = []
    for finding in examine() if address is None else examine_cluster(address, storage):
        say(f"{finding.level:<5} {finding.text}")
        findings.append(finding)
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(FAILED)


@app.command()
def models() -> None:
    """List the network families: depths, and what may become of their activations."""
    from revnet_core.networks import FAMILIES

    for name, family in FAMILIES.items():
        say(f"{name:<24} depth {family.depths:<9} {family.summary}")
        say(f"{'':<24} {', '.join(family.activations)}")
    say("package.module:factory   a model of your own; see docs/studies.md")


@app.command()
def plan(
    study: StudyArgument,
    out: OutOption = None,
    memory: MemoryOption = None,
    device: Annotated[
        DeviceKind | None, typer.Option(help="Predict for it; by default the one that trials would run on here.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="What fits where on it and how long it takes.", metavar="64x8xH200-141GB")
    ] = None,
    earlier: Annotated[
        list[str] | None, typer.Option("--from", help="With --cluster: a run to take times from.", metavar="RUN")
    ] = None,
    beside: Annotated[
        float | None, typer.Option(min=0, help="With --cluster: s of a trial beside its steps where none was measured.")
    ] = None,
) -> None:
    """Check a study, predict the memory of its trials, and list which of them are done; starts nothing."""
    from harness.forecast import forecast
    from harness.plan_view import print_plan
    from harness.predict import Device, device_of
    from harness.store import RunStore

    memory_bytes = _memory(memory)
    if cluster is not None:
        _refuse({"--memory": memory, "--device": device}, "--cluster says what it is. Leave it out.")
    else:
        _refuse({"--from": " ".join(earlier or ()) or None, "--beside": beside}, "it belongs to --cluster. Give both.")
    loaded, trials = _load(study)
    store = RunStore(out or _default_out(loaded))
    if cluster is not None:
        from harness.cluster.plan import plan_on

        plan_on(cluster, trials, store, [open_run(run) for run in earlier or ()], beside)
        return

    def chosen(trial: "TrialSpec") -> Device:
        return Device(device.value, trial.resources.cpus_per_worker) if device else device_of(trial)

    print_plan(trials, forecast(trials, chosen), store.finished_ids(), lambda _: memory_bytes)


@app.command()
def run(
    study: StudyArgument,
    out: OutOption = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to join, rather than one of our own here.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, spread over the strategies.")] = None,
    only: Annotated[str | None, typer.Option(help="Only the trials whose id begins so, done or not.")] = None,
    retry: Annotated[str | None, typer.Option(help="Also trials that ended so, e.g. failed,crashed,timeout.")] = None,
    find: Annotated[
        Sought | None, typer.Option(help="Instead of the study's own values of it, the largest one that fits.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="With --find: what a rank fits into.", metavar="SIZE")] = None,
    headroom: Annotated[
        str | None, typer.Option(help="With --find: the share that predictions leave free; 5% if not given.")
    ] = None,
    at_most: Annotated[int | None, typer.Option(min=1, help="With --find: the bound of the search.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave it to a driver in the cluster at --address, and return.")
    ] = False,
    snapshot: Annotated[bool, typer.Option("--snapshot", help="One step's memory for pytorch.org/memory_viz.")] = False,
    perfetto: Annotated[bool, typer.Option("--perfetto", help="One step's trace for ui.perfetto.dev.")] = False,
) -> None:
    """Run the trials of a study that are not done yet, then write the report."""
    if find is not None:
        others = {"--limit": limit, "--only": only, "--detach": detach, "--snapshot": snapshot, "--perfetto": perfetto}
        _refuse(others, "--find chooses its trials itself. Leave it out.")
        from harness.find_run import Question, find_largest
        from harness.launching import run_selected

        axis: Axis = "depth" if find is Sought.DEPTH else "batch_size"
        asked = Question(study, axis, headroom or "5%", _memory(memory), at_most, retry, out)

        def run_pending(pending: "list[TrialSpec]", store: "RunStore", resources: "StudyResources") -> bool:
            return run_selected(pending, len(pending), store, resources, address, [])

        found = find_largest(asked, run_pending, write_report)
        raise typer.Exit({"interrupted": INCOMPLETE, "open": FAILED, "answered": DONE}[found])
    of_a_search = {"--memory": memory, "--headroom": headroom, "--at-most": at_most}
    _refuse(of_a_search, "it belongs to --find. Give both; the memory of a study's trials is its resources.memory.")
    from harness.exports import what_was_exported
    from harness.launching import leave_to_cluster, run_selected
    from harness.planning import select_trials
    from harness.store import RunStore

    exports = [name for name, asked in (("snapshot", snapshot), ("perfetto", perfetto)) if asked]
    if detach and (address is None or exports):
        raise HarnessError(
            "--detach: takes a cluster that goes on when this command has ended, and no exports. Give --address, or "
            "run `nohup revnet run ... &` on this machine."
        )
    if exports and only is None:
        raise HarnessError(
            f"--{exports[0]}: a file for each trial. Name the trials with --only ID; the report has the ids."
        )
    loaded, trials = _load(study)
    store = RunStore(out or _default_out(loaded))
    store.refuse_private()
    store.open_for(loaded.resolved(), [trial.id for trial in trials])
    selected = select_trials(trials, store, only=only, retry=retry, limit=limit)
    if detach and selected:
        leave_to_cluster(selected, store, loaded.resources, address)
        return
    interrupted = run_selected(selected, len(trials), store, loaded.resources, address, exports)
    counts = Counter(record.status for record in store.read_records())
    left = len(trials) - len(store.finished_ids() & {trial.id for trial in trials})
    in_words = "  ".join(f"{status} {count}" for status, count in counts.items())
    say(f"{len(selected)} run now; {len(trials) - left} of {len(trials)} trials done: {in_words or 'none'}")
    broken = sum(counts[status] for status in ("failed", "crashed", "timeout"))
    if broken:
        say(f"{broken} came to no result; their logs lie in {store.uri}/logs.")
        say(f"Run them again with: {_again(study, out)} --retry failed,crashed,timeout")
    if interrupted:
        say(f"stopped; what is finished is kept. Go on with: {_again(study, out)}")
    elif left:
        say(f"{left} trials not run yet. Run them with: {_again(study, out)}")
    for trial in selected if exports else ():
        say("\n".join(what_was_exported(store, trial.id, exports)))
    say(f"report: {write_report(store)}")
    raise typer.Exit(INCOMPLETE if interrupted else FAILED if broken else DONE)


@app.command()
def status(run: RunArgument) -> None:
    """How many trials of a run stand how, and which are at work where; from its directory alone."""
    from harness.status import describe

    for line in describe(open_run(run)):
        say(line)


@app.command()
def logs(
    run: RunArgument, trial: Annotated[str, typer.Argument(help="A trial's id, or its beginning.", metavar="ID")]
) -> None:
    """Print what a trial has printed, of one that is at work as of some seconds ago."""
    from harness.status import trial_with

    store = open_run(run)
    trial_id = trial_with(store, trial)
    log = store.read_log(trial_id)
    if log is None:
        raise HarnessError(f"{trial_id}: has no log yet. `revnet status {run}` says where it stands.")
    say(log, nl=False)


@app.command()
def stop(run: RunArgument) -> None:
    """Ask whoever runs the trials to stop: those at work are given back, what is finished is kept."""
    store = open_run(run)
    store.ask_to_stop()
    say(f"asked; drivers see it within seconds. Go on with the `revnet run` that began it; {store.uri} is kept.")


@app.command()
def pack(run: RunArgument) -> None:
    """Put the finished trials of a run into one Parquet file, in place of three small files each."""
    from harness.pack import pack as pack_trials

    store = open_run(run)
    done = pack_trials(store)
    where = f"{store.uri}/packs/{done.name}" if done.name else "no pack"
    say(f"{done.trials} trials in {where}; {done.removed} files replaced.")


for command in (report, export, compare):
    app.command()(command)


def _refuse(options: dict[str, object], why: str) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise HarnessError(f"{name if value is True else f'{name} {value}'}: {why}")


def _load(study: str) -> "tuple[Study, list[TrialSpec]]":
    from harness.expansion import expand
    from harness.study import check_trials, load_study

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


def main() -> None:
    try:
        app()
    except HarnessError as error:
        say(str(error), err=True)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
