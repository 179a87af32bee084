"""One step's memory as files for other people's viewers: PyTorch's memory viewer and Perfetto. Written, never read."""

import gzip
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.measure.attribution import Attribution, Block, Held

# The viewer draws each allocation as a polygon.
MOST_BLOCKS = 100_000


def pickled_snapshot(snapshot: Mapping[str, Any]) -> bytes:
    """As PyTorch's memory viewer (pytorch.org/memory_viz) and `torch.cuda._memory_viz` read it."""
    return pickle.dumps(dict(snapshot))


def snapshot_of(attribution: Attribution) -> dict[str, Any]:
    """A step in the format of `torch.cuda.memory._snapshot`, which the CPU's allocator does not write.

    In place of stack frames the operation, the module and the category. Of more than MOST_BLOCKS allocations the
    largest; how many were left out is under `revnet`.
    """
    shown = sorted(attribution.blocks, key=lambda block: -block.nbytes)[:MOST_BLOCKS]
    events = attribution.history.events
    moments = [(block.start, "alloc", block) for block in shown]
    moments += [(block.end, action, block) for action in _FREED for block in shown if block.end is not None]
    trace = [
        {
            "action": action,
            "addr": block.address,
            "size": block.nbytes,
            "stream": 0,
            "time_us": events[position].time_ns // 1000,
            "frames": _frames(block),
            "category": block.category,
        }
        for position, action, block in sorted(moments, key=lambda moment: moment[0])
    ]
    # An address that the step handed out was free, whatever had been there.
    handed_out = {block.address for block in attribution.blocks}
    lasting = [held for held in attribution.held if held.address not in handed_out]
    segments = [_segment(held.address, held.nbytes, _held_frames(held)) for held in lasting]
    segments += [_segment(block.address, block.nbytes, _frames(block)) for block in shown if block.end is None]
    left_out = {"allocations_left_out": len(attribution.blocks) - len(shown)}
    return {"segments": segments, "device_traces": [trace], "revnet": left_out}


_FREED = ("free_requested", "free_completed")


def _frames(block: Block) -> list[dict[str, Any]]:
    names = {"operation": block.operation, "module": block.owner, "category": block.category}
    return [{"name": name, "filename": kind, "line": 0} for kind, name in names.items() if name]


def _held_frames(held: Held) -> list[dict[str, Any]]:
    return [{"name": held.category, "filename": "category", "line": 0}]


def _segment(address: int, nbytes: int, frames: list[dict[str, Any]]) -> dict[str, Any]:
    block = {
        "address": address,
        "size": nbytes,
        "requested_size": nbytes,
        "state": "active_allocated",
        "frames": frames,
    }
    return {
        "address": address,
        "device": 0,
        "total_size": nbytes,
        "allocated_size": nbytes,
        "active_size": nbytes,
        "requested_size": nbytes,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "blocks": [block],
    }


def perfetto_trace(profile: torch.profiler.profile, attribution: Attribution) -> bytes:
    """The profiler's trace of the step with a counter track for each category, as gzipped JSON; ui.perfetto.dev
    opens it."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "trace.json")
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())
    base_ns = trace.get("baseTimeNanoseconds", 0)
    history = attribution.history
    times_us = [(ns - base_ns) / 1000 for ns in (history.start_ns, *(event.time_ns for event in history.events))]
    for category, levels in attribution.levels().items():
        for position, level in enumerate(levels):
            if position == 0 or level != levels[position - 1]:
                counter = {"ph": "C", "cat": "memory", "name": f"memory: {category}", "pid": os.getpid()}
                trace["traceEvents"].append(counter | {"ts": times_us[position], "args": {"bytes": level}})
    return gzip.compress(json.dumps(trace).encode(), mtime=0)
