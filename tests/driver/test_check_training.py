"""``voltpi check`` of the settings of a training: it reads them and their data, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from ase.io import write
from test_train import configured, frames

from voltpi.driver.check import check
from voltpi.driver.cli import main
from voltpi.potential.checkpoints import save_potential
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP


def test_settings_of_a_training_are_checked_with_their_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["check", str(config)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"settings of a training are valid; `voltpi train {config}` takes them" in printed.out
    assert "ok: train.xyz: 24 frames of 6 atoms (H, O); labels energy 'REF_energy'" in printed.out
    assert "ok: 24 frames to train on, 8 to validate" in printed.out
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_trained_is_found(tmp_path: Path) -> None:
    config = configured(tmp_path)
    data = frames(0, 24)
    data[5].positions[1] = data[5].positions[0] + [0.01, 0.0, 0.0]
    write(tmp_path / "train.xyz", data, format="extxyz")
    good, bad = check(config)
    assert (good.ok, bad.ok) == (True, False)
    assert "train.xyz, frame 5: atoms 0 (O) and 1 (H) are 0.010 Å apart" in bad.sentence
    (finding,) = check(configured(tmp_path, **{"training.epoch": 5}))
    assert not finding.ok
    assert "unknown key training.epoch; did you mean training.epochs?" in finding.sentence


def test_what_the_model_to_start_from_does_not_know_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NequIP([8], hidden_irreps="4x0e+2x1o", layers=1, r_max=3.0, n_basis=4, radial_hidden=8)
    save_potential(tmp_path / "oxygen.safetensors", Potential(network), {"name": "oxygen"})
    config = configured(tmp_path, start="oxygen.safetensors")
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({key: tree[key] for key in ("data", "start")}))
    bad = [finding for finding in check(config) if not finding.ok]
    assert len(bad) == 1
    assert "train.xyz, frame 0: has H, which model oxygen.safetensors does not know (it knows O)" in bad[0].sentence
