"""Compact copy of the constant-potential reference cases; ``make_constant_potential.py FOLDER`` writes the JSON.

FOLDER holds one JSON per case and boundary: geometry, potentials, answers of LAMMPS, OpenMM and a brute-force sum.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ENERGIES = ("U_coul_eV", "minus_QV_eV", "field_energy_eV", "omega_eV")
SOURCE = (
    "Brute-force dense solution in float64 (2D Ewald, 3D Ewald with the slab term, 3D Ewald with a uniform field), "
    "checked against LAMMPS 22Jul2025 (ELECTRODE, Ewald and PPPM) and OpenMM 8.6.1 (ConstantPotentialForce, ffield "
    "alone), whose total charge (e) and grand potential (eV) stand under engines"
)


def rounded(value: Any) -> Any:
    """Numbers to 12 digits after the point."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 12) + 0.0


def main(folder: Path) -> None:
    geometries: dict[str, Any] = {}
    cases: dict[str, Any] = {}
    for path in sorted(folder.glob("case*.json")):
        case = json.loads(path.read_text())
        given = {
            "cell": case["cell_A"],
            "positions": case["positions_A"],
            "role": "".join(case["role"]),
            "fixed_charges": [q for q, r in zip(case["charges_fixed_e"], case["role"], strict=True) if r == "E"],
        }
        geometry = next((name for name, known in geometries.items() if known == given), f"{len(given['role'])} atoms")
        geometries[geometry] = given
        oracle = case["results"]["oracle"]
        screening = case["thomas_fermi"] or {"length_A": 0.0, "voronoi_A3": None}
        cases[case["name"]] = {
            "geometry": geometry,
            "boundary": case["boundary"]["method"],
            "eta": case["eta_1_per_A"],
            "coulomb_constant": case["coulomb_constant_eV_A_per_e2"],
            "thomas_fermi": screening["length_A"],
            "atom_volume": screening["voronoi_A3"],
            "potentials": [case["potentials_V"]["A"] + 0.0, case["potentials_V"]["B"] + 0.0],
            "electrode_charges": rounded(
                [q for q, r in zip(oracle["charges_e"], case["role"], strict=True) if r != "E"]
            ),
            "forces": rounded(oracle["forces_eV_A"]),
            **{k: rounded(oracle[k]) for k in ENERGIES},
            "engines": {
                name: {k: rounded(answer[k]) for k in ("Q_B_e", "omega_eV")}
                for name, answer in case["results"].items()
                if name != "oracle"
            },
        }
    out = {"source": SOURCE, "units": "Å, e, V, eV, eV/Å", "geometries": geometries, "cases": cases}
    Path(__file__).with_name("constant_potential.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
