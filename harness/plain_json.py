"""JSON from elsewhere: exactly what the standard allows, of a size that reading it is worth."""

import json
import re
from typing import Any

MOST_BYTES = 2**26
# Of a whole number: far more than bytes and operations ever need, and few enough to be turned into a number at once.
MOST_DIGITS = 40
# Of a character beyond 16 bits, written as JSON may write it; two make one, and one alone is no text.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(data: str | bytes, *, finite: bool = True) -> Any:
    """Raises ValueError, in a few words, for what is no JSON, gives a key twice, is too large or too deeply nested, or
    has a number that is too long or not finite.

    Half a character, as Python has it where a file's name is no text, is read as U+FFFD.

    finite  False takes NaN and Infinity too, as Python writes them
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes")
    try:
        found = json.loads(data, parse_constant=_refuse if finite else None, parse_int=_whole, object_pairs_hook=_once)
        return _whole_text(found) if _HALF.search(data if isinstance(data, str) else data.decode()) else found
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _whole_text(found: Any) -> Any:
    if isinstance(found, str):
        return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(found, list):
        return [_whole_text(each) for each in found]
    if isinstance(found, dict):
        return {_whole_text(key): _whole_text(value) for key, value in found.items()}
    return found


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
