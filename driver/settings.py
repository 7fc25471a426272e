"""One typed tree of all that a run needs to know; YAML in, one clear sentence with file and line out.

The same keys are used in a YAML file, in ``--set a.b=c`` and in i-PI's ``<parameters>``. A key that is valid here but
that the installed potential cannot honour is refused where the potential is built (``voltpi.driver.build``), never
ignored.

Units: Å, eV, e, V, V/Å.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from voltpi.driver.selection import parse_selection
from voltpi.driver.settings_file import Origins, assign, explain, key_path, origin_of, parse_value, read_yaml
from voltpi.potential.errors import InputError

__all__ = [
    "Charges",
    "Clock",
    "Coulomb",
    "Cyclic",
    "Dispersion",
    "Electrode",
    "Output",
    "Pair",
    "Potentiostat",
    "Ramp",
    "Schedule",
    "Settings",
    "ShortRange",
    "Square",
    "Table",
    "Taper",
    "finite_number",
    "load_settings",
]


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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


_Part = TypeVar("_Part", bound=_Strict)


def _optional_part(part: type[_Part], value: Any) -> _Part | None:
    """A part that may be switched off by the word ``none``; anything else must be a mapping."""
    if value is None or value == "none":
        return None
    if isinstance(value, part):
        return value
    if not isinstance(value, dict):
        keys = ", ".join(part.model_fields)
        raise ValueError(f"expected 'none' or a mapping with the keys {keys}")
    return part.model_validate(value)


class _Row(_Strict):
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


class BornMayer(_Row):
    """A exp(−r/rho): eV, Å."""

    A: Number
    rho: Number


class Buckingham(BornMayer):
    """A exp(−r/rho) − C/r⁶: eV, Å, eV Å⁶."""

    C: Number


class BornMayerHuggins(BornMayer):
    """A exp((sigma − r)/rho) − C/r⁶ − D/r⁸: eV, Å, eV Å⁶, eV Å⁸."""

    sigma: Number
    C: Number
    D: Number


class LennardJones(_Row):
    """4 epsilon ((sigma/r)¹² − (sigma/r)⁶): eV, Å."""

    epsilon: Number
    sigma: Number


class Pair(_Strict):
    """Pair potentials, which add up; pairs are named like ``Na-Cl``, elements (``lennard_jones`` only) like ``O``."""

    set: Literal["nacl", "licl", "kcl"] | None = None
    born_mayer_huggins: dict[str, BornMayerHuggins] = {}
    buckingham: dict[str, Buckingham] = {}
    born_mayer: dict[str, BornMayer] = {}
    lennard_jones: dict[str, LennardJones] = {}
    mixing: Literal["lorentz-berthelot", "geometric"] = "lorentz-berthelot"
    zbl: bool = False
    cutoff: Annotated[Number, Field(gt=0)] = 10.0

    @model_validator(mode="after")
    def _some(self) -> Pair:
        kinds = ("set", "born_mayer_huggins", "buckingham", "born_mayer", "lennard_jones", "zbl")
        if not any(getattr(self, kind) for kind in kinds):
            raise PydanticCustomError("contradiction", f"give at least one of {', '.join(kinds)}, such as zbl: true")
        if "mixing" in self.model_fields_set and not self.lennard_jones:
            raise PydanticCustomError("contradiction", "mixing belongs to lennard_jones; give that or remove mixing")
        return self


class ShortRange(_Strict):
    """The short-range energy where no ``model`` brings one: exactly one of the two."""

    pair: Pair | None = None
    foundation: str | None = None

    @model_validator(mode="after")
    def _one(self) -> ShortRange:
        if (self.pair is None) == (self.foundation is None):
            raise PydanticCustomError("contradiction", "give exactly one of pair and foundation")
        return self


class Dispersion(_Strict):
    """D3 dispersion."""

    functional: str = "pbe"
    damping: Literal["zero", "bj"] = "zero"


def _per_atom(value: Any) -> Any:
    """``auto``, the name of a per-atom array in the file, or the charges (e) themselves."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list | tuple) and value:
        return tuple(finite_number(x) for x in value)
    raise ValueError("expected 'auto', the name of a per-atom array in the structure file, or a list of numbers")


