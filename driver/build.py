"""From settings to a potential; what this version cannot honour is refused here, with what to use instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from voltpi.driver.settings import Settings, Taper, finite_number
from voltpi.driver.settings_file import origin_of, read_yaml
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential

__all__ = ["build_potential", "choose_device", "read_charge_parameters"]

# settings key -> attribute of the charge model; these belong to the physics that a checkpoint was trained with
_TRAINED = {
    "charges.conserve": "conserve",
    "charges.response": "response",
    "charges.limiter": "limiter",
    "charges.shell_limit": "shell_limit",
    "charges.sigma": "sigma",
    "charges.relaxation": "relaxation",
    "coulomb.coulomb_constant": "coulomb_constant",
}

_A_COMMITTEE = (
    "a model with a committee: train one with training.committee, give one to a model with `voltpi committee`, or "
    "remove output.uncertainty"
)

# V; `precision: double` is for derivatives by finite differences, where the residual of the charges is the noise
_TOLERANCE = {"double": 1e-10}


def build_potential(settings: Settings) -> Potential:
    """The potential that the settings describe, on its device.

    Raises InputError for a setting that is not available in this version, that contradicts a trained model, or that
    leaves nothing to compute; for a model file that is missing; for a device that is not there.
    """
    for key, sentence in _unavailable(settings):
        raise settings.refusal(key, sentence)
    device = choose_device(settings)
    if settings.has_model:
        return _from_checkpoint(settings, device)
    if settings.charges.model == "none" and settings.dispersion is None and settings.short_range is None:
        raise settings.refusal(
            "charges.model",
            "there is nothing to compute: model, short_range, dispersion and charges.model are all none; set "
            "model: water or charges.model: pqeq",
        )
    foundation = _foundation(settings)
    if foundation is not None and settings.charges.net_charge and settings.charges.model not in ("none", "linear-qeq"):
        raise settings.refusal(
            "charges.net_charge",
            f"charges.net_charge: {settings.charges.net_charge:g} is not available with a foundation model, whose "
            "energy knows no charge; set it to 0",
        )
    if settings.charges.model == "linear-qeq":  # these charges bring their energy along
        linear = _linear_qeq(settings, foundation)
        return Potential(None, linear, _dispersion(settings), precision=settings.precision).to(device)
    charges = _charges(settings)
    potential = Potential(
        _short_range(settings) if foundation is None else foundation,
        charges,
        _dispersion(settings),
        response_only=foundation is not None and charges is not None,
        precision=settings.precision,
    )
    return potential.to(device)


def choose_device(settings: Settings) -> str:
    """The device to run on. Raises InputError where CUDA is asked for and not there."""
    import torch

    wanted = settings.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(wanted.partition(":")[2] or 0)
        if index >= count:
            raise settings.refusal(
                "device", f"device is {wanted} but {count} CUDA devices are visible; use auto or cpu"
            )
    return wanted


def _unavailable(s: Settings) -> Iterator[tuple[str, str]]:
    """Pairs (key, sentence) for valid settings that this version cannot honour."""

    if s.short_range is not None and s.short_range.foundation is not None and s.has_model:
        yield (
            "short_range.foundation",
            "short_range.foundation and model both bring a short range; remove one of the two",
        )
    if s.charges.model == "latent" and not s.has_model:
        yield (
            "charges.model",
            "charges.model: latent needs a network that gives the charges; set model to one that was trained with "
            "charges.model: latent (voltpi train)",
        )
    if s.charges.model == "linear-qeq" and not s.has_model:
        yield from _not_with_linear_qeq(s)
    if s.output.uncertainty != "none" and not s.has_model:
        yield "output.uncertainty", f"output.uncertainty needs {_A_COMMITTEE}"
    if s.displacement is not None and s.coulomb.method == "taper":
        yield "displacement", "displacement is not available with coulomb.method: taper; use coulomb.method: auto"
    if s.coulomb.method == "taper" and not s.has_model:
        yield from _not_tapered(s, "coulomb.method: auto")


def _not_tapered(s: Settings, instead: str) -> Iterator[tuple[str, str]]:
    """Pairs (key, sentence) for settings that the tapered sum with its fixed number of iterations does not have.

    ``instead`` names what has them.
    """
    given = s.given()
    for key, there in (
        ("charges.limiter", "coulomb.taper.clamp bounds the shells"),
        ("charges.shell_limit", "coulomb.taper.clamp bounds the shells"),
        ("coulomb.accuracy", "coulomb.taper.cutoff ends the sum"),
    ):
        if key in given:
            yield key, f"{key} has no meaning with coulomb.method: taper, where {there}; remove one of the two"
    if s.charges.conserve != "total":
        yield (
            "charges.conserve",
            f"charges.conserve: {s.charges.conserve} is not available with coulomb.method: taper; use total, or "
            f"{instead}",
        )
    for key in ("born_charges", "polarizability", "smallest_curvature", "capacitance"):
        if getattr(s.output, key):
            yield (
                f"output.{key}",
                f"output.{key} needs stationary charges, which coulomb.method: taper stops short of; use {instead}",
            )


def _not_with_linear_qeq(s: Settings) -> Iterator[tuple[str, str]]:
    """Pairs (key, sentence) for settings that the charges inside a QET do not have."""
    foundation = None if s.short_range is None else s.short_range.foundation
    if foundation is None or foundation.partition(":")[0] not in ("qet", "qet-matgl2"):
        yield (
            "charges.model",
            "charges.model: linear-qeq are the charges inside a QET; set short_range.foundation to qet:PATH, or use "
            "pqeq",
        )
    if s.charges.conserve != "total":
        yield (
            "charges.conserve",
            "charges.conserve: fragments is not available with charges.model: linear-qeq, whose charge flows through "
            "the whole structure; use total",
        )
    meant = ("charges.model", "charges.net_charge", "charges.conserve", "coulomb.boundary")
    for key in s.given_for_charges():
        if key not in meant:
            yield key, f"{key} has no meaning with charges.model: linear-qeq, whose charges a network gives; remove it"
    if s.coulomb.boundary.startswith("finite-field"):
        yield (
            "coulomb.boundary",
            f"coulomb.boundary: {s.coulomb.boundary} is not available with charges.model: linear-qeq, which has no "
            "field; use the boundary of the structure, or charges.model: pqeq",
        )
    for key in ("born_charges", "polarizability", "smallest_curvature"):
        if getattr(s.output, key):
            yield (
                f"output.{key}",
                f"output.{key} is not defined with charges.model: linear-qeq, which has no field; set it to false, or "
                "use charges.model: pqeq",
            )


def _linear_qeq(settings: Settings, foundation: Any) -> Any:
    """The charges inside a QET. Raises InputError for electrodes that these cannot honour."""
    from voltpi.potential.shortrange.qet import LinearQEq

    try:
        return LinearQEq(foundation, _electrodes(settings)["electrodes"])
    except InputError as error:
        raise settings.refusal("electrodes", str(error)) from None


def _foundation(settings: Settings) -> Any:
    """Somebody else's model, or None. Raises InputError for one that is not there."""
    if settings.short_range is None or settings.short_range.foundation is None:
        return None
    from voltpi.potential.shortrange.foundation import load_foundation

    try:
        return load_foundation(settings.short_range.foundation, precision=settings.precision)
    except InputError as error:
        raise settings.refusal("short_range.foundation", str(error)) from None


