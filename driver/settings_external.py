"""Settings of what acts from outside: electrodes, fields and displacements, and how they change with time.

Units: Å, e, V, V/Å, ps.
"""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, TypeAdapter, field_validator, model_validator
from pydantic_core import PydanticCustomError

from voltpi.driver.selection import parse_selection
from voltpi.driver.settings_base import Number, Strict, finite_number

__all__ = [
    "Clock",
    "Cyclic",
    "Displacement",
    "Electrode",
    "Potential",
    "Potentiostat",
    "Ramp",
    "Schedule",
    "Square",
    "Table",
    "UniformField",
]


def _electrode_name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d][\w-]*", value):
        raise ValueError("expected a word that begins with a letter, such as left")
    return value


class Ramp(Strict):
    """From ``start`` to ``until`` (V, of a field V/Å) at ``rate`` (a ps), and then constant."""

    start: Number
    rate: Annotated[Number, Field(gt=0)]
    until: Number


class Square(Strict):
    """``low`` (V, of a field V/Å) for half a ``period`` (ps), then ``high`` for the other half, and so on."""

    low: Number
    high: Number
    period: Annotated[Number, Field(gt=0)]


class Cyclic(Strict):
    """Cyclic voltammetry: from ``start`` (``low``, where not given) up to ``high``, down to ``low``, up again, …

    V and V/ps; of a field V/Å and V/Å/ps, with which it is a hysteresis loop.
    """

    low: Number
    high: Number
    rate: Annotated[Number, Field(gt=0)]
    start: Number | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Cyclic:
        if not self.low < self.high:
            raise PydanticCustomError("contradiction", "low must lie below high")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise PydanticCustomError("contradiction", "start must lie between low and high")
        return self


class Table(Strict):
    """``values`` (V, of a field V/Å) at ``times`` (ps), straight lines between, constant before and after."""

    times: tuple[Number, ...]
    values: tuple[Number, ...]

    @model_validator(mode="after")
    def _pairs(self) -> Table:
        n, m = len(self.times), len(self.values)
        if n != m or n == 0:
            raise PydanticCustomError("contradiction", f"give as many values as times ({n} times and {m} values)")
        if any(late <= early for early, late in itertools.pairwise(self.times)):
            raise PydanticCustomError("contradiction", "times must increase from one to the next")
        return self


class Schedule(Strict):
    """A potential or field that changes with time in one of these ways (``voltpi.driver.schedule``), from step 0 on."""

    ramp: Ramp | None = None
    square: Square | None = None
    cyclic: Cyclic | None = None
    table: Table | None = None

    @model_validator(mode="after")
    def _one(self) -> Schedule:
        if sum(kind is not None for kind in (self.ramp, self.square, self.cyclic, self.table)) != 1:
            raise PydanticCustomError("contradiction", "give exactly one of ramp, square, cyclic and table")
        return self


def _potential(value: Any) -> float | Schedule:
    """V, or how it changes with time."""
    if isinstance(value, dict | Schedule):
        return Schedule.model_validate(value)
    try:
        return finite_number(value)
    except ValueError as error:
        raise ValueError(f"{error} (V), or one of ramp, square, cyclic and table with its keys below it") from None


Potential = Annotated[float | Schedule, PlainValidator(_potential)]


