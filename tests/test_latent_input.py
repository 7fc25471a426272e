"""The ready input of water with latent charges in a field: runs in i-PI, sends charges and Born charges."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

from voltpi.analysis.ipi_files import read_extras
from voltpi.driver import launch
from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.uses import copy_use
from voltpi.potential.checkpoints import load_potential, read_card
from voltpi.potential.electrostatics.latent import LatentCharges

BOHR = 0.529177210903


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that wrote everything at each."""
    target = tmp_path_factory.mktemp("water-les") / "run"
    copy_use("water-les", target)
    text = re.sub(r"stride='\d+'", "stride='1'", (target / "input.xml").read_text())
    text, changed = re.subn(r"<total_steps> *\d+ *</total_steps>", "<total_steps>4</total_steps>", text)
    assert changed == 1
    (target / "input.xml").write_text(text)
    launch.run(target / "input.xml")
    return target


@pytest.mark.slow
def test_molecules_are_neutral_and_born_charges_add_up(folder: Path) -> None:
    charges = read_extras(folder / "run.charges_0").values
    assert charges.shape == (5, 192)
    assert np.abs(charges.reshape(5, 64, 3).sum(2)).max() < 1e-10
    born = read_extras(folder / "run.born_0").values.reshape(5, 192, 3, 3)
    assert np.abs(born.sum(1)).max() < 1e-8
    oxygen = np.trace(born[:, ::3], axis1=2, axis2=3).mean() / 3
    assert -1.0 < oxygen < -0.3  # with the root of 1.78


@pytest.mark.slow
def test_the_run_is_the_potential_in_its_field(folder: Path) -> None:
    atoms = read(folder / "run.pos_0.extxyz", "-1")
    atoms.pbc = True
    atoms.calc = VoltPICalculator(
        {"model": "water-les", "field": [0.05, 0, 0], "charges": {"epsilon_infinity": 1.78}, "device": "cpu"}
    )
    written = np.loadtxt(folder / "run.out")[-1, 4]
    assert atoms.get_potential_energy() == pytest.approx(written, abs=1e-3)
    dipole = read_extras(folder / "run.dipole_0").values[-1] * BOHR
    assert atoms.get_dipole_moment() == pytest.approx(dipole, abs=1e-3)


def test_the_shipped_model_says_what_it_is() -> None:
    card = read_card("water-les")
    assert card["errors"]["water"]["force_rmse"] < card["without_long_range"]["force_rmse"]
    assert card["errors"]["water"]["energy_rmse"] < card["without_long_range"]["energy_rmse"]
    charges = load_potential("water-les").charges
    assert isinstance(charges, LatentCharges)
    assert charges.conserve == "fragments"