def _short_range(settings: Settings) -> Any:
    """The pair potential, or None. Raises InputError that names the kind and pair whose parameters cannot be."""
    if settings.short_range is None or settings.short_range.pair is None:
        return None
    from voltpi.potential.shortrange.pair import (
        ZBL,
        BMHParameters,
        BornMayerHuggins,
        LennardJones,
        LJParameters,
        PairPotential,
        read_set,
    )

    p = settings.short_range.pair
    terms: list[BornMayerHuggins | LennardJones | ZBL] = []
    if p.set is not None:
        terms.append(BornMayerHuggins(read_set(p.set)))
    for kind in ("born_mayer_huggins", "buckingham", "born_mayer", "lennard_jones"):
        rows = {name: row.model_dump() for name, row in getattr(p, kind).items()}
        try:
            if rows and kind == "lennard_jones":
                terms.append(LennardJones({name: LJParameters(**row) for name, row in rows.items()}, p.mixing))
            elif rows:
                terms.append(BornMayerHuggins({name: BMHParameters(**row) for name, row in rows.items()}))
        except InputError as error:
            key = f"short_range.pair.{kind}"
            raise settings.refusal(key, f"{key}: {error}") from None
    if p.zbl:
        terms.append(ZBL())
    return PairPotential(terms, p.cutoff)


