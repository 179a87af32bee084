"""What trackers have, read with their own libraries, in one form."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MLFLOW, WANDB, TENSORBOARD = "mlflow", "wandb", "tensorboard"


class Seen(NamedTuple):
    """One run of a tracker. `place` is what it is known by there."""

    place: str
    name: str
    parameters: dict[str, Any]
    metrics: dict[str, float]
    tags: dict[str, str]
    series: dict[str, list[tuple[int, float]]]


def needs(tracker: str) -> None:
    pytest.importorskip(tracker, reason=f"{tracker} is not installed; pip install 'revnet-harness[{tracker}]'")


def seen(tracker: str, target: Path, name: str) -> dict[str, Seen]:
    """By trial; fails where a trial has two."""
    read = {MLFLOW: _in_mlflow, WANDB: _in_wandb, TENSORBOARD: _in_tensorboard}[tracker]
    found: dict[str, Seen] = {}
    for run in read(target, name):
        assert run.tags["trial"] not in found, "doubled"
        found[run.tags["trial"]] = run
    return found


def mlflow_client(target: Path) -> Any:
    return pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{target}/mlflow.db")


def _in_mlflow(target: Path, name: str) -> Iterator[Seen]:
    client = mlflow_client(target)
    experiment = client.get_experiment_by_name(name)
    for run in client.search_runs([experiment.experiment_id]):
        run_id, data = run.info.run_id, run.data
        history = {
            metric: [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]
            for metric in data.metrics
        }
        series = {metric: sorted(points) for metric, points in history.items() if "/" in metric}
        metrics = {metric: points[0][1] for metric, points in history.items() if metric not in series}
        assert all(len(history[metric]) == 1 for metric in metrics)
        yield Seen(run_id, run.info.run_name, data.params, metrics, data.tags, series)


def _in_wandb(target: Path, name: str) -> Iterator[Seen]:
    for path in (target / name / "wandb").glob("offline-run-*/*.wandb"):
        run: Any = None
        metrics: dict[str, float] = {}
        series: dict[str, list[tuple[int, float]]] = {}
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
            elif kind == "summary":
                changed = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.summary.update}
                metrics |= {key: json.loads(text) for key, text in changed.items() if not key.startswith("_")}
            elif kind == "history":
                row = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                for key, value in row.items():
                    table, slash, _ = key.partition("/")
                    if slash:
                        series.setdefault(key, []).append((row[f"{table}_index"], float(value)))
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        tags = config.pop("record") | {"host": run.host, "tags": list(run.tags)}
        assert run.run_id == tags["trial"]
        config.pop("_wandb")
        yield Seen(str(path.parent), run.display_name, config, metrics, tags, series)


def wandb_records(path: Path) -> Iterator[Any]:
    """Its messages are the library's own. They lie in the file as in a log of LevelDB; only its Go part reads that."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, block = path.read_bytes(), 2**15
    assert data[:4] == b":W&B"
    at, message = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or its last part
            record = messages.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def _in_tensorboard(target: Path, name: str) -> Iterator[Seen]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arrays = pytest.importorskip("tensorboard.util.tensor_util")
    hparams = pytest.importorskip("tensorboard.plugins.hparams.metadata")
    for folder in (target / name).iterdir():
        run = events.EventAccumulator(str(folder), size_guidance={events.TENSORS: 0})
        run.Reload()
        start = hparams.parse_session_start_info_plugin_data(
            run.SummaryMetadata(hparams.SESSION_START_INFO_TAG).plugin_data.content
        )
        parameters = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
        points = {
            tag: [(event.step, float(arrays.make_ndarray(event.tensor_proto))) for event in run.Tensors(tag)]
            for tag in run.Tags()["tensors"]
            if run.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
        }
        assert not run.Tags()["scalars"]
        series = {tag: found for tag, found in points.items() if "/" in tag}
        metrics = {tag: found[0][1] for tag, found in points.items() if tag not in series}
        text = arrays.make_ndarray(run.Tensors("record")[0].tensor_proto)[0].decode()
        record = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
        yield Seen(str(folder), folder.name, parameters, metrics, record["tags"] | {"record": text}, series)
