"""study.yaml: a resolved study, written so that it reads back the same."""

import io
import json
import re
from typing import Any

from harness.errors import StudyError
from harness.yaml_lines import read_yaml


def to_yaml(study: dict[str, Any]) -> str:
    """As people write it. Some text would read back as something else then, in ways that the writer does not know of: a
    study that has such is written as JSON, which YAML 1.2 holds all of."""
    text = _as_people_write(study)
    try:
        same = read_yaml(text, "study.yaml")[0] == study
    except StudyError:
        same = False
    return text if same else _as_json(study)


def _as_people_write(study: dict[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    yaml.default_flow_style = None
    yaml.width = 120
    # Keys stay in the order of the schema, which is the order a reader looks for them.
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    text = io.StringIO()
    yaml.dump(study, text)
    return text.getvalue()


def _as_json(study: dict[str, Any]) -> str:
    text = json.dumps(study, ensure_ascii=False, indent=1)
    # Line breaks and marks of YAML that JSON leaves as they are.
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"
