"""Training from the command line: a tiny data set end to end, exact resume, fine-tuning, and every bad file by name."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.io import read, write
from safetensors.torch import load_file
from test_cli import SOCKET, XML, refused

from voltpi.driver.cli import main
from voltpi.driver.training_settings import load_training
from voltpi.potential.checkpoints import load_potential, read_card, save_potential
from voltpi.potential.reaxnet import import_reaxnet
from voltpi.potential.systems import Systems
from voltpi.potential.training import trainer as trainer_module

from training_toys import flexible_water

NETWORK = {"hidden_irreps": "8x0e+4x1o", "layers": 2, "r_max": 3.0, "n_basis": 4, "radial_hidden": 8}
TRAINING = {"epochs": 6, "batch_size": 4, "warmup_steps": 4, "ema_decay": 0.8, "threads": 1, "device": "cpu"}


def frames(first: int, last: int) -> list[Atoms]:
    out = []
    for seed in range(first, last):
        atoms = flexible_water(2, seed)
        atoms.info["config_type"] = "even" if seed % 2 == 0 else "odd"
        out.append(atoms)
    return out


def configured(folder: Path, **changes: Any) -> Path:
    """A settings file (and its data, where they are not there) in ``folder``; dotted keys change the settings."""
    folder.mkdir(exist_ok=True)
    for name, span in (("train.xyz", (0, 24)), ("validation.xyz", (24, 32))):
        if not (folder / name).exists():
            write(folder / name, frames(*span), format="extxyz")
    tree: dict[str, Any] = {
        "data": {"train": "train.xyz", "validation": "validation.xyz"},
        "network": dict(NETWORK),
        "charges": {"conserve": "fragments", "response": "all"},
        "training": dict(TRAINING),
        "figures": False,
    }
    for key, value in changes.items():
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    (folder / "water.yaml").write_text(yaml.safe_dump(tree))
    return folder / "water.yaml"


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; the folder of its settings file."""
    folder = tmp_path_factory.mktemp("trained")
    config = configured(folder, **{"dispersion": {"functional": "pbe"}, "figures": True})
    assert main(["train", str(config), "--quiet"]) == 0
    return folder


# -- from data to a model --------------------------------------------------------------------------------------------


def test_loss_falls_and_everything_is_on_disk(trained: Path) -> None:
    out = trained / "water"
    rows = log(out)
    assert len(rows) == TRAINING["epochs"]
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    assert float(rows[-1]["train_force_rmse"]) < 0.7 * float(rows[0]["train_force_rmse"])
    for name in ("learning.png", "learning.svg", "parity.png", "parity.svg", "report.json"):
        assert (out / name).stat().st_size > 1000
    card = read_card(out / "water.safetensors")
    assert card["summary"] == "NequIP + PQEq + D3 for H, O"
    assert card == json.loads((out / "report.json").read_text())
    files = card["data"]["files"]
    assert [(f["file"], f["frames"], f["use"]) for f in files] == [
        ("train.xyz", 24, "training"),
        ("validation.xyz", 8, "validation"),
    ]
    assert files[0]["labels"]["stress"] == "REF_stress"
    assert files[0]["units_measured"]["stiffness_over_usual"] == pytest.approx(1.0, abs=0.5)
    assert all(re.fullmatch("[0-9a-f]{64}", f["sha256"]) for f in files)
    errors = card["errors"]
    assert (errors["data"]["frames"], errors["data/even"]["frames"], errors["data/odd"]["frames"]) == (8, 4, 4)
    assert errors["data"]["force_rmse"] < errors["data"]["force_rms"]
    assert errors["data"]["stress_rmse"] > 0


