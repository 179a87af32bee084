"""The Study: one question, and the trials that answer it. Strict YAML in, errors with file and line out."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from harness.errors import DataError, ModelError, StudyError
from harness.places import Loc, Places, dotted
from harness.sizes import Memory
from harness.study_faults import describe, did_you_mean
from harness.study_values import Axes, Condition, Settings, SomeAxes, ZippedAxes, fault_at
from harness.trials import (
    AXES,
    DATA_AXES,
    MOST_COMBINATIONS,
    MOST_CORES,
    MOST_GPUS,
    MOST_SHARING,
    DataSpec,
    DeepSpeedConfig,
    TrialSpec,
)
from harness.yaml_lines import MOST_BYTES, read_yaml

YEAR_S = 365 * 86_400
SHIPPED = Path(__file__).resolve().parent.parent / "studies"


class _Inert(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class When(_Inert):
    """Axes that multiply in for the combinations that match every key of `if`."""

    model_config = ConfigDict(populate_by_name=True)

    if_: Condition = Field(alias="if")
    grid: SomeAxes


class StudyResources(_Inert):
    """What each rank of each trial gets, and how long a trial may take."""

    gpus_per_worker: int | None = Field(
        default=None, ge=0, le=MOST_GPUS, description="null: one where there are GPUs, else none"
    )
    cpus_per_worker: int = Field(default=1, ge=1, le=MOST_CORES)
    memory: Memory = Field(default=None, description="bytes; null: no limit")
    trials_per_device: int = Field(
        default=1, ge=1, le=MOST_SHARING, description="trials on the same cores and GPU, untimed"
    )
    timeout_s: float = Field(default=900, gt=0, le=YEAR_S, allow_inf_nan=False)
    max_attempts: int = Field(default=3, ge=1, le=1000, description="of a trial whose node or process is lost")

    @model_validator(mode="after")
    def _share_with_care(self) -> "StudyResources":
        faults: list[InitErrorDetails] = []
        if self.trials_per_device > 1 and self.memory is None:
            problem = "trials that share a device are each held to resources.memory. Give it, such as 8GiB."
            faults.append(fault_at(problem, ("trials_per_device",), self.trials_per_device))
        if self.trials_per_device > 1 and (self.gpus_per_worker or 0) > 1:
            problem = "trials that share a device have no more than one GPU. Set gpus_per_worker to 1 or leave it out."
            faults.append(fault_at(problem, ("trials_per_device",), self.trials_per_device))
        if faults:
            raise ValidationError.from_exception_data("resources", faults)
        return self


class Study(_Inert):
    """A study with its defaults filled in; see `load_study` for the file it comes from."""

    name: str = Field(description="names the run directory")
    question: str = ""
    predict: str = ""
    model: str | None = Field(default=None, min_length=1, description="null where it is an axis")
    data: DataSpec = DataSpec()
    grid: Axes = {}
    zip: list[ZippedAxes] = []
    when: list[When] = []
    exclude: list[Condition] = []
    # After the axes, which its defaults depend on.
    fixed: Settings = Field(default={}, validate_default=True)
    repeats: int = Field(default=1, ge=1, le=MOST_COMBINATIONS)
    resources: StudyResources = StudyResources()
    deepspeed: DeepSpeedConfig = {}

    _places: Places = PrivateAttr(default_factory=Places)

    @field_validator("name")
    @classmethod
    def _names_a_directory(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise PydanticCustomError(
                "name",
                "a name is 1 to 64 letters, digits, '.', '_' or '-', and begins with a letter or digit. Correct it.",
            )
        return name

    @field_validator("fixed")
    @classmethod
    def _fill_defaults(cls, fixed: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "model" in fixed:
            problem = "the model is given at the top, or as an axis. Move it there."
            raise ValidationError.from_exception_data("study", [fault_at(problem, ("model",), fixed["model"])])
        axes = {key for group in (info.data.get("grid", {}), *info.data.get("zip", [])) for key in group}
        elsewhere = {*axes, *DATA_AXES, "model", "seed"}
        defaults = {key: TrialSpec.model_fields[key].default for key in AXES if key not in elsewhere}
        return {key: (defaults | fixed)[key] for key in AXES if key in defaults or key in fixed}

    @model_validator(mode="after")
    def _each_key_once(self) -> "Study":
        given: dict[str, str] = {} if self.model is None else {"model": "the top"}
        if self.repeats > 1:
            given["seed"] = "repeats"
        twice = {f"data.{name}": "the section data" for name in self.data.model_fields_set} | given
        faults = [
            fault_at(f"also given in {twice[key]}. Keep one.", ("fixed", key), value)
            for key, value in self.fixed.items()
            if key in twice
        ]
        groups: list[tuple[Loc, dict[str, list[Any]]]] = [(("grid",), self.grid)]
        groups += [(("zip", index), group) for index, group in enumerate(self.zip)]
        groups += [(("when", index, "grid"), when.grid) for index, when in enumerate(self.when)]
        for loc, group in groups:
            for key in group:
                if key in given:
                    faults.append(fault_at(f"also given in {given[key]}. Keep one.", (*loc, key), group[key]))
                elif loc[0] != "when":  # several `when` may give one key, if they match different combinations
                    given[key] = dotted(loc)
        if "model" not in given:
            faults.append(fault_at("a study has a model, or an axis `model`. Add one.", ("model",), None))
        if faults:
            raise ValidationError.from_exception_data("study", faults)
        return self

    @model_validator(mode="after")
    def _conditions_are_decided(self) -> "Study":
        for index, when in enumerate(self.when):
            later = {key for entry in self.when[index:] for key in entry.grid}
            for key in when.if_:
                if key in later:
                    problem = "this `when` or a later one sets it, so it is not decided yet. Move that one up."
                    fault = fault_at(problem, ("when", index, "if", key), when.if_[key])
                    raise ValidationError.from_exception_data("study", [fault])
        return self

    @classmethod
    def from_yaml(cls, text: str, path: str) -> "Study":
        """Read a study; `path` is named in errors. Raises StudyError with one line per fault."""
        data, places = read_yaml(text, path)
        if not isinstance(data, dict):
            what = "is empty" if data is None else "is no mapping"
            raise StudyError(f"{path}: {what}; a study has the keys {', '.join(cls.model_fields)}. Write them.")
        try:
            study = cls.model_validate(data)
        except ValidationError as error:
            raise StudyError(describe(error, places, cls)) from None
        study._places = places
        return study

    def resolved(self) -> dict[str, Any]:
        """Plain data with the defaults filled in; read again, it is an equal Study with the same trials."""
        plain = self.model_dump(mode="json", by_alias=True)
        plain["data"] = {name: value for name, value in plain["data"].items() if f"data.{name}" not in self.fixed}
        return plain

    @property
    def path(self) -> str:
        """The file that the study was read from, as it is named in errors."""
        return self._places.path

    def place(self, *loc: str | int) -> str:
        """`path:line: grid.depth[2]`, of a value or of what encloses it."""
        return self._places.of(loc)

    def where(self, key: str, value: object, trial: TrialSpec | None = None) -> str:
        """`path:line: grid.depth[2]`, where a trial's value of `key` comes from; the path alone for a default.

        `key` is a field of the trial's spec, such as `depth` or `data.image_size`. Given the trial, a `when`
        that does not hold for it is passed over.
        """
        for index, when in enumerate(self.when):
            holds = trial is None or all(trial.value(name) == wanted for name, wanted in when.if_.items())
            if holds and value in when.grid.get(key, ()):
                return self.place("when", index, "grid", key, when.grid[key].index(value))
        for loc, axes in ((("grid",), self.grid), *((("zip", i), group) for i, group in enumerate(self.zip))):
            if value in axes.get(key, ()):
                return self.place(*loc, key, axes[key].index(value))
        for loc in (("fixed", key), tuple(key.replace("memory_bytes", "memory").split("."))):
            if loc in self._places.lines:
                return self.place(*loc)
        return self.path


def shipped_studies() -> list[str]:
    """The names of the studies that come with the harness, such as `quickstart` or `gpu/depth`."""
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml"))


def load_study(path_or_name: str | Path) -> Study:
    """Read a study from a file, or a shipped study by its name.

    Raises StudyError, with one line per fault, for a study that cannot be used or does not exist.
    """
    given = str(path_or_name)
    path = Path(given)
    if not path.is_file() and given in shipped_studies():
        path = SHIPPED / f"{given}.yaml"
    if not path.is_file():
        known = shipped_studies()
        what = "is a directory" if path.is_dir() else "no such file or shipped study"
        guess = did_you_mean(path.stem if path.suffix else given, known)
        raise StudyError(
            f"{given}: {what}{f'; {guess}' if guess else '.'} "
            f"Give a YAML file, or one of the shipped studies: {', '.join(known)}."
        )
    try:
        # One byte more than is allowed, so that what is read of a file that is too large is refused as such.
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode("utf-8-sig", errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read as UTF-8 text ({error}). Correct the file.") from None
    return Study.from_yaml(text, str(path))


def check_trials(study: Study, trials: Sequence[TrialSpec]) -> None:
    """Check that the models and data sets of the trials exist and have the depths, widths and image sizes asked for.

    What a model does not support otherwise is a result, which the trial itself finds out.

    Raises StudyError, with one line per fault, at the place in the study where the value comes from.
    """
    # These import torch and numpy, which reading a study must not.
    from harness.data import check_data
    from harness.models import check_model

    faults: dict[str, None] = {}
    for trial in {(trial.model, trial.depth, trial.channels, trial.log_scale_gain): trial for trial in trials}.values():
        try:
            check_model(trial.model, trial.depth, trial.channels, trial.log_scale_gain)
        except ModelError as error:
            faults[_at_its_place(study, trial, str(error), otherwise="model")] = None
    if any(trial.workers > 1 and trial.resources.trials_per_device > 1 for trial in trials):
        faults[
            f"{study.place('resources', 'trials_per_device')} = {study.resources.trials_per_device}; some trials have "
            "several ranks, each with a device of its own. Leave it out, or keep workers at 1."
        ] = None
    for trial in {trial.data: trial for trial in trials}.values():
        try:
            check_data(trial.data.name, trial.data.path, trial.data.image_size)
        except DataError as error:
            faults[_at_its_place(study, trial, str(error), otherwise="data")] = None
    if faults:
        raise StudyError("\n".join(faults))


def _at_its_place(study: Study, trial: TrialSpec, message: str, otherwise: str) -> str:
    """The message in front of which stands the place of the first field that it names, or else of `otherwise`.

    `depth = 40; ...` becomes `path:line: grid.depth[2] = 40; ...`.
    """
    named = re.search(rf"\b({'|'.join(map(re.escape, AXES))})\b", message)
    key = named[1] if named else otherwise
    place = study.where(key, trial.value(key), trial)
    if place == study.path:
        key, place = otherwise, study.where(otherwise, getattr(trial, otherwise), trial)
    return place + message.removeprefix(key) if message.startswith(f"{key} = ") else f"{place}: {message}"
