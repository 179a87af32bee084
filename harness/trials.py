"""The specification of one trial: everything that decides its outcome."""

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from harness.errors import StudyError
from harness.ids import canonical_json, id_of
from harness.places import Places
from harness.sizes import Memory
from harness.study_faults import describe

if TYPE_CHECKING:
    pass

# The harness derives these from the trial; two sources for one value could disagree.
DEEPSPEED_SET_BY_HARNESS: tuple[tuple[str, ...], ...] = (
    ("train_batch_size",),
    ("train_micro_batch_size_per_gpu",),
    ("gradient_accumulation_steps",),
    ("zero_optimization", "stage"),
    ("bf16",),
    ("bfloat16",),  # DeepSpeed's older name of bf16
    ("fp16",),
    ("torch_autocast",),
    ("optimizer",),
    ("scheduler",),
)


def _refuse_what_the_harness_sets(config: dict[str, JsonValue]) -> dict[str, JsonValue]:
    faults: list[InitErrorDetails] = []
    for *sections, key in DEEPSPEED_SET_BY_HARNESS:
        inner: JsonValue = config
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and key in inner:
            reason = PydanticCustomError("set_by_harness", "the harness sets this key from the trial. Remove it.")
            faults.append(InitErrorDetails(type=reason, loc=(*sections, key), input=inner[key]))
    if faults:
        raise ValidationError.from_exception_data("deepspeed", faults)
    return config


def _refuse_infinite(config: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        json.dumps(config, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("not_finite", "a number is finite. Correct the one that is not.") from None
    return config


def _refuse_what_names_nothing(name: str) -> str:
    if not re.fullmatch(r"\w[\w.:-]*", name):
        raise PydanticCustomError("name", "a name is letters, digits, '_', and then '.', '-' and ':' too. Correct it.")
    return name


# How a step is executed, if not as it is written.
MODES = ("compile", "cuda_graph")
WARM_UP_FOR_COMPILING = (
    "with compile true the first step compiles the model, which takes a minute or many, and would be measured. Give at "
    "least 1."
)
Activations = Literal["stored", "checkpointed", "offloaded", "reconstructed", "budgeted"]
# YAML and JSON have lists; a trial is hashable.
# Names stand in figures and in other people's terminals.
ModelName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_refuse_what_names_nothing)]
DataName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_refuse_what_names_nothing)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Channels = Annotated[
    Annotated[tuple[Width, ...], Field(max_length=64)] | None,
    BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v),
]
Compute = Literal["fp32", "tf32", "bf16", "fp16"]
Reconstruction = Literal["fp64", "fp32", "bf16", "fp16", "exact"]
# As `revnet_core.GUARD_ACTIONS`, which a study is read without.
GuardAction = Literal["stop", "warn", "store"]
DeepSpeedConfig = Annotated[
    dict[str, JsonValue], AfterValidator(_refuse_infinite), AfterValidator(_refuse_what_the_harness_sets)
]


