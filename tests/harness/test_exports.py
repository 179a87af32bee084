"""One step's memory for other people's viewers: read by PyTorch's own reader, and valid JSON of the right counters."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda import _memory_viz

from harness.errors import HarnessError
from harness.exports import EXPORTS, EXPORTS_ASKED, asked_exports, exports_environment
from harness.measure import viewers
from harness.measure.attribution import CATEGORIES, Attribution, Block, Held, attribute
from harness.measure.events import AllocatorEvent, AllocatorHistory, ProfilerRecorder
from harness.measure.live import LiveStorages
from harness.measure.viewers import perfetto_trace, pickled_snapshot, snapshot_of
from harness.store import RunStore
from tests.harness.conftest import Command

STUDY = """\
name: one
model: revnet
grid: {depth: [14]}
"""


def two_blocks() -> Attribution:
    """128 bytes held; 64 of a module come and stay, 32 of an operation come and go, 16 come at the end."""
    events = [
        AllocatorEvent(1_000, 0x500, 64, "aten::exp"),
        AllocatorEvent(2_000, 0x600, 32, "aten::sum"),
        AllocatorEvent(3_000, 0x600, -32, "aten::sum"),
        AllocatorEvent(4_000, 0x600, 16, ""),
    ]
    blocks = [
        Block(0x500, 64, 0, None, "aten.exp.default", "saved", "stage.0"),
        Block(0x600, 32, 1, 2, "aten::sum", "temporary"),
        Block(0x600, 16, 3, None, ""),
    ]
    history = AllocatorHistory(events, 1, 0, 5_000)
    return Attribution(history, blocks, [Held("parameter", 0x400, 128)], 0)


def profiled_step() -> tuple[torch.profiler.profile, Attribution]:
    weight = torch.zeros(256, requires_grad=True)
    recorder = ProfilerRecorder()
    with recorder, LiveStorages([weight]) as live:
        loss = weight.exp().sum()
        live.end_forward()
        recorder.end_forward()
        loss.backward()
    held = [Held("parameter", weight.data_ptr(), weight.nbytes)]
    return recorder.profile, attribute(recorder.history(), live.storages, device=weight.device, before=held, after=held)


def test_a_snapshot_has_what_existed_and_what_came_and_went() -> None:
    snapshot = snapshot_of(two_blocks())
    (trace,) = snapshot["device_traces"]
    assert [(e["action"], e["addr"], e["size"], e["time_us"]) for e in trace] == [
        ("alloc", 0x500, 64, 1),
        ("alloc", 0x600, 32, 2),
        ("free_requested", 0x600, 32, 3),
        ("free_completed", 0x600, 32, 3),
        ("alloc", 0x600, 16, 4),
    ]
    assert [(f["filename"], f["name"]) for f in trace[0]["frames"]] == [
        ("operation", "aten.exp.default"),
        ("module", "stage.0"),
        ("category", "saved"),
    ]
    assert [(s["address"], s["total_size"]) for s in snapshot["segments"]] == [(0x400, 128), (0x500, 64), (0x600, 16)]


def test_of_too_many_allocations_the_largest_are_kept_and_the_rest_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewers, "MOST_BLOCKS", 1)
    snapshot = snapshot_of(two_blocks())
    assert [e["size"] for e in snapshot["device_traces"][0]] == [64]
    assert snapshot["revnet"] == {"allocations_left_out": 2}
    monkeypatch.undo()
    assert snapshot_of(two_blocks())["revnet"] == {"allocations_left_out": 0}


def test_pytorch_s_reader_finds_every_byte_of_a_snapshot() -> None:
    _, attribution = profiled_step()
    snapshot = snapshot_of(attribution)
    end_bytes = 256 * 4 + attribution.history.levels[-1]
    lines = _memory_viz.memory(snapshot, format_flamegraph=lambda text: text).splitlines()
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == end_bytes
    assert f"segments: {len(snapshot['segments'])}" in _memory_viz.segsum(snapshot)
    allocations = [line for line in _memory_viz.trace(snapshot).splitlines() if " = " in line]
    assert len(allocations) == len(attribution.blocks)


@pytest.mark.parametrize("plot", ["trace_plot", "segment_plot"])
def test_pytorch_s_command_draws_a_snapshot(tmp_path: Path, plot: str) -> None:
    file, drawn = tmp_path / "a.pickle", tmp_path / "a.html"
    file.write_bytes(pickled_snapshot(snapshot_of(two_blocks())))
    command = [sys.executable, "-m", "torch.cuda._memory_viz", plot, str(file), "-o", str(drawn)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "snapshot.pickle" in drawn.read_text()


def test_a_perfetto_trace_has_the_operations_and_a_counter_for_each_category() -> None:
    profile, attribution = profiled_step()
    trace = json.loads(gzip.decompress(perfetto_trace(profile, attribution)))
    events = trace["traceEvents"]
    assert "aten::exp" in {event["name"] for event in events}
    counters = [event for event in events if event["ph"] == "C"]
    assert {event["name"] for event in counters} == {f"memory: {category}" for category in CATEGORIES}
    # A counter holds until it changes; the end of each track is the level at the step's end.
    ends = {event["name"]: event["args"]["bytes"] for event in counters}
    assert sum(ends.values()) == 256 * 4 + attribution.history.levels[-1]
    for category, levels in attribution.levels().items():
        track = [event["args"]["bytes"] for event in counters if event["name"] == f"memory: {category}"]
        assert max(track) == max(levels)
    allocations = [event for event in events if event["name"] == "[memory]" and event["args"]["Bytes"] > 0]
    assert {event["ts"] for event in allocations} <= {event["ts"] for event in counters}


@pytest.mark.parametrize(
    ("text", "names"), [("", set()), ("snapshot", {"snapshot"}), ("perfetto,snapshot", set(EXPORTS))]
)
def test_what_is_asked_for_is_in_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, names: set[str]) -> None:
    monkeypatch.setenv(EXPORTS_ASKED, text)
    assert asked_exports() == names
    assert exports_environment(names) == {EXPORTS_ASKED: text}


def test_an_export_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPORTS_ASKED, "snapshot,svg")
    with pytest.raises(HarnessError, match=r"'svg' is no export\. Give some of: snapshot, perfetto"):
        asked_exports()


def test_a_store_keeps_exports_as_they_are(tmp_path: Path, record: Any) -> None:
    store = RunStore(tmp_path)
    store.write_trial(record, exports={"snapshot": b"\x80", "perfetto": b"gz"})
    assert store.read_exports(record.id) == {"snapshot": b"\x80", "perfetto": b"gz"}
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {
        f"{record.id}.snapshot.pickle",
        f"{record.id}.perfetto.json.gz",
    }
    assert store.read_exports("another") == {}


def test_an_export_is_of_one_trial(revnet_here: Command, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(STUDY)
    refused = revnet_here("run", "one.yaml", "--snapshot")
    assert refused.returncode == 2
    assert "--only ID" in refused.stderr
    assert not (tmp_path / "runs").exists()
