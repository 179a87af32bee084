"""What may stand in a study: axes, settings and conditions, as types that pydantic checks."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from harness.places import Loc
from harness.study_faults import did_you_mean
from harness.trials import AXES, DATA_AXES, SECTIONS, axis_value


def fault_at(problem: str, loc: Loc, given: object) -> InitErrorDetails:
    """A fault for `ValidationError.from_exception_data`; `problem` holds what is allowed and what to do."""
    # The problem is an argument of the template: braces within it are no fields.
    return InitErrorDetails(type=PydanticCustomError("study", "{problem}", {"problem": problem}), loc=loc, input=given)


def _as_in_a_trial(cells: Iterable[tuple[Loc, str, Any]]) -> dict[Loc, Any]:
    """The values of cells (place, field, value) as a trial holds them. Raises all faults at once."""
    values: dict[Loc, Any] = {}
    faults: list[InitErrorDetails] = []
    for loc, key, value in cells:
        if key in SECTIONS:
            faults.append(fault_at(f"{key} is the same for all trials. Move it to the section {key!r}.", loc, value))
        elif key == "data":
            problem = f"what differs between trials is given field by field: {', '.join(DATA_AXES)}. Name the field."
            faults.append(fault_at(problem, loc, value))
        elif key not in AXES:
            guess = did_you_mean(key, AXES) or "remove it."
            faults.append(fault_at(f"{key!r} is no field of a trial; {guess} Allowed: {', '.join(AXES)}.", loc, value))
        else:
            try:
                values[loc] = axis_value(key, value)
            except ValidationError as error:
                first = error.errors()[0]
                own = "url" in first
                faults.append(
                    InitErrorDetails(type=first["type"], loc=loc, input=value, ctx=first.get("ctx", {}))
                    if own
                    else fault_at(first["msg"], loc, value)
                )
    if faults:
        raise ValidationError.from_exception_data("study", faults)
    return values


def _check_axes(axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    def cells() -> Iterator[tuple[Loc, str, Any]]:
        for key, values in axes.items():
            if key not in AXES:
                yield (key,), key, values
            for index, value in enumerate(values if key in AXES else ()):
                yield (key, index), key, value

    checked = _as_in_a_trial(cells())
    return {key: [checked[key, index] for index in range(len(values))] for key, values in axes.items()}


def _check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    checked = _as_in_a_trial(((key,), key, value) for key, value in settings.items())
    return {key: checked[(key,)] for key in settings}


def _check_lengths(axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    first, *others = axes
    for key in others:
        if len(axes[key]) != len(axes[first]):
            problem = (
                f"axes that move together are equally long, and {first} has {len(axes[first])} values, "
                f"{key} {len(axes[key])}. Make them equally long."
            )
            raise ValidationError.from_exception_data("study", [fault_at(problem, (key,), axes[key])])
    return axes


Axis = Annotated[list[Any], Field(min_length=1)]
Axes = Annotated[dict[str, Axis], AfterValidator(_check_axes)]
SomeAxes = Annotated[dict[str, Axis], Field(min_length=1), AfterValidator(_check_axes)]
ZippedAxes = Annotated[SomeAxes, AfterValidator(_check_lengths)]
Settings = Annotated[dict[str, Any], AfterValidator(_check_settings)]
Condition = Annotated[dict[str, Any], Field(min_length=1), AfterValidator(_check_settings)]
