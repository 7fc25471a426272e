"""Settings of the short range, dispersion, charges and their Coulomb sum.

Units: Å, eV, e, V.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from voltpi.driver.settings_base import Number, Row, Strict, finite_number, nonempty

__all__ = ["Charges", "Coulomb", "Dispersion", "Pair", "ShortRange", "Taper"]


class BornMayer(Row):
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


class LennardJones(Row):
    """4 epsilon ((sigma/r)¹² − (sigma/r)⁶): eV, Å."""

    epsilon: Number
    sigma: Number


class Pair(Strict):
    """Pair potentials, which add up; pairs are named like ``Na-Cl``, elements (``lennard_jones`` only) like ``O``."""

    set: Literal["nacl", "licl", "kcl"] | None = None
    born_mayer_huggins: dict[str, BornMayerHuggins] = Field(default={})
    buckingham: dict[str, Buckingham] = Field(default={})
    born_mayer: dict[str, BornMayer] = Field(default={})
    lennard_jones: dict[str, LennardJones] = Field(default={})
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


class ShortRange(Strict):
    """The short-range energy where no ``model`` brings one: exactly one of the two."""

    pair: Pair | None = None
    foundation: str | None = None

    @model_validator(mode="after")
    def _one(self) -> ShortRange:
        if (self.pair is None) == (self.foundation is None):
            raise PydanticCustomError("contradiction", "give exactly one of pair and foundation")
        return self


class Dispersion(Strict):
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


def _width(value: Any) -> Any:
    if value == "point":
        return value
    if isinstance(value, dict) and value:
        widths = {nonempty(k): finite_number(v) for k, v in value.items()}
        if all(eta > 0 for eta in widths.values()):
            return widths
    raise ValueError("expected 'point' or a mapping of element to eta (1/Å, positive)")


class Charges(Strict):
    """The charges and what they may do (``voltpi.potential`` defines the functional).

    sigma, epsilon_infinity, relaxation : of ``latent`` charges: width of their Gaussians (Å), permittivity at fixed
        nuclei, whether they relax from what the network gives
    """

    model: Literal["pqeq", "qeq", "fixed", "latent", "linear-qeq", "none"] = "pqeq"
    parameters: Annotated[str, BeforeValidator(nonempty)] = "default"
    net_charge: Number = 0.0
    limiter: Literal["fene", "none"] = "fene"
    shell_limit: Annotated[Number, Field(gt=0)] = 0.25
    conserve: Literal["total", "fragments", "neighbors"] = "total"
    response: Literal["shells", "all", "frozen"] = "shells"
    carried: Annotated[str | tuple[float, ...], PlainValidator(_per_atom)] = "auto"
    fragments: Annotated[str | tuple[int, ...], PlainValidator(_labels)] = "auto"
    values: Annotated[str, BeforeValidator(nonempty)] = "initial_charges"
    width: Annotated[Literal["point"] | dict[str, float], PlainValidator(_width)] = "point"
    sigma: Annotated[Number, Field(gt=0)] = 1.0
    epsilon_infinity: Annotated[Number, Field(ge=1)] = 1.0
    relaxation: bool = False


class Taper(Strict):
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


class Coulomb(Strict):
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
