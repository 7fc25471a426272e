"""Committees from the command line to i-PI: trained, calibrated, evaluated, and read back from extras."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.io import read, write
from safetensors.torch import load_file
from test_cli import refused

from voltpi.driver import pes
from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.cli import main
from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator, Result
from voltpi.driver.potentiostat import Potentiostat
from voltpi.driver.settings import load_settings
from voltpi.potential.checkpoints import load_potential, read_card, read_description
from voltpi.potential.committee import LastLayers, Seeds
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems
from voltpi.potential.training import trainer as trainer_module

from ipi_runs import LIMIT
from training_toys import flexible_water

NETWORK = {"hidden_irreps": "8x0e+4x1o", "layers": 2, "r_max": 3.0, "n_basis": 4, "radial_hidden": 8}
TRAINING = {"epochs": 3, "batch_size": 4, "warmup_steps": 4, "ema_decay": 0.8, "threads": 1, "device": "cpu"}
INPUT = """<simulation verbosity='low'>
  <output prefix='run'>
    <properties stride='1' filename='out'> [step, potential] </properties>
    {trajectories}
  </output>
  <total_steps>3</total_steps>
  <prng><seed>5</seed></prng>
  {forcefield}
  <system>
    <initialize nbeads='1'>
      <file mode='ase'> start.xyz </file> <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nve'> <timestep units='femtosecond'> 0.25 </timestep> </dynamics>
    </motion>
  </system>
</simulation>
"""


def configured(folder: Path, **training: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, span in (("train.xyz", range(16)), ("validation.xyz", range(24, 32))):
        write(folder / name, [flexible_water(2, seed) for seed in span], format="extxyz")
    tree = {
        "data": {"train": "train.xyz", "validation": "validation.xyz"},
        "network": NETWORK,
        "charges": {"conserve": "fragments", "response": "all"},
        "training": TRAINING | training,
        "figures": False,
    }
    (folder / "water.yaml").write_text(yaml.safe_dump(tree))
    return folder / "water.yaml"


def start() -> Atoms:
    atoms = flexible_water(2, 99)
    return Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True)


def changed_model(path: Path) -> bool:
    return "committee" in read_description(path)["short_range"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a committee of last layers."""
    folder = tmp_path_factory.mktemp("last-layers")
    assert main(["train", str(configured(folder, committee=6)), "--quiet"]) == 0
    return folder / "water" / "water.safetensors"


# -- training ----------------------------------------------------------------------------------------------------------


def test_last_layers_after_a_training(trained: Path) -> None:
    report = read_card(trained)["committee"]
    assert (report["kind"], report["members"], report["frames"]) == ("last-layers", 6, 8)
    assert report == json.loads((trained.parent / "report.json").read_text())["committee"]
    for name, errors in (("energy", 8), ("forces", 8 * 6 * 3)):
        own = report[name]
        assert 0.4 < own["within_1_sigma"] <= own["within_2_sigma"] <= 1
        assert own["within_1_sigma"] * errors == pytest.approx(round(own["within_1_sigma"] * errors))
    assert report["forces"]["rmse"] == pytest.approx(read_card(trained)["errors"]["data"]["force_rmse"], rel=1e-5)
    potential = load_potential(trained)
    assert isinstance(potential.short_range, LastLayers)
    assert potential.short_range.calibration.energy == report["energy"]["alpha"]
    best = load_file(trained.parent / "best.safetensors")
    own = potential.short_range.network.state_dict()
    assert all(torch.equal(own[name], best[name]) for name in best)  # the training is that without a committee


