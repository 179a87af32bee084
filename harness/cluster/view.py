"""What `revnet plan --cluster` prints beneath the trials: what goes where, how long that takes, and how it is known."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rich.table import Table

from harness.cluster.durations import LAUNCH_S, NIC_BYTES_PER_S, Estimate
from harness.cluster.outlook import SCHEDULING_S, Outlook, Prospect
from harness.placing import Place
from harness.plan_view import STRATEGY, wide_console
from harness.trials import AXES


def print_outlook(outlook: Outlook, beside_s: float) -> None:
    """beside_s: what was assumed of trials without records"""
    console = wide_console()
    prospects = outlook.prospects
    varying = [name for name in AXES if len({p.trial.value(name) for p in prospects}) > 1]
    console.print()
    console.print(f"cluster: {' + '.join(group.in_words() for group in outlook.cluster)}", highlight=False)
    console.print(_table(outlook, [name for name in STRATEGY if name in varying]))
    for line in (*_troubles(outlook), *_summary(outlook), *_sources(prospects, beside_s)):
        console.print(line, highlight=False, soft_wrap=True)


def in_time(seconds: float) -> str:
    """`41 s`, `2 min 3 s`, `4 h 10 min`, `3.2 days`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{seconds / 86400:.1f} days"


def _table(outlook: Outlook, names: Sequence[str]) -> Table:
    rows: dict[tuple[str, ...], list[Prospect]] = defaultdict(list)
    for prospect in outlook.prospects:
        own = (str(prospect.trial.value(name)) for name in names)
        rows[(*own, _where(prospect.place, outlook))].append(prospect)
    hours = f"{'GPU' if outlook.has_gpus else 'core'}-hours"
    table = Table(*names, "on", box=None, pad_edge=False)
    for name in ("trials", "out of memory", "step", "trial", hours, "times from"):
        table.add_column(name, justify="right")
    for own, members in rows.items():
        spans = [outlook.spans[p.trial.id] for p in members if p.trial.id in outlook.spans]
        known = [e for p in members for e in p.estimates if isinstance(e, Estimate)]
        seconds = sum(outlook.device_s(p) for p in members if p.trial.id in outlook.spans)
        table.add_row(
            *own,
            str(len(members)),
            str(sum(p.runs_out for p in members)),
            _range(e.step_s for e in known),
            _range(span.end_s - span.start_s for span in spans),
            f"{seconds / 3600:.2f}" if spans else "-",
            " and ".join(sorted({e.how for e in known})) or "-",
        )
    return table


def _where(place: Place | None, outlook: Outlook) -> str:
    if place is None:
        return "nowhere"
    if place.is_spread:
        return f"{len(place.bundles)} ranks, several nodes"
    amounts = dict(place.bundles[0])
    count, what = (amounts["GPU"], "GPU") if "GPU" in amounts else (amounts["CPU"], "core")
    return f"{count:g} {what}{'s' if count > 1 else ''} of a node"


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    if not found:
        return "-"
    low, high = (in_time(value) if value >= 1 else f"{1e3 * value:.3g} ms" for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"


def _troubles(outlook: Outlook) -> Iterable[str]:
    nowhere = Counter(p.why for p in outlook.prospects if p.place is None)
    for why, count in nowhere.items():
        yield f"{count} trials fit nowhere, and the sweep would be refused: each {why}"
    unknown = Counter(p.unknown for p in outlook.prospects if p.unknown is not None)
    for why, count in unknown.items():
        yield f"{count} trials are left out, since their time is not known: {why}"
    if mixed := sum(p.fits_some for p in outlook.prospects):
        yield (
            f"{mixed} trials fit some of these devices and not others; places are chosen by number, not by memory, so "
            "they may run out of it. Run them on a cluster of those that they fit."
        )


def _summary(outlook: Outlook) -> Iterable[str]:
    spans = outlook.spans
    if not spans:
        return
    device = "GPU" if outlook.has_gpus else "core"
    used_s = sum(outlook.device_s(p) for p in outlook.prospects if p.trial.id in spans)
    longest_id, longest = max(spans.items(), key=lambda item: item[1].end_s - item[1].start_s)
    busy = used_s / (outlook.makespan_s * outlook.devices)
    yield (
        f"{len(spans)} trials take {in_time(outlook.makespan_s)} and {used_s / 3600:.2f} "
        f"{device}-hours; {busy:.0%} of the {outlook.devices} {device}s' time is used"
    )
    longest_s = longest.end_s - longest.start_s
    yield f"the longest of them, {longest_id}, takes {in_time(longest_s)}; more nodes end it no sooner"


def _sources(prospects: Sequence[Prospect], beside_s: float) -> Iterable[str]:
    counts = Counter(e.how for p in prospects for e in p.estimates[:1] if isinstance(e, Estimate))
    if counts["records"]:
        yield (
            f"times of {counts['records']} trials from earlier records of the same family, activations, precisions, "
            "compilation, graph, ZeRO stage, ranks and audits, by the operations of a step"
        )
    if counts["roofline"]:
        yield (
            f"times of {counts['roofline']} trials by a roofline, the least that a step can take: the maker's peak "
            f"FLOP/s, memory bandwidth and link of each GPU, all used to the full; {LAUNCH_S * 1e6:g} us a kernel; "
            f"{NIC_BYTES_PER_S / 1e9:g} GB/s a rank between nodes"
        )
        yield (
            f"beside its steps each of these is assumed to take {in_time(beside_s)} (--beside); records of a few "
            "(`revnet run --limit`, then --from) tell better"
        )
    yield f"each trial takes {SCHEDULING_S:g} s to be scheduled; largest first, in places as a sweep asks for them"
