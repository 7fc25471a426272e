"""Born charges of models against labels: R² and errors, over all entries and on the diagonal.

    python born_charges.py DATA MODEL... [--key bec] [--transposed]

DATA is extended XYZ with 9 Born charges an atom (e): ∂M_a/∂r_b, a the row, or with ``--transposed`` the column (those
of SPICE as distributed with LES are: Σ_i Z*_i (ω × r_i) = ω × M holds to 0.1 % that way). MODEL is a model file, or
``pqeq`` for PQEq with published parameters and no network. Frames with elements that a model does not know are left
out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase.io import read

from voltpi.potential.checkpoints import load_potential
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.systems import Systems


def r2(ours: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """1 − Σ(error²)/Σ(label − mean)², squared correlation, RMSE."""
    rest = np.square(ours - labels).sum() / np.square(labels - labels.mean()).sum()
    return 1 - rest, np.corrcoef(ours, labels)[0, 1] ** 2, np.sqrt(np.mean(np.square(ours - labels)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--key", default="bec")
    parser.add_argument("--transposed", action="store_true", help="labels are [displacement, dipole]")
    options = parser.parse_args()
    frames = read(options.data, ":")
    head = "all: R²  corr²  RMSE (e) | diagonal: R²  corr²  RMSE"
    print(f"{'model':24} {'frames':>6} {'atoms':>6} | {head}")
    for name in options.models:
        if name == "pqeq":
            potential = Potential(charges=PQEq(response="all"))
        else:
            potential = load_potential(name, precision="double")
        ours, labels = [], []
        used = 0
        for atoms in frames:
            try:
                systems = potential.prepare(Systems.from_atoms(atoms))
                answer = potential(systems, born_charges=True)
            except InputError as error:
                if "know" not in str(error):
                    raise
                continue
            assert answer.born_charges is not None
            used += 1
            ours.append(answer.born_charges.numpy())
            label = atoms.arrays[options.key].reshape(-1, 3, 3)
            labels.append(label.transpose(0, 2, 1) if options.transposed else label)
        ours, labels = np.concatenate(ours), np.concatenate(labels)
        whole = r2(ours.reshape(-1), labels.reshape(-1))
        diagonal = r2(*(np.einsum("naa->na", x).reshape(-1) for x in (ours, labels)))
        shown = " | ".join("{:.3f}  {:.3f}  {:.3f}".format(*x) for x in (whole, diagonal))
        print(f"{Path(name).stem:24} {used:6} {len(ours):6} | {shown}")


if __name__ == "__main__":
    main()
