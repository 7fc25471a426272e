"""Polarizabilities, Born charges and field energies of molecules: PQEq with the published parameters beside PBE.

    python tests/benchmarks/polarizability.py [--limiter fene|none] [--shell-limit 0.25]

Prints the tables of ``docs/polarizabilities.md`` as markdown. The PBE numbers, with their level and geometries, are in
``tests/potential/data/dft_polarizabilities.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray

from voltpi.potential.electrostatics.pqeq import PQEq, PQEqSolution
from voltpi.potential.model import Potential
from voltpi.potential.systems import Systems

DATA = Path(__file__).parents[1] / "potential" / "data" / "dft_polarizabilities.json"
BOHR = 0.529177210903
RESPONSES = ("shells", "all")
METALS = {"Li", "Na"}
"""Molecules with these are averaged apart: their springs are those of another oxidation state (the page says more)."""

Array = NDArray[np.float64]


def reference() -> dict[str, Any]:
    """The PBE numbers: molecules, water_in_a_field and water_dimer (units inside)."""
    data: dict[str, Any] = json.loads(DATA.read_text())
    return data


def molecule(entry: dict[str, Any]) -> Atoms:
    """A structure without a cell from an entry of the reference."""
    return Atoms(entry["symbols"], entry["positions"])


def solve(
    model: PQEq,
    atoms: Atoms,
    field: Sequence[float] = (0.0, 0.0, 0.0),
    *,
    carried: torch.Tensor | None = None,
    derivatives: bool = False,
) -> PQEqSolution:
    """PQEq's answer in a ``field`` (V/Å); ``carried`` [n] (e): those of zero field in this geometry where not given."""
    systems = Potential(charges=model).prepare(Systems.from_atoms(atoms, field=field).replace(carried=carried))
    return model.solve(systems, born_charges=derivatives, polarizability=derivatives)


def isotropic(tensor: Array) -> float:
    """A third of the trace."""
    return float(np.trace(tensor)) / 3


def anisotropy(tensor: Array) -> float:
    """√(½ Σ (α_a − α_b)²) over the three pairs of principal values, the quantity of light scattering."""
    a, b, c = np.linalg.eigvalsh(tensor)
    return float(np.sqrt(0.5 * ((a - b) ** 2 + (b - c) ** 2 + (c - a) ** 2)))


def polarizabilities(response: str, **keywords: Any) -> dict[str, Array]:
    """molecule -> PQEq's polarizability [3, 3] (Å³) at zero field; ``keywords`` go to PQEq."""
    model = PQEq(response=response, tolerance=1e-10, **keywords)
    out = {}
    for name, entry in reference()["molecules"].items():
        alpha = solve(model, molecule(entry), derivatives=True).polarizability
        assert alpha is not None
        out[name] = alpha[0].numpy()
    return out


def without_metals() -> list[str]:
    """Names of the molecules of H, C, N, O, F, P, S and Cl alone."""
    return [name for name, entry in reference()["molecules"].items() if not METALS & set(entry["symbols"])]


def mean_absolute_error(found: dict[str, Array], names: Sequence[str], *, basis: str = "best") -> float:
    """Of the isotropic polarizability, a.u. (bohr³), over ``names``; ``basis``: best, or aug-cc-pVDZ for all."""
    molecules = reference()["molecules"]
    errors = []
    for name in names:
        entry = molecules[name]
        small = basis == "aug-cc-pVDZ"
        expected = entry["isotropic_augccpvdz"] if small else isotropic(np.array(entry["polarizability"]))
        errors.append(abs(isotropic(found[name]) - expected))
    return float(np.mean(errors)) / BOHR**3


