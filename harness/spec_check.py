"""The specification in a record, which another version may have written, with fields that this one does not know."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from harness.trials import TrialSpec


def problem_of(spec: Mapping[str, Any]) -> str | None:
    """What no version can have written: a known field with something in it that no trial has. None if all is well."""
    known = {name: value for name, value in spec.items() if name in TrialSpec.model_fields}
    try:
        TrialSpec.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None
