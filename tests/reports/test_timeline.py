"""Memory over one step: levels and peak to the byte, phases, owners, and which trials are drawn."""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.record import Record, TraceRow
from harness.store import RunStore
from reports.frames import trials_frame
from reports.timeline import chosen, memory_over_step, peak_sentences, percents, step_of, timelines
from tests.reports.conftest import MIB, Make, trial

HELD = {"parameter": 5 * MIB, "gradient": 2 * MIB, "optimizer": 0, "buffer": 0, "batch": 0}
# (seconds, bytes above the start by category); the peak is the fifth, in the backward.
REBUILT = [
    (0.0, {}),
    (0.001, {"saved": 4 * MIB, "temporary": 3 * MIB}),
    (0.002, {"saved": 8 * MIB}),
    (0.003, {"saved": 6 * MIB, "reconstruction": 2 * MIB}),
    (0.004, {"saved": 6 * MIB, "reconstruction": 5 * MIB, "temporary": MIB, "gradient": 4 * MIB}),
    (0.005, {"gradient": 4 * MIB}),
]
STORED = [(0.0, {}), (0.001, {"saved": 30 * MIB}), (0.002, {"saved": 30 * MIB, "temporary": 10 * MIB}), (0.003, {})]
OWNERS = [("saved: stages.0", 6), ("reconstruction: aten.add.Tensor", 5), ("gradient: aten::mm", 3)]
OWNERS += [("gradient: aten.mm.default", 1), ("others", 1)]


def rows(
    points: list[tuple[float, dict[str, int]]],
    *,
    owners: list[tuple[str, int]] = OWNERS,
    phases: dict[str, float] | None = None,
    by_category: bool = True,
) -> list[TraceRow]:
    """A trace as harness.measure.timeline writes one; owners in MiB."""
    trace = []
    for index, (seconds, above) in enumerate(points):
        trace += [
            TraceRow("memory", index, "time_s", seconds),
            TraceRow("memory", index, "live_bytes", sum(above.values())),
        ]
        levels = dict.fromkeys(("saved", "reconstruction", "temporary", "unattributed"), 0) | HELD
        for category, held in levels.items() if by_category else ():
            trace.append(TraceRow("memory", index, f"{category}_bytes", held + above.get(category, 0)))
    trace += [TraceRow("phases", place, name, value) for place, (name, value) in enumerate((phases or {}).items())]
    trace += [TraceRow("owners", rank, name, mib * MIB) for rank, (name, mib) in enumerate(owners)]
    return [*trace, TraceRow("step", 0, "step_s", 0.1)]


def timeline(trace: list[TraceRow]) -> pd.DataFrame:
    return pd.DataFrame(trace, columns=list(TraceRow._fields)).assign(id="a" * 12)


def drawn(trace: list[TraceRow], **options: Any) -> Any:
    figure: Any = memory_over_step(timeline(trace), title="revnet 38", **options)
    assert figure is not None
    return figure


def layout(figure: go.Figure) -> Any:
    return figure.layout


def texts(figure: go.Figure) -> list[str]:
    return [annotation.text for annotation in layout(figure).annotations]


PHASES = {"backward_s": 0.0025, "end_s": 0.006}


def test_the_areas_are_the_levels_above_the_start_and_sum_to_what_is_live() -> None:
    figure = drawn(rows(REBUILT, phases=PHASES))
    areas = {area.name: list(area.y) for area in figure.data}
    assert areas == {
        "saved": [0, 4, 8, 6, 6, 0, 0],
        "reconstruction": [0, 0, 0, 2, 5, 0, 0],
        "temporary": [0, 3, 0, 0, 1, 0, 0],
        # What was held before is no part of it, and the last level stays until the end.
        "gradient": [0, 0, 0, 0, 4, 4, 4],
    }
    assert {tuple(area.x) for area in figure.data} == {(0, 1, 2, 3, 4, 5, 6)}
    assert {area.stackgroup for area in figure.data} == {"bytes"}
    assert {area.line.shape for area in figure.data} == {"hv"}


