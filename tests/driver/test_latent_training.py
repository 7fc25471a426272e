"""Latent charges from the command line: trained, fine-tuned, run in fields, and what has no meaning with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from test_cli import SOCKET, XML, refused
from test_train import configured, log

from voltpi.driver.cli import main
from voltpi.driver.evaluator import Evaluator
from voltpi.driver.settings import load_settings
from voltpi.potential.checkpoints import load_potential, read_card
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

from training_toys import flexible_water

LATENT = {"charges": {"model": "latent", "conserve": "fragments", "sigma": 1.2, "epsilon_infinity": 1.5}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training with latent charges; the folder of its settings file."""
    folder = tmp_path_factory.mktemp("latent")
    changes = {**LATENT, "dispersion": {"functional": "pbe"}, "coulomb": {"accuracy": 1e-7}}
    assert main(["train", str(configured(folder, **changes)), "--quiet"]) == 0
    return folder


def model_of(folder: Path) -> str:
    return str(folder / "water" / "water.safetensors")


def test_the_trained_file_gives_the_errors_on_its_card(trained: Path) -> None:
    rows = log(trained / "water")
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    card = read_card(model_of(trained))
    assert card["summary"] == "NequIP + latent charges + D3 for H, O"
    potential = load_potential(model_of(trained), precision="double")
    assert isinstance(potential.charges, LatentCharges)
    assert (potential.charges.sigma, potential.charges.epsilon_infinity) == (1.2, 1.5)
    energy, force, stress, largest = [], [], [], 0.0
    for atoms in read(trained / "validation.xyz", ":"):
        answer = potential(potential.prepare(Systems.from_atoms(atoms)))
        energy.append((float(answer.energy) - atoms.info["REF_energy"]) / len(atoms))
        force.append(answer.forces.numpy() - atoms.arrays["REF_forces"])
        stress.append(-answer.virial[0].numpy() / atoms.get_volume() - atoms.info["REF_stress"])
        largest = max(largest, float(answer.charges.abs().max()))
    errors = card["errors"]["data"]
    assert largest > 1e-3
    assert 1000 * np.sqrt(np.mean(np.square(energy))) == pytest.approx(errors["energy_rmse"], rel=1e-3)
    assert np.sqrt(np.mean(np.square(force))) == pytest.approx(errors["force_rmse"], rel=1e-4)
    assert np.sqrt(np.mean(np.square(stress))) * 160.21766208 == pytest.approx(errors["stress_rmse"], rel=1e-3)


def test_it_runs_in_ipi_in_a_field(trained: Path, tmp_path: Path) -> None:
    atoms = flexible_water(2, 99)
    write(tmp_path / "start.xyz", Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True), format="extxyz")
    settings = f"model: {model_of(trained)}\nfield: [0, 0, 0.02]\ndevice: cpu\noutput: {{born_charges: true}}\n"
    (tmp_path / "settings.yaml").write_text(settings)
    (tmp_path / "input.xml").write_text(XML.format(forcefield=SOCKET, timestep=0.1))
    command = [sys.executable, "-m", "voltpi.driver.cli", "run", "input.xml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = np.loadtxt(tmp_path / "run.out", ndmin=2)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(rows).all()


def test_finetuning_goes_on_with_the_same_charges(trained: Path, tmp_path: Path) -> None:
    options = ["--set", "training.epochs=2", "--set", "training.device=cpu", "--set", "figures=false"]
    command = ["finetune", model_of(trained), str(trained / "train.xyz"), "--out", str(tmp_path / "more")]
    assert main([*command, *options, "--quiet"]) == 0
    tuned = load_potential(tmp_path / "more" / "more.safetensors")
    before = load_potential(model_of(trained))
    assert tuned.charges.config == before.charges.config
    old, new = (p.short_range.latent_readout[1].detach() for p in (before, tuned))
    assert 1e-6 < float((old - new).abs().max()) < 0.5


def test_born_charges_are_compared_with_labels(tmp_path: Path) -> None:
    config = configured(tmp_path, **LATENT, **{"training.epochs": 1})
    for name in ("train.xyz", "validation.xyz"):
        frames = read(tmp_path / name, ":")
        for atoms in frames:
            charge = np.where(atoms.numbers == 8, -0.8, 0.4)
            atoms.arrays["bec"] = (charge[:, None, None] * np.eye(3)).reshape(-1, 9)
        write(tmp_path / name, frames, format="extxyz")
    assert main(["train", str(config), "--quiet"]) == 0
    card = json.loads((tmp_path / "water" / "report.json").read_text())
    assert card["charges_alone"]["born_charges"]["rms_label"] == pytest.approx(np.sqrt((0.64 + 2 * 0.16) / 9))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"charges.response": "all"}, "charges.response has no meaning with charges.model: latent"),
        ({"charges.fit": {}}, "charges.fit is for pqeq and qeq, not latent"),
        ({"charges.limiter": "none"}, "charges.limiter has no meaning with charges.model: latent"),
        ({"charges.parameters": "own.csv"}, "charges.parameters has no meaning with charges.model: latent"),
        ({"charges.sigma": 0.0}, "charges.sigma is 0"),
        ({"charges.epsilon_infinity": 0.5}, "charges.epsilon_infinity is 0.5"),
    ],
)
def test_settings_that_contradict_latent_charges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    config = configured(tmp_path, **{"charges": {"model": "latent"}}, **changes)
    assert words in refused(capsys, "train", str(config), "--quiet")


