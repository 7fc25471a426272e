"""Finds a pair potential that, with PQEq, holds a crystal near its volume; writes it as settings.

python fit_short_range.py OUT [--lipon FILE]

Not models of the materials: they keep the atoms together, so that the charges have a crystal to answer to. PQEq itself
hardly binds these crystals. Bonds get Lennard-Jones wells of a given depth at the distance they have in the crystal,
all other pairs a Born-Mayer wall of a given height at their shortest distance. One number is fitted, by which all
sigma are scaled: the trace of the stress, with PQEq's default settings, is zero.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from ase import Atoms
from ase.io import read
from ase.neighborlist import neighbor_list
from make_starts import crystals
from scipy.optimize import brentq

from voltpi.driver.ase import VoltPICalculator

RHO = 0.3  # Å, of every wall
REACH = 6.5  # Å, within which a pair of elements counts as present
FIRST_SHELL = 1.25  # bonds are shorter than so many times the shortest


class Recipe(NamedTuple):
    """Depth of the wells of the bonds, and height of the walls of other pairs, eV."""

    wells: dict[str, float]
    wall: float


RECIPES = {
    "nacl": Recipe({"Na-Cl": 0.5}, 0.02),
    "batio3": Recipe({"Ti-O": 1.0, "Ba-O": 0.3}, 0.02),
    "cspbi3": Recipe({"Pb-I": 1.0, "Cs-I": 0.2}, 0.02),
    "lipon": Recipe({"P-O": 2.0, "P-N": 2.0, "Li-O": 0.4, "Li-N": 0.4}, 0.08),
}


def pair_settings(atoms: Atoms, recipe: Recipe, scale: float) -> dict[str, Any]:
    """The tree under short_range.pair, with all sigma scaled by ``scale``."""
    i, j, d = neighbor_list("ijd", atoms, REACH)
    symbols = np.array(atoms.get_chemical_symbols())
    wells: dict[str, dict[str, float]] = {}
    walls: dict[str, dict[str, float]] = {}
    elements = list(dict.fromkeys(symbols))
    for k, a in enumerate(elements):
        for b in elements[k:]:
            name = f"{a}-{b}" if f"{a}-{b}" in recipe.wells else f"{b}-{a}"
            distances = d[(symbols[i] == a) & (symbols[j] == b)]
            shortest = distances.min()
            if name in recipe.wells:
                bond = distances[distances < FIRST_SHELL * shortest].mean()
                sigma = scale * bond / 2 ** (1 / 6)
                wells[name] = {"epsilon": recipe.wells[name], "sigma": round(float(sigma), 5)}
            else:
                walls[name] = {"A": float(f"{recipe.wall * np.exp(shortest / RHO):.4g}"), "rho": RHO}
    return {"lennard_jones": wells, "born_mayer": walls}


def stress(atoms: Atoms, settings: dict[str, Any]) -> np.ndarray:
    """xx, yy, zz in eV/Å³."""
    copy = atoms.copy()
    copy.calc = VoltPICalculator(settings)
    return copy.get_stress()[:3]


def fitted(atoms: Atoms, recipe: Recipe) -> dict[str, Any]:
    """The tree with the scale that takes the pressure away."""
    electric = stress(atoms, {})

    def trace(scale: float) -> float:
        pair = pair_settings(atoms, recipe, scale)
        short = stress(atoms, {"short_range": {"pair": pair}, "charges": {"model": "none"}})
        return float((short + electric).sum())

    return pair_settings(atoms, recipe, brentq(trace, 0.9, 1.1, xtol=1e-6))


def main() -> None:
    """Writes OUT/NAME.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lipon", type=Path, help="a structure file of Li2PO2N")
    options = parser.parse_args()
    structures = crystals()
    if options.lipon is not None:
        structures["lipon"] = read(options.lipon)
    for name, atoms in structures.items():
        pair = fitted(atoms, RECIPES[name])
        left = stress(atoms, {"short_range": {"pair": pair}})
        print(f"{name}: stress {np.round(left, 4)} eV/Å³")
        path = options.out / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"short_range": {"pair": pair}}, sort_keys=False)
        path.write_text(f"# Not a model of the material: see fit_short_range.py, which wrote this.\n{text}")


if __name__ == "__main__":
    main()
