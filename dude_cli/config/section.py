"""A block of a config, and how it says that its values contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0)]
Contradiction = tuple[str, tuple[str, ...]]  # a message, and the dotted keys that it is about, from its section on


class Section(BaseModel):
    """A block of the config: unknown keys are errors, values are not coerced, instances do not change.

    A subclass names its values that contradict each other in `contradictions`; all of them become one error.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with values that are right each on its own, and the keys that it is about."""
        yield from ()

    @model_validator(mode="after")
    def _values_agree(self) -> Self:
        found = list(self.contradictions())
        if found:
            message = "; ".join(message for message, _ in found)
            raise PydanticCustomError("contradiction", "{message}", {"message": message, "contradictions": found})
        return self
