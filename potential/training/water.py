"""How the shipped model ``water`` was made; run it to make it again.

    python -m voltpi.potential.training.water DATA_FOLDER RUN_FOLDER [--hours 1.5] [--device cuda]

The shipped one was trained first with fewer channels (``--hidden-irreps 32x0e+16x1o+8x2e --basis 8``) and without
repulsion, then widened and trained further (``--start MODEL --rate 2.5e-3``,
:mod:`voltpi.potential.training.widening`), then with the repulsion (from 1.6e-3). ``--charges none`` and
``--charges qeq`` train the same network without PQEq and with charge equilibration without shells, for comparison.

DATA_FOLDER holds ``efield_water_train.xyz``, ``efield_water_validation.xyz`` (FIREANN's water under fields: Zhang &
Jiang, Nat. Commun. 14, 6424 (2023)) and ``water_rpbe_d3.xyz`` (liquid water, RPBE-D3, as distributed with LES). A run
that was stopped (Ctrl-C) continues when the command is given again.

What the labels mean, as found in the data:

- Forces are those under the field, with E containing −M·ε: the atoms lie in planes normal to x, so by symmetry the
  force along x is Z*_xx ε, and it is −0.74 ε on oxygen, +0.37 ε on hydrogen.
- ``REF_dipole`` has the opposite sign of M, and is known modulo cell quanta: −REF_dipole is 0.41–0.44 e times the sum
  of the O–H vectors (circular correlation 0.98), and its x component is −0.97 REF_polarizability_xx ε.
- All 177 frames are 64 molecules in four planes of which two are the other two again: 96 atoms are the primitive cell.
  No frame has a molecule out of plane, so they alone cannot teach a liquid; the RPBE-D3 frames add that.

Division of labour: D3 (PBE, zero damping) carries dispersion. PQEq with whole molecules neutral (``conserve:
fragments``) and charges and shells both feeling the field (``response: all``) carries everything that depends on the
field; its parameters for O and H are refitted by ``fit_charges`` to polarizabilities, dipoles and the field's part of
the forces. The network learns the rest, which no longer knows the field.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from rich.console import Console
from torch import Tensor

from voltpi.potential.checkpoints import load_potential, save_potential
from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, ElementParameters, PQEq, PQEqSolution
from voltpi.potential.fragments import assign_fragments, whole_positions
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.shortrange.pair import nuclear_repulsion
from voltpi.potential.systems import Systems
from voltpi.potential.training.baseline import LongRange, load_dataset, subtract_baseline
from voltpi.potential.training.charge_fit import TRAINABLE, ChargeFit, Target
from voltpi.potential.training.config import TrainConfig
from voltpi.potential.training.dataset import Sample, read_frames
from voltpi.potential.training.labels import Source
from voltpi.potential.training.loss import Loss
from voltpi.potential.training.references import reference_energies, subtract_references, summarize
from voltpi.potential.training.splitting import split
from voltpi.potential.training.trainer import Trainer
from voltpi.potential.training.widening import widen

NETWORK: dict[str, Any] = {
    "hidden_irreps": "48x0e+24x1o+12x2e",
    "sh_irreps": "1x0e+1x1o+1x2e",
    "layers": 3,
    "r_max": 4.5,
    "n_basis": 12,
    "repulsion": {"H-H": 1.2},
}
FITTED = {
    "H": ElementParameters(4.72484, 46.946, 1.0, 0.49957, 1338.1),
    "O": ElementParameters(23.954, 14.440, 1.0, 0.27665, 332.95),
}
"""What the shipped model uses (only χ_O − χ_H matters for neutral molecules).

