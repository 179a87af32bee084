"""plan.json: which trials a run is to have."""

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.ids import ID_FORM
from harness.plain_json import read_json

TrialId = Annotated[str, Field(pattern=f"^{ID_FORM}$")]


class Plan(BaseModel):
    """search: of a search that comes to more and more trials, what it asks"""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str = Field(max_length=200)
    hash: str = Field(pattern="^[0-9a-f]{64}$")
    trials: list[TrialId]
    search: str | None = None

    @classmethod
    def of(cls, name: str, trial_ids: Iterable[str], search: str | None = None) -> "Plan":
        trials = list(trial_ids)
        return cls(name=name, hash=plan_hash(trials), trials=trials, search=search)

    @classmethod
    def from_json(cls, data: bytes) -> "Plan":
        """Raises ValueError for what is none."""
        try:
            return cls.model_validate(read_json(data))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(by_alias=True, exclude_none=True), indent=1) + "\n").encode()


def plan_hash(trial_ids: Iterable[str]) -> str:
    """Two studies are the same run when they ask for the same trials, whatever their wording."""
    return hashlib.sha256("\n".join(sorted(trial_ids)).encode()).hexdigest()