def _charges(settings: Settings) -> Any:
    from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, FixedCharges, PQEq
    from voltpi.potential.electrostatics.taper import TaperedPQEq

    c = settings.charges
    if c.model == "none":
        return None
    constant = COULOMB_CONSTANT if settings.coulomb.coulomb_constant == "codata" else settings.coulomb.coulomb_constant
    table = read_charge_parameters(c.parameters)
    if c.model == "fixed":
        return FixedCharges(
            parameters=table,
            widths=_widths(settings),
            accuracy=settings.coulomb.accuracy,
            coulomb_constant=constant,
            tolerance=_TOLERANCE.get(settings.precision, FixedCharges.tolerance),
            **_electrodes(settings),
        )
    if c.model == "qeq":
        table = {symbol: row._replace(Z=0.0) for symbol, row in table.items()}
    if settings.coulomb.method == "taper":
        t = settings.coulomb.taper or Taper()
        return TaperedPQEq(
            parameters=table,
            response=c.response,
            cutoff=t.cutoff,
            iterations=t.iterations,
            clamp=t.clamp,
            cut=t.cut,
            coulomb_constant=constant,
        )
    return PQEq(
        parameters=table,
        conserve=c.conserve,
        response=c.response,
        limiter=c.limiter,
        shell_limit=c.shell_limit,
        accuracy=settings.coulomb.accuracy,
        coulomb_constant=constant,
        tolerance=_TOLERANCE.get(settings.precision, PQEq.tolerance),
        **_electrodes(settings),
    )


def _electrodes(settings: Settings) -> dict[str, Any]:
    """What the charge models know of electrodes: which there are, and across which direction the potential jumps."""
    from voltpi.potential.external.electrodes import Electrode

    electrodes = [
        Electrode(control=e.control, **e.model_dump(exclude={"atoms", "potential", "charge"}))
        for e in settings.electrodes
    ]
    boundary = settings.coulomb.boundary
    jump = "xyz".index(boundary[-1]) if boundary.startswith("finite-field") else None
    return {"electrodes": tuple(electrodes), "finite_field": jump}


def _widths(settings: Settings) -> dict[str, float] | None:
    """The widths of fixed charges by element, 1/Å, or None for points. Raises InputError for an unknown element."""
    widths = settings.charges.width
    if isinstance(widths, str):
        return None
    for symbol in widths:
        if not atomic_numbers.get(symbol):
            raise settings.refusal("charges.width", f"charges.width: {symbol} is not an element; write like {{O: 1.2}}")
    return widths


def read_charge_parameters(source: str) -> dict[str, Any]:
    """The shipped table, with the rows of a CSV or the numbers of a YAML file ({O: {K: 400}}) put over it.

    Raises InputError for a file that cannot be read, an unknown element or name, and a number that cannot be.
    """
    from voltpi.potential.electrostatics.pqeq import ElementParameters, check_parameters, read_parameters

    table = read_parameters("default")
    path = Path(source)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return table if source == "default" else {**table, **read_parameters(source)}
    if not path.is_file():
        raise InputError(f"{path}: there is no such file of parameters; check charges.parameters")
    overrides, origins = read_yaml(path)
    for symbol, values in overrides.items():
        where = origin_of(origins, (symbol,))
        if symbol not in atomic_numbers:
            raise InputError(f"{where}: {symbol} is not an element; write like {{O: {{K: 400}}}}")
        if not isinstance(values, dict) or not values or not values.keys() <= set(ElementParameters._fields):
            raise InputError(f"{where}: {symbol} needs some of {', '.join(ElementParameters._fields)}, like {{K: 400}}")
        known = table[symbol]._asdict() if symbol in table else {}
        try:
            table[symbol] = ElementParameters(
                **{key: finite_number(value) for key, value in {**known, **values}.items()}
            )
        except ValueError as error:
            raise InputError(f"{where}: {error} for each parameter of {symbol}") from None
        except TypeError:
            missing = [name for name in ElementParameters._fields if name not in values]
            raise InputError(
                f"{where}: {symbol} is not in the shipped table; give {', '.join(missing)} as well"
            ) from None
        check_parameters(where, symbol, table[symbol])
    return table


def _dispersion(settings: Settings) -> Any:
    if settings.dispersion is None:
        return None
    from voltpi.potential.dispersion import D3

    return D3(functional=settings.dispersion.functional, damping=settings.dispersion.damping)


