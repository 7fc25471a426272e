"""The example energy-conservation: default settings conserve energy, forces at fixed, unconverged charges do not."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk

from voltpi.driver.evaluator import Evaluator
from voltpi.driver.settings import load_settings
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "energy-conservation"


def module(name: str) -> ModuleType:
    """A script of the example."""
    spec = importlib.util.spec_from_file_location(f"energy_conservation_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


figure, make_starts, runs, schemes = map(module, ("figure", "make_starts", "run", "schemes"))
PUBLISHED = np.load(ROOT / "tests" / "potential" / "data" / "reaxnet_taper.npz")
CRYSTALS = {
    # structure, time step (fs), steps, largest change of the energy (eV/atom): default, published
    "nacl": (bulk("NaCl", "rocksalt", 5.640, cubic=True).repeat(2), 0.5, 80, 1.5e-5, 2e-4),
    "batio3": (make_starts.perovskite("Ba", "Ti", "O", 4.00).repeat(2), 0.25, 120, 6e-5, 1.5e-4),
}


@functools.cache
def energies(system: str, scheme: str, timestep: float, steps: int) -> np.ndarray:
    """Total energy since the start [steps + 1], eV/atom: velocity Verlet from a rattled start at 300 K."""
    atoms, rng = CRYSTALS[system][0].copy(), np.random.default_rng(3)
    atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    evaluator = Evaluator.from_settings(load_settings(EXAMPLE / "settings" / f"{system}.yaml"), atoms)
    evaluator.potential.charges = schemes.charge_model(evaluator.potential.charges, scheme)
    mass, dt = atoms.get_masses()[:, None], timestep * units.fs
    p = rng.normal(size=atoms.positions.shape) * np.sqrt(mass * 300 * units.kB)
    p -= mass * p.sum(0) / mass.sum()
    r, cell, total = atoms.positions.copy(), np.asarray(atoms.cell)[None], []
    answer = evaluator.evaluate_systems(cell, r[None])
    for step in range(steps + 1):
        if step:
            p += 0.5 * dt * answer.forces.numpy()
            r += dt * p / mass
            answer = evaluator.evaluate_systems(cell, r[None])
            p += 0.5 * dt * answer.forces.numpy()
        total.append(float(answer.energy) + 0.5 * float((p**2 / mass).sum()))
    return (np.array(total) - total[0]) / len(atoms)


@pytest.mark.slow
@pytest.mark.parametrize("system", CRYSTALS)
def test_energy_is_conserved_by_default_and_not_by_forces_at_fixed_unconverged_charges(system):
    _, timestep, steps, allowed, violated = CRYSTALS[system]
    assert np.abs(energies(system, "default", timestep, steps)).max() < allowed
    assert np.abs(energies(system, "published", timestep, steps)).max() > violated


@pytest.mark.slow
def test_what_is_left_belongs_to_the_time_step():
    """Half the time step leaves a quarter of the fluctuation, as for the gradient of any smooth energy."""
    for scheme, lowest, highest in (("default", 3.6, 4.4), ("published", 0.0, 2.5)):
        coarse, fine = (np.abs(energies("nacl", scheme, dt, round(40 / dt))).max() for dt in (1.0, 0.5))
        assert lowest < coarse / fine < highest, scheme


@pytest.mark.parametrize("structure", ["Na9Cl8+", "water64", "BaTiO3"])
def test_forces_at_fixed_charges_are_those_of_the_published_code(structure):
    atoms = Atoms(
        str(PUBLISHED[f"{structure}/symbols"]).split("."),
        PUBLISHED[f"{structure}/positions"],
        cell=PUBLISHED[f"{structure}/cell"],
        pbc=True,
    )
    model = schemes.FixedChargeForces(
        cut="cores", cutoff=float(PUBLISHED[f"{structure}/cutoff"]), coulomb_constant=14.399645
    )
    system = Systems.from_atoms(atoms, net_charge=float(PUBLISHED[f"{structure}/net_charge"]))
    answer, forces = model.solve(system), PUBLISHED[f"{structure}/2/forces"]
    assert answer.energy.item() == pytest.approx(float(PUBLISHED[f"{structure}/2/energy"]), rel=1e-8)
    assert np.abs(answer.forces.numpy()[: len(forces)] - forces).max() < 1e-6


def test_an_unknown_scheme_is_refused():
    with pytest.raises(InputError, match="scheme is 'seed': choose published"):
        schemes.charge_model(PQEq(), "seed")


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """Start structures, three runs of eight steps through i-PI, table and figure."""
    folder = tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", ["make_starts.py", str(folder / "starts")])
    make_starts.main()
    assert {path.stem for path in (folder / "starts").iterdir()} == {"nacl", "batio3", "cspbi3", "water"}
    monkeypatch.setattr(sys, "argv", ["run.py", "nacl", "--runs", str(folder), "--steps", "8"])
    assert runs.main() == 0
    monkeypatch.setattr(sys, "argv", ["figure.py", "--runs", str(folder), "--out", str(tmp_path / "figure.png")])
    capsys.readouterr()
    figure.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in rows] == ["default", "published", "taper"]
    assert [float(row[-1].rstrip(" |")) < 1e-8 for row in rows] == [True, False, False]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
