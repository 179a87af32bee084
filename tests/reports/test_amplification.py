"""The section on amplification: planted errors read back out of the figure and the sentences."""

from collections.abc import Iterator
from typing import Any

import pytest

from harness.record import TraceRow
from reports.amplification import ADVICE, TABLE, amplification_by_block, amplification_sentences, growth_of
from reports.frames import trace_frame, trials_frame
from reports.page import build_report
from tests.reports.conftest import Make, trial

CHAINS = (0, 0, 0, 1, 1)
# Four times at each block towards the input of a chain.
REL = (16e-6, 4e-6, 1e-6, 8e-6, 2e-6)


def rows(*, measured: float = 1.0) -> Iterator[TraceRow]:
    """Predicted half of what is measured, but a tenth in block 3; bounded by 1e9 times."""
    for block, (chain, rel) in enumerate(zip(CHAINS, REL, strict=True)):
        figures = {"chain": chain, "largest": 3.0, "smallest": 0.5 if block != 1 else 0.001, "noise_gain": 1.5}
        figures |= {"predicted_rel": measured * rel / (10 if block == 3 else 2), "bound_rel": measured * rel * 1e9}
        yield from (TraceRow(TABLE, block, name, value) for name, value in figures.items())
        yield TraceRow("drift", block, "rel", measured * rel)


def test_each_error_is_in_the_figure_and_in_the_sentences(make_run: Make) -> None:
    fp32 = trial(1, activations="reconstructed")
    exact = trial(2, activations="reconstructed", reconstruction="exact")
    store = make_run([fp32, exact])
    for record, measured in ((fp32, 1.0), (exact, 0.0)):
        store.write_trial(record, list(rows(measured=measured)), b"log")
    frame = trials_frame(store)
    causes, drift = (trace_frame(store, list(frame["id"]), table) for table in (TABLE, "drift"))

    figure: Any = amplification_by_block(frame, causes, drift)
    assert figure is not None
    drawn = {(trace.xaxis, trace.name): trace for trace in figure.data if trace.x[0] is not None}
    assert len(drawn) == 6
    measured = drawn["x", "measured"]
    assert measured.mode == "markers"
    # A gap where the next chain begins.
    assert list(measured.x) == [0, 1, 2, None, 3, 4]
    assert list(measured.y) == [*REL[:3], None, *REL[3:]]
    assert list(drawn["x", "predicted"].y) == pytest.approx([8e-6, 2e-6, 5e-7, None, 8e-7, 1e-6], nan_ok=True)
    assert drawn["x", "bound"].line.dash == "dot"
    assert drawn["x", "bound"].y[0] == pytest.approx(16e3)
    low, high = (10**end for end in figure.layout["yaxis"].range)  # pyright: ignore[reportAttributeAccessIssue]
    assert low < 5e-7 < 16e-6 < high < 16e3
    zero = drawn["x2", "measured"]
    assert set(zero.customdata) == {0, None}
    assert figure.layout["yaxis"]["ticktext"][0] == "0"
    assert figure.layout["yaxis"]["tickvals"][0] == zero.y[0] < low * 10

    first, advice, second = amplification_sentences(frame, causes, drift)
    assert first.startswith("revnet38 · reconstructed: the error is at most 1.6e-05, in block 0;")
    assert "it is multiplied by 4 (predicted: " in first
    assert "at most 1e+03 times, in block 1;" in first
    assert "predicted over measured is 0.5 in the median and 0.1 at worst; the bound is up to 1e+09 times too" in first
    assert "every rebuilt input equals the original bit for bit" in second
    assert advice == ADVICE
    html = build_report(store)
    assert 'id="figure-amplification"' in html
    answers = html[html.index('aria-label="Verdict"') : html.index('id="choose"')]
    assert answers.index("the error is at most 1.6e-05") < answers.index("the relative drift is at most")
    assert ADVICE not in answers


@pytest.mark.parametrize(
    ("compute", "reconstruction", "told"),
    [("bf16", "fp32", True), ("bf16", "bf16", False), ("fp32", "fp64", False), ("fp32", "fp32", False)],
)
def test_a_prediction_for_coarser_f_and_g_says_what_it_leaves_out(
    make_run: Make, compute: str, reconstruction: str, told: bool
) -> None:
    record = trial(1, activations="reconstructed", reconstruction=reconstruction, compute=compute)
    store = make_run([record])
    store.write_trial(record, list(rows()), b"log")
    frame = trials_frame(store)
    causes, drift = (trace_frame(store, list(frame["id"]), table) for table in (TABLE, "drift"))
    left_out = "F and G compute in fewer digits than the streams"
    assert (left_out in amplification_sentences(frame, causes, drift)[0]) == told


def test_errors_that_are_no_numbers_are_said_to_be_none(make_run: Make) -> None:
    record = trial(1, activations="reconstructed")
    store = make_run([record])
    store.write_trial(record, list(rows(measured=float("nan"))), b"log")
    assert "not all errors are numbers" in build_report(store)


def test_growth_is_within_chains_and_of_nothing_where_there_is_none(make_run: Make) -> None:
    store = make_run([trial(1)])
    store.write_trial(trial(1), list(rows()), b"log")
    drift, causes = (trace_frame(store, [trial(1).id], table) for table in ("drift", TABLE))
    blocks = causes.pivot_table(index="index", columns="name", values="value")
    blocks["rel"] = drift.set_index("index")["value"]
    assert growth_of(blocks) == pytest.approx(4)
    assert growth_of(blocks.loc[[2, 3]]) is None
    assert growth_of(blocks.assign(rel=0.0)) is None


def test_without_rows_there_is_no_section(make_run: Make) -> None:
    store = make_run([trial(1, activations="reconstructed")])
    frame = trials_frame(store)
    causes, drift = (trace_frame(store, list(frame["id"]), table) for table in (TABLE, "drift"))
    assert amplification_by_block(frame, causes, drift) is None
    assert amplification_sentences(frame, causes, drift) == []
    assert 'id="amplification"' not in build_report(store)
