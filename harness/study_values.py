"""What may stand in a study: axes, settings, conditions and amounts of memory, as types that pydantic checks."""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from harness.places import Loc
from harness.study_faults import did_you_mean
from harness.trials import AXES, SECTIONS, axis_value

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


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


def parse_memory(value: object) -> int | None:
    """Bytes of `2GiB`, `512 MiB`, a whole number of bytes, or None. Raises ValueError."""
    if value is None:
        return None
    allowed = "a number of bytes, or a number with KiB, MiB, GiB or TiB"
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"a memory limit is at least 1 byte; allowed: {allowed}, or null for no limit")
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"allowed: {allowed}, such as 2GiB or 512 MiB")
    number, unit = match.groups()
    if unit not in _UNITS:
        near = next((name for name in _UNITS if unit and name[0] == unit[0].upper()), None)
        hint = f"write {number}{near} (binary, 1 {near} = {_UNITS[near]} bytes)" if near else "give the unit"
        raise ValueError(f"allowed: {allowed}; {hint}")
    size_bytes = float(number) * _UNITS[unit]
    if size_bytes < 1 or not size_bytes.is_integer():
        raise ValueError("a memory limit is a whole number of bytes, at least 1; write the bytes out")
    return int(size_bytes)


def _memory(value: object) -> int | None:
    try:
        return parse_memory(value)
    except ValueError as error:
        raise PydanticCustomError("memory", "{problem}", {"problem": f"{error}."}) from None


Axis = Annotated[list[Any], Field(min_length=1)]
Axes = Annotated[dict[str, Axis], AfterValidator(_check_axes)]
SomeAxes = Annotated[dict[str, Axis], Field(min_length=1), AfterValidator(_check_axes)]
ZippedAxes = Annotated[SomeAxes, AfterValidator(_check_lengths)]
Settings = Annotated[dict[str, Any], AfterValidator(_check_settings)]
Condition = Annotated[dict[str, Any], Field(min_length=1), AfterValidator(_check_settings)]
Memory = Annotated[int | None, BeforeValidator(_memory)]