def test_categories_differ_by_more_than_colour_and_keep_their_looks() -> None:
    everything = [(0.0, {}), (0.001, dict.fromkeys((*HELD, "saved", "reconstruction", "temporary", "unattributed"), 1))]
    all_looks = {a.name: (a.fillcolor, a.fillpattern.shape) for a in drawn(rows([*everything, (0.002, {})])).data}
    few_looks = {area.name: (area.fillcolor, area.fillpattern.shape) for area in drawn(rows(REBUILT)).data}
    assert few_looks == {name: all_looks[name] for name in few_looks}
    assert len({color for color, _ in all_looks.values()}) == len(all_looks) == 9
    # Of the two without a pattern one is at the bottom and grey is at the top.
    assert [shape for _, shape in all_looks.values()].count("") == 2
    assert next(iter(all_looks)) == "saved"
    assert list(all_looks)[-1] == "unattributed"


def test_axes_have_units_and_the_description_says_the_peak() -> None:
    figure = drawn(rows(REBUILT, phases=PHASES))
    assert layout(figure).xaxis.title.text.endswith("(ms)")
    assert layout(figure).yaxis.title.text == "MiB above the 7.0 MiB at the start"
    description = layout(figure).meta["description"]
    assert "revnet 38" in description
    assert (
        "in the backward is 16.0 MiB (38 % saved, 31 % reconstruction, 6 % temporary and 25 % gradient)" in description
    )


def test_the_peak_has_its_value_and_its_owners_whoever_called_the_operation() -> None:
    peak = next(a for a in layout(drawn(rows(REBUILT))).annotations if a.text.startswith("<b>peak"))
    assert (peak.x, peak.y) == (4, 16)
    assert peak.text.split("<br>") == [
        "<b>peak 16.0 MiB</b>",
        "6.0 stages.0 (saved)",
        "5.0 add.Tensor (reconstruction)",
        "4.0 mm (gradient)",
        "1.0 others",
    ]


def test_an_owner_is_text_and_no_markup() -> None:
    owner = "saved: <a href='x'>" + "m" * 90
    text = next(text for text in texts(drawn(rows(REBUILT, owners=[(owner, 16)]))) if "peak" in text)
    assert "<a" not in text
    assert len(text) < 80


@pytest.mark.parametrize(
    ("phases", "at_ms", "label"), [(PHASES, [2.5, 6], "backward"), (None, [2, 5], "backward, from about here")]
)
def test_forward_backward_and_the_optimizer_s_step_are_told_apart(
    phases: dict[str, float] | None, at_ms: list[float], label: str
) -> None:
    """Of an older trace from the levels: where most is saved and nothing else is live."""
    figure = drawn(rows(REBUILT, phases=phases))
    assert [shape.x0 for shape in layout(figure).shapes] == at_ms
    assert {"forward", label, "optimizer's step"} <= set(texts(figure))


def test_figures_side_by_side_have_one_scale_when_asked_for() -> None:
    alone, beside = (layout(drawn(rows(REBUILT), top_mib=top)).yaxis.range[1] for top in (None, 40.0))
    assert beside == layout(drawn(rows(STORED))).yaxis.range[1]
    assert 16 < alone < 40 < beside


def test_a_step_that_was_not_attributed_is_one_area_without_phases() -> None:
    figure = drawn(rows(REBUILT, owners=[], by_category=False))
    assert [(area.name, max(area.y)) for area in figure.data] == [("not attributed", 16)]
    assert texts(figure) == ["<b>peak 16.0 MiB</b>"]
    assert list(layout(figure).shapes) == []


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9).filter(any))
def test_shares_of_a_peak_add_up_to_100_percent(parts: list[int]) -> None:
    found = percents(pd.Series(parts, index=[f"category {place}" for place in range(len(parts))]))
    assert sum(found.values()) == 100
    for nbytes, percent in zip(parts, found.values(), strict=True):
        assert abs(percent - 100 * nbytes / sum(parts)) < 1