def test_the_model_file_gives_the_errors_on_its_card(trained: Path) -> None:
    """Energy, forces and stress of the whole potential against the labels: long range and references are back in."""
    potential = load_potential(trained / "water" / "water.safetensors", precision="double")
    energy, force, stress = [], [], []
    for atoms in read(trained / "validation.xyz", ":"):
        answer = potential(potential.prepare(Systems.from_atoms(atoms)))
        energy.append((float(answer.energy) - atoms.info["REF_energy"]) / len(atoms))
        force.append(answer.forces.numpy() - atoms.arrays["REF_forces"])
        stress.append(-answer.virial[0].numpy() / atoms.get_volume() - atoms.info["REF_stress"])
    errors = read_card(trained / "water" / "water.safetensors")["errors"]["data"]
    assert 1000 * np.sqrt(np.mean(np.square(energy))) == pytest.approx(errors["energy_rmse"], rel=1e-3)
    assert np.sqrt(np.mean(np.square(force))) == pytest.approx(errors["force_rmse"], rel=1e-4)
    assert np.sqrt(np.mean(np.square(stress))) * 160.21766208 == pytest.approx(errors["stress_rmse"], rel=1e-3)


@pytest.mark.slow
def test_the_model_file_runs_in_ipi(trained: Path, tmp_path: Path) -> None:
    atoms = flexible_water(2, 99)
    write(tmp_path / "start.xyz", Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True), format="extxyz")
    model = trained / "water" / "water.safetensors"
    (tmp_path / "settings.yaml").write_text(f"model: {model}\nfield: [0, 0, 0.02]\ndevice: cpu\n")
    (tmp_path / "input.xml").write_text(XML.format(forcefield=SOCKET, timestep=0.1))
    command = [sys.executable, "-m", "voltpi.driver.cli", "run", "input.xml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = np.loadtxt(tmp_path / "run.out", ndmin=2)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(rows).all()
    assert np.ptp(rows[:, 1]) > 0


class _Interrupt:
    """``predict`` that sends its own process the signal of Ctrl-C once."""

    def __init__(self, after: int) -> None:
        self.countdown, self.predict = after, trainer_module.predict

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.countdown -= 1
        if self.countdown == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.predict(*arguments, **options)


@pytest.mark.parametrize("changes", [{}, {"training.schedule": "plateau", "training.precision": "float64"}])
def test_interrupted_and_resumed_is_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    changes = {"charges": {"model": "none"}, "training.epochs": 3, "data.validation": 0.3, **changes}
    whole, parts = (configured(tmp_path / name, **changes) for name in ("whole", "parts"))
    assert main(["train", str(whole), "--quiet"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "predict", _Interrupt(after=9))
        error = refused(capsys, "train", str(parts), "--quiet", status=1)
    assert "the same command goes on from there" in error
    assert not (parts.parent / "water" / "water.safetensors").exists()
    assert main(["train", str(parts), "--quiet"]) == 0
    one, two = (load_file(path.parent / "water" / "water.safetensors") for path in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert log(whole.parent / "water") == log(parts.parent / "water")
    # a finished training stays as it is
    assert main(["train", str(parts), "--quiet"]) == 0
    assert log(whole.parent / "water") == log(parts.parent / "water")


def test_other_settings_do_not_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path, **{"charges": {"model": "none"}, "training.epochs": 1})
    assert main(["train", str(config), "--quiet"]) == 0
    error = refused(capsys, "train", str(config), "--quiet", "--set", "network.layers=1")
    assert "begun with other network: give another output folder" in error
    write(tmp_path / "train.xyz", frames(0, 20), format="extxyz")
    assert "begun with other data" in refused(capsys, "train", str(config), "--quiet")
    write(tmp_path / "train.xyz", frames(0, 24), format="extxyz")
    assert main(["train", str(config), "--quiet", "--set", "training.epochs=2"]) == 0
    assert [row["epoch"] for row in log(tmp_path / "water")] == ["0", "1"]


def test_a_repulsion_is_not_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model has what the settings name, and the network's scale is that of the rest."""
    changes = {"charges": {"model": "none"}, "training.epochs": 1}
    scales = []
    for name, repulsion in (("bare", "none"), ("walled", {"O-H": 1.6})):
        config = configured(tmp_path / name, **changes, **{"network.repulsion": repulsion})
        assert main(["train", str(config), "--quiet"]) == 0
        network = load_potential(tmp_path / name / "water" / "water.safetensors").short_range
        assert network.config["repulsion"] == (None if repulsion == "none" else repulsion)
        scales.append(float(network.scale[0]))
    assert scales[0] != pytest.approx(scales[1], rel=0.05)
    for given, sentence in {
        "{O-H: 9}": "repulsion ends at 9 Å, beyond r_max",
        "{OH: 1}": "repulsion: 'OH' is not a pair of elements",
        "{O-H: -1}": "expected none, covalent, or where it ends by pair of elements",
        "covalant": "network.repulsion is 'covalant'; expected none, covalent",
    }.items():
        assert sentence in refused(capsys, "train", str(config), "--quiet", "--set", f"network.repulsion={given}")


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    changes = {
        "charges": {"model": "none"},
        "training.precision": "float64",
        "training.epochs": 2,
        "training.batch_size": 5,
    }
    one, two = (configured(tmp_path / name, **changes) for name in ("one", "two"))
    assert main(["train", str(one), "--quiet"]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "voltpi.driver.cli", "train", str(two)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all epochs are done") == 1  # one of them talks
    weights = [load_file(path.parent / "water" / "best.safetensors") for path in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-9, atol=1e-11)
    for a, b in zip(log(one.parent / "water"), log(two.parent / "water"), strict=True):
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()}, rel=1e-5)
    assert read_card(two.parent / "water" / "water.safetensors")["training"]["processes"] == 2


# -- fine-tuning -----------------------------------------------------------------------------------------------------


def shifted(count: int) -> list[Atoms]:
    """The same molecules at another level of theory: stiffer, other energies of atoms."""
    out = frames(40, 40 + count)
    for atoms in out:
        atoms.info["REF_energy"] = -2050.0 * 2 + 1.2 * (atoms.info["REF_energy"] + 936.0)
        atoms.arrays["REF_forces"] *= 1.2
        del atoms.info["REF_stress"]
    return out


@pytest.fixture
def model(trained: Path) -> str:
    return str(trained / "water" / "water.safetensors")


def test_finetuning_starts_from_the_model_and_leaves_what_is_frozen(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "new.xyz", shifted(16), format="extxyz")
    options = ["--set", "data.validation=0.3", "--set", "training.epochs=4", "--set", "figures=false"]
    out = tmp_path / "tuned"
    command = ["finetune", model, str(tmp_path / "new.xyz"), "--out", str(out), *options]
    assert main([*command, "--freeze", "embedding", "--freeze", "convolutions.0.*"]) == 0
    said = capsys.readouterr().out
    assert "starts from water.safetensors" in said
    assert "tensors frozen" in said
    before, after = load_file(model), load_file(out / "tuned.safetensors")
    for name, tensor in before.items():
        stays = name.startswith(("embedding", "convolutions.0.")) or name in ("shift", "scale")
        assert torch.equal(after[name], tensor) == stays, name
    card = read_card(out / "tuned.safetensors")
    assert card["fine-tuned from"] == "water.safetensors"
    assert card["summary"] == "NequIP + PQEq + D3 for H, O"
    # reference energies are those of the new level: a molecule is at -2050 eV, not at -468 eV
    references = card["reference_energies"]["data"]
    assert 2 * references["H"] + references["O"] == pytest.approx(-2050, abs=5)
    assert card["errors"]["data"]["energy_rmse"] < 200
    # better than the model that it started from, on the labels of the new level
    rows = log(out)
    assert float(rows[-1]["data_force_rmse"]) < float(rows[0]["data_force_rmse"])


def test_references_may_be_kept(model: str, tmp_path: Path) -> None:
    write(tmp_path / "new.xyz", frames(50, 62), format="extxyz")
    out = tmp_path / "kept"
    options = ["reference_energies=keep", "data.validation=0.4", "training.epochs=1", "figures=false"]
    sets = [word for option in options for word in ("--set", option)]
    assert main(["finetune", model, str(tmp_path / "new.xyz"), "--out", str(out), "--quiet", *sets]) == 0
    one, two = (load_potential(path).reference_energies for path in (model, out / "kept.safetensors"))
    assert one == two


def test_finetuning_an_imported_checkpoint(tmp_path: Path) -> None:
    potential, card = import_reaxnet(Path(__file__).parents[1] / "potential" / "data" / "reaxnet_even")
    save_potential(tmp_path / "published.safetensors", potential, card)
    write(tmp_path / "new.xyz", frames(0, 12), format="extxyz")
    options = ["data.validation=0.4", "training.epochs=2", "figures=false"]
    sets = [word for option in options for word in ("--set", option)]
    command = ["finetune", str(tmp_path / "published.safetensors"), str(tmp_path / "new.xyz"), "--quiet"]
    assert main([*command, "--out", str(tmp_path / "tuned"), *sets]) == 0
    tuned = load_potential(tmp_path / "tuned" / "tuned.safetensors")
    assert tuned.charges == potential.charges  # tapered, as published
    assert tuned.short_range.species == potential.short_range.species
    rows = log(tmp_path / "tuned")
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])