def _labels(value: Any) -> Any:
    """``auto``, the name of a per-atom integer array in the file, or the labels themselves."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        return tuple(value)
    raise ValueError(
        "expected 'auto', the name of a per-atom integer array in the structure file, or a list of integers"
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a name")
    return value.strip()


def _width(value: Any) -> Any:
    if value == "point":
        return value
    if isinstance(value, dict) and value:
        widths = {_text(k): finite_number(v) for k, v in value.items()}
        if all(eta > 0 for eta in widths.values()):
            return widths
    raise ValueError("expected 'point' or a mapping of element to eta (1/Å, positive)")


class Charges(_Strict):
    """The charges and what they may do (``voltpi.potential`` defines the functional)."""

    model: Literal["pqeq", "qeq", "fixed", "latent", "linear-qeq", "none"] = "pqeq"
    parameters: Annotated[str, BeforeValidator(_text)] = "default"
    net_charge: Number = 0.0
    limiter: Literal["fene", "none"] = "fene"
    shell_limit: Annotated[Number, Field(gt=0)] = 0.25
    conserve: Literal["total", "fragments"] = "total"
    response: Literal["shells", "all", "frozen"] = "shells"
    carried: Annotated[str | tuple[float, ...], PlainValidator(_per_atom)] = "auto"
    fragments: Annotated[str | tuple[int, ...], PlainValidator(_labels)] = "auto"
    values: Annotated[str, BeforeValidator(_text)] = "initial_charges"
    width: Annotated[Literal["point"] | dict[str, float], PlainValidator(_width)] = "point"


class Taper(_Strict):
    """Tapered pair sum, for checkpoints of the published ReaxNet code."""

    cutoff: Annotated[Number, Field(gt=0)] = 12.5
    iterations: Annotated[int, Field(ge=1)] = 2
    clamp: Annotated[Number, Field(gt=0)] = 0.25
    cut: Literal["cores", "sites"] = "cores"


def _coulomb_constant(value: Any) -> Any:
    if value == "codata":
        return value
    number = finite_number(value)
    if number <= 0:
        raise ValueError("expected 'codata' or a positive number (eV Å/e²)")
    return number


class Coulomb(_Strict):
    """How the Coulomb sum is done, and to which accuracy (relative force error).

    boundary : ``auto`` takes the periodic directions of the file; ``slab-z`` is periodic along the cell vectors a and b
        and open along the normal of their plane, whatever c is (``slab-x``: along b and c; ``slab-y``: along a and c)
    method : ``auto`` sums small clusters pair by pair and everything else by particle-mesh Ewald; ``direct`` insists on
        the first, ``ewald`` and ``pme`` (one and the same: the Ewald sum is always done on a mesh) on the second
    """

    method: Literal["auto", "direct", "ewald", "pme", "taper"] = "auto"
    boundary: Literal[
        "auto",
        "open",
        "periodic",
        "slab-x",
        "slab-y",
        "slab-z",
        "finite-field-x",
        "finite-field-y",
        "finite-field-z",
    ] = "auto"
    accuracy: Annotated[Number, Field(ge=1e-12, le=1e-2)] = 1.0e-6
    coulomb_constant: Annotated[Literal["codata"] | float, PlainValidator(_coulomb_constant)] = "codata"
    taper: Taper | None = None


def _electrode_name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d][\w-]*", value):
        raise ValueError("expected a word that begins with a letter, such as left")
    return value


class Ramp(_Strict):
    """From ``start`` to ``until`` (V) at ``rate`` (V/ps), and then constant."""

    start: Number
    rate: Annotated[Number, Field(gt=0)]
    until: Number


class Square(_Strict):
    """``low`` for half a ``period`` (ps), then ``high`` (V) for the other half, and so on."""

    low: Number
    high: Number
    period: Annotated[Number, Field(gt=0)]


class Cyclic(_Strict):
    """Cyclic voltammetry: from ``start`` (``low``, where not given) up to ``high``, down to ``low`` (V), up again, …

    ``rate`` in V/ps.
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


class Table(_Strict):
    """``values`` (V) at ``times`` (ps), straight lines between them, constant before the first and after the last."""

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


class Schedule(_Strict):
    """A potential that changes with time in one of these ways (``voltpi.driver.schedule``); time starts at step 0."""

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


class Electrode(_Strict):
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


class Potentiostat(_Strict):
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


class Clock(_Strict):
    """What i-PI does not tell its drivers; ``voltpi run`` fills it in from the XML or RESTART.

    timestep : fs
    first_step : the step whose structure comes first
    beads : structures a step
    """

    timestep: Annotated[Number, Field(gt=0)]
    first_step: Annotated[int, Field(ge=0)] = 0
    beads: Annotated[int, Field(ge=1)] = 1