def test_shares_that_rounding_alone_would_bring_to_101_percent() -> None:
    parts = pd.Series({"saved": 555, "reconstruction": 60, "temporary": 385})
    assert sum(round(100 * part / 1000 + 1e-9) for part in parts) == 101
    assert percents(parts) == {"saved": 56, "reconstruction": 6, "temporary": 38}


def test_nothing_is_drawn_where_there_is_nothing() -> None:
    assert memory_over_step(timeline([TraceRow("step", 0, "step_s", 0.1)]), title="x") is None
    assert memory_over_step(timeline([]), title="x") is None
    flat: Any = memory_over_step(timeline(rows([(0.0, {})], owners=[])), title="x")
    assert flat is not None
    assert [list(area.y) for area in flat.data] == [[0, 0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_drawn(value: float) -> None:
    spoiled = [row._replace(value=value) if row.index == 4 else row for row in rows(REBUILT)]
    step = step_of(timeline(spoiled))
    assert step is not None
    assert step.total_bytes.max() == 8 * MIB
    assert memory_over_step(timeline(spoiled), title="x") is not None


@pytest.fixture
def kept(make_run: Make, sweep: list[Record]) -> RunStore:
    """The sweep with a trace for each trial of batch 32 but the checkpointed."""
    store = make_run(sweep)
    for record in sweep:
        if record.spec["batch_size"] == 32 and record.spec["activations"] != "checkpointed":
            stored = record.spec["activations"] == "stored"
            store.write_trial(record, rows(STORED if stored else REBUILT, phases=PHASES))
    return store


def test_timelines_are_the_rows_that_are_drawn(kept: RunStore, sweep: list[Record]) -> None:
    ids = [record.id for record in sweep]
    found = timelines(kept, [*ids, "0" * 12])
    assert list(found) == ["id", "table", "index", "name", "value"]
    assert set(found["table"]) == {"memory", "phases", "owners"}
    drawn_ids = {i for i, own in found.groupby("id") if memory_over_step(own, title="x") is not None}
    assert drawn_ids == {r.id for r in sweep if r.spec["batch_size"] == 32 and r.spec["activations"] != "checkpointed"}
    assert timelines(kept, []).empty


def test_the_deepest_of_each_strategy_and_batch_are_chosen_first(make_run: Make, sweep: list[Record]) -> None:
    others = [trial(1, depth=38, seed=1), trial(2, depth=62, status="oom", reason="too large")]
    frame = trials_frame(make_run([*sweep, *others]))
    by_id = frame.set_index("id")
    first = by_id.loc[chosen(frame, most=8)]
    assert set(first["depth"]) == {38}
    assert list(first["batch_size"]) == [32] * 4 + [16] * 4
    assert len(set(zip(first["strategy"], first["batch_size"], strict=True))) == 8
    assert set(by_id.loc[chosen(frame, most=12)]["depth"]) == {38, 26}
    # Every finished trial once, and of repeats one.
    assert len(chosen(frame, most=1000)) == len(sweep)
    assert chosen(frame, most=0) == []


def test_of_no_trials_none_is_chosen(tmp_path: Path) -> None:
    assert chosen(trials_frame(RunStore(tmp_path))) == []


def test_the_sentence_sets_reconstructed_beside_stored_of_the_same_cell(kept: RunStore) -> None:
    frame = trials_frame(kept)
    sentences = peak_sentences(frame, timelines(kept, chosen(frame)))
    assert sentences[0] == (
        "revnet (depth 38), batch 32: the peak is 40.0 MiB (75 % saved and 25 % temporary) stored, and 16.0 MiB "
        "(38 % saved, 31 % reconstruction, 6 % temporary and 25 % gradient) reconstructed."
    )
    assert [sentence.split()[-1] for sentence in sentences] == ["reconstructed.", "exact."]


def test_there_is_no_sentence_about_what_was_not_attributed(make_run: Make) -> None:
    records = [trial(1, activations=activations) for activations in ("stored", "reconstructed")]
    store = make_run(records)
    for record in records:
        store.write_trial(record, rows(REBUILT, owners=[], by_category=False))
    frame = trials_frame(store)
    assert peak_sentences(frame, timelines(store, frame["id"])) == []
