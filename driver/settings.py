"""One typed tree of all that a run needs to know; YAML in, one clear sentence with file and line out.

The same keys are used in a YAML file, in ``--set a.b=c`` and in i-PI's ``<parameters>``. A key that is valid here but
that the installed potential cannot honour is refused where the potential is built (``voltpi.driver.build``), never
ignored.

Units: Å, eV, e, V, V/Å.
"""

from __future__ import annotations

import copy
import math
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

from voltpi.driver.settings_file import Origins, assign, explain, key_path, origin_of, parse_value, read_yaml
from voltpi.potential.errors import InputError

__all__ = [
    "Charges",
    "Coulomb",
    "Dispersion",
    "Electrode",
    "Output",
    "Pair",
    "Settings",
    "ShortRange",
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


class Electrode(_Strict):
    """Atoms at one potential (V), or with one total charge (e)."""

    name: Annotated[str, BeforeValidator(_text)]
    atoms: str | tuple[int, ...]
    potential: Number | None = None
    charge: Number | None = None
    eta: Annotated[Number, Field(gt=0)] | None = None
    hardness: Annotated[Number, Field(ge=0)] = 0.0
    thomas_fermi: Annotated[Number, Field(ge=0)] = 0.0
    chi: Number | None = None
    polarizable: bool = False

    @field_validator("atoms", mode="before")
    @classmethod
    def _selection(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list | tuple) and value and all(type(i) is int and i >= 0 for i in value):
            return tuple(value)
        raise ValueError("expected a selection such as 'element Au and z < 10' or a list of indices from 0")

    @model_validator(mode="after")
    def _one(self) -> Electrode:
        if (self.potential is None) == (self.charge is None):
            raise PydanticCustomError("contradiction", "give exactly one of potential (V) and charge (e)")
        return self


class Output(_Strict):
    """What is computed and passed on beyond energy, forces and virial."""

    charges: bool = True
    born_charges: bool = False
    polarizability: bool = False
    smallest_curvature: bool = False


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

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for key, sentence in _contradictions(self):
            raise PydanticCustomError("contradiction", "{sentence}", {"sentence": sentence, "key": key})
        return self

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
    if s.has_model and "short_range" in {key.partition(".")[0] for key in given}:
        yield (
            "short_range",
            f"short_range cannot be combined with model {s.model}, which brings its own; remove one of the two",
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
    names = [e.name for e in s.electrodes]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield "electrodes", f"two electrodes are called {name}; give each its own name"
    if charges.model == "none":
        for key in ("born_charges", "polarizability", "smallest_curvature"):
            if getattr(s.output, key) and not s.has_model:
                yield f"output.{key}", f"output.{key} needs charges; set charges.model (for example pqeq)"
        if not s.has_model and (s.field_from_frame or any(s.field)):
            yield (
                "field",
                "a field needs charges that feel it; set charges.model (for example pqeq) or remove the field",
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
        text is read as YAML, so ``"[0, 0, 0.1]"`` is a list
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
            assign(data, origins, key, value, f"{origin} {item}")
        else:
            key, value = item
            # copied, because later assignments may go inside it
            value = copy.deepcopy(parse_value(value, f"{origin} {key}"))
            assign(data, origins, key, value, f"{origin} {key}")
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, Settings, origins)) from None
    settings._origins.update(origins)
    return settings


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Paths in a settings file are relative to that file, wherever the command is run."""
    model = data.get("model")
    if isinstance(model, str) and ("/" in model or model.endswith(".safetensors")):
        data["model"] = str(folder / model)
    charges = data.get("charges")
    if isinstance(charges, dict) and isinstance(charges.get("parameters"), str) and charges["parameters"] != "default":
        charges["parameters"] = str(folder / charges["parameters"])
