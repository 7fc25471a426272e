"""One file format for a whole model: a safetensors file whose JSON header describes every part.

``NAME.safetensors`` holds the network's tensors, and in its metadata (key ``voltpi``) one JSON object

    {"format": 1, "short_range": {"kind": "nequip", "config": {…}}, "charges": {…} | null, "dispersion": {…} | null,
     "reference_energies": {"8": eV}, "card": {…}}

so that a model is one file that no loader can execute. ``charges`` with ``"kind": "taper"`` are ReaxNet's
(:class:`~voltpi.potential.electrostatics.taper.TaperedPQEq`), with ``"kind": "latent"`` the network's
(:class:`~voltpi.potential.electrostatics.latent.LatentCharges`), without a kind PQEq's. ``card`` says what data it was
trained on, its errors on held-out data, and what it is not for.

``short_range`` may hold ``"committee": {"kind": "last-layers" | "seeds", "members": K, "calibration": {"energy": α,
"forces": α}}`` beside the config, which is that of one member (:mod:`~voltpi.potential.committee`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from voltpi.potential.committee import Committee, committee_of, describe_short_range
from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.electrostatics.pqeq import ElementParameters, PQEq
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.shortrange.pair import PairPotential

__all__ = ["FORMAT", "list_models", "load_potential", "model_path", "read_card", "read_description", "save_potential"]

FORMAT = 1
_OPTIONAL = (dict, type(None))
_KEYS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "short_range": _OPTIONAL,
    "charges": _OPTIONAL,
    "dispersion": _OPTIONAL,
    "reference_energies": (dict,),
    "card": (dict,),
}
_Part = TypeVar("_Part")


def list_models() -> list[str]:
    """Names of the models that ship."""
    folder = resources.files("voltpi.potential.models")
    return sorted(f.name.removesuffix(".safetensors") for f in folder.iterdir() if f.name.endswith(".safetensors"))


def model_path(name_or_path: str | Path) -> Path:
    """File of a shipped model's name or of a path. Raises InputError where there is none."""
    if str(name_or_path) in list_models():
        return Path(str(resources.files("voltpi.potential.models").joinpath(f"{name_or_path}.safetensors")))
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise InputError(
            f"model: '{name_or_path}' is neither a shipped model ({', '.join(list_models()) or 'none'}) "
            "nor an existing file; check the name or the path"
        )
    return path


def read_description(name_or_path: str | Path) -> dict[str, Any]:
    """The JSON object in a model file's header.

    Raises InputError where the file is not a VoltPI model, or its description lacks a part or has one it should not.
    """
    path = model_path(name_or_path)
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("voltpi", "")
        description = json.loads(text)
    except (SafetensorError, json.JSONDecodeError, OSError):
        raise InputError(
            f"{path}: not a VoltPI model (a safetensors file with a 'voltpi' header); train or import one"
        ) from None
    if not isinstance(description, dict):
        raise InputError(f"{path}: not a VoltPI model (its 'voltpi' header is no JSON object); train or import one")
    if description.get("format") != FORMAT:
        raise InputError(
            f"{path}: model format {description.get('format')}, this version reads {FORMAT}; "
            "install the matching version"
        )
    if description.keys() != _KEYS.keys():
        odd = ", ".join(sorted(description.keys() ^ _KEYS.keys()))
        raise InputError(f"{path}: its description lacks or should not have: {odd}; save the model again")
    for key, kinds in _KEYS.items():
        if not isinstance(description[key], kinds):
            raise InputError(f"{path}: {key} in its description is no JSON object; save the model again")
    network = description["short_range"]
    if network is not None and (network.get("kind") != "nequip" or not isinstance(network.get("config"), dict)):
        raise InputError(
            f"{path}: short_range of kind '{network.get('kind')}', this version reads nequip with its config; "
            "install the matching version"
        )
    return description


def read_card(name_or_path: str | Path) -> dict[str, Any]:
    """What the model is: data, errors on held-out data, limits."""
    return read_description(name_or_path)["card"]


