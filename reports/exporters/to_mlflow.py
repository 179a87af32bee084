"""Trials as runs of an MLflow experiment."""

import json
import math
import os
import posixpath
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from reports.exporters.extras import library
from reports.exporters.folders import writable_folder
from reports.exporters.rows import Row, shortened, spelled

EXTRA = "mlflow"
# Of one request, and of one value: what MLflow's servers take.
MOST_METRICS, MOST_TEXTS = 1000, 100
PARAMETER_CHARACTERS, TAG_CHARACTERS = 6000, 5000
# Whose run it is, and what it was exported as; the second is written last.
TRIAL, FINGERPRINT = "trial", "fingerprint"


class Mlflow:
    """Metrics are float64, which holds whole numbers exactly up to 2**53. NaN is kept. An infinity is left out, since
    the databases behind MLflow make it 1.8e308; the tag `not_finite.SERIES` has it."""

    def __init__(self, target: str, name: str) -> None:
        """`target` is a directory, for a database in it, or a tracking URI. Raises HarnessError where MLflow is not
        installed or does not open it."""
        # Use of the library, which nobody asked to have reported; and how it makes its tables.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        self._entities: Any = library("mlflow.entities", EXTRA)
        errors = library("mlflow.exceptions", EXTRA).MlflowException, library("sqlalchemy.exc", EXTRA).SQLAlchemyError
        self._refused: tuple[type[Exception], ...] = errors
        self._uri, artifacts = target, None
        if not re.match(r"[\w+-]+://", target) and target not in ("databricks", "databricks-uc"):
            library("alembic", EXTRA)
            folder = writable_folder("--mlflow", Path(target).expanduser().absolute())
            self._uri, artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri()
        # A password is none of a terminal's or a log's business.
        self._shown = re.sub("//[^/@]*@", "//", self._uri)
        self._name = name
        try:
            self._client: Any = library("mlflow", EXTRA).MlflowClient(self._uri)
            self._experiment = self._experiment_id(artifacts)
            self._earlier = self._find_runs()
        except self._refused as error:
            raise self._failed(error) from None

    @property
    def where(self) -> str:
        return f"MLflow: experiment {self._name!r} at {self._shown}"

    def put(self, row: Row) -> bool:
        """Write the trial as a run of its own and delete earlier ones; False where one is right as it is."""
        earlier = self._earlier.get(row.id, {})
        current = next((run_id for run_id, found in earlier.items() if found == row.fingerprint), None)
        try:
            if current is None:
                self._write(row)
            for run_id in earlier.keys() - {current}:
                self._client.delete_run(run_id)
        except self._refused as error:
            raise self._failed(error) from None
        return current is None

    def close(self) -> None:
        """Everything is written."""

    def _failed(self, error: Exception) -> HarnessError:
        first = str(error).replace(self._uri, self._shown).partition("\n")[0]
        return HarnessError(f"--mlflow {self._shown}: {shortened(first, 500)}")

    def _experiment_id(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(self._name)
        if found is None:
            return self._client.create_experiment(self._name, artifact_location=artifacts)
        if found.lifecycle_stage != self._entities.LifecycleStage.ACTIVE:
            raise HarnessError(
                f"--mlflow {self._shown}: the experiment {self._name!r} was deleted. Restore it with "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or give another --name."
            )
        return found.experiment_id

    def _find_runs(self) -> dict[str, dict[str, str | None]]:
        """Of each trial its runs, with what they were exported as; None for a run that was not written to its end."""
        found: dict[str, dict[str, str | None]] = {}
        token = None
        while True:
            page = self._client.search_runs([self._experiment], max_results=1000, page_token=token)
            for run in page:
                trial = run.data.tags.get(TRIAL)
                if trial is not None:
                    found.setdefault(trial, {})[run.info.run_id] = run.data.tags.get(FINGERPRINT)
            token = page.token
            if not token:
                return found

    def _write(self, row: Row) -> None:
        now_s = time.time()
        started_ms, ended_ms = (round(1000 * (now_s if at is None else at)) for at in (row.started_s, row.ended_s))
        run = self._client.create_run(
            self._experiment, start_time=started_ms, run_name=row.name, tags={TRIAL: row.id}
        ).info.run_id
        refused: dict[str, Any] = {}
        points = [(name, value, 0) for name, value in _accepted(row.metrics, refused)]
        points += [(name, value, step) for name, found in _accepted(row.series, refused) for step, value in found]
        made = [self._entities.Metric(name, float(value), ended_ms, step) for name, value, step in points]
        for part in _parts([metric for metric in made if not math.isinf(metric.value)], MOST_METRICS):
            self._client.log_batch(run, metrics=part)
        made = [
            self._entities.Param(name, shortened(spelled(value), PARAMETER_CHARACTERS))
            for name, value in _accepted(row.parameters, refused)
        ]
        for part in _parts(made, MOST_TEXTS):
            self._client.log_batch(run, params=part)
        tags = dict(_accepted(row.tags, refused))
        if refused:
            tags["refused_names"] = json.dumps(refused)
        made = [self._entities.RunTag(name, shortened(text, TAG_CHARACTERS)) for name, text in tags.items()]
        for part in _parts(made, MOST_TEXTS):
            self._client.log_batch(run, tags=part)
        self._client.set_terminated(run, status="FINISHED" if row.is_result else "FAILED", end_time=ended_ms)
        self._client.set_tag(run, FINGERPRINT, row.fingerprint)


def _accepted(named: Mapping[str, Any], refused: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those whose names MLflow takes; the others are added to `refused`."""
    taken = []
    for name, value in named.items():
        # A name may become a path in a file store.
        if re.fullmatch(r"[\w.\- /]{1,250}", name, re.ASCII) and posixpath.normpath(f"/{name}") == f"/{name}":
            taken.append((name, value))
        else:
            refused[name] = value
    return taken


def _parts(made: list[Any], most: int) -> Iterator[list[Any]]:
    for start in range(0, len(made), most):
        yield made[start : start + most]