From ``fit_charges`` on every 16th training frame with ``limiter: none`` and a slightly different prior; a repeat ends
at other values of the same quality, since η, R and K make up for one another.
"""
FITTED_QEQ = {
    "H": ElementParameters(4.98094, 9.46984, 0.0, 1.38083, 2037.2),
    "O": ElementParameters(16.4687, 24.525, 0.0, 0.302437, 414.045),
}
"""Charge equilibration for comparison, from ``fit_charges`` without shells: two training frames, 25 steps."""
START = {
    "H": ElementParameters(4.72484, 20.0, 1.0, 0.371, 2037.2),
    "O": ElementParameters(16.72484, 20.0, 1.0, 0.669, 414.045),
}
"""Where a fit starts: the published R and K, and stiff charges."""
MEAN_CHARGE = 0.4275
"""e per O–H vector, the estimate of M that picks the branch of a dipole label."""
EXTENSIVE = ("REF_dipole", "REF_polarizability")


def charge_model(parameters: dict[str, ElementParameters] | None = None) -> PQEq:
    """The electrostatics of the model."""
    # A limit of 1 Å: shells reach 0.1 Å here, where a limit of 0.25 Å would stiffen them by a fifth and cost a sixth of
    # the polarizability; 1 Å costs 1%.
    return PQEq(parameters=parameters or FITTED, conserve="fragments", response="all", shell_limit=1.0, accuracy=1e-6)


def _field_source(path: Path) -> Source:
    return Source(path, "efield-water", field_key="electric_field", reduce=True, extensive=EXTENSIVE)


def _bond_sum(system: Systems) -> Tensor:
    """Σ of O–H vectors, [3] Å."""
    hydrogen = system.numbers == 1
    assert system.parents is not None
    whole = whole_positions(system)
    return (whole - whole[system.parents])[hydrogen].sum(0)


def _labelled_dipole(atoms: Atoms, system: Systems) -> np.ndarray:
    """M of a frame on the branch nearest to the estimate, e·Å (the label carries the opposite sign)."""
    label = -np.asarray(atoms.info["REF_dipole"], dtype=float)
    # The label of the whole (cubic) cell is known modulo its edge; that of one of its n repetitions modulo edge/n.
    lengths = atoms.cell.lengths()
    quanta = lengths.max() / np.round(lengths.max() / lengths.min())
    estimate = MEAN_CHARGE * _bond_sum(system).numpy()
    return label + quanta * np.round((estimate - label) / quanta)


def _solve(model: PQEq, atoms: Atoms) -> tuple[Systems, PQEqSolution]:
    system = assign_fragments(Systems.from_atoms(atoms, field=atoms.info["electric_field"]))
    return system, model.solve(system, born_charges=True, polarizability=True)


def fit_charges(
    frames: Sequence[Atoms], console: Console, *, shells: bool = True, steps: int = 60
) -> dict[str, ElementParameters]:
    """χ, η, R, K of O and H from polarizability (diagonal), dipole (in plane) and Z*_xx = F_x/ε of reduced frames.

    Without ``shells`` of χ, η and R alone (charge equilibration).
    """
    unknown = float("nan")
    targets = []
    for atoms in frames:
        system = assign_fragments(Systems.from_atoms(atoms, field=atoms.info["electric_field"]))
        born = np.full((len(atoms), 3, 3), unknown)
        born[:, 0, 0] = atoms.arrays["REF_forces"][:, 0] / atoms.info["electric_field"][0]
        alpha = np.full((3, 3), unknown)
        np.fill_diagonal(alpha, np.diag(atoms.info["REF_polarizability"]) * COULOMB_CONSTANT)
        dipole = _labelled_dipole(atoms, system)
        dipole[0] = unknown
        labels = {"born_charges": born, "polarizability": alpha, "dipole": dipole}
        targets.append(Target(system, {k: torch.from_numpy(v) for k, v in labels.items()}, system.cell[0]))
    model = charge_model(START if shells else without_shells(START))
    trained = TRAINABLE if shells else [name for name in TRAINABLE if name != "K"]
    fit = ChargeFit(model, targets, dict.fromkeys(labels, 1.0), trained=trained, prior=1e-5)

    def report(step: int, loss: float, errors: Mapping[str, float]) -> None:
        console.print(f"charges, step {step}: loss {loss:.5f}, relative errors {dict(errors)}")

    return fit.fit(steps=steps, report=report).table


def without_shells(parameters: Mapping[str, ElementParameters]) -> dict[str, ElementParameters]:
    """The same for charge equilibration."""
    return {symbol: row._replace(Z=0.0) for symbol, row in parameters.items()}


def charge_errors(model: PQEq, frames: Sequence[Atoms]) -> dict[str, float]:
    """Errors of polarizability, dipole and the field's force against the labels, from PQEq alone."""
    alpha, reference, dipole, dipole_labels, force, induced = [], [], [], [], [], []
    for atoms in frames:
        system, answer = _solve(model, atoms)
        assert answer.born_charges is not None
        assert answer.polarizability is not None
        field = float(atoms.info["electric_field"][0])
        alpha.append(answer.polarizability[0].numpy())
        reference.append(np.asarray(atoms.info["REF_polarizability"]) * COULOMB_CONSTANT)
        label = _labelled_dipole(atoms, system)
        dipole.append((answer.dipole[0].numpy() - label)[1:])
        dipole_labels.append(label[1:])
        force.append(answer.born_charges[:, 0, 0].numpy() * field - atoms.arrays["REF_forces"][:, 0])
        induced.append((answer.dipole[0, 0].item(), -float(atoms.info["REF_dipole"][0])))
    ours, labels = np.array(induced).T
    return {
        "polarizability_relative_error": float(np.linalg.norm(np.array(alpha) - reference) / np.linalg.norm(reference)),
        "polarizability_isotropic_A3_per_molecule": float(np.trace(np.mean(alpha, 0)) / 3 / (len(frames[0]) / 3)),
        "polarizability_isotropic_A3_per_molecule_dft": float(
            np.trace(np.mean(reference, 0)) / 3 / (len(frames[0]) / 3)
        ),
        "dipole_rmse_eA": float(np.sqrt(np.mean(np.square(dipole)))),
        "dipole_rms_eA_dft": float(np.sqrt(np.mean(np.square(dipole_labels)))),
        "dipole_change_relative_error": float(np.linalg.norm(ours - labels) / np.linalg.norm(labels)),
        "field_force_rmse_eV_per_A": float(np.sqrt(np.mean(np.square(np.concatenate(force))))),
    }


