"""A baseline file that is not whole is refused by the place, and stays as it is."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness.inverses.baseline_file import DEFAULT_TOLERANCES, BaselineError, read, write

KEY = "cpu x86_64 AVX2, torch 2.13, fp64"
BLOCK = {
    "calls": "f",
    "drift_rel": 1.34e-17,
    "inverse_rel": 0.0,
    "name": "0 Shift",
    "output_projection": -0.718464594508,
    "output_rms": 1.10220485364,
    "weights": "f=824f98b1da77",
}
WHOLE: dict[str, Any] = {
    "schema": 1,
    "test": "test_net",
    "structure": {"0 Shift": ["f Linear(3, 3)"]},
    "tolerances": DEFAULT_TOLERANCES,
    "baselines": {
        KEY: {
            "inputs": "a98f9f5142b8",
            "outside": "e3b0c44298fc",
            "blocks": [BLOCK],
            "gradient": {"gradient_difference_rel": 5.26e-12},
        }
    },
}
OF_KEY, OF_BLOCK = ("baselines", KEY), ("baselines", KEY, "blocks", 0)
PLACES = [
    *((key,) for key in WHOLE if key != "schema"),
    *(("tolerances", metric) for metric in DEFAULT_TOLERANCES),
    *((*OF_KEY, key) for key in WHOLE["baselines"][KEY]),
    *((*OF_BLOCK, key) for key in BLOCK),
]
VALUES = [
    *PLACES,
    ("structure", "0 Shift"),
    OF_KEY,
    OF_BLOCK,
    (*OF_KEY, "gradient", "gradient_difference_rel"),
]


def with_value(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(WHOLE)
    inner = found
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return found


def refusal(path: Path, contents: Any) -> str:
    """What the file is refused with; it stays."""
    path.write_text(text := json.dumps(contents))
    with pytest.raises(BaselineError) as raised:
        read(path)
    assert path.read_text() == text
    return str(raised.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test_net.json"


def test_what_was_written_is_read(path: Path) -> None:
    assert read(path) is None
    write(path, WHOLE)
    assert read(path) == WHOLE
    # A whole number is a number, and a module without parameters has no gradient.
    for place, value in ((("tolerances", "drift_rel"), 3), ((*OF_KEY, "gradient"), {}), (("baselines",), {})):
        write(path, with_value(place, value))
        assert read(path) == with_value(place, value)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_what_is_missing_is_named(path: Path, place: tuple[Any, ...]) -> None:
    found = copy.deepcopy(WHOLE)
    inner = found
    for name in place[:-1]:
        inner = inner[name]
    del inner[place[-1]]
    message = refusal(path, found)
    assert f"{path}: " in message
    assert f"{place[-1]} is missing; a" in message
    assert message.endswith(" belongs there. Restore the file, or delete it to have it written anew.")


@pytest.mark.parametrize("value", [None, True, [1], math.nan], ids=str)
@pytest.mark.parametrize("place", VALUES, ids=str)
def test_what_is_of_another_kind_is_named(path: Path, place: tuple[Any, ...], value: object) -> None:
    if value == [1] and place == (*OF_KEY, "blocks"):
        assert "blocks[0] is 1; an object belongs there" in refusal(path, with_value(place, value))
        return
    named = f"[{place[-1]}]" if isinstance(place[-1], int) else str(place[-1])
    message = refusal(path, with_value(place, value))
    assert named in message
    assert f" is {json.dumps(value)}; a" in message


@pytest.mark.parametrize("place", [("tolerances", "drift_rel"), (*OF_BLOCK, "drift_rel"), (*OF_BLOCK, "output_rms")])
@pytest.mark.parametrize("value", [-1.0, math.inf, 10**400])
def test_nothing_can_be_held_against_a_number_that_is_none(path: Path, place: tuple[Any, ...], value: float) -> None:
    assert f"{place[-1]} is " in refusal(path, with_value(place, value))


@pytest.mark.parametrize(
    "place", [("note",), ("tolerances", "drift"), (*OF_KEY, "note"), (*OF_BLOCK, "rel"), (*OF_KEY, "gradient", "rel")]
)
def test_what_a_rewriting_would_lose_is_refused(path: Path, place: tuple[Any, ...]) -> None:
    assert f"{place[-1]} is not known; known are " in refusal(path, with_value(place, 1.0))


def test_a_weight_without_a_hash_is_refused(path: Path) -> None:
    message = refusal(path, with_value((*OF_BLOCK, "weights"), "f"))
    assert 'weights is "f"; a text of `part=hash` belongs there' in message


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, '"\x00"'], ids=["half", "empty", "deep", "control"])
def test_what_is_no_json_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(BaselineError, match="not JSON"):
        read(path)


def test_what_is_no_text_or_no_file_is_refused(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BaselineError, match="not JSON"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(BaselineError, match="cannot be read"):
        read(path)


@pytest.mark.parametrize("contents", [[], 1, {}, {"schema": 2}, {"schema": "1"}])
def test_another_schema_is_refused(path: Path, contents: object) -> None:
    assert "not a baseline of schema 1. Restore" in refusal(path, contents)


def test_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "inverse_baselines").write_text("a file where a folder belongs")
    with pytest.raises(BaselineError, match=r"test_net\.json: cannot be written \("):
        write(tmp_path / "inverse_baselines" / "test_net.json", WHOLE)