def test_finetuning_refusals(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "new.xyz", shifted(16), format="extxyz")
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> str:
        out = ["--out", str(tmp_path / "out"), "--set", "data.validation=0.3", "--quiet"]
        return refused(capsys, "finetune", model, str(tmp_path / "new.xyz"), *out, *arguments)

    assert "no parameter of the network matches 'convolution.0'" in said("--freeze", "convolution.0")
    assert "leaves nothing to train" in said("--freeze", "*")
    assert "network comes from the model that start names" in said("--set", "network.layers=3")
    sulfide = Atoms("SH2", [[0, 0, 0], [1.0, 0.9, 0], [-1.0, 0.9, 0]], info={"REF_energy": -10.0})
    sulfide.arrays["REF_forces"] = np.zeros((3, 3))
    write(tmp_path / "new.xyz", [*shifted(16), sulfide], format="extxyz")
    assert "frame 16: has S, which model water.safetensors does not know (it knows H, O)" in said()
    wrong = refused(capsys, "finetune", str(tmp_path / "none.safetensors"), str(tmp_path / "new.xyz"))
    assert "neither a shipped model" in wrong
    assert not (tmp_path / "none-finetuned").exists()  # no empty folder


# -- bad data --------------------------------------------------------------------------------------------------------


def _missing(data: list[Atoms]) -> None:
    del data[5].arrays["REF_forces"]


