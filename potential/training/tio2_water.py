"""How the shipped model ``tio2-water`` was made; run it to make it again.

    python -m voltpi.potential.training.tio2_water settings tio2_water_optb88.xyz RUN_FOLDER
    voltpi train RUN_FOLDER/train.yaml
    python -m voltpi.potential.training.tio2_water card RUN_FOLDER

``tio2_water_optb88.xyz`` holds 346 frames of Zeng et al., Nat. Commun. 14, 6131 (2023), arXiv:2303.07433: CP2K, optB88
exchange with VWN and the non-local correlation of Dion et al., GTH pseudopotentials, DZVP, 350 Ry, SCF to 1e-4. Van der
Waals attraction is in these labels, so the model has no D3.

What the frames are, as found in the data:

- 236 bare slabs (66–213 atoms, 29 607 in all; anatase (001), (100), (101), (110), rutile (001), (011), (100), (101),
  (110); 8 to 24 Å of vacuum; up to ten TiO2 units are taken out), 37 cells with TiO2 and 64 water molecules (291–336
  atoms, 11 463; rutile (011) and anatase (100), up to four units taken out; ten of them with vacuum) and 73
  cells of 64 water molecules at 7.5 to 13.2 Å³/atom (14 016). All cells are orthogonal and periodic in three
  directions; no frame has a charge, a field or a stress.
- Water is whole in the liquid; 26 of the 37 interfaces have oxygens with one hydrogen nearer than 1.25 Å (1 to 20 of
  them), and seven have one or two with three.
- Every frame is (TiO2)n(H2O)m, so that reference energies of Ti, O and H are known for these two units only.
- Energies from those of the two units: −206 to +746 meV/atom for slabs (highest: anatase (110)),
  −61 to −24 at interfaces, −8 to +40 in water. No frame is there twice; the nearest two differ by 0.05 Å.
- Forces are 0.84, 0.73 and 0.90 eV/Å (RMS; slab, interface, water), at most 8.9. Those of a frame do not add up to
  zero: a component of the sum is 0.69, 0.73 and 0.53 eV/Å (RMS), up to 4.9 for anatase (110). If atoms err
  independently that is a noise of 0.07, 0.04 and 0.04 eV/Å, below which no model gets. They are trained on as they are.

Charges: PQEq with the published table, ``conserve: total`` (water dissociates, so that molecules are no fixed groups)
and ``response: shells``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write
from ase.neighborlist import neighbor_list
from ase.spacegroup import crystal

from voltpi.potential.checkpoints import load_potential, save_potential
from voltpi.potential.electrostatics.pqeq import PQEq, read_parameters
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.systems import Systems

ELEMENTS = ("H", "O", "Ti")
SETTINGS = """\
name: tio2-water
output: run
data: {train: [{file: tio2-water.xyz, name: tio2-water}], validation: 0.1}
network:
  {hidden_irreps: 32x0e+16x1o+8x2e, sh_irreps: 1x0e+1x1o+1x2e, layers: 2, r_max: 4.5, n_basis: 8, radial_layers: 1,
   radial_hidden: 32}
# shells of surface titanium reach 0.4 Å, which the usual limit of 0.25 Å would stiffen
charges: {model: pqeq, conserve: total, response: shells, shell_limit: 1.0}
loss: {energy: 500, forces: 10, kind: huber, huber_energy: 0.02, huber_forces: 1.0}
training: {epochs: null, hours: 0.95, batch_atoms: 200, learning_rate: 8.0e-3, ema_decay: 0.995, validate_every: 4}
"""
"""Settings of the training."""
BOND = 1.25
"""Å, the longest O–H that counts as bonded."""
BULK = {
    "rutile": ((0.3053, 0.3053, 0.0), 136, (4.594, 4.594, 2.959, 90, 90, 90)),
    "anatase": ((0.0, 0.0, 0.2081), 141, (3.785, 3.785, 9.514, 90, 90, 90)),
}
"""Place of O, space group and cell (Å, degrees) from experiment, on which the charges' answers are stated."""


def kind(atoms: Atoms) -> str:
    """``slab``, ``interface`` or ``water``, by composition.

    Raises InputError for anything else.
    """
    found = set(atoms.get_chemical_symbols())
    for name, elements in (("slab", {"O", "Ti"}), ("interface", set(ELEMENTS)), ("water", {"H", "O"})):
        if found == elements:
            return name
    raise InputError(f"a frame of {', '.join(sorted(found))} is no TiO2, water or both: give tio2_water_optb88.xyz")


def bulk(name: str) -> Atoms:
    """Conventional cell of rutile (6 atoms) or anatase (12)."""
    oxygen, group, cell = BULK[name]
    return crystal(["Ti", "O"], [(0, 0, 0), oxygen], spacegroup=group, cellpar=cell)


def charge_model() -> PQEq:
    """The electrostatics of the model."""
    table = read_parameters()
    return PQEq(
        parameters={element: table[element] for element in ELEMENTS},
        conserve="total",
        response="shells",
        shell_limit=1.0,
        accuracy=1e-6,
    )


