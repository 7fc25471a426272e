"""Which model honours which setting, found by trying: every model with every setting on a small structure.

    python -m voltpi.driver.honoured docs/models-and-settings.md

writes the page anew; columns of models whose package is not installed stay as they are there.
A setting is honoured where the evaluation goes through and refused where it ends with a sentence, which the page
quotes. What stands for a kind of model is small and untrained: whether a setting is honoured depends on the kind alone.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from voltpi.driver.evaluator import BOHR, Evaluator, Result
from voltpi.driver.settings import load_settings
from voltpi.potential.checkpoints import save_potential
from voltpi.potential.committee import LastLayers
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import VoltPIError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP

__all__ = ["honoured", "page", "read_page"]

_WATER = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
_LENNARD_JONES = {
    "O": {"epsilon": 0.006, "sigma": 3.1},
    "H": {"epsilon": 0.001, "sigma": 1.0},
    "Au": {"epsilon": 0.01, "sigma": 2.6},
}


_CHARGES = {"O": -0.8, "H": 0.4}
"""e, of fixed charges."""


def _molecule() -> Atoms:
    return Atoms("OH2", _WATER)


def _cell() -> Atoms:
    first, second = Atoms("OH2", _WATER), Atoms("OH2", _WATER)
    second.translate((2.9, 0.3, 2.7))
    atoms = first + second
    atoms.set_cell([6.0, 6.2, 5.8])
    atoms.pbc = True
    return atoms


def _plates() -> Atoms:
    atoms = Atoms("OH2", _WATER)
    atoms.translate((2.5, 2.5, 7.0))
    for z in (2.0, 12.0):
        atoms += Atoms("Au4", [[2.9 * i, 2.9 * j, z] for i in (0, 1) for j in (0, 1)])
    atoms.set_cell([5.8, 5.8, 20.0])
    atoms.pbc = True
    return atoms


def _charged(atoms: Atoms, total: float, fixed: bool) -> Atoms:
    """With the charges a user would give: those of every atom where they are fixed, else of ions."""
    charges = [_CHARGES.get(s, 0.0) if fixed else 0.0 for s in atoms.get_chemical_symbols()]
    charges[0] += total
    atoms.set_initial_charges(charges)
    return atoms


def _electrodes(control: str, low: float, high: float) -> list[dict[str, Any]]:
    sides = (("low", "element Au and z < 7", low), ("high", "element Au and z > 7", high))
    return [{"name": name, "atoms": atoms, control: value, "eta": 1.6} for name, atoms, value in sides]


_SLAB = {"coulomb.boundary": "slab-z"}
_VOLTAGE = {**_SLAB, "electrodes": _electrodes("potential", -0.5, 0.5)}
_GROUNDED = {"electrodes": _electrodes("potential", 0.0, 0.0)}
_EMPTY = {"electrodes": _electrodes("charge", 0.0, 0.0)}
_NEEDS_MATGL = "QET, `linear-qeq`"
_SENT = {"BEC", "polarizability", "smallest_curvature", "energy_uncertainty", "electrode_capacitance"}
_NO_FIELD = {"field": [0.0, 0.0, 0.0]}
_CHARGE = {**_SLAB, "electrodes": _electrodes("charge", -0.1, 0.1)}

SETTINGS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "`field`, molecule": (_molecule, {"field": [0.0, 0.05, 0.0]}, _NO_FIELD),
    "`field`, periodic": (_cell, {"field": [0.0, 0.05, 0.0]}, _NO_FIELD),
    "`displacement`": (_cell, {"displacement": [None, 0.05, None]}, {"displacement": None}),
    "`field_under_strain: reduced`": (
        _cell,
        {"field": [0.0, 0.05, 0.0], "field_under_strain": "reduced"},
        {**_NO_FIELD, "field_under_strain": "uniform"},
    ),
    "`charges.net_charge`": (_molecule, {"charges.net_charge": 1.0}, {"charges.net_charge": 0.0}),
    "electrodes at potentials": (_plates, _VOLTAGE, _GROUNDED),
    "electrodes at charges": (_plates, _CHARGE, _EMPTY),
    "`finite-field` cell": (_plates, {**_VOLTAGE, "coulomb.boundary": "finite-field-z"}, _GROUNDED),
    "`output.uncertainty`": (_cell, {"output.uncertainty": "energy"}, {}),
    "`output.born_charges`": (_cell, {"output.born_charges": True}, {}),
    "`output.polarizability`": (_cell, {"output.polarizability": True}, {}),
    "`output.smallest_curvature`": (_cell, {"output.smallest_curvature": True}, {}),
    "`output.capacitance`": (_plates, {**_VOLTAGE, "output.capacitance": True}, {}),
}
"""What is tried: a structure, the keys, and what to change for an answer that must be another (empty: an output)."""


def _models(folder: Path) -> dict[str, dict[str, Any]]:
    """The keys that choose each kind of model."""
    torch.manual_seed(1)
    small: dict[str, Any] = {"hidden_irreps": "4x0e+2x1o", "layers": 1, "r_max": 3.0, "n_basis": 4, "radial_hidden": 8}
    plain, latent = NequIP([1, 8], **small), NequIP([1, 8], **small, latent=True)
    tapered: Any = TaperedPQEq()
    charged = {
        "pqeq": Potential(plain, PQEq(conserve="fragments", response="all")),
        "latent": Potential(latent, LatentCharges(conserve="total")),
        "neighbors": Potential(latent, LatentCharges(conserve="neighbors")),
        "molecules": Potential(latent, LatentCharges(conserve="fragments")),
        "relaxing": Potential(latent, LatentCharges(conserve="fragments", relaxation=True)),
        "tapered": Potential(plain, tapered),
        "bare": Potential(plain),
    }
    committee = LastLayers(plain, torch.randn(4, 4))
    charged["committee"] = Potential(committee, PQEq(conserve="fragments", response="all"))
    latents = LastLayers(latent, torch.randn(4, 4))
    charged["latent-committee"] = Potential(latents, LatentCharges(conserve="fragments"))
    for name, potential in charged.items():
        save_potential(folder / f"stand-in-{name}.safetensors", potential, {"name": name})
    files: dict[str, dict[str, Any]] = {
        name: {"model": str(folder / f"stand-in-{name}.safetensors")} for name in charged
    }
    stand_in: dict[str, Any] = {"short_range": {"foundation": "ase:ase.calculators.emt:EMT"}}
    models: dict[str, dict[str, Any]] = {
        "trained, PQEq": files["pqeq"],
        "trained, PQEq, committee": files["committee"],
        "trained, latent, `total`": files["latent"],
        "trained, latent, `fragments`": files["molecules"],
        "trained, latent, `neighbors`": files["neighbors"],
        "trained, latent, `fragments`, relaxation": files["relaxing"],
        "trained, latent, `fragments`, committee": files["latent-committee"],
        "trained, no charges": files["bare"],
        "imported ReaxNet, tapered": files["tapered"],
        "pair potential, PQEq": {
            "short_range": {"pair": {"lennard_jones": _LENNARD_JONES}},
            "charges.conserve": "fragments",
            "charges.response": "all",
        },
        "pair potential, fixed charges": {
            "short_range": {"pair": {"lennard_jones": _LENNARD_JONES}},
            "charges.model": "fixed",
        },
        "foundation model, PQEq response": {**stand_in, "charges.conserve": "fragments", "charges.response": "all"},
        "foundation model alone": {**stand_in, "charges.model": "none"},
    }
    if importlib.util.find_spec("matgl") is not None:
        models[_NEEDS_MATGL] = {
            "short_range": {"foundation": f"qet:{_qet(folder / 'qet')}"},
            "charges.model": "linear-qeq",
        }
    return models


def _qet(folder: Path) -> Path:
    """A small QET as matgl saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that matgl imports
        from matgl.apps.pes import Potential as MatGLPotential
        from matgl.models import QET
    network = QET(element_types=("H", "O", "Au"), units=8, nblocks=1, max_n=3, max_l=2, cutoff=4.0, use_smooth=True)
    MatGLPotential(network, calc_charge=True).save(folder)
    return folder


