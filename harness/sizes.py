"""Amounts of memory as people write them: `2GiB`, `512 MiB`, or bytes."""

import re
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_memory(value: object) -> int | None:
    """Bytes of `2GiB`, `512 MiB`, a whole number of bytes, or None. Raises ValueError."""
    if value is None:
        return None
    allowed = "a number of bytes, or a number with KiB, MiB, GiB or TiB"
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"an amount of memory is at least 1 byte; allowed: {allowed}, or null for none")
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
        raise ValueError("an amount of memory is a whole number of bytes, at least 1; write the bytes out")
    return int(size_bytes)


def in_words(size_bytes: int) -> str:
    """`94.1 GiB`, in the largest unit of which there is one."""
    for unit, unit_bytes in reversed(_UNITS.items()):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.1f} {unit}"
    return f"{size_bytes} bytes"


def _memory(value: object) -> int | None:
    try:
        return parse_memory(value)
    except ValueError as error:
        raise PydanticCustomError("memory", "{problem}", {"problem": f"{error}."}) from None


Memory = Annotated[int | None, BeforeValidator(_memory)]