def _nan(data: list[Atoms]) -> None:
    data[7].info["REF_energy"] = float("nan")


def _hartree(data: list[Atoms]) -> None:
    for atoms in data:
        atoms.info["REF_energy"] /= 27.211386
        atoms.arrays["REF_forces"] /= 51.422067


def _duplicate(data: list[Atoms]) -> None:
    data[3] = flexible_water(2, 26)


def _field(data: list[Atoms]) -> None:
    data[2].info["electric_field"] = [0.1, 0.0, 0.0]
    for atoms in data[:2] + data[3:]:
        atoms.info["electric_field"] = [0.0, 0.0, 0.0]


def _charged(data: list[Atoms]) -> None:
    for k, atoms in enumerate(data):
        atoms.info["total_charge"] = int(k == 4)


def _contradiction(data: list[Atoms]) -> None:
    data[9] = data[1].copy()
    data[9].info["REF_energy"] = data[1].info["REF_energy"] + 5.0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing, ["train.xyz, frame 5: forces label 'REF_forces' is missing"]),
        (_nan, ["train.xyz, frame 7: energy label 'REF_energy' is not finite"]),
        (_hartree, ["train.xyz: bonds H-O have a stiffness of", "set units.forces to hartree/bohr"]),
        (_duplicate, ["validation.xyz, frame 2 is also in training", "train.xyz, frame 3"]),
        (_field, ["train.xyz, frame 2: has a field of 0.1, 0, 0 V/Å", "set charges.model"]),
        (_charged, ["train.xyz, frame 4: has a charge of 1 e", "labels.charge: none"]),
        (_contradiction, ["train.xyz, frame 9: is the structure of", "frame 1, but its energy differs by 5 eV"]),
    ],
)
def test_bad_data_are_named_by_file_frame_and_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[list[Atoms]], None], words: list[str]
) -> None:
    config = configured(tmp_path, **{"charges": {"model": "none"}})
    data = frames(0, 24)
    spoil(data)
    write(tmp_path / "train.xyz", data, format="extxyz")
    error = refused(capsys, "train", str(config), "--quiet")
    for word in words:
        assert word in error