def _tried(model: Mapping[str, Any], structure: Atoms, setting: Mapping[str, Any], without: Mapping[str, Any]) -> str:
    """Empty where it goes through and changes the energy or what is sent along, else the sentence."""
    try:
        result = _answer(model, structure, setting)
    except VoltPIError as error:
        return str(error)
    if not np.isfinite(result.forces).all():
        raise ArithmeticError(f"forces are not finite: {setting}")
    if without:
        other = _answer(model, structure, {**setting, **without})
        if abs(result.energy - other.energy) < 1e-9:
            raise ArithmeticError(f"{setting} is dropped by {model}: the energy does not know it")
    elif not result.extras.keys() & _SENT:
        raise ArithmeticError(f"{setting} is dropped by {model}: it is not sent along")
    return ""


def _answer(model: Mapping[str, Any], structure: Atoms, setting: Mapping[str, Any]) -> Result:
    keys = {**model, **setting}
    if "electrodes" in setting and "model" in model:
        keys["short_range.pair.lennard_jones"] = _LENNARD_JONES  # the walls of a model that knows no metal
    if "electrodes" in setting and model.get("charges.model") == "linear-qeq":  # whose hardness a network gives
        keys["electrodes"] = [{k: v for k, v in one.items() if k != "eta"} for one in setting["electrodes"]]
    total, fixed = setting.get("charges.net_charge", 0.0), model.get("charges.model") == "fixed"
    structure = _charged(structure, total, fixed)
    evaluator = Evaluator.from_settings(load_settings(overrides=keys), structure)
    return evaluator.evaluate(structure.cell.array.T[None] / BOHR, structure.positions[None] / BOHR)[0]


