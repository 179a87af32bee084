"""Trials as offline runs of Weights & Biases; nothing is sent and nobody logs in."""

import glob
import os
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from reports.exporters.extras import library
from reports.exporters.folders import find_current, mark, remove, writable_folder
from reports.exporters.rows import STEP_TABLES, Row

EXTRA = "wandb"


class WandB:
    """Whole numbers are exact: they are kept as JSON. So are NaN and infinities, as the texts "NaN" and "Infinity"."""

    def __init__(self, directory: str, name: str) -> None:
        """Raises HarnessError where wandb is not installed or the directory cannot be written."""
        # Its reports of its own crashes would be sent also in offline mode.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb: Any = library("wandb", EXTRA)
        self._project = re.sub(r"[/\\#?%:]", "-", name)[:128]
        # Where it cannot write, wandb goes elsewhere on its own.
        self._root = writable_folder("--wandb", Path(directory).expanduser().absolute() / self._project)
        self._written: list[tuple[Row, Path, list[Path]]] = []

    @property
    def where(self) -> str:
        runs = self._root / "wandb"
        return f"Weights & Biases: {runs}; upload it with: wandb sync {runs}/offline-run-*"

    def put(self, row: Row) -> bool:
        """Write the trial as a run of its own, in place of earlier ones; False where one is right as it is."""
        pattern = f"{glob.escape(str(self._root))}/wandb/offline-run-*-{row.id}*"
        earlier = [Path(found) for found in sorted(glob.glob(pattern))]
        current = find_current(earlier, row)
        if current is not None:
            remove(folder for folder in earlier if folder != current)
            return False
        try:
            self._written.append((row, self._write(row), earlier))
        except self._wandb.Error as error:
            raise HarnessError(f"--wandb {self._root}: {error}") from None
        return True

    def close(self) -> None:
        # Before, some runs that are finished lie in files that are empty yet.
        self._wandb.teardown()
        for row, folder, earlier in self._written:
            mark(folder, row)
            remove(earlier)

    def _write(self, row: Row) -> Path:
        settings = self._wandb.Settings(
            # What wandb would find out by itself is about the machine that exports, not the one that measured.
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            host=row.node or "",
            silent=True,
        )
        run = self._wandb.init(
            dir=str(self._root),
            mode="offline",
            project=self._project,
            id=row.id,
            name=row.name,
            tags=[row.status],
            config={**row.parameters, "record": dict(row.tags)},
            reinit="create_new",
            settings=settings,
        )
        _log_series(run, row)
        run.summary.update(dict(row.metrics))
        run.finish(exit_code=0 if row.is_result else 1)
        return Path(run.dir).parent


def _log_series(run: Any, row: Row) -> None:
    """Each table over its own steps, `TABLE_index`, since those of one are not those of another."""
    for table in STEP_TABLES:
        points = sorted(
            (step, name, value)
            for name, series in row.series.items()
            if name.startswith(f"{table}/")
            for step, value in series
        )
        if not points:
            continue
        # The summary is of the record's metrics alone.
        run.define_metric(f"{table}_index", hidden=True, summary="none")
        run.define_metric(f"{table}/*", step_metric=f"{table}_index", summary="none")
        for step, at_step in groupby(points, key=lambda point: point[0]):
            run.log({f"{table}_index": step} | {name: value for _, name, value in at_step})