def test_elements_without_training_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path, **{"charges": {"model": "none"}, "data.check_units": False})
    data = frames(24, 32)
    data[6].symbols[0] = "S"
    write(tmp_path / "validation.xyz", data, format="extxyz")
    error = refused(capsys, "train", str(config), "--quiet")
    assert "validation.xyz, frame 6: no reference energy for S" in error


def test_the_long_range_part_names_the_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path)
    data = frames(0, 24)
    data[8].symbols[3] = "Og"
    write(tmp_path / "train.xyz", data, format="extxyz")
    assert "train.xyz, frame 8: " in refused(capsys, "train", str(config), "--quiet")


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.epoch": 5}, ["water.yaml, line", "unknown key training.epoch; did you mean training.epochs?"]),
        ({"training.epochs": 0}, ["training.epochs is 0", "greater than or equal to 1"]),
        ({"training.epochs": None}, ["training: epochs and hours are both null"]),
        ({"training.batch_atoms": 100}, ["training: batch_size and batch_atoms exclude each other"]),
        ({"data.units": {"energy": "erg"}}, ["data.units", "units.energy is 'erg'"]),
        ({"data.labels": {"energy": "none"}}, ["data.labels: energy cannot be none"]),
        ({"data.validation": 1.5}, ["data.validation"]),
        ({"data.train": "none.xyz"}, ["none.xyz: cannot be read"]),
        ({"loss": {"huber_forces": 0.5}}, ["loss: huber_forces belongs to kind: huber"]),
        ({"charges.model": "fixed"}, ["charges.model: fixed cannot be trained with; use pqeq, qeq, latent or none"]),
        ({"charges.shel_limit": 0.5}, ["unknown key charges.shel_limit; did you mean charges.shell_limit?"]),
        ({"freeze": ["embedding"]}, ["freeze is for fine-tuning"]),
        ({"reference_energies": {"Xx": 1.0}}, ["reference_energies", "no element is called Xx"]),
        ({"reference_energies": {"O": -430.0}}, ["train.xyz, frame 0: no reference energy for H"]),
    ],
)
def test_settings_that_cannot_be_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    config = configured(tmp_path, **changes)
    error = refused(capsys, "train", str(config), "--quiet")
    for word in words:
        assert word in error


def test_paths_are_relative_to_the_settings_file(tmp_path: Path) -> None:
    config = configured(tmp_path, **{"data.train": [{"file": "train.xyz", "name": "a"}, "more.xyz"]})
    settings = load_training(config, ["training.seed=7", "data.labels.stress=none"])
    assert [f.file for f in settings.data.train] == [str(tmp_path / "train.xyz"), str(tmp_path / "more.xyz")]
    assert settings.output == str(tmp_path / "water")
    assert settings.training.seed == 7
    assert settings.data.sources(settings.data.train)[0].stress_key is None
    loss = settings.loss.build()
    assert (loss.energy, loss.forces, loss.stress, loss.huber_forces) == (1.0, 10.0, 10.0, None)
