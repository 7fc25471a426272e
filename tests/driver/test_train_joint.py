"""``charges.fit: joint``: parameters of the charges trained together with the network, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io import read, write
from test_cli import refused
from test_train import configured, log

from voltpi.driver.cli import main
from voltpi.driver.training_settings import load_training
from voltpi.potential.checkpoints import load_potential, read_card
from voltpi.potential.electrostatics.pqeq import PQEq, read_parameters
from voltpi.potential.systems import Systems

from training_toys import flexible_water

NETWORK = {"hidden_irreps": "4x0e+4x1o", "layers": 1, "r_max": 3.0, "n_basis": 4, "radial_hidden": 8}
JOINT = {"mode": "joint", "train": ["chi", "R"], "targets": {"dipole": 0.1}, "rate": 3}


def joint(folder: Path, **changes: Any) -> Path:
    """Settings and data of molecules and cells, with dipoles of the molecules."""
    for name, span in (("train.xyz", range(8)), ("validation.xyz", range(8, 12))):
        frames = [flexible_water(2, seed) for seed in span]
        for k, atoms in enumerate(frames):
            if k % 4:
                atoms.pbc = False
                del atoms.info["REF_stress"]
                atoms.info["dipole"] = (atoms.positions * np.where(atoms.numbers == 8, -0.8, 0.4)[:, None]).sum(0)
        write(folder / name, frames, format="extxyz")
    training = {"epochs": 3, "warmup_steps": 1, "ema_decay": 0.5, "threads": 1, "device": "cpu"}
    charges = {"conserve": "fragments", "response": "all", "fit": JOINT}
    return configured(
        folder, **{"network": NETWORK, "charges": charges, "training": training, "dispersion": {}, **changes}
    )


def test_the_model_has_the_table_and_the_errors_on_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = joint(tmp_path)
    assert main(["train", str(config)]) == 0
    said = capsys.readouterr().out
    assert "charges trained along: chi, R of H, O" in said
    assert "charges alone, dipole before: rmse" in said
    assert "→" in said
    folder = tmp_path / "water"
    rows = log(folder)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    potential = load_potential(folder / "water.safetensors", precision="double")
    assert isinstance(potential.charges, PQEq)
    after, before = potential.charges.parameters, read_parameters()
    assert abs(after["O"].chi - before["O"].chi) > 1e-3
    assert after["O"]._replace(chi=0.0, R=0.0) == before["O"]._replace(chi=0.0, R=0.0)
    assert after["Na"] == before["Na"]
    written = read_parameters(folder / "charges" / "charges.csv")
    assert pytest.approx(after["H"].R, rel=1e-7) == written["H"].R
    card = read_card(folder / "water.safetensors")
    assert card["summary"] == "NequIP + PQEq + D3 for H, O"
    assert card["charges_trained"]["before"]["O"] == before["O"]._asdict()
    assert card["charges_trained"]["after"]["O"] == after["O"]._asdict()
    assert card["charges_alone"]["dipole"]["rmse"] < card["charges_alone"]["before"]["dipole"]["rmse"]
    energy, force = [], []
    for atoms in read(tmp_path / "validation.xyz", ":"):
        answer = potential(potential.prepare(Systems.from_atoms(atoms)))
        energy.append((float(answer.energy) - atoms.info["REF_energy"]) / len(atoms))
        force.append(answer.forces.numpy() - atoms.arrays["REF_forces"])
    errors = card["errors"]["data"]
    assert 1000 * np.sqrt(np.mean(np.square(energy))) == pytest.approx(errors["energy_rmse"], rel=1e-3)
    assert np.sqrt(np.mean(np.square(np.concatenate(force)))) == pytest.approx(errors["force_rmse"], rel=1e-4)
    assert errors["force_rmse"] == pytest.approx(
        float(rows[card["training"]["best_epoch"]]["data_force_rmse"]), rel=1e-4
    )
    # more epochs go on from the table, and another choice of parameters is another run
    assert main(["train", str(config), "--quiet", "--set", "training.epochs=4"]) == 0
    assert log(folder)[:3] == rows
    sentence = refused(capsys, "train", str(config), "--quiet", "--set", "charges.fit.train=[chi]")
    assert "begun with other charges.fit" in sentence


def test_settings_of_joint_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = joint(tmp_path)
    short = load_training(config, ["charges.fit=joint"]).charges.fit
    assert short is not None
    assert (short.mode, short.weights(), short.rate) == ("joint", {}, 1.0)
    given = load_training(config).charges.fit
    assert given is not None
    assert given.weights() == {"dipole": 0.1}
    assert "needs the network" in refused(capsys, "fit-charges", str(config))
    for overrides, words in (
        (["charges.fit.steps=3"], "steps belongs to mode: before"),
        (["charges.fit={rate: 2}"], "rate belongs to mode: joint"),
        (["charges.fit.rate=0"], "charges.fit.rate"),
        (["charges.fit.targets={born_charges: 1}"], "no frame has such a label"),
        (["training.committee=4", "training.committee_kind=seeds"], "use last-layers"),
        (["charges.model=latent"], "charges.fit is for pqeq and qeq, not latent"),
    ):
        options = [part for override in overrides for part in ("--set", override)]
        assert words in refused(capsys, "train", str(config), "--quiet", *options)


def test_a_slab_is_refused_by_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = joint(tmp_path)
    frames = read(tmp_path / "train.xyz", ":")
    frames[5].pbc = (True, True, False)
    write(tmp_path / "train.xyz", frames, format="extxyz")
    assert "train.xyz, frame 5: charges are fitted to clusters" in refused(capsys, "train", str(config), "--quiet")