def bulk_answers() -> dict[str, dict[str, float]]:
    """Charge and Born charges (e; mean of the diagonal) and ε∞ (along a and c) of the charges alone."""
    model = charge_model()
    out = {}
    for name in BULK:
        atoms = bulk(name)
        system = Systems.from_atoms(atoms)
        carried = model.solve(system).charges
        answer = model.solve(system.replace(carried=carried), born_charges=True, polarizability=True)
        assert answer.born_charges is not None
        assert answer.polarizability is not None
        epsilon = 1 + 4 * np.pi * np.diag(answer.polarizability[0].numpy()) / atoms.get_volume()
        numbers = {
            "charge_Ti": carried[0],
            "born_Ti": np.trace(answer.born_charges[0].numpy()) / 3,
            "born_O": np.trace(answer.born_charges[-1].numpy()) / 3,
            "epsilon_infinity_a": epsilon[0],
            "epsilon_infinity_c": epsilon[2],
        }
        out[name] = {key: round(float(value), 3) for key, value in numbers.items()}
    return out


def water_charge(frames: Sequence[Atoms]) -> dict[str, float]:
    """What PQEq moves from TiO2 to water: charge (e) of the molecules, over frames in which none is dissociated."""
    model = charge_model()
    charges = []
    for frame in frames:
        first, second = neighbor_list("ij", frame, {("O", "H"): BOND})
        bonds = np.bincount(first, minlength=len(frame))[frame.numbers == 8]
        if set(bonds) == {0, 2}:
            carried = model.solve(Systems.from_atoms(frame)).charges.numpy()
            charges.append(carried[np.unique(np.concatenate([first, second]))].sum())
    numbers = {"mean": np.mean(charges), "lowest": np.min(charges), "highest": np.max(charges)}
    return {"frames": len(charges), **{key: round(float(value), 2) for key, value in numbers.items()}}


def write_settings(data: Path, folder: Path) -> None:
    """``tio2-water.xyz``, the frames with their kind in ``config_type``, and ``train.yaml``."""
    frames = read(data, ":")
    for frame in frames:
        frame.info["config_type"] = kind(frame)
    write(folder / "tio2-water.xyz", frames, format="extxyz")
    (folder / "train.yaml").write_text(SETTINGS)


def write_card(folder: Path) -> None:
    """The trained model with its card, ``tio2-water.safetensors``."""
    source = folder / "run/tio2-water.safetensors"
    report = json.loads((folder / "run/report.json").read_text())
    frames = read(folder / "tio2-water.xyz", ":")
    card: dict[str, Any] = {
        "name": "tio2-water",
        "summary": "TiO2, its surfaces and interfaces with water that may dissociate: NequIP + PQEq",
        "licence": "MIT",
        "provenance": "346 frames of Zeng et al., Nat. Commun. 14, 6131 (2023), arXiv:2303.07433: CP2K, optB88-vdW, "
        "350 Ry. Their licence is not stated with them: as distributed by the authors of arXiv:2303.07433. None of "
        "them is in this file, only what was fitted to their energies and forces",
        "dispersion": "none: optB88-vdW's non-local correlation is in the labels, so that D3 would count it twice",
        "elements": report["elements"],
        "data": report["data"],
        "errors": report["errors"],
        "held_out": "10 % by hash, so that other frames of the same cells were trained on; the forces of a label's "
        "frame do not add up to zero, which alone is a noise of 0.07 (slab) and 0.04 eV/Å (water, interface)",
        "charges": "PQEq, published parameters, charge conserved in total, shells up to 1 Å",
        "charges_alone": {
            "units": "e; rutile and anatase at experimental lattice constants",
            **bulk_answers(),
            "whole_water_at_interfaces": water_charge([f for f in frames if f.info["config_type"] == "interface"]),
        },
        "reference_energies": report["reference_energies"],
        "references_in_the_model": report["references_in_the_model"],
        "training": report["training"],
        "versions": report["versions"],
        "not_for": "ions, charged defects and compositions other than (TiO2)n(H2O)m, whose energies mean nothing "
        "(reference energies of H, O and Ti are known for these units only); stress and NPT of the oxide (no stress "
        "was trained on, slabs are at one lattice constant); faces other than rutile (011) and anatase (100) "
        "with water on them; "
        "how ions of TiO2 follow a field: no label knows one, PQEq's Born charge of Ti is 0.74 e where density "
        "functional perturbation theory has more than 4 (Phys. Rev. B 49, 14730 (1994)), and its water takes charge "
        "from the oxide (charges_alone), which the field then pulls",
    }
    save_potential(folder / "tio2-water.safetensors", _with_short_table(load_potential(source)), card)


def _with_short_table(potential: Potential) -> Potential:
    """With the parameters of three elements; the training keeps the whole table."""
    potential.charges = charge_model()
    return potential


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the steps at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("settings", help="write the training data and settings")
    first.add_argument("data", type=Path)
    last = steps.add_parser("card", help="put the card into the trained model")
    for step in (first, last):
        step.add_argument("run", type=Path)
    options = parser.parse_args(arguments)
    options.run.mkdir(parents=True, exist_ok=True)
    if options.step == "settings":
        write_settings(options.data, options.run)
    else:
        write_card(options.run)


if __name__ == "__main__":
    main()