class _Inert(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# Of axes, `when` and repeats, before `exclude`.
MOST_COMBINATIONS = 100_000
# Far beyond what anybody has asked for, and far below what would take a machine down with it.
MOST_STEPS, MOST_SAMPLES, MOST_CORES, MOST_GPUS = 10**7, 2**24, 2**12, 2**10
# Trials on one device; Ray counts in ten-thousandths.
MOST_SHARING = 64


class DataSpec(_Inert):
    """What the trial trains on; `path` null is the sample that ships with the harness."""

    name: DataName = Field(default="cifar10")
    path: str | None = Field(default=None, min_length=1)
    image_size: int = Field(default=32, ge=1, le=2**14, description="pixels, height and width")


class TrialResources(_Inert):
    """What each rank of a trial gets."""

    gpus_per_worker: int | None = Field(
        default=None, ge=0, le=MOST_GPUS, description="null: one where there are GPUs, else none"
    )
    cpus_per_worker: int = Field(default=1, ge=1, le=MOST_CORES)
    memory_bytes: int | None = Field(default=None, ge=1, description="null: no limit")
    trials_per_device: int = Field(
        default=1, ge=1, le=MOST_SHARING, description="trials on the same cores and GPU, untimed"
    )

    @model_serializer(mode="wrap")
    def _say_nothing_of_one(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that a trial that has its device to itself keeps the id that it had before devices were shared.
        content = serialize(self)
        return {name: value for name, value in content.items() if name != "trials_per_device" or value > 1}


class TrialSpec(_Inert):
    """Everything that decides a trial's outcome, and nothing else: equal content, equal id."""

    model: ModelName = Field(description="a registered family, or package.module:factory")
    depth: int | None = Field(
        default=38, ge=1, le=100_000, description="as the family counts it; null for a user's own factory"
    )
    channels: Channels = Field(default=None, description="width of each stage; null: the family's own")
    log_scale_gain: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="of couplings that multiply; null: the family's own"
    )
    data: DataSpec = DataSpec()
    batch_size: int = Field(default=32, ge=1, le=MOST_SAMPLES, description="samples per rank and step")
    activations: Activations = "reconstructed"
    budget_bytes: Memory = Field(default=None, description="of the network's activations where they are budgeted")
    compute: Compute = "fp32"
    reconstruction: Reconstruction = "fp32"
    compile: bool = Field(default=False, description="whether the model is trained as torch.compile makes it")
    cuda_graph: bool = Field(default=False, description="whether its forward and backward are replayed as CUDA graphs")
    zero_stage: int = Field(default=0, ge=0, le=3)
    workers: int = Field(default=1, ge=1, le=2**16)
    warmup_steps: int = Field(default=2, ge=0, le=MOST_STEPS)
    measured_steps: int = Field(default=5, ge=1, le=MOST_STEPS)
    audit_batch_size: int = Field(
        default=16, ge=0, le=MOST_SAMPLES, description="samples of the drift and gradient audit; 0: none"
    )
    amplification: bool = Field(
        default=False, description="whether the audit also looks for the causes of drift, block by block"
    )
    drift_steps: int = Field(
        default=0, ge=0, le=MOST_STEPS, description="of a training over which drift is followed; 0: none"
    )
    drift_audits: int = Field(
        default=11, ge=2, le=MOST_STEPS, description="audits on the way, before the first step and after the last"
    )
    guard_every: int = Field(
        default=0, ge=0, description="training steps from one comparison of a rebuilt block to the next; 0: no guard"
    )
    guard_tolerance: float = Field(
        default=1e-3, ge=0, allow_inf_nan=False, description="the relative error of a rebuilt block that passes"
    )
    guard_action: GuardAction = Field(default="stop", description="what follows an error above the tolerance")
    learning_rate: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)
    resources: TrialResources = TrialResources()
    deepspeed: DeepSpeedConfig = {}

    @model_serializer(mode="wrap")
    def _say_nothing_of_what_is_off(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that a trial without a guard, a compiler and a graph keeps the id that it had before there were any.
        content = serialize(self)
        unsaid = {name for name in MODES if not getattr(self, name)}
        if all(getattr(self, name) == value for name, value in no_guard().items()):
            unsaid |= no_guard().keys()
        return {name: value for name, value in content.items() if name not in unsaid}

    def canonical_json(self) -> str:
        """The same text for the same content, on every machine and whatever the order of keys was."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def id(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return id_of(self.model_dump(mode="json"))

    @property
    def steps(self) -> int:
        """Training steps that it takes, but for the few that are looked into; where drift is followed a twin takes as
        many."""
        return self.warmup_steps + self.measured_steps + 2 * self.drift_steps

    def value(self, key: str) -> Any:
        """What the trial has under one of AXES."""
        section, _, field = key.rpartition(".")
        return getattr(getattr(self, section) if section else self, field)

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "trial spec") -> "TrialSpec":
        """Read a specification; keys left out get their defaults. Raises StudyError, which names `source`."""
        try:
            spec = cls.model_validate(json.loads(text))
        except ValidationError as error:
            raise StudyError(describe(error, Places(source), cls)) from None
        except ValueError as error:
            raise StudyError(f"{source}: not JSON ({error}). Give a file that holds the spec of one trial.") from None
        if (spec.activations == "budgeted") != (spec.budget_bytes is not None):
            raise StudyError(f"{source}: budget_bytes belongs to activations 'budgeted'. Give both or neither.")
        if spec.compile and spec.warmup_steps == 0:
            raise StudyError(f"{source}: warmup_steps = 0; {WARM_UP_FOR_COMPILING}")
        return spec


def no_guard() -> dict[str, Any]:
    """The fields of a trial's guard, each with its default."""
    names = ("guard_every", "guard_tolerance", "guard_action")
    return {name: TrialSpec.model_fields[name].default for name in names}


# A section of its own in the study: set once, for all trials.
SECTIONS: frozenset[str] = frozenset({"resources", "deepspeed"})
# A section too, but for those of its fields that are axes.
DATA_AXES: tuple[str, ...] = tuple(f"data.{name}" for name in DataSpec.model_fields)
AXES: tuple[str, ...] = tuple(
    axis
    for name in TrialSpec.model_fields
    if name not in SECTIONS
    for axis in (DATA_AXES if name == "data" else (name,))
)


def axis_value(key: str, value: object) -> Any:
    """`value` as a trial would hold it under `key`. Raises pydantic's ValidationError."""
    section, _, field = key.rpartition(".")
    given = {section: {field: value}} if section else {field: value}
    return TrialSpec.model_validate({"model": "any"} | given).value(key)
