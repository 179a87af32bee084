"""Trials as event files of TensorBoard, a folder each; written without torch and without TensorFlow."""

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reports.exporters.extras import library
from reports.exporters.folders import find_current, mark, remove, writable_folder
from reports.exporters.rows import Row

EXTRA = "tensorboard"


class TensorBoard:
    """Scalars are float32, the only kind that TensorBoard's usual loader shows. NaN and infinities are kept; a number
    that float32 would make 0 or infinite is left out.

    Beside its scalars each trial has hyperparameters, without those that are null, and a text `record`, in which
    parameters, metrics and tags are exact.
    """

    def __init__(self, directory: str, name: str) -> None:
        """Raises HarnessError where TensorBoard is not installed or the directory cannot be written."""
        self._event: Any = library("tensorboard.compat.proto.event_pb2", EXTRA)
        self._summary: Any = library("tensorboard.compat.proto.summary_pb2", EXTRA)
        self._writer: Any = library("tensorboard.summary.writer.event_file_writer", EXTRA)
        self._tensors: Any = library("tensorboard.util.tensor_util", EXTRA)
        self._scalar: Any = library("tensorboard.plugins.scalar.metadata", EXTRA)
        self._text: Any = library("tensorboard.plugins.text.metadata", EXTRA)
        self._hparams: Any = library("tensorboard.plugins.hparams.metadata", EXTRA)
        self._hparams_data: Any = library("tensorboard.plugins.hparams.plugin_data_pb2", EXTRA)
        self._hparams_api: Any = library("tensorboard.plugins.hparams.api_pb2", EXTRA)
        self._root = writable_folder("--tensorboard", Path(directory).expanduser().absolute() / name)

    @property
    def where(self) -> str:
        return f"TensorBoard: {self._root}; look at it with: tensorboard --logdir {self._root}"

    def put(self, row: Row) -> bool:
        """Write the trial's folder anew; False where it is right as it is."""
        earlier = [folder for folder in self._root.glob(f"{row.id}*") if folder.is_dir()]
        if find_current(earlier, row):
            return False
        remove(earlier)
        folder = self._root / re.sub(r"[^\w.-]+", "-", row.name, flags=re.ASCII)
        ended_s = time.time() if row.ended_s is None else row.ended_s
        writer = self._writer.EventFileWriter(str(folder))
        try:
            for step, value in self._values(row):
                event = self._event.Event(wall_time=ended_s, step=step, summary=self._summary.Summary(value=[value]))
                writer.add_event(event)
        finally:
            writer.close()
        mark(folder, row)
        return True

    def close(self) -> None:
        """Everything is written."""

    def _values(self, row: Row) -> Iterator[tuple[int, Any]]:
        for value in self._session(row):
            yield 0, value
        yield 0, self._value("record", self._all_of(row), self._text.create_summary_metadata("record", ""))
        series = {name: [(0, number)] for name, number in row.metrics.items()} | dict(row.series)
        for name, points in series.items():
            for step, number in points:
                held = _float32(number)
                if held is not None:
                    yield step, self._value(name, held, self._scalar.create_summary_metadata(name, ""))

    def _all_of(self, row: Row) -> Any:
        found = {"parameters": row.parameters, "metrics": row.metrics, "tags": row.tags}
        text = f"```json\n{json.dumps(found, indent=1)}\n```"
        return np.array([text.encode()], dtype=object)

    def _value(self, tag: str, content: Any, metadata: Any) -> Any:
        return self._summary.Summary.Value(tag=tag, tensor=self._tensors.make_tensor_proto(content), metadata=metadata)

    def _session(self, row: Row) -> Iterator[Any]:
        """What the hyperparameters' tab reads."""
        start = self._hparams_data.SessionStartInfo(group_name=row.id, start_time_secs=row.started_s or 0)
        for name, value in row.parameters.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[name].number_value = value
            elif value is not None:
                start.hparams[name].string_value = value if isinstance(value, str) else json.dumps(value)
        status = self._hparams_api.STATUS_SUCCESS if row.is_result else self._hparams_api.STATUS_FAILURE
        end = self._hparams_data.SessionEndInfo(status=status, end_time_secs=row.ended_s or 0)
        for tag, said in (
            (self._hparams.SESSION_START_INFO_TAG, {"session_start_info": start}),
            (self._hparams.SESSION_END_INFO_TAG, {"session_end_info": end}),
        ):
            data = self._hparams_data.HParamsPluginData(version=0, **said)
            metadata = self._hparams.create_summary_metadata(data)
            yield self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=self._hparams.NULL_TENSOR)


def _float32(number: float) -> np.float32 | None:
    with np.errstate(over="ignore", under="ignore"):
        held = np.float32(number)
    lost = (math.isfinite(number) and not np.isfinite(held)) or (held == 0) != (number == 0)
    return None if lost else held
