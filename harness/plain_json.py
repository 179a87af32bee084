"""JSON from elsewhere: exactly what the standard allows, of a size that reading it is worth."""

import json
from typing import Any

MOST_BYTES = 2**26
# Of a whole number: far more than bytes and operations ever need, and few enough to be turned into a number at once.
MOST_DIGITS = 40


def read_json(data: str | bytes, *, finite: bool = True) -> Any:
    """Raises ValueError, in a few words, for what is no JSON, gives a key twice, is too large or too deeply nested, or
    has a number that is too long or not finite.

    finite  False takes NaN and Infinity too, as Python writes them
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes")
    try:
        return json.loads(data, parse_constant=_refuse if finite else None, parse_int=_whole, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found