def row(*cells: object) -> None:
    """One line of a markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def head(*cells: str) -> None:
    """First line of a markdown table and the rule under it."""
    print()
    row(*cells)
    row(*["---"] * len(cells))


def print_polarizabilities(keywords: dict[str, Any]) -> None:
    """Molecule by molecule, and mean absolute errors."""
    molecules = reference()["molecules"]
    found = {response: polarizabilities(response, **keywords) for response in RESPONSES}
    names = ("PBE", "`shells`", "`all`")
    head("molecule", "basis", *[f"α {n}" for n in names], "error", "error", *[f"Δα {n}" for n in names])
    for name, entry in molecules.items():
        tensors = [np.array(entry["polarizability"]), *(found[response][name] for response in RESPONSES)]
        iso = [isotropic(t) for t in tensors]
        errors = [f"{value - iso[0]:+.2f}" for value in iso[1:]]
        spread = [f"{anisotropy(t):.2f}" for t in tensors]
        row(name, entry["basis"], *[f"{value:.2f}" for value in iso], *errors, *spread)

    light = without_metals()
    heavy = [name for name in molecules if name not in light]
    head("mean absolute error of α, a.u.", "`shells`", "`all`", "`shells`, no limiter", "`all`, no limiter")
    free = {response: polarizabilities(response, limiter="none") for response in RESPONSES}
    for text, names_in, basis in (
        (f"{len(light)} molecules without a metal", light, "best"),
        ("the same, PBE in aug-cc-pVDZ", light, "aug-cc-pVDZ"),
        (", ".join(heavy), heavy, "best"),
        (f"all {len(molecules)}", list(molecules), "best"),
    ):
        errors_in = [
            f"{mean_absolute_error(f[response], names_in, basis=basis):.2f}"
            for f in (found, free)
            for response in RESPONSES
        ]
        row(text, *errors_in)


def print_born_charges(keywords: dict[str, Any]) -> None:
    """Water's Born charges, O and the first H."""
    water = reference()["water_in_a_field"]
    answers = [solve(PQEq(response=response, **keywords), molecule(water), derivatives=True) for response in RESPONSES]
    born = [np.array(water["born_charges"])]
    for answer in answers:
        assert answer.born_charges is not None
        born.append(answer.born_charges.numpy())
    head("Born charge of water, e", "PBE", "`shells`", "`all`")
    for atom, element in ((0, "O"), (1, "H")):
        for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (2, 1)):
            if atom == 0 and a != b:
                continue  # zero by symmetry
            label = f"{element}, dipole {'xyz'[a]}, displacement {'xyz'[b]}"
            row(label, *[f"{z[atom, a, b]:.3f}" for z in born])
    row("dipole z, e Å", f"{water['dipole'][2]:.3f}", *[f"{answer.dipole[0, 2]:.3f}" for answer in answers])
    row("charge of O, e", "-", *[f"{answer.charges[0]:.3f}" for answer in answers])


def print_field_energies(keywords: dict[str, Any]) -> None:
    """½ [E(ε) + E(−ε)] − E(0) of water: what polarization gives, without the permanent dipole."""
    water = reference()["water_in_a_field"]
    models = [PQEq(response=response, **keywords) for response in RESPONSES]
    atoms = molecule(water)
    zero = [float(solve(model, atoms).energy) for model in models]
    head("field, V/Å", "PBE, eV", "`shells`", "`all`")
    for axis, strength in (("x", 0.1), ("x", 0.3), ("x", 0.5), ("y", 0.5), ("z", 0.5)):
        energies = dict(water["energies"][axis])
        unit = np.eye(3)["xyz".index(axis)]
        cells = [0.5 * (energies[strength] + energies[-strength])]
        for model, start in zip(models, zero, strict=True):
            both = [float(solve(model, atoms, sign * strength * unit).energy) for sign in (1, -1)]
            cells.append(0.5 * sum(both) - start)
        row(f"{strength} along {axis}", *[f"{value:.5f}" for value in cells])


def print_dimer(keywords: dict[str, Any]) -> None:
    """Two waters, 0.25 V/Å along O–O: charge of the donor, and the change of the dipole along the field."""
    dimer = reference()["water_dimer"]
    donor = dimer["donor"]
    kinds = [(c, r) for c in ("fragments", "total") for r in RESPONSES]
    head("two waters", "PBE (Hirshfeld / IAO)", *[f"`{c}`, `{r}`" for c, r in kinds])
    for distance, entry in dimer["separations"].items():
        atoms, results = molecule(entry), {tuple(r["field"]): r for r in entry["results"]}
        off, on, back = (results[(x, 0, 0)] for x in (0.0, 0.25, -0.25))
        answers = {}
        for c, r in kinds:
            model = PQEq(conserve=c, response=r, **keywords)
            answers[c, r] = [solve(model, atoms, (x, 0.0, 0.0)) for x in (0.0, 0.25, -0.25)]
        for text, index, pbe in (("0", 0, off), ("0.25 V/Å", 1, on)):
            charges = [f"{round(float(answers[k][index].charges[donor].sum()), 4) + 0.0:+.4f}" for k in kinds]
            q = pbe["donor_charge"]
            row(
                f"{distance} Å, charge of the donor, field {text}", f"{q['hirshfeld']:+.4f} / {q['iao']:+.4f}", *charges
            )
        change = [f"{0.5 * float(answers[k][1].dipole[0, 0] - answers[k][2].dipole[0, 0]):.4f}" for k in kinds]
        expected = 0.5 * (on["dipole"][0] - back["dipole"][0])
        row(f"{distance} Å, dipole that 0.25 V/Å induces, e Å", f"{expected:.4f}", *change)


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limiter", choices=("fene", "none"), default=PQEq.limiter)
    parser.add_argument("--shell-limit", type=float, default=PQEq.shell_limit)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keywords = {"limiter": options.limiter, "shell_limit": options.shell_limit}
    limited = f" {options.shell_limit:g} Å" if options.limiter == "fene" else ""
    print(f"limiter: {options.limiter}{limited}; α and Δα in Å³")
    print_polarizabilities(keywords)
    print_born_charges(keywords)
    print_field_energies(keywords)
    print_dimer(keywords)


if __name__ == "__main__":
    main()