class Electrode(Strict):
    """Atoms at one potential (V, constant or changing with time), or with one total charge (e).

    atoms : a selection (``voltpi.driver.selection``), evaluated once, on the start structure, or indices from 0
    eta : 1/Å, Gaussian charges of an ideal conductor; without it the atoms have the PQEq parameters of their element
    hardness : eV/e² beyond the Gaussian's self-energy (0: ideal conductor)
    thomas_fermi : Å, with ``atom_volume`` Å³ per atom (absent: that of the element's bulk crystal)
    chi : V
    polarizable : whether the atoms have PQEq shells
    """

    name: Annotated[str, BeforeValidator(_electrode_name)]
    atoms: str | tuple[int, ...]
    potential: Potential | None = None
    charge: Number | None = None
    eta: Annotated[Number, Field(gt=0)] | None = None
    hardness: Annotated[Number, Field(ge=0)] = 0.0
    thomas_fermi: Annotated[Number, Field(ge=0)] = 0.0
    atom_volume: Annotated[Number, Field(gt=0)] | None = None
    chi: Number | None = None
    polarizable: bool = False

    @property
    def control(self) -> Literal["potential", "charge"]:
        """What the electrode is held at."""
        return "charge" if self.potential is None else "potential"

    @property
    def value(self) -> float:
        """V or e, as ``control`` says; of a potential that changes with time see ``voltpi.driver.schedule``."""
        value = self.charge if self.potential is None else self.potential
        assert value is not None
        assert not isinstance(value, Schedule)
        return value

    @field_validator("atoms", mode="before")
    @classmethod
    def _selection(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip():
            parse_selection(value)
            return value
        if isinstance(value, list | tuple) and value and all(type(i) is int and i >= 0 for i in value):
            return tuple(value)
        raise ValueError("expected a selection such as 'element Au and z < 10' or a list of indices from 0")

    @model_validator(mode="after")
    def _one(self) -> Electrode:
        if (self.potential is None) == (self.charge is None):
            raise PydanticCustomError("contradiction", "give exactly one of potential (V) and charge (e)")
        if "hardness" in self.model_fields_set and self.eta is None:
            raise PydanticCustomError(
                "contradiction",
                "hardness needs eta (1/Å), as without it the atoms have the hardness of their element; give eta or "
                "remove hardness",
            )
        if self.atom_volume is not None and not self.thomas_fermi:
            raise PydanticCustomError(
                "contradiction", "atom_volume belongs to thomas_fermi (Å); give that or remove atom_volume"
            )
        return self


class Potentiostat(Strict):
    """The charge on two electrodes as one more degree of freedom of i-PI (``voltpi.driver.potentiostat``).

    electrodes : names; a charge n (e) flows from the first, which has −n, to the second, which has +n
    potential : V, of the second against the first
    scale : Å/e; the coordinate is the charge times this
    beads : how many structures share one charge, the mean of theirs: the beads of the ring polymer (a classical
        charge); 1: every bead has its own
    """

    electrodes: tuple[str, ...]
    potential: Potential
    scale: Annotated[Number, Field(gt=0)] = 1.0
    beads: Annotated[int, Field(ge=1)] = 1


class Clock(Strict):
    """What i-PI does not tell its drivers; ``voltpi run`` fills it in from the XML or RESTART.

    timestep : fs
    first_step : the step whose structure comes first
    beads : structures a step
    """

    timestep: Annotated[Number, Field(gt=0)]
    first_step: Annotated[int, Field(ge=0)] = 0
    beads: Annotated[int, Field(ge=1)] = 1


def _component(value: Any) -> float | Schedule:
    """V/Å, or how it changes with time."""
    if isinstance(value, dict | Schedule):
        return Schedule.model_validate(value)
    try:
        return finite_number(value)
    except ValueError as error:
        raise ValueError(f"{error} (V/Å), or one of ramp, square, cyclic and table with its keys below it") from None


_Component = Annotated[float | Schedule, PlainValidator(_component)]
_Component3 = tuple[_Component, _Component, _Component]
_COMPONENTS = TypeAdapter(_Component3)


def _field(value: Any) -> Any:
    if value == "from-frame":
        return value
    if isinstance(value, list | tuple) and len(value) == 3:
        return _COMPONENTS.validate_python(tuple(0.0 if x is None else x for x in value))
    raise ValueError("expected three numbers (V/Å), each constant or changing with time, or 'from-frame'")


def _displacement(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 3:
        held = _COMPONENTS.validate_python(tuple(0.0 if x is None else x for x in value))
        return (
            None
            if all(x is None for x in value)
            else tuple(None if x is None else d for x, d in zip(value, held, strict=True))
        )
    raise ValueError("expected null or three entries, each a number (V/Å; it may change with time) or null")


UniformField = Annotated[_Component3 | Literal["from-frame"], PlainValidator(_field)]
Displacement = Annotated[
    tuple[_Component | None, _Component | None, _Component | None] | None, PlainValidator(_displacement)
]
