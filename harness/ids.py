"""What a trial is called: a hash of its specification, so that nobody can give one trial the name of another."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

ID_FORM = "[0-9a-f]{12}"


def canonical_json(spec: Mapping[str, Any]) -> str:
    """The same text for the same content, on every machine and whatever the order of keys was."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)


def id_of(spec: Mapping[str, Any]) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(spec).encode()).hexdigest()[:12]


def is_id(text: str) -> bool:
    return re.fullmatch(ID_FORM, text) is not None
