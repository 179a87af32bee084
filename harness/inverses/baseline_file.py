"""The file of a baseline: read only where it is whole, written whole or not at all."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import HarnessError
from harness.inverses.measurement import ERRORS
from harness.inverses.precisions import OUTPUT_CHANGE

SCHEMA = 1
DEFAULT_TOLERANCES: dict[str, float] = {
    # Times the figure before.
    "inverse_rel": 3.0,
    "drift_rel": 3.0,
    "gradient_rel": 3.0,
    "gradient_angle_deg": 3.0,
    "gradient_reference_rel": 3.0,
    "gradient_difference_rel": 100.0,
    # Absolute, over the output's root mean square.
    **{f"output_change_{precision}": change for precision, change in OUTPUT_CHANGE.items()},
}
REMEDY = "Restore the file, or delete it to have it written anew."


class BaselineError(HarnessError):
    """A baseline file that cannot be used."""


class _Kind(NamedTuple):
    words: str
    has: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    try:
        # A comparison with nan finds nothing worse, and one with infinity neither.
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_LIST = _Kind("a list", lambda value: isinstance(value, list))
_TEXTS = _Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
_NUMBER = _Kind("a finite number", _is_number)
_SIZE = _Kind("a finite number, at least 0,", lambda value: _is_number(value) and value >= 0)
_HASHES = _Kind("a text of `part=hash`", lambda v: isinstance(v, str) and all("=" in part for part in v.split()))

_FILE = {
    "schema": _NUMBER,
    "test": _TEXT,
    "structure": _OBJECT,
    "tolerances": _OBJECT,
    "baselines": _OBJECT,
}
_TOLERANCES = dict.fromkeys(DEFAULT_TOLERANCES, _SIZE)
_BASELINE = {"inputs": _TEXT, "outside": _TEXT, "blocks": _LIST, "gradient": _OBJECT}
_BLOCK = {
    "name": _TEXT,
    "weights": _HASHES,
    "calls": _TEXT,
    **dict.fromkeys(ERRORS, _SIZE),
    "output_rms": _SIZE,
    "output_projection": _NUMBER,
}
_GRADIENT = {name: _SIZE for name in DEFAULT_TOLERANCES if name.startswith("gradient_")}


def read(path: Path) -> dict[str, Any] | None:
    """The file's contents; None where there is none. Raises BaselineError for what is no baseline."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise BaselineError(f"{path}: not JSON ({error}). {REMEDY}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BaselineError(f"{path}: not a baseline of schema {SCHEMA}. {REMEDY}")
    if fault := _fault(found):
        raise BaselineError(f"{path}: {fault}. {REMEDY}")
    return found


def write(path: Path, contents: Mapping[str, Any]) -> None:
    """Sorted, a line for each figure, and whole or not at all. Raises BaselineError where nothing can be written."""
    text = json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n"
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise BaselineError(
            f"{path}: cannot be written ({error.strerror}). Write it where the tests' folder can be written, and "
            "commit it."
        ) from None


def refuse_tolerances(tolerances: Mapping[str, float]) -> None:
    """Raises BaselineError for limits of a new baseline that no metric has, or that nothing can be held against."""
    if fault := _of_keys(tolerances, _TOLERANCES, "", optional=_TOLERANCES):
        raise BaselineError(f"tolerances: {fault}.")


def _fault(found: Mapping[str, Any]) -> str | None:
    """The first thing that is not as in a baseline: one lacking, one of another kind, or one that nothing reads."""
    if fault := _of_keys(found, _FILE, "") or _of_keys(found["tolerances"], _TOLERANCES, "tolerances."):
        return fault
    if fault := _of_keys(found["structure"], dict.fromkeys(found["structure"], _TEXTS), "structure."):
        return fault
    for machine, baseline in found["baselines"].items():
        where = f"baselines[{machine!r}]"
        if not isinstance(baseline, dict):
            return _other(where, baseline, _OBJECT)
        if fault := _of_keys(baseline, _BASELINE, f"{where}."):
            return fault
        # Which gradients there are depends on the module.
        if fault := _of_keys(baseline["gradient"], _GRADIENT, f"{where}.gradient.", optional=_GRADIENT):
            return fault
        for index, block in enumerate(baseline["blocks"]):
            place = f"{where}.blocks[{index}]"
            if not isinstance(block, dict):
                return _other(place, block, _OBJECT)
            if fault := _of_keys(block, _BLOCK, f"{place}."):
                return fault
    return None


def _of_keys(
    found: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str, *, optional: Iterable[str] = ()
) -> str | None:
    for key, kind in kinds.items():
        if key in found and not kind.has(found[key]):
            return _other(f"{where}{key}", found[key], kind)
        if key not in found and key not in optional:
            return f"{where}{key} is missing; {kind.words} belongs there"
    # It would be lost when the file is rewritten, and a misspelt limit limits nothing.
    unknown = sorted(found.keys() - kinds.keys())
    return f"{where}{unknown[0]} is not known; known are {', '.join(kinds)}" if unknown else None


def _other(place: str, value: Any, kind: _Kind) -> str:
    try:
        shown = json.dumps(value)
    except TypeError:
        shown = repr(value)
    return f"{place} is {shown if len(shown) <= 60 else f'{shown[:60]}...'}; {kind.words} belongs there"
