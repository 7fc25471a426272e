"""``charges.fit``: parameters of the charges from labels, by ``voltpi fit-charges`` and before a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.io import write
from test_cli import refused

from voltpi.driver.cli import main
from voltpi.driver.training_settings import load_training
from voltpi.potential.checkpoints import load_potential
from voltpi.potential.electrostatics.pqeq import PQEq, read_parameters
from voltpi.potential.systems import Systems

from training_toys import flexible_water

NETWORK = {"hidden_irreps": "8x0e+4x1o", "layers": 1, "r_max": 3.0, "n_basis": 4, "radial_hidden": 8}
TRAINING = {"epochs": 1, "warmup_steps": 4, "threads": 1, "device": "cpu"}


def configured(folder: Path, **charges: Any) -> Path:
    """Ten water dimers whose polarizabilities are those of softer springs, and settings that fit these."""
    table = read_parameters()
    softer = {symbol: table[symbol]._replace(K=0.7 * table[symbol].K) for symbol in ("H", "O")}
    frames = []
    for seed in range(10):
        atoms = flexible_water(2, seed)
        atoms.pbc = False
        answer = PQEq(parameters=softer, response="all").solve(Systems.from_atoms(atoms), polarizability=True)
        assert answer.polarizability is not None
        atoms.info["polarizability"] = answer.polarizability[0].numpy()
        frames.append(atoms)
    write(folder / "water.xyz", frames, format="extxyz")
    tree = {
        "data": {"train": "water.xyz", "validation": 0.3},
        "network": NETWORK,
        "charges": {"response": "all", "fit": {"train": ["K"], "steps": 4}, **charges},
        "training": TRAINING,
        "figures": False,
    }
    (folder / "water.yaml").write_text(yaml.safe_dump(tree))
    return folder / "water.yaml"


def test_charges_are_fitted_then_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path)
    assert main(["fit-charges", str(config), "--set", "charges.fit.steps=2"]) == 0
    assert "fitting K of H, O to polarizability\n" in capsys.readouterr().out
    folder = tmp_path / "water" / "charges"
    first = read_parameters(folder / "charges.csv")
    errors = json.loads((folder / "report.json").read_text())["relative_errors_of_validation"]
    assert errors["after"]["polarizability"] < 0.5 * errors["before"]["polarizability"]
    assert main(["train", str(config)]) == 0  # two more steps, then an epoch
    said = capsys.readouterr().out
    assert "step 3: loss" in said
    assert "step 2: loss" not in said
    table = read_parameters(folder / "charges.csv")
    assert table["O"].K != first["O"].K
    assert table["O"]._replace(K=0.0) == read_parameters()["O"]._replace(K=0.0)
    charges = load_potential(tmp_path / "water" / "water.safetensors").charges
    assert isinstance(charges, PQEq)
    assert pytest.approx(table["O"].K, rel=1e-7) == charges.parameters["O"].K
    assert charges.parameters["Na"] == read_parameters()["Na"]


def test_settings_of_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path)
    assert load_training(config, ["charges.fit=none"]).charges.fit is None
    sentence = refused(capsys, "fit-charges", str(config), "--set", "charges.fit=none")
    assert "nothing to fit; give charges.fit: {}" in sentence
    for override, words in (
        ("charges.model=none", "no meaning with charges.model: none"),
        ("charges.fit.train=[Z]", "charges.fit.train"),
        ("charges.fit.prior=-1", "charges.fit.prior"),
        ("charges.fit.targets={dipole: 0, polarizability: 0, born_charges: 0}", "all weights are 0"),
        ("charges.fit.targets={polarizability: 0}", "no frame has such a label"),
    ):
        assert words in refused(capsys, "fit-charges", str(config), "--quiet", "--set", override)
