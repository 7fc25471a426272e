"""The electrodes' charge as a degree of freedom: its energy and forces, its statistics in i-PI, and what is refused."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import capacitor
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.io import read
from capacitor import KT, UNIX, direct, printed, write_run
from numpy.typing import NDArray

from voltpi.driver.check import check, refuse_starts
from voltpi.driver.cli import main
from voltpi.driver.client import evaluate_batch
from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator
from voltpi.driver.ipi_input import read_input
from voltpi.driver.potentiostat import Potentiostat, period, run_evaluator
from voltpi.driver.protocol import Structures
from voltpi.driver.settings import load_settings
from voltpi.potential.errors import InputError, VoltPIError

from ipi_runs import LIMIT, rows, until

Array = NDArray[np.float64]
pytestmark = pytest.mark.timeout(180)

SCALE = 2.5
CHARGE = 0.21


def ions() -> Atoms:
    """Two ions of a salt between small plates, periodic in their plane; the ghost last."""
    square = np.array([[x, y, 0.0] for x in (0, 1) for y in (0, 1)]) * 2.9
    r = np.vstack([square, square + np.array([0.3, 0.1, 9.0]), [[1.2, 1.9, 3.4], [3.1, 2.2, 5.9]]])
    atoms = Atoms("Au8NaCl", r, cell=[5.8, 5.8, 30.0], pbc=(True, True, False))
    atoms.set_initial_charges([0.0] * 8 + [1.0, -1.0])
    return atoms + Atoms("X", [[CHARGE * SCALE, 0, 0]])


def salt(own: dict[str, Any] | None = None, **held: Any) -> Any:
    held = held or {"left": {"charge": 0}, "right": {"charge": 0}}
    electrodes = [
        {"name": "left", "atoms": "index 0:4", "eta": 1.8, **held["left"]},
        {"name": "right", "atoms": "index 4:8", "eta": 1.8, **held["right"]},
    ]
    pair = {name: {"epsilon": 0.01, "sigma": 2.5} for name in ("Au", "Na", "Cl")}
    tree: dict[str, Any] = {
        "short_range": {"pair": {"lennard_jones": pair}},
        "charges": {"model": "fixed"},
        "coulomb": {"accuracy": 1e-9},
        "precision": "double",
        "device": "cpu",
        "electrodes": electrodes,
    }
    if own is not None:
        tree["potentiostat"] = {"electrodes": ["left", "right"], "scale": SCALE, **own}
    return load_settings(overrides=tree)


def wire(atoms: Atoms) -> tuple[Array, Array]:
    return np.asarray(atoms.cell).T[None] / BOHR, atoms.positions[None] / BOHR


# energy, forces, virial -----------------------------------------------------------------------------------------------


def test_forces_are_derivatives_also_that_on_the_charge() -> None:
    potentiostat = run_evaluator(salt({"potential": 0.8}), ions())
    h, r = wire(ions())
    forces, step = potentiostat.evaluate(h, r)[0].forces, 1e-3
    assert forces.shape == (11, 3)
    for atom, axis in [(10, 0), (8, 0), (8, 2), (9, 1), (1, 2), (6, 0)]:
        shift = np.zeros_like(r)
        shift[0, atom, axis] = step
        up, down = (potentiostat.evaluate(h, r + s * shift)[0].energy for s in (1, -1))
        assert forces[atom, axis] == pytest.approx((down - up) / (2 * step), abs=1e-8), (atom, axis)
    assert abs(forces[10, 0]) > 1e-3
    assert not forces[10, 1:].any()


def test_the_virial_is_that_of_a_ghost_that_scales_with_the_cell() -> None:
    potentiostat = run_evaluator(salt({"potential": 0.8}), ions())
    h, r = wire(ions())
    virial, step = potentiostat.evaluate(h, r)[0].virial, 1e-4

    def energy(strain: Array) -> float:
        f = np.eye(3) + strain
        return potentiostat.evaluate(f @ h, r @ f.T)[0].energy

    for a, b in [(0, 0), (1, 1)]:
        strain = np.zeros((3, 3))
        strain[a, b] = step
        assert virial[a, b] == pytest.approx((energy(-strain) - energy(strain)) / (2 * step), abs=2e-7)


def test_the_charge_rests_where_the_instantaneous_charge_would_be() -> None:
    held = {"left": {"potential": -0.4}, "right": {"potential": 0.4}}
    atoms = ions()
    h, r = wire(atoms)
    instantaneous = Evaluator.from_settings(salt(**held), atoms[:-1]).evaluate(h, r[:, :-1])[0]
    potentiostat = run_evaluator(salt({"potential": 0.8}), atoms)
    r[0, -1, 0] = instantaneous.extras["electrode_charges"][1] * SCALE / BOHR
    result = potentiostat.evaluate(h, r)[0]
    assert result.energy == pytest.approx(instantaneous.energy, abs=1e-9)
    np.testing.assert_allclose(result.forces[:-1], instantaneous.forces, atol=1e-8)
    assert abs(result.forces[-1, 0]) < 1e-9
    low, high = result.extras["electrode_potentials"]
    assert (high - low) * HARTREE == pytest.approx(0.8, abs=1e-7)
    assert result.extras["potentiostat_target"] * HARTREE == pytest.approx(0.8)
    assert result.extras["charges"] == pytest.approx([*instantaneous.extras["charges"], 0.0], abs=1e-8)


def test_capacitance_and_period() -> None:
    atoms = capacitor.structure(0.1)
    atoms.set_initial_charges(np.zeros(len(atoms)))
    potentiostat = run_evaluator(load_settings(overrides=capacitor.potentiostat(1.0)), atoms)
    assert isinstance(potentiostat, Potentiostat)
    c = potentiostat.capacitance(np.asarray(atoms.cell), atoms.positions)
    assert c == pytest.approx(capacitor.capacitance(), rel=1e-8)
    # from the curvature along x, in atomic units: 1 amu = 1822.888486 electron masses, 1 fs = 41.341373336
    h, r = wire(atoms)
    step = np.zeros_like(r)
    step[0, -1, 0] = 0.01
    up, down = (potentiostat.evaluate(h, r + s * step)[0].forces[-1, 0] for s in (1, -1))
    curvature = (down - up) / 0.02
    fs = 2 * np.pi * np.sqrt(30 * 1822.888486 / curvature) / 41.341373336
    assert period(c, 30.0, 1.0) == pytest.approx(fs, rel=1e-6)


# beads ----------------------------------------------------------------------------------------------------------------


def ring(beads: int) -> tuple[Array, Array]:
    h, r = wire(ions())
    noise = np.random.default_rng(3).normal(scale=0.05, size=(beads, *r.shape[1:]))
    noise[:, -1, 1:] = 0
    return np.repeat(h, beads, axis=0), r + noise


def test_beads_that_share_a_charge_feel_its_mean_force() -> None:
    potentiostat = run_evaluator(salt({"potential": 0.8, "beads": 3}), ions())
    h, r = ring(3)
    results = potentiostat.evaluate(h, r)
    own = r[:, -1, 0] * BOHR / SCALE
    assert [x.extras["potentiostat_charge"] for x in results] == pytest.approx(own)
    assert [x.extras["electrode_charges"][1] for x in results] == pytest.approx([own.mean()] * 3)

    def total(r: Array) -> float:
        return sum(x.energy for x in potentiostat.evaluate(h, r))

    step = 1e-3
    for bead, atom, axis in [(0, 10, 0), (2, 10, 0), (1, 8, 2)]:
        shift = np.zeros_like(r)
        shift[bead, atom, axis] = step
        force = (total(r - shift) - total(r + shift)) / (2 * step)
        assert results[bead].forces[atom, axis] == pytest.approx(force, abs=1e-8)
    alone = run_evaluator(salt({"potential": 0.8}), ions()).evaluate(h, r)
    assert [x.extras["electrode_charges"][1] for x in alone] == pytest.approx(own)
    assert np.ptp([x.forces[-1, 0] for x in alone]) > 1e-4
    assert np.ptp([x.forces[-1, 0] for x in results]) == 0


def test_a_shared_charge_needs_whole_batches() -> None:
    potentiostat = run_evaluator(salt({"potential": 0.8, "beads": 3}), ions())
    h, r = ring(3)
    with pytest.raises(VoltPIError, match=r"beads is 3 but a batch of 2 came.*<batch_size>3"):
        potentiostat.evaluate(h[:2], r[:2])
    # at the start all beads are equal, and they are no padding
    same = Structures(h, np.repeat(r[:1], 3, axis=0))
    assert len(evaluate_batch(potentiostat, same)) == 3


# settings and structures that cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"electrodes": ["left"]}, "give the names of the two electrodes"),
        ({"electrodes": ["left", "left"]}, "give the names of the two electrodes"),
        ({"electrodes": ["left", "top"]}, "there is no electrode top; there are left, right"),
        ({"potential": "high"}, "expected a number (V), or one of ramp, square, cyclic and table"),
        ({"scale": 0}, "potentiostat.scale is 0"),
        ({"mass": 3}, "unknown key potentiostat.mass"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], words: str) -> None:
    tree = capacitor.potentiostat(1.0)
    tree["potentiostat"] |= change
    with pytest.raises(InputError, match=re.escape(words)):
        load_settings(overrides=tree)


@pytest.mark.parametrize(
    ("held", "words"),
    [({"potential": 0.5}, "right has a potential but"), ({"charge": 0.5}, "right has a charge of 0.5 e but")],
)
def test_the_charge_is_the_potentiostats(held: dict[str, float], words: str) -> None:
    tree = capacitor.potentiostat(1.0)
    tree["electrodes"] = capacitor.electrodes(left={"charge": 0}, right=held)
    with pytest.raises(InputError, match=words):
        load_settings(overrides=tree)


def test_structures_without_the_ghost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"with the label X, but here it is Cl; add a line 'X x 0 0'"):
        run_evaluator(salt({"potential": 0.8}), ions()[:-1])
    moved = ions()
    moved.positions[-1, 2] = 3.0
    with pytest.raises(InputError, match="z = 3 Å; put it at y = z = 0"):
        run_evaluator(salt({"potential": 0.8}), moved)
    with pytest.raises(InputError, match="atom 10 is the dummy element X, which is for runs with a potentiostat"):
        Evaluator.from_settings(salt(left={"charge": 0}, right={"charge": 0}), ions())
    xml = write_run(tmp_path, capacitor.potentiostat(1.0), charge=0.1, mass=30)
    assert main(["evaluate", str(xml.with_name("start.xyz")), "--settings", str(xml.with_name("settings.yaml"))]) == 2
    assert "potentiostat is for a run in i-PI" in capsys.readouterr().err


# inputs of i-PI that would be wrong -----------------------------------------------------------------------------------

GHOST = 2 * capacitor.PLATE + 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<fixcom> False </fixcom>", "", "<fixcom> is True (as it is where it is not given)"),
        ("<fixcom> False", "<fixcom> True", "write <fixcom>False</fixcom>"),
        ("name='ff'>", "name='ff' pbc='True'>", "pbc='True' would fold the potentiostat's charge"),
        ("mode='langevin'", "mode='svr'", "<thermostat mode='svr'> scales all momenta alike"),
        (f", {3 * GHOST + 2}]", "]", f"its degrees of freedom {3 * GHOST + 2} (y, z) are free"),
        (
            f", {3 * GHOST + 1},",
            f", {3 * GHOST}, {3 * GHOST + 1},",
            f"<fixatoms_dof> holds {3 * GHOST}, the potentiostat's charge",
        ),
        ("fixatoms_dof> [0, 1", "fixatoms> [0, 1", "<fixatoms> excludes <fixatoms_dof>"),
        (f"index='{GHOST}'", "index='3'", f"X (atom {GHOST}) would weigh one electron"),
        ("mode='nvt'", "mode='sc'", "<dynamics mode='sc'> may ask for more"),
        ("<timestep", "<nmts> [2] </nmts> <timestep", "<nmts> asks for several"),
        ("forcefield='ff'/>", "forcefield='ff'/> <force forcefield='ff'/>", "2 <force> tags ask for it"),
    ],
)
def test_inputs_that_would_be_wrong(tmp_path: Path, old: str, new: str, words: str) -> None:
    xml = write_run(tmp_path, capacitor.potentiostat(1.0), charge=0.1, mass=30)
    text = xml.read_text()
    assert old in text
    refuse_starts(read_input(xml), {})
    text = text.replace(old, new, 1)
    if new.startswith("fixatoms>"):
        text = text.replace("</fixatoms_dof>", "</fixatoms>")
    xml.write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        refuse_starts(read_input(xml), {})


@pytest.mark.parametrize(
    ("shared", "beads", "options", "words"),
    [
        (4, 2, "<batch_size>2</batch_size>", "potentiostat.beads is 4 but the run has nbeads='2'"),
        (4, 4, "<batch_size>2</batch_size>", "use <ffdirect> (not threaded) with <batch_size>4</batch_size>"),
        (4, 4, "unix", "use <ffdirect> (not threaded) with <batch_size>4</batch_size>"),
    ],
)
def test_a_shared_charge_and_how_beads_come(tmp_path: Path, shared: int, beads: int, options: str, words: str) -> None:
    forcefield = UNIX if options == "unix" else direct(options)
    tree = capacitor.potentiostat(1.0, beads=shared)
    xml = write_run(tmp_path, tree, charge=0.1, mass=30, beads=beads, forcefield=forcefield)
    with pytest.raises(InputError, match=re.escape(words)):
        refuse_starts(read_input(xml), {"ff": tmp_path / "settings.yaml"})


@pytest.mark.parametrize(
    ("mass", "beads", "words"),
    [
        (0.1, 1, r"period of 7\.38 fs, too short for a timestep of 4 fs; use 12 amu or more"),
        (20, 4, r"make its variance \d+\.\d% too large; use (\d+) amu or more \(or potentiostat\.beads\)"),
        (1e8, 1, r"hint: .* slow for a run of 4 ps; try 74 amu, or run longer"),
        (
            30,
            1,
            r"with all atoms held, is 0\.13313 e/V, and the potentiostat's charge of 30 amu has a period of 128 fs$",
        ),
    ],
)
def test_check_knows_a_good_mass(tmp_path: Path, mass: float, beads: int, words: str) -> None:
    xml = write_run(tmp_path, capacitor.potentiostat(1.0), charge=0.1, mass=mass, beads=beads, steps=1000)
    found = list(check(xml))
    hits = [f for f in found if re.search(words, f.sentence)]
    assert len(hits) == 1, [f.sentence for f in found]
    assert hits[0].ok == (mass >= 30)
    if match := re.search(r"too large; use (\d+) amu", hits[0].sentence):
        # that mass leaves 1%
        fs = period(capacitor.capacitance(), float(match[1]), 1.0)
        y = 2 * np.pi * 0.6582119569 / (fs * KT)
        assert y / 2 / np.tanh(y / 2) - 1 == pytest.approx(0.01, rel=0.05)


# in i-PI --------------------------------------------------------------------------------------------------------------


def test_charge_and_potential_have_their_mean_and_variance(tmp_path: Path) -> None:
    """Linear, so ⟨n⟩ = Cψ, ⟨ψ⟩ = ψ, var n = kT C and var ψ = kT/C; wrong input makes these wrong by a factor."""
    target, c = 0.7, capacitor.capacitance()
    tree = capacitor.potentiostat(target)
    xml = write_run(tmp_path, tree, charge=0.1, mass=30, steps=900, timestep=5, thermostat="langevin")
    assert main(["run", str(xml), "--quiet"]) == 0
    n = printed(tmp_path, "electrode_charges")[100:, 1]
    low, high = HARTREE * printed(tmp_path, "electrode_potentials")[100:].T
    assert len(n) == 801
    # correlated over about 8 steps: 100 independent values
    assert n.mean() == pytest.approx(c * target, abs=3.5 * np.sqrt(KT * c / 100))
    assert (high - low).mean() == pytest.approx(target, abs=3.5 * np.sqrt(KT / c / 100))
    assert 0.65 < n.var() / (KT * c) < 1.45
    np.testing.assert_allclose(high - low, n / c, atol=1e-6)
    start, end = (read(tmp_path / "run.pos_0.xyz", index=i, format="xyz") for i in (0, -1))
    assert not end.positions[-1, 1:].any()
    np.testing.assert_allclose(end.positions[: 2 * capacitor.PLATE], start.positions[: 2 * capacitor.PLATE])
    assert np.abs(end.positions[-3:-1] - start.positions[-3:-1]).max() > 0.05


@pytest.mark.parametrize(("held", "forcefield"), [("charge", direct()), ("potential", UNIX)])
def test_constant_charge_and_instantaneous_constant_potential(tmp_path: Path, held: str, forcefield: str) -> None:
    tree = capacitor.settings(electrodes=capacitor.electrodes(left={held: -0.3}, right={held: 0.3}))
    xml = write_run(tmp_path, tree, steps=10, forcefield=forcefield)
    assert main(["run", str(xml), "--quiet"]) == 0
    charges = printed(tmp_path, "electrode_charges")
    potentials = HARTREE * printed(tmp_path, "electrode_potentials")
    assert charges.shape == potentials.shape == (11, 2)
    given = charges if held == "charge" else potentials
    np.testing.assert_allclose(given, np.repeat([[-0.3, 0.3]], 11, axis=0), atol=1e-10)
    np.testing.assert_allclose(charges[:, 1], capacitor.capacitance() * np.ptp(potentials, axis=1), atol=1e-8)


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, processes: Any) -> None:
    def write(folder: Path) -> Path:
        return write_run(folder, capacitor.potentiostat(0.7), charge=0.1, mass=30, steps=45)

    whole, killed = write(tmp_path / "whole"), write(tmp_path / "killed")
    assert main(["run", str(whole), "--quiet"]) == 0
    ipi = processes.ipi(killed)
    assert until(lambda: rows(killed.parent) > 16)
    ipi.send_signal(signal.SIGKILL)
    ipi.wait(LIMIT)
    again = killed.with_name("again.xml")
    (killed.with_name("run.chk")).rename(again)
    first = read_input(again).first_step
    assert first in range(7, 45, 7)
    killed.with_name("run.out").unlink()
    killed.with_name("run.electrode_charges_0").unlink()
    assert main(["run", str(again), "--quiet"]) == 0
    expected, found = (np.loadtxt(folder / "run.out") for folder in (whole.parent, killed.parent))
    assert len(found) == 45 - first
    # not bit by bit: the solution of the charges starts from elsewhere
    np.testing.assert_allclose(found, expected[first + 1 :], rtol=1e-9, atol=1e-9)
    charges = [printed(folder, "electrode_charges") for folder in (whole.parent, killed.parent)]
    np.testing.assert_allclose(charges[1], charges[0][first + 1 :], atol=1e-9)


def test_a_socket_gives_the_same_trajectory(tmp_path: Path) -> None:
    tree = capacitor.potentiostat(0.7)
    for name, forcefield in (("direct", ""), ("unix", UNIX)):
        xml = write_run(tmp_path / name, tree, charge=0.1, mass=30, steps=15, forcefield=forcefield)
        assert main(["run", str(xml), "--quiet"]) == 0
    tables = [np.loadtxt(tmp_path / name / "run.out") for name in ("direct", "unix")]
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-9, atol=1e-9)
    assert np.ptp(printed(tmp_path / "unix", "electrode_charges")[:, 1]) > 1e-3


def test_path_integrals_with_a_classical_charge(tmp_path: Path) -> None:
    extras = ("electrode_charges", "electrode_potentials", "potentiostat_charge")
    xml = write_run(
        tmp_path,
        capacitor.potentiostat(0.7, beads=4),
        charge=0.1,
        mass=30,
        beads=4,
        steps=20,
        forcefield=direct("<batch_size>4</batch_size>"),
        extras=extras,
    )
    assert main(["run", str(xml), "--quiet"]) == 0
    own = np.array([printed(tmp_path, "potentiostat_charge", bead)[:, 0] for bead in range(4)])
    used = np.array([printed(tmp_path, "electrode_charges", bead)[:, 1] for bead in range(4)])
    assert own.shape == used.shape == (4, 21)
    assert np.ptp(own[:, -1]) > 1e-4
    np.testing.assert_allclose(used, np.repeat(own.mean(axis=0)[None], 4, axis=0), atol=1e-12)
    assert yaml.safe_load((tmp_path / "settings.yaml").read_text())["potentiostat"]["beads"] == 4