def honoured(folder: Path) -> dict[str, dict[str, str]]:
    """Model -> setting -> why it is refused, empty where it is honoured. ``folder`` takes the stand-ins."""
    out: dict[str, dict[str, str]] = {}
    for name, model in _models(folder).items():
        out[name] = {}
        for setting, (structure, keys, without) in SETTINGS.items():
            sentence = _tried(model, structure(), keys, without)
            file = Path(str(model.get("model", ""))).stem
            out[name][setting] = sentence.replace(f"model {file}.safetensors", "the model")
    return out


def page(table: Mapping[str, Mapping[str, str]]) -> str:
    """The table as Markdown, with the sentences below."""
    notes: dict[str, int] = {}
    lines = ["| setting | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    for setting in SETTINGS:
        cells = []
        for row in table.values():
            sentence = row[setting]
            cells.append("yes" if not sentence else f"no [{notes.setdefault(sentence, len(notes) + 1)}]")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    below = [f"{number}. {sentence}" for sentence, number in notes.items()]
    return "\n".join(
        [
            "# Which model honours which setting",
            "",
            "Made by `python -m voltpi.driver.honoured docs/models-and-settings.md`, which tries every",
            "combination; a test compares. *yes*: the energy answers, with exact derivatives. *no*: refused with",
            "the sentence below; nothing is silently dropped. Foundation models are all those of",
            "`short_range.foundation`; the column of QET is made where matgl is installed, else kept as it is.",
            "",
            *lines,
            "",
            "What is said:",
            "",
            *below,
            "",
        ]
    )


def read_page(text: str) -> dict[str, dict[str, str]]:
    """The table of a page that :func:`page` made."""
    said = dict(re.findall(r"^(\d+)\. (.*)$", text, flags=re.MULTILINE))
    head, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    columns = zip(head[1:], zip(*(row[1:] for row in rows), strict=True), strict=True)
    return {
        name: {
            row[0]: "" if cell == "yes" else said[cell.removeprefix("no [").removesuffix("]")]
            for row, cell in zip(rows, cells, strict=True)
        }
        for name, cells in columns
    }


def main() -> None:
    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        table = honoured(Path(folder))
    if _NEEDS_MATGL not in table and path.is_file():
        table[_NEEDS_MATGL] = read_page(path.read_text())[_NEEDS_MATGL]
    path.write_text(page(table))


if __name__ == "__main__":
    main()