class Output(_Strict):
    """What is computed and passed on beyond energy, forces and virial."""

    charges: bool = True
    shells: bool = False
    born_charges: bool = False
    polarizability: bool = False
    smallest_curvature: bool = False
    capacitance: bool = False


def _field(value: Any) -> Any:
    if value == "from-frame":
        return value
    if isinstance(value, list | tuple) and len(value) == 3:
        return tuple(finite_number(x) for x in value)
    raise ValueError("expected three numbers (V/Å) or 'from-frame'")


def _displacement(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 3:
        return tuple(None if x is None else finite_number(x) for x in value)
    raise ValueError("expected null or three entries, each a number (V/Å) or null")


def _device(value: Any) -> str:
    if isinstance(value, str) and (
        value in ("auto", "cpu", "cuda") or (value.startswith("cuda:") and value[5:].isdigit())
    ):
        return value
    raise ValueError("expected auto, cpu, cuda or cuda:n")


class Settings(_Strict):
    """All a run needs, validated; ``load_settings`` reads it.

    Raises ``pydantic.ValidationError`` when built directly; ``load_settings`` turns that into one
    sentence (``InputError``).
    """

    model: Annotated[str, BeforeValidator(_text)] = "none"
    short_range: ShortRange | None = None
    dispersion: Dispersion | None = None
    charges: Charges = Charges()
    coulomb: Coulomb = Coulomb()
    field: Annotated[tuple[float, float, float] | Literal["from-frame"], PlainValidator(_field)] = (0.0, 0.0, 0.0)
    displacement: Annotated[tuple[float | None, float | None, float | None] | None, PlainValidator(_displacement)] = (
        None
    )
    electrodes: tuple[Electrode, ...] = ()
    potentiostat: Potentiostat | None = None
    clock: Clock | None = None
    device: Annotated[str, BeforeValidator(_device)] = "auto"
    precision: Literal["double", "mixed", "single"] = "mixed"
    output: Output = Output()

    # where each key was given, for messages ("settings.yaml, line 4")
    _origins: Origins = PrivateAttr(default_factory=dict)

    @field_validator("short_range", mode="before")
    @classmethod
    def _read_short_range(cls, value: Any) -> Any:
        return _optional_part(ShortRange, value)

    @field_validator("dispersion", mode="before")
    @classmethod
    def _read_dispersion(cls, value: Any) -> Any:
        return _optional_part(Dispersion, value)

    @field_validator("electrodes", mode="before")
    @classmethod
    def _list_of_electrodes(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("expected a list such as [{name: left, atoms: element Au, potential: 0.5}]")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for key, sentence in _contradictions(self):
            raise PydanticCustomError("contradiction", "{sentence}", {"sentence": sentence, "key": key})
        return self

    @property
    def scheduled(self) -> list[str]:
        """The keys of potentials that change with time."""
        keys = [f"electrodes.{k}.potential" for k, e in enumerate(self.electrodes) if isinstance(e.potential, Schedule)]
        if self.potentiostat is not None and isinstance(self.potentiostat.potential, Schedule):
            keys.append("potentiostat.potential")
        return keys

    @property
    def has_model(self) -> bool:
        """Whether a checkpoint brings the potential."""
        return self.model != "none"

    @property
    def field_from_frame(self) -> bool:
        """Whether every frame brings its own field."""
        return self.field == "from-frame"

    def given(self) -> dict[str, Any]:
        """Dotted key -> value of everything that was set explicitly, leaf by leaf."""
        return dict(_given(self, ""))

    def given_for_charges(self) -> list[str]:
        """The keys among them that have no meaning without charges."""
        neutral = ("charges.model", "coulomb.boundary")  # the boundary is that of short range and dispersion too
        return sorted(k for k in self.given() if k.startswith(("charges.", "coulomb.")) and k not in neutral)

    def where(self, key: str) -> str:
        """File and line (or option) that gave ``key``, or an empty string."""
        return origin_of(self._origins, key_path(key))

    def refusal(self, key: str, sentence: str) -> InputError:
        """The error to raise about ``key``, with the place where it was given."""
        where = self.where(key)
        return InputError(f"{where}: {sentence}" if where else sentence)


def _given(part: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in part.model_fields_set:
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield from _given(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _contradictions(s: Settings) -> Iterator[tuple[str, str]]:
    """Pairs (key, sentence) for settings that exclude each other, whatever the structure."""
    charges, coulomb = s.charges, s.coulomb
    given = set(s.given())
    walls = bool(s.electrodes) and s.short_range is not None and s.short_range.pair is not None
    if s.has_model and not walls and "short_range" in {key.partition(".")[0] for key in given}:
        yield (
            "short_range",
            f"short_range cannot be combined with model {s.model}, which brings its own, but for short_range.pair "
            "between electrodes and electrolyte; remove one of the two",
        )
    if s.displacement is not None:
        if s.field_from_frame:
            yield "displacement", "displacement excludes field: from-frame; give a constant field or no displacement"
        for i, axis in enumerate("xyz"):
            if s.displacement[i] is not None and s.field[i]:
                yield (
                    "displacement",
                    f"displacement and field are both set along {axis}; keep one of the two in each direction",
                )
    if charges.model == "none":
        for key in s.given_for_charges():
            yield key, f"{key} has no meaning with charges.model: none; remove one of the two"
    if charges.model != "fixed":
        for key in ("charges.values", "charges.width"):
            if key in given:
                yield (
                    key,
                    f"{key} belongs to charges.model: fixed, not {charges.model}; remove it or change the model",
                )
    if charges.model == "fixed":
        meaningless = ["limiter", "shell_limit", "conserve", "response", "carried", "fragments"]
        if all(e.eta is not None for e in s.electrodes):  # otherwise they have the parameters of their element
            meaningless.append("parameters")
        for key in meaningless:
            if f"charges.{key}" in given:
                yield (
                    f"charges.{key}",
                    f"charges.{key} has no meaning with charges.model: fixed, whose charges are charges.values; remove "
                    "one of the two",
                )
        if coulomb.method == "taper":
            yield "coulomb.method", "coulomb.method: taper is for charges.model: pqeq or qeq, not fixed; use auto"
    if charges.limiter == "none" and "charges.shell_limit" in given:
        yield (
            "charges.shell_limit",
            "charges.shell_limit has no meaning with charges.limiter: none; remove one of the two",
        )
    if charges.response == "all" and charges.carried != "auto":
        yield "charges.carried", "charges.carried belongs to charges.response: shells or frozen, not all; remove it"
    if coulomb.taper is not None and coulomb.method != "taper":
        yield "coulomb.taper", "coulomb.taper needs coulomb.method: taper; set it or remove coulomb.taper"
    if coulomb.method == "direct" and coulomb.boundary not in ("auto", "open"):
        yield "coulomb.method", f"coulomb.method: direct is for open boundaries, not {coulomb.boundary}; use auto"
    if coulomb.method in ("ewald", "pme") and coulomb.boundary == "open":
        yield (
            "coulomb.method",
            f"coulomb.method: {coulomb.method} needs a periodic boundary, not open; use auto, which sums large "
            "clusters on a mesh by itself",
        )
    yield from _electrode_contradictions(s)
    if s.output.capacitance and sum(e.potential is not None for e in s.electrodes) != 2:
        yield (
            "output.capacitance",
            "output.capacitance is that between two electrodes at potentials; give these, or set it to false",
        )
    if charges.model == "none":
        for key in ("born_charges", "polarizability", "smallest_curvature"):
            if getattr(s.output, key) and not s.has_model:
                yield f"output.{key}", f"output.{key} needs charges; set charges.model (for example pqeq)"
        if not s.has_model and (s.field_from_frame or any(s.field)):
            yield (
                "field",
                "a field needs charges that feel it; set charges.model (for example pqeq) or remove the field",
            )


def _electrode_contradictions(s: Settings) -> Iterator[tuple[str, str]]:
    names = [e.name for e in s.electrodes]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield "electrodes", f"two electrodes are called {name}; give each its own name"
    if s.coulomb.boundary.startswith("finite-field"):
        axis = s.coulomb.boundary[-1]
        at_potentials = sum(e.control == "potential" for e in s.electrodes)
        if not len(s.electrodes) == at_potentials == 2:
            yield (
                "coulomb.boundary",
                f"coulomb.boundary: finite-field-{axis} needs two electrodes, both at potentials, whose difference is "
                f"the jump across the cell, but of {len(s.electrodes)} electrodes {at_potentials} are at potentials; "
                f"give two, or use slab-{axis}",
            )
        for key in ("response", "carried"):
            if s.given().get(f"charges.{key}", "all") != "all":
                yield (
                    f"charges.{key}",
                    f"charges.{key} has no meaning with coulomb.boundary: finite-field-{axis}, where every charge "
                    "feels the jump of the potential; remove it",
                )
    yield from _potentiostat_contradictions(s)
    if s.clock is not None and not s.scheduled:
        yield "clock", "clock is for potentials that change with time, and there is none; remove it"
    if not s.electrodes:
        return
    if s.charges.model == "none" and not s.has_model:
        yield "electrodes", "electrodes need charges; set charges.model (for example fixed) or remove them"
    if s.coulomb.method == "taper":
        yield "coulomb.method", "coulomb.method: taper has no electrodes; use auto, or remove the electrodes"
    for k, electrode in enumerate(s.electrodes):
        if s.charges.model in ("fixed", "qeq") and electrode.polarizable:
            yield (
                f"electrodes.{k}.polarizable",
                f"electrode {electrode.name} cannot be polarizable with charges.model: {s.charges.model}, which has no "
                "shells; remove polarizable or use pqeq",
            )


def _potentiostat_contradictions(s: Settings) -> Iterator[tuple[str, str]]:
    if s.potentiostat is None:
        return
    names = s.potentiostat.electrodes
    if len(names) != 2 or names[0] == names[1]:
        yield (
            "potentiostat.electrodes",
            f"potentiostat.electrodes is [{', '.join(names)}]; give the names of the two electrodes between which "
            "charge flows",
        )
    known = {e.name: e for e in s.electrodes}
    for name in names:
        if name not in known:
            yield (
                "potentiostat.electrodes",
                f"potentiostat.electrodes: there is no electrode {name}; there are {', '.join(known) or 'none'}",
            )
        elif known[name].charge != 0:
            held = "a potential" if known[name].charge is None else f"a charge of {known[name].charge:g} e"
            yield (
                "potentiostat.electrodes",
                f"electrode {name} has {held} but its charge is the potentiostat's to move; give it charge: 0 (the "
                "potential belongs to the potentiostat)",
            )


def load_settings(
    path: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    origin: str = "--set",
) -> Settings:
    """Settings from a YAML file (or defaults), then ``overrides`` on top.

    Parameters
    ----------
    path : YAML file; paths inside it are relative to its folder
    overrides : ``["a.b=c", ...]`` as the command line has them, or a mapping of dotted (or nested) keys to values;
        text is read as YAML, so ``"[0, 0, 0.1]"`` is a list; an electrode goes by its place or its name, as in
        ``electrodes.left.potential``
    origin : what messages call the source of the overrides

    Raises InputError, one sentence that names file, line, key, value and fix.
    """
    data: dict[str, Any] = {}
    origins: Origins = {}
    if path is not None:
        data, origins = read_yaml(Path(path))
        _resolve_paths(data, Path(path).parent)
    if isinstance(overrides, str):
        overrides = [overrides]
    for item in overrides.items() if isinstance(overrides, Mapping) else overrides:
        if isinstance(item, str):
            key, equals, text = item.partition("=")
            if not equals:
                raise InputError(f"{origin} {item}: expected key=value, such as charges.model=pqeq")
            key, value = key.strip(), parse_value(text, f"{origin} {item}")
            assign(data, origins, _placed(key, data, f"{origin} {item}"), value, f"{origin} {item}")
        else:
            key, value = item
            # copied, because later assignments may go inside it
            value = copy.deepcopy(parse_value(value, f"{origin} {key}"))
            assign(data, origins, _placed(key, data, f"{origin} {key}"), value, f"{origin} {key}")
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, Settings, origins)) from None
    settings._origins.update(origins)
    return settings


def _placed(key: str, data: Mapping[str, Any], origin: str) -> str:
    """``electrodes.left.potential`` -> ``electrodes.0.potential``; any other key as it is. Raises InputError."""
    first, _, rest = key.partition(".")
    name, dot, below = rest.partition(".")
    if first != "electrodes" or not name or name.isdigit():
        return key
    electrodes = data.get("electrodes")
    names = [e.get("name") for e in electrodes if isinstance(e, dict)] if isinstance(electrodes, list) else []
    if name not in names:
        known = ", ".join(map(str, names)) or "none"
        raise InputError(f"{origin}: there is no electrode {name}; the settings have {known}")
    return f"electrodes.{names.index(name)}{dot}{below}"


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Paths in a settings file are relative to that file, wherever the command is run."""
    model = data.get("model")
    if isinstance(model, str) and ("/" in model or model.endswith(".safetensors")):
        data["model"] = str(folder / model)
    charges = data.get("charges")
    if isinstance(charges, dict) and isinstance(charges.get("parameters"), str) and charges["parameters"] != "default":
        charges["parameters"] = str(folder / charges["parameters"])