def test_a_field_on_a_label_needs_charges_within_fragments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path, **{"charges": {"model": "latent"}, "data.labels": {"field": "electric_field"}})
    for name in ("train.xyz", "validation.xyz"):
        frames = read(tmp_path / name, ":")
        for atoms in frames:
            atoms.info["electric_field"] = [0.0, 0.0, 0.05]
        write(tmp_path / name, frames, format="extxyz")
    assert "frame 0: field along a periodic direction" in refused(capsys, "train", str(config), "--quiet")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"charges.sigma": 1.0}, "charges.sigma: 1.0 contradicts model water.safetensors, which was trained with 1.2"),
        ({"charges.conserve": "total"}, "charges.conserve: total contradicts model water.safetensors"),
        ({"charges.model": "pqeq"}, "charges.model: pqeq contradicts model water.safetensors"),
        ({"charges.carried": "q"}, "charges.carried has no meaning with model water.safetensors"),
        ({"charges.limiter": "fene"}, "charges.limiter has no meaning with model water.safetensors"),
        ({"output.polarizability": True}, "output.polarizability: latent charges do not answer"),
    ],
)
def test_a_run_cannot_change_what_was_trained(trained: Path, keys: dict[str, Any], words: str) -> None:
    atoms = read(trained / "validation.xyz", 0)

    def run() -> None:
        evaluator = Evaluator.from_settings(load_settings(overrides={"model": model_of(trained), **keys}), atoms)
        evaluator.potential(evaluator.prepared, polarizability=True)

    with pytest.raises(InputError) as raised:
        run()
    assert words in str(raised.value)


def test_the_permittivity_may_be_chosen_for_a_run(trained: Path) -> None:
    atoms = read(trained / "validation.xyz", 0)
    dipoles = []
    for value in (1.0, 4.0):
        settings = load_settings(overrides={"model": model_of(trained), "charges.epsilon_infinity": value})
        evaluator = Evaluator.from_settings(settings, atoms)
        dipoles.append(evaluator.potential(evaluator.prepared).dipole[0].numpy())
    assert dipoles[1] == pytest.approx(2 * dipoles[0], abs=1e-10)


def test_export_says_what_it_cannot_export(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "export", model_of(trained), "--output", str(trained / "model.pt"))
    assert "water.safetensors has latent charges, which cannot be exported" in error


def test_latent_charges_need_a_model() -> None:
    settings = load_settings(overrides={"charges.model": "latent"})
    with pytest.raises(InputError, match=r"set model to one that was trained with charges\.model: latent"):
        Evaluator.from_settings(settings, flexible_water(2, 1))