def _from_checkpoint(settings: Settings, device: str) -> Potential:
    """A trained model with the settings that may differ from run to run; what would change its physics is refused."""
    from voltpi.potential.checkpoints import load_potential
    from voltpi.potential.committee import Committee
    from voltpi.potential.electrostatics.latent import LatentCharges
    from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT
    from voltpi.potential.electrostatics.taper import TaperedPQEq

    walls = _short_range(settings)
    try:
        potential = load_potential(settings.model, precision=settings.precision, device=device, walls=walls)
    except InputError as error:
        raise settings.refusal("model", str(error)) from None
    if settings.output.uncertainty != "none" and not isinstance(potential.short_range, Committee):
        sentence = f"output.uncertainty: model {_name(settings)} has no committee; this needs {_A_COMMITTEE}"
        raise settings.refusal("output.uncertainty", sentence)
    given = settings.given()

    def contradiction(key: str, trained: object) -> InputError:
        return settings.refusal(
            key,
            f"{key}: {given[key]} contradicts model {_name(settings)}, which was trained with {trained}; remove {key}",
        )

    charges = potential.charges
    if charges is None:
        for key in settings.given_for_charges():
            raise contradiction(key, "no charges")
        if settings.electrodes:
            raise settings.refusal(
                "electrodes", f"electrodes need charges but model {_name(settings)} has none; remove the electrodes"
            )
    elif isinstance(charges, LatentCharges):
        for key in ("limiter", "shell_limit", "response", "carried", "values", "width"):
            if f"charges.{key}" in given:
                raise settings.refusal(
                    f"charges.{key}",
                    f"charges.{key} has no meaning with model {_name(settings)}, whose charges are latent; remove it",
                )
    elif charges.response == "all" and settings.charges.carried != "auto":
        raise contradiction("charges.carried", "charges.response: all, where every charge feels the field")
    if given.get("charges.parameters", "default") != "default":
        raise contradiction("charges.parameters", "its own parameters")
    if isinstance(charges, TaperedPQEq):
        if given.get("coulomb.method", "taper") != "taper":
            raise contradiction("coulomb.method", "coulomb.method: taper")
        for key in ("cutoff", "iterations", "clamp", "cut"):
            if given.get(f"coulomb.taper.{key}", getattr(charges, key)) != getattr(charges, key):
                raise contradiction(f"coulomb.taper.{key}", getattr(charges, key))
        for key, sentence in _not_tapered(
            settings, "a model with the whole Coulomb sum (import-reaxnet --charges pqeq)"
        ):
            raise settings.refusal(key, f"model {_name(settings)} is tapered: {sentence}")
        if settings.electrodes:
            raise settings.refusal(
                "electrodes",
                f"electrodes need the whole Coulomb sum but that of model {_name(settings)} is tapered; remove the "
                "electrodes, or import the model with --charges pqeq",
            )
    elif given.get("coulomb.method") == "taper":
        raise contradiction("coulomb.method", "the whole Coulomb sum")
    if "charges.model" in given and given["charges.model"] != _charge_model(charges):
        raise contradiction("charges.model", _charge_model(charges))
    for key, attribute in _TRAINED.items():
        trained = getattr(charges, attribute, "no such charges")
        if key in given and (COULOMB_CONSTANT if given[key] == "codata" else given[key]) != trained:
            raise contradiction(key, trained)
    if "dispersion" in given and potential.dispersion is not None:
        raise contradiction("dispersion", "D3")
    for key in ("functional", "damping"):
        trained = getattr(potential.dispersion, key, "no dispersion")
        if given.get(f"dispersion.{key}", trained) != trained:
            raise contradiction(f"dispersion.{key}", trained)
    if charges is not None and not isinstance(charges, TaperedPQEq):
        accuracy = settings.coulomb.accuracy if "coulomb.accuracy" in given else charges.accuracy
        tolerance = _TOLERANCE.get(settings.precision, charges.tolerance)
        changes: dict[str, Any] = {"accuracy": accuracy, "tolerance": tolerance, **_electrodes(settings)}
        if "charges.epsilon_infinity" in given:
            if not isinstance(charges, LatentCharges):
                raise contradiction("charges.epsilon_infinity", f"charges.model: {_charge_model(charges)}")
            changes["epsilon_infinity"] = settings.charges.epsilon_infinity
        potential.charges = dataclasses.replace(charges, **changes)
    return potential


def _charge_model(charges: Any) -> str:
    from voltpi.potential.electrostatics.latent import LatentCharges

    if charges is None:
        return "none"
    if isinstance(charges, LatentCharges):
        return "latent"
    return "pqeq" if any(row.Z for row in charges.parameters.values()) else "qeq"


def _name(settings: Settings) -> str:
    return Path(settings.model).name