def save_potential(path: str | Path, potential: Potential, card: dict[str, Any]) -> None:
    """Writes a whole potential with its card to one safetensors file, which is there whole or not at all.

    Raises InputError for a short range that is no NequIP or committee of them, and a path that cannot be written.
    """
    path = Path(path)
    network = potential.short_range
    if network is not None and not isinstance(network, NequIP | Committee):
        raise InputError(f"a {type(network).__name__} cannot be saved: model files hold a NequIP short range")
    tensors = {} if network is None else {k: _compact(v) for k, v in network.state_dict().items()}
    description = {
        "format": FORMAT,
        "short_range": None if network is None else describe_short_range(network),
        "charges": None if potential.charges is None else _described(potential.charges),
        "dispersion": None if potential.dispersion is None else potential.dispersion.config,
        "reference_energies": {str(z): e for z, e in potential.reference_energies.items()},
        "card": card,
    }
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it, or give another path")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777  # as the umask says; safetensors writes for the owner alone
        save_file(tensors, str(temporary), metadata={"voltpi": json.dumps(description)})
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); give a path that can") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_potential(
    name_or_path: str | Path,
    *,
    precision: str = "mixed",
    device: torch.device | str = "cpu",
    walls: PairPotential | None = None,
) -> Potential:
    """The potential in a model file, ready to evaluate, with a pair potential of ``walls`` between electrodes.

    Raises InputError where the file cannot be used.
    """
    description = read_description(name_or_path)
    path = model_path(name_or_path)
    network = None
    if description["short_range"] is not None:
        network = _built(path, "short_range", lambda: _short_range(description["short_range"]))
        network.to(torch.float64 if precision == "double" else torch.float32)
        with safe_open(str(path), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(
                f"{path}: its tensors do not fit its own description ({' '.join(str(error).split()[:40])})"
            ) from None
    charges = description["charges"]
    dispersion = description["dispersion"]
    return Potential(
        network,
        None if charges is None else _built(path, "charges", lambda: _charges(charges)),
        None if dispersion is None else _built(path, "dispersion", lambda: D3(**dispersion)),
        reference_energies=_built(path, "reference_energies", lambda: _references(description["reference_energies"])),
        walls=walls,
        precision=precision,
    ).to(device)


def _built(path: Path, part: str, build: Callable[[], _Part]) -> _Part:
    """What ``build`` gives; InputError that names the file where the description of ``part`` is not understood."""
    try:
        return build()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: {part} in its description cannot be used ({reason}); save the model again") from None


def _short_range(description: Mapping[str, Any]) -> NequIP | Committee:
    network = NequIP(**description["config"])
    committee = description.get("committee")
    return network if committee is None else committee_of(network, committee)


def _compact(values: Tensor) -> Tensor:
    """On the CPU, and in float32 where that loses nothing."""
    values = values.detach().contiguous().cpu()
    single = values.float()
    return single if values.is_floating_point() and torch.equal(single.to(values.dtype), values) else values


def _described(charges: PQEq | TaperedPQEq) -> dict[str, Any]:
    """JSON-able description from which ``_charges`` builds the same model."""
    if isinstance(charges, PQEq):
        return charges.config
    own = {f.name: getattr(charges, f.name) for f in fields(charges) if f.init}
    return {**own, "kind": "taper", "parameters": {symbol: list(row) for symbol, row in charges.parameters.items()}}


def _charges(description: Mapping[str, Any]) -> Any:
    config = dict(description)
    kind = config.pop("kind", "pqeq")
    if kind == "pqeq":
        return PQEq.from_config(config)
    if kind == "latent":
        return LatentCharges.from_config(config)
    if kind != "taper":
        raise ValueError(f"kind '{kind}', this version reads pqeq, latent and taper")
    if type(config["iterations"]) is not int:
        raise ValueError(f"iterations {config['iterations']!r} are no whole number")
    config["parameters"] = {symbol: ElementParameters(*row) for symbol, row in config["parameters"].items()}
    return TaperedPQEq(**config)


def _references(table: dict[str, Any]) -> dict[int, float]:
    energies = {int(z): float(energy) for z, energy in table.items()}
    unknown = [z for z in energies if not 0 < z < len(chemical_symbols)]
    if unknown:
        raise ValueError(f"{unknown[0]} is no atomic number")
    return energies
