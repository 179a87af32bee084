"""What pydantic found wrong, said as `path:line: where = value; what is allowed. What to do.`"""

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from harness.places import Loc, Places, dotted

_KINDS = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def describe(error: ValidationError, places: Places, model: type[BaseModel]) -> str:
    """One line per fault, in the order of the file; `model` is what was validated."""
    faults = sorted(error.errors(), key=lambda fault: places.lines.get(fault["loc"], 0))
    return "\n".join(f"{places.at(fault['loc'])}: {_sentence(fault, model)}" for fault in faults)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`did you mean 'grid'?`, or nothing where no name is near."""
    near = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def shown(value: object) -> str:
    """A value as the reader of a study knows it; long ones are cut."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sentence(fault: ErrorDetails, model: type[BaseModel]) -> str:
    kind, loc, given = fault["type"], fault["loc"], fault["input"]
    context: dict[str, Any] = fault.get("ctx", {})
    last = loc[-1] if loc else ""
    if kind == "missing":
        return f"{dotted(loc)} is missing. Add it."
    if kind == "extra_forbidden":
        known = _keys_at(model, loc[:-1])
        inside = f" in {dotted(loc[:-1])}" if loc[:-1] else ""
        remedy = did_you_mean(last, known) or "remove it."
        return f"unknown key {last!r}{inside}; {remedy} Allowed: {', '.join(known)}."
    what = f"{dotted(loc)} = {shown(given)}" if loc else shown(given)
    remedy = "Remove the entry." if isinstance(last, int) and loc[0] != "zip" else "Correct the value."
    if kind == "list_type":
        return f"{what}; a list is needed here. Write [{shown(given)}]."
    if kind in _KINDS:
        return f"{what}; it has to be {_KINDS[kind]}. {remedy}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{what}; {_subject(loc)} {words} {context[bound]}. {remedy}"
    if kind == "literal_error":
        allowed = [name.strip(" '") for name in re.split(r",| or ", context["expected"])]
        near = did_you_mean(given, allowed)
        return f"{what}; {near} Allowed: {', '.join(allowed)}." if near else f"{what}; use one of {', '.join(allowed)}."
    if kind in ("too_short", "string_too_short"):
        return f"{what}; it may not be empty. Fill it or remove it."
    # Only pydantic's own errors carry a link; the schema's are whole sentences already.
    return f"{what}; {fault['msg']}. {remedy}" if "url" in fault else f"{what}; {fault['msg']}"


def _subject(loc: Loc) -> str:
    """The field with its verb: `a batch size is`, `measured steps are`."""
    name = next((part for part in reversed(loc) if isinstance(part, str)), "study").rpartition(".")[-1]
    words = name.removesuffix("_s").replace("_", " ")
    if name.split("_per_")[0].endswith("s") and not name.endswith("_s"):
        return f"{words} are"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words} is"


def _keys_at(model: type[BaseModel], loc: Loc) -> list[str]:
    """The keys of the mapping at `loc` within what `model` describes."""
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is not None:
            classes = (field.annotation, *get_args(field.annotation))
            model = next((kind for kind in classes if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]
