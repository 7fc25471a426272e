"""What the parts of the settings have in common: strict models, numbers and names."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

__all__ = ["Number", "Row", "Strict", "finite_number", "nonempty", "optional_part"]


def finite_number(value: Any) -> float:
    """A finite float; text as YAML 1.1 leaves it ('1e-6') is accepted, true/false is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("expected a number") from None
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


Number = Annotated[float, BeforeValidator(finite_number)]


class Strict(BaseModel):
    """Knows its keys, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


Part = TypeVar("Part", bound=Strict)


def optional_part(part: type[Part], value: Any) -> Part | None:
    """A part that may be switched off by the word ``none``; anything else must be a mapping."""
    if value is None or value == "none":
        return None
    if isinstance(value, part):
        return value
    if not isinstance(value, dict):
        keys = ", ".join(part.model_fields)
        raise ValueError(f"expected 'none' or a mapping with the keys {keys}")
    return part.model_validate(value)


class Row(Strict):
    """Parameters of one element or pair; it names its own keys, as what is above it is named by elements."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, value: Any) -> Any:
        names = ", ".join(cls.model_fields)
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping with the keys {names}")
        for key in value:
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key}; the keys here are {names}")
        return value


def nonempty(value: Any) -> str:
    """A name; raises ValueError for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a name")
    return value.strip()