def test_a_finished_training_is_given_a_committee(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path)
    model = tmp_path / "water" / "water.safetensors"
    assert main(["train", str(config), "--quiet"]) == 0
    assert not changed_model(model)
    before = (tmp_path / "water" / "log.csv").read_text()
    assert main(["train", str(config), "--set", "training.committee=5"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"committee of 5 last-layers on 8 frames: energy uncertain by \S+ eV \(RMSE .* spread times", printed
    )
    assert changed_model(model)
    assert (tmp_path / "water" / "log.csv").read_text() == before


class _Interrupt:
    """``predict`` that sends its own process the signal of Ctrl-C once."""

    def __init__(self, after: int) -> None:
        self.countdown, self.predict = after, trainer_module.predict

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.countdown -= 1
        if self.countdown == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.predict(*arguments, **options)


def test_seeds_are_trainings_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second member and resumed; the third alone, with its seed, is the same training."""
    config = configured(tmp_path / "four", committee=4, committee_kind="seeds", seed=10, epochs=2)
    out = config.parent / "water"
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "predict", _Interrupt(after=12))
        error = refused(capsys, "train", str(config), "--quiet", status=1)
    assert "the same command goes on from there" in error
    assert "member-2" in error
    assert not (out / "member-3").exists()
    assert main(["train", str(config)]) == 0
    assert "member 4 of 4" in capsys.readouterr().out
    card = read_card(out / "water.safetensors")
    assert [m["seed"] for m in card["training"]["members"]] == [10, 11, 12, 13]
    assert card["committee"]["kind"] == "seeds"
    committee = load_potential(out / "water.safetensors").short_range
    assert isinstance(committee, Seeds)
    alone = configured(tmp_path / "one", seed=12, epochs=2)
    assert main(["train", str(alone), "--quiet"]) == 0
    best = load_file(alone.parent / "water" / "best.safetensors")
    third = committee.networks[2].state_dict()
    assert all(torch.equal(third[name], best[name]) for name in best)
    error = refused(capsys, "finetune", str(out / "water.safetensors"), str(config.parent / "train.xyz"), "--quiet")
    assert "has several networks, none to train further" in error


def test_a_model_is_given_a_committee(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its answers stay; a committee that is there is replaced; the card keeps what it said and says what was fitted."""
    data = trained.parent.parent / "train.xyz"
    out = tmp_path / "with"
    arguments = ["committee", str(trained), str(data), "--members", "7", "--out", str(out), "--quiet"]
    assert main([*arguments, "--set", "data.validation=0.4"]) == 0
    new = out / "with.safetensors"
    one, two = load_potential(trained), load_potential(new)
    assert two.short_range.size == 7
    systems = one.prepare(Systems.from_atoms(start()))
    assert torch.equal(one(systems).energy, two(systems).energy)
    assert torch.equal(one(systems).forces, two(systems).forces)
    card = read_card(new)
    assert card["errors"] == read_card(trained)["errors"]
    assert card["committee"]["files"][0]["file"] == "train.xyz"
    assert card["committee"]["members"] == 7
    error = refused(capsys, *arguments[:3], "--members", "3", "--out", str(tmp_path / "x"))
    assert re.search(r"--members.*committee.*4", error)
    error = refused(capsys, *arguments, "--set", "training.committee_kind=seeds")
    assert "a model that is trained gets last-layers; for seeds, train" in error


def test_data_of_another_zero_are_said_to_be_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An energy of its own for each element: refused with its size, unless the zero is fitted to the data."""
    frames = read(trained.parent.parent / "train.xyz", ":")
    for atoms in frames:
        atoms.info["REF_energy"] += 3.0 * (atoms.numbers == 8).sum() - 0.9 * (atoms.numbers == 1).sum()
    write(tmp_path / "other.xyz", frames, format="extxyz")
    out = tmp_path / "with"
    arguments = ["committee", str(trained), str(tmp_path / "other.xyz"), "--out", str(out), "--quiet"]
    arguments += ["--set", "data.validation=0.4"]
    error = refused(capsys, *arguments)
    said = re.search(r"DATA: energies are (\S+) eV/atom off .* scatter by (\S+), as where", error)
    assert said is not None, error
    off, scatter = map(float, said.groups())
    assert off == pytest.approx(0.4, abs=0.1)
    assert scatter < 0.08
    assert main([*arguments, "--set", "reference_energies=fit"]) == 0
    assert read_card(out / "with.safetensors")["committee"]["energy"]["rmse"] < 0.6


def test_finetuning_leaves_the_old_committee_behind(trained: Path, tmp_path: Path) -> None:
    data, out = trained.parent.parent / "train.xyz", tmp_path / "more"
    common = ["finetune", str(trained), str(data), "--out", str(out), "--quiet", "--set", "figures=false"]
    assert main([*common, "--set", "training.epochs=1", "--set", "data.validation=0.4"]) == 0
    assert isinstance(load_potential(out / "more.safetensors").short_range, NequIP)


def test_settings_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path)
    error = refused(capsys, "train", str(config), "--set", "training.committee_kind=seeds")
    assert "committee_kind is for a committee; give committee: 8, say" in error
    error = refused(capsys, "train", str(config), "--set", "training.committee=2")
    assert "training.committee" in error
    assert "4" in error


# -- evaluation --------------------------------------------------------------------------------------------------------


def settings_of(model: Path, uncertainty: str, precision: str = "double") -> dict[str, Any]:
    return {"model": str(model), "device": "cpu", "precision": precision, "output": {"uncertainty": uncertainty}}


def test_evaluate_and_ase(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "start.xyz", start(), format="extxyz")
    options = ["--set", f"model={trained}", "--set", "device=cpu"]
    assert main(["evaluate", str(tmp_path / "start.xyz"), *options, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert not {"energy_uncertainty", "forces_uncertainty", "committee"} & plain.keys()
    told = {}
    for asked in ("energy", "true", "members"):
        output = ["--set", f"output.uncertainty={asked}", "--json"]
        assert main(["evaluate", str(tmp_path / "start.xyz"), *options, *output]) == 0
        told[asked] = json.loads(capsys.readouterr().out)
        assert told[asked]["energy"] == pytest.approx(plain["energy"], abs=1e-5)
    assert "forces_uncertainty" not in told["energy"]
    record = told["members"]
    energies, forces = np.array(record["committee"]["energies"]), np.array(record["committee"]["forces"])
    assert (energies.shape, forces.shape) == ((6,), (6, 6, 3))
    assert record["energy_uncertainty"] == pytest.approx(energies.std(ddof=1), rel=1e-5)
    np.testing.assert_allclose(forces.mean(0), record["forces"], atol=1e-5)
    np.testing.assert_allclose(np.mean(record["committee"]["stresses"], axis=0), record["stress"], atol=1e-6)
    assert len(told["true"]["forces_uncertainty"]) == 6
    atoms = start()
    atoms.calc = VoltPICalculator(settings_of(trained, "members", "mixed"))
    assert atoms.get_potential_energy() == pytest.approx(record["energy"], abs=1e-5)
    assert atoms.calc.results["energy_uncertainty"] == pytest.approx(record["energy_uncertainty"], rel=1e-4)
    np.testing.assert_allclose(atoms.calc.results["forces_uncertainty"], record["forces_uncertainty"], rtol=1e-3)
    assert atoms.calc.results["committee"]["forces"].shape == (6, 6, 3)
    assert main(["evaluate", str(tmp_path / "start.xyz"), *options, "--set", "output.uncertainty=true"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"energy +│ -?\d+\.\d+ ± \S+ eV", printed)
    assert "uncertainty of forces" in printed


def test_extras_are_those_of_the_response_in_atomic_units(trained: Path) -> None:
    atoms = start()
    evaluator = Evaluator.from_settings(load_settings(overrides=settings_of(trained, "members")), atoms)
    cells, positions = np.asarray(atoms.cell).T[None] / BOHR, atoms.positions[None] / BOHR
    two = np.concatenate([positions, 1.01 * positions])
    results = evaluator.evaluate(np.repeat(cells, 2, axis=0), two)
    for result, r in zip(results, two, strict=True):
        (alone,) = evaluator.evaluate(cells, r[None])
        extras = result.extras
        for key in ("energy_uncertainty", "forces_uncertainty", "committee_pot", "committee_force", "committee_virial"):
            np.testing.assert_allclose(extras[key], alone.extras[key], rtol=1e-7, atol=1e-10)
        assert np.mean(extras["committee_pot"]) == pytest.approx(result.energy, abs=1e-12)
        np.testing.assert_allclose(np.mean(extras["committee_force"], axis=0), result.forces.ravel(), atol=1e-12)
        np.testing.assert_allclose(np.mean(extras["committee_virial"], axis=0), result.virial.ravel(), atol=1e-12)
    response = evaluator.evaluate_systems(np.asarray(atoms.cell)[None], atoms.positions[None])
    extras = results[0].extras
    assert extras["energy_uncertainty"] * HARTREE == pytest.approx(float(response.members.energy_uncertainty))
    doubt = response.members.forces_uncertainty.numpy()
    np.testing.assert_allclose(np.array(extras["forces_uncertainty"]) * HARTREE / BOHR, doubt)


def test_uncertainty_of_a_model_without_committee_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "start.xyz", start(), format="extxyz")
    options = ["evaluate", str(tmp_path / "start.xyz"), "--set", "output.uncertainty=true"]
    error = refused(capsys, *options, "--set", "model=water")
    assert "output.uncertainty: model water has no committee; this needs a model with a committee: train one" in error
    error = refused(capsys, *options, "--set", "charges.model=pqeq")
    assert "output.uncertainty needs a model with a committee" in error
    error = refused(capsys, *options[:3], "output.uncertainty=forxes", "--set", "model=water")
    assert "output.uncertainty" in error


def test_the_ghost_of_a_potentiostat_acts_in_every_member() -> None:
    """The mean of the members is the answer with the ghost, as it was without."""
    rng = np.random.default_rng(0)
    forces, virial, n, k = rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), 3, 5
    spreads = [rng.normal(size=(k, *shape)) for shape in ((), (3 * n,), (9,))]
    members = [
        (mean + s - s.mean(0)).tolist() for mean, s in zip((-4.0, forces.ravel(), virial.ravel()), spreads, strict=True)
    ]
    names = ("committee_pot", "committee_force", "committee_virial")
    extras_of = {**dict(zip(names, members, strict=True)), "forces_uncertainty": [0.1, 0.2, 0.3]}
    own = SimpleNamespace(_own=SimpleNamespace(scale=2.0), evaluator=SimpleNamespace(n_atoms=n))
    result = Potentiostat._with_ghost(own, Result(-4.0, forces, virial, extras_of), 0.3, 0.25, 0.05, 0.02)
    assert result.forces[3, 0] != 0
    assert result.energy != -4.0
    assert np.mean(result.extras["committee_pot"]) == pytest.approx(result.energy, abs=1e-14)
    np.testing.assert_allclose(np.mean(result.extras["committee_force"], axis=0), result.forces.ravel(), atol=1e-14)
    np.testing.assert_allclose(np.mean(result.extras["committee_virial"], axis=0), result.virial.ravel(), atol=1e-14)
    assert result.extras["forces_uncertainty"] == [0.1, 0.2, 0.3, 0.0]


# -- i-PI --------------------------------------------------------------------------------------------------------------


def trajectory(name: str) -> str:
    return f"<trajectory filename='{name}' stride='1' extra_type='{name}'> extras </trajectory>"


def prepared(folder: Path, model: Path, uncertainty: str, forcefield: str, *names: str) -> None:
    write(folder / "start.xyz", start(), format="extxyz")
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings_of(model, uncertainty)))
    text = INPUT.format(forcefield=forcefield, trajectories="\n    ".join(map(trajectory, names)))
    (folder / "input.xml").write_text(text)


def run(folder: Path) -> np.ndarray:
    """Runs i-PI with its drivers; step and potential (hartree) of every step."""
    command = [sys.executable, "-m", "voltpi.driver.cli", "run", "input.xml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return np.loadtxt(folder / "run.out", ndmin=2)


def extras(folder: Path, name: str) -> np.ndarray:
    """Numbers of every step, [steps, ...]."""
    text = (folder / f"run.{name}_0").read_text()
    parts = re.split(r"^ *#EXTRAS.*$", text, flags=re.MULTILINE)[1:]
    return np.array(
        [np.array(part.replace("[", " ").replace("]", " ").replace(",", " ").split(), float) for part in parts]
    )


def test_extras_of_a_run_in_ipi(trained: Path, tmp_path: Path) -> None:
    """Through a socket: the mean of the members is the potential, their standard deviation the uncertainty."""
    names = ("energy_uncertainty", "forces_uncertainty", "committee_pot")
    forcefield = "<ffsocket name='ff' mode='unix'> <address>voltpi-committee</address> </ffsocket>"
    prepared(tmp_path, trained, "forces", forcefield, *names)
    table = run(tmp_path)
    doubt, of_forces, members = (extras(tmp_path, name) for name in names)
    assert members.shape == (4, 6)
    np.testing.assert_allclose(members.mean(1), table[:, 1], rtol=0, atol=1e-7)  # i-PI prints nine digits
    np.testing.assert_allclose(members.std(1, ddof=1), doubt[:, 0], rtol=1e-5)
    assert of_forces.shape == (4, 6)
    assert np.ptp(doubt) > 0


@pytest.mark.parametrize("uncertainty", ["energy", "members"])
def test_ffcommittee_reads_all_members_from_one_driver(trained: Path, tmp_path: Path, uncertainty: str) -> None:
    """i-PI's own mean and uncertainty (its alpha is 1) are ours, and the trajectory is that without it."""
    parameters = "<parameters>{settings: settings.yaml, template: start.xyz}</parameters>"
    ff = f"<ffdirect name='NAME'> <pes>custom</pes> <pes_path>{pes.__file__}</pes_path> {parameters} </ffdirect>"
    plain, inside = tmp_path / "plain", tmp_path / "inside"
    plain.mkdir()
    inside.mkdir()
    prepared(plain, trained, uncertainty, ff.replace("NAME", "ff"), "energy_uncertainty", "committee_pot")
    names = ["committee_pot", "committee_uncertainty", "committee_energy_uncertainty", "committee_charges"]
    names += ["committee_force"] if uncertainty == "members" else []
    active = "<active_thresh>1e-6</active_thresh> <active_output>doubtful</active_output>"
    within = (
        f"<ffcommittee name='ff'> <parse_json>True</parse_json> {active} {ff.replace('NAME', 'all')} </ffcommittee>"
    )
    prepared(inside, trained, uncertainty, within, *names)
    one, two = run(plain), run(inside)
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-9)
    np.testing.assert_allclose(extras(inside, "committee_pot"), extras(plain, "committee_pot"), rtol=0, atol=1e-7)
    doubt = extras(plain, "energy_uncertainty")
    np.testing.assert_allclose(extras(inside, "committee_uncertainty"), doubt, rtol=1e-5)
    np.testing.assert_allclose(extras(inside, "committee_energy_uncertainty"), doubt, rtol=1e-5)
    assert (inside / "run.doubtful").read_text().count('"uncertainty"') == 4
    if uncertainty == "members":
        assert extras(inside, "committee_force").shape == (4, 6 * 6 * 3)


def test_check_knows_the_names_of_extras(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forcefield = "<ffsocket name='ff' mode='unix'> <address>voltpi-committee</address> </ffsocket>"
    prepared(tmp_path, trained, "energy", forcefield, "committee_force", "committee_pot")
    assert main(["check", str(tmp_path / "input.xml")]) == 2
    printed = capsys.readouterr()
    assert "extra_type='committee_force', which these settings do not give; set output.uncertainty: members" in (
        printed.out + printed.err
    )
    assert "committee_pot'" not in printed.out + printed.err
