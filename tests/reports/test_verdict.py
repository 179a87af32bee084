"""Sentences on memory and time: the answer first, and no slope without what its interval is worth."""

from typing import Any

from harness.record import Record
from reports.frames import frame_of
from reports.verdict import batch_sentences, growth_sentences, mode_sentences, time_sentences
from tests.reports.conftest import MIB, PEAK, trial, with_metrics


def measured(peaks_mib: dict[int, float], **changes: Any) -> list[Record]:
    """A trial a depth, with these peaks."""
    return [
        with_metrics(trial(depth, depth=depth, **changes), activation_peak_bytes=round(peak * MIB))
        for depth, peak in peaks_mib.items()
    ]


def family(model: str, *kinds: str) -> list[Record]:
    cells = [(depth, batch, kind) for depth in (14, 26, 38) for batch in (16, 32) for kind in kinds]
    return [
        trial(n, model=model, depth=depth, batch_size=batch, activations=kind)
        for n, (depth, batch, kind) in enumerate(cells)
    ]


def test_the_networks_that_rebuild_come_first_and_of_them_what_rebuilds() -> None:
    records = family("alpha", "stored", "checkpointed") + family("beta", "stored", "checkpointed", "reconstructed")
    frame = frame_of(records)
    for sentences in (growth_sentences(frame, PEAK, "peak"), batch_sentences(frame, PEAK, "peak")):
        assert [sentence.split(",")[0] for sentence in sentences] == ["beta", "alpha"]
    assert [sentence.split(" times as long ")[1].split(" as")[0] for sentence in time_sentences(frame)] == [
        "reconstructed",
        "checkpointed",
        "checkpointed",
    ]
    assert time_sentences(frame)[2].startswith("alpha: ")


def test_each_network_is_told_of_its_own_largest_batch() -> None:
    records = [record for record in family("beta", "stored", "reconstructed") if record.spec["batch_size"] == 16]
    frame = frame_of([*records, *family("alpha", "stored")])
    starts = [sentence.split(":")[0] for sentence in growth_sentences(frame, PEAK, "peak")]
    assert starts == ["beta, batch 16", "alpha, batch 32"]


def test_an_interval_of_three_depths_is_called_wide_and_the_share_has_a_bound() -> None:
    bent = measured({14: 20, 26: 21, 38: 28}, activations="reconstructed")
    straight = measured({14: 50, 26: 80, 38: 110})
    (sentence,) = growth_sentences(frame_of([*bent, *straight]), PEAK, "peak")
    assert "per block (from 3 depths, ± half the 95 % interval, wide with 3): 10.00 ± 0 MiB with stored" in sentence
    assert "1.3 ± 7.3 MiB with reconstructed." in sentence
    assert sentence.endswith("The last is 13 % of the first (by their intervals at most 87 %).")


def test_more_depths_are_not_called_wide_and_two_give_no_interval() -> None:
    four = measured({14: 20, 26: 21, 38: 28, 50: 30})
    (sentence,) = growth_sentences(frame_of(four), PEAK, "peak")
    assert "(from 4 depths, ± half the 95 % interval): 1.2 ± " in sentence
    (sentence,) = growth_sentences(frame_of(four[:2]), PEAK, "peak")
    assert "(from 2 depths, which give no interval): 0.333 MiB with" in sentence
    assert "±" not in sentence


def test_a_compiled_step_is_set_beside_the_same_step_as_it_is_written() -> None:
    def timed(n: int, step_s: float, peak: int, **changes: Any) -> Record:
        return with_metrics(trial(n, **changes), step_median_s=step_s, activation_peak_bytes=peak)

    records = [
        timed(1, 4.0, 100, activations="stored", depth=14),
        timed(2, 1.0, 90, activations="stored", depth=14, compile=True),
        timed(3, 6.0, 50, activations="reconstructed", depth=14),
        timed(4, 3.0, 60, activations="reconstructed", depth=14, cuda_graph=True),
        timed(5, 8.0, 50, activations="reconstructed", depth=26),
        timed(6, 2.0, 60, activations="reconstructed", depth=26, cuda_graph=True),
        # Without a partner.
        timed(7, 5.0, 50, activations="checkpointed", depth=26, cuda_graph=True),
    ]
    assert mode_sentences(frame_of(records)) == [
        "revnet: a step takes 0.25 times as long stored · compiled as stored (median of 1 cell).",
        "revnet: a step takes 0.38 times as long reconstructed · graph as reconstructed (median of 2 cells, 0.25 to "
        "0.50).",
        "revnet: the activation peak is 0.90 times as high stored · compiled as stored (median of 1 cell).",
    ]
    assert mode_sentences(frame_of(records[:1])) == []