def _data(folder: Path, cache: Path, baseline: LongRange) -> tuple[list[Sample], list[Sample]]:
    common: dict[str, Any] = {"baseline": baseline, "baseline_key": baseline.key, "cache": cache}
    r_max = NETWORK["r_max"]

    def in_fields(name: str) -> list[Sample]:
        source = _field_source(folder / name)
        if baseline.potential.charges is not None:
            return load_dataset(source, r_max, **common)
        # nothing feels the field: what it does to the labels stays in them
        samples = (replace(s, systems=s.systems.replace(field=torch.zeros(1, 3))) for s in load_dataset(source, r_max))
        return subtract_baseline(list(samples), baseline, baseline.key, cache=cache)

    train, validation = in_fields("efield_water_train.xyz"), in_fields("efield_water_validation.xyz")
    liquid = Source(folder / "water_rpbe_d3.xyz", "rpbe-water", energy_key="energy", forces_key="forces")
    liquid_train, liquid_validation = split(load_dataset(liquid, r_max, **common), 0.1)
    return train + liquid_train, validation + liquid_validation


def _card(
    data: tuple[list[Sample], list[Sample]],
    references: dict[str, dict[int, float]],
    metrics: dict[str, float],
    charges: dict[str, float],
    note: str,
) -> dict[str, Any]:
    train, validation = (Counter(s.dataset for s in samples) for samples in data)
    return {
        "name": "water",
        "summary": "Liquid water under uniform fields, 300 K: NequIP + PQEq (whole molecules, refitted O and H) + D3",
        "licence": "MIT",
        "data": f"FIREANN water in fields ({train['efield-water']} frames, 4 planes of 16 molecules, fields along x to "
        f"0.6 V/Å; Nat. Commun. 14, 6424 (2023), MIT) and RPBE-D3 liquid water ({train['rpbe-water']} frames, 64 "
        "molecules)",
        "validation": f"FIREANN's {validation['efield-water']} validation frames (FIREANN's own force RMSE there: "
        f"0.115 eV/Å); {validation['rpbe-water']} RPBE-D3 frames",
        "errors": {"units": "forces eV/Å, energies meV/atom", **metrics},
        "errors_of_charges_alone": charges,
        "reference_energies": {k: {str(z): e for z, e in v.items()} for k, v in references.items()},
        "training": note,
        "not_for": "dissociation, ions, interfaces, densities far from 1 g/cm³, hydrogens of two molecules closer than "
        "0.4 Å; out of plane it knows RPBE-D3 only, and fields only through PQEq",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write RUN_FOLDER/water.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--hours", type=float, default=1.55)
    parser.add_argument("--epochs", type=int, help="end after so many, whatever the time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate to begin with")
    parser.add_argument("--hidden-irreps", default=NETWORK["hidden_irreps"])
    parser.add_argument("--basis", type=int, default=NETWORK["n_basis"])
    parser.add_argument("--start", help="a model whose network is widened and trained further")
    parser.add_argument("--charges", choices=("pqeq", "qeq", "none"), default="pqeq")
    parser.add_argument("--fit-charges", action="store_true", help="refit the charges first")
    parser.add_argument("--export-only", action="store_true", help="write the model from the best weights so far")
    parser.add_argument(
        "--note", default="made by potential/training/water.py", help="how it was trained, for the card"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    charges = _charges(options, console)
    baseline = LongRange(charges, D3("pbe", "zero"))
    train, validation = _data(options.data, options.run / "cache", baseline)
    references = reference_energies(train)
    train, validation = subtract_references(train, references), subtract_references(validation, references)
    network = _network(options, train)
    config = TrainConfig(
        epochs=options.epochs,
        max_seconds=None if options.epochs else 3600 * options.hours,
        batch_size=1,
        loss=Loss(energy=1000.0, forces=10.0, huber_energy=0.02, huber_forces=1.0),
        learning_rate=options.rate,
        ema_decay=0.9995,
        validate_every=4,
        seed=options.seed,
        device=options.device,
        threads=options.threads,
    )
    trainer = Trainer(network, train, validation, config, options.run)
    if not options.export_only:
        trainer.fit(resume=True)
    trainer.load_best()
    metrics = trainer.validate()
    labelled = read_frames(_field_source(options.data / "efield_water_validation.xyz"))
    alone = {} if charges is None else charge_errors(charges, labelled)
    card = _card((train, validation), references, metrics, alone, options.note)
    potential = Potential(network, charges, D3("pbe", "zero"), reference_energies=references["efield-water"])
    save_potential(options.run / "water.safetensors", potential, card)
    console.print_json(json.dumps(card))


def _charges(options: argparse.Namespace, console: Console) -> PQEq | None:
    if options.charges == "none":
        return None
    parameters = FITTED if options.charges == "pqeq" else FITTED_QEQ
    if options.fit_charges:
        frames = read_frames(_field_source(options.data / "efield_water_train.xyz"))
        parameters = fit_charges(frames[3::16], console, shells=options.charges == "pqeq")
    return charge_model(parameters)


def _network(options: argparse.Namespace, train: Sequence[Sample]) -> NequIP:
    torch.manual_seed(options.seed)
    if options.start is not None:
        start = load_potential(options.start).short_range
        assert isinstance(start, NequIP)
        walled = NequIP(**{**start.config, "repulsion": NETWORK["repulsion"]})
        walled.load_state_dict(start.state_dict())
        return widen(walled, options.hidden_irreps, options.basis)
    summary = summarize(train, nuclear_repulsion(NETWORK["repulsion"], NETWORK["r_max"]))
    settings = {**NETWORK, "hidden_irreps": options.hidden_irreps, "n_basis": options.basis}
    return NequIP([1, 8], **settings, n_neighbors=summary.average_neighbors, scale=summary.force_rms)


if __name__ == "__main__":
    main()
