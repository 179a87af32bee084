"""YAML 1.2 read safely into plain data, together with the line that each value stands on.

Only plain JSON types come out: a file cannot name a Python type, repeat a key or refer to an alias. Its size, how
deep it nests and how large its numbers are have bounds, beyond which it is refused before it costs time or memory.
"""

import math
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from harness.errors import StudyError
from harness.places import Loc, Places, dotted
from harness.plain_text import unprintable
from harness.study_faults import shown

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null"))
_COLLECTIONS = frozenset(_TAG + name for name in ("map", "seq"))
MOST_BYTES = 2**18
MOST_LEVELS = 16
# Whole numbers of at most 64 bits, sign included, are the same to whoever reads them.
MOST = 2**63


def read_yaml(text: str, path: str) -> tuple[Any, Places]:
    """The data of a YAML text and the places of its values; `path` is named in errors. Raises StudyError."""
    if len(text) > MOST_BYTES:
        raise StudyError(f"{path}: larger than {MOST_BYTES} bytes, the most that a study has. Divide it.")
    try:
        _refuse_what_grows(text, path)
        yaml = YAML(typ="safe", pure=True)
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise StudyError(f"{path}{line}: not YAML: {error.problem or error.context}. Correct the line.") from None
    except YAMLError as error:
        raise StudyError(f"{path}: not YAML: {error}. Correct the file.") from None
    reader = _Reader(yaml, path)
    data = None if root is None else reader.value(root, ())
    return data, Places(path, reader.lines)


def _refuse_what_grows(text: str, path: str) -> None:
    level = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = f"{path}:{event.start_mark.line + 1}"
        if isinstance(event, AliasEvent):
            raise StudyError(f"{line}: *{event.anchor}; a study has no aliases. Write the value out.")
        level += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if level > MOST_LEVELS:
            raise StudyError(f"{line}: nested {level} levels deep; a study has at most {MOST_LEVELS}. Flatten it.")


class _Reader:
    """Turns nodes into data and notes their lines."""

    def __init__(self, yaml: YAML, path: str) -> None:
        self._yaml = yaml
        self._path = path
        self.lines: dict[Loc, int] = {}

    def value(self, node: Node, loc: Loc) -> Any:
        tag = str(node.tag)
        if tag not in (_SCALARS if isinstance(node, ScalarNode) else _COLLECTIONS):
            shown = tag.replace(_TAG, "!!")
            raise self._fault(
                node,
                f"{dotted(loc) or 'the file'} is of type {shown}; allowed are text, numbers, true, false, null, "
                "lists and mappings. Remove the tag, or put the value in quotes if it is text.",
            )
        if isinstance(node, MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, SequenceNode):
            for index, item in enumerate(node.value):
                self.lines[(*loc, index)] = item.start_mark.line + 1
            return [self.value(item, (*loc, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, loc)

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag != f"{_TAG}str":
                shown = key if isinstance(key_node, ScalarNode) else "a list or mapping"
                raise self._fault(key_node, f"the key {shown} is not text; a key is the name of a field. Correct it.")
            if found := unprintable(key):
                raise self._fault(key_node, f"a key holds {found}; text has no control characters. Remove it.")
            here = (*loc, key)
            if key in data:
                raise self._fault(
                    key_node, f"{dotted(here)} is given twice, first on line {self.lines[here]}. Keep one of them."
                )
            # A collection in block style, or a value left out, begins below its key.
            shown_node = value_node if isinstance(value_node, ScalarNode) and value_node.value else key_node
            self.lines[here] = shown_node.start_mark.line + 1
            data[key] = self.value(value_node, here)
        return data

    def _scalar(self, node: Node, loc: Loc) -> Any:
        try:
            value = self._yaml.constructor.construct_object(node)
        except (ValueError, KeyError, YAMLError):
            kind = str(node.tag).replace(_TAG, "!!")
            raise self._fault(node, f"{dotted(loc)} = {shown(node.value)} is no {kind}. Correct it.") from None
        if isinstance(value, str) and (found := unprintable(value)):
            raise self._fault(node, f"{dotted(loc)} holds {found}; text has no control characters. Remove it.")
        if isinstance(value, int) and not -MOST <= value < MOST:
            number = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
            raise self._fault(
                node, f"{dotted(loc)} = {number}; a whole number is from -2**63 to 2**63 - 1. Correct it."
            )
        if isinstance(value, float):
            # ruamel's floats remember their spelling; a plain one is written back the same everywhere.
            value = float(value)
            if not math.isfinite(value):
                raise self._fault(node, f"{dotted(loc)} = {node.value}; a number is finite. Correct it.")
        return value

    def _fault(self, node: Node, problem: str) -> StudyError:
        return StudyError(f"{self._path}:{node.start_mark.line + 1}: {problem}")
