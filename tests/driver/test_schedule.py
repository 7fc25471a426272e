"""Voltages as functions of time: their shapes, and the clock in real runs, from the start and from a checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import capacitor
import numpy as np
import pytest
from capacitor import UNIX, direct, printed, write_run
from numpy.typing import NDArray

from voltpi.driver import launch, pes, schedule
from voltpi.driver.check import check
from voltpi.driver.cli import main
from voltpi.driver.client import UnixAddress, serve
from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator
from voltpi.driver.ipi_input import read_input
from voltpi.driver.potentiostat import run_evaluator
from voltpi.driver.schedule import Scheduled, Steps, extreme_times, outside_at, value_at
from voltpi.driver.settings import Clock, Settings, load_settings
from voltpi.potential.errors import InputError, VoltPIError

from ipi_runs import LIMIT, Processes, rows, until

Array = NDArray[np.float64]
pytestmark = pytest.mark.timeout(180)

RAMP = {"ramp": {"start": -0.2, "rate": 20.0, "until": 1.0}}
EXTRAS = ("electrode_charges", "electrode_potentials", "step")


def voltage(right: Any = RAMP) -> dict[str, Any]:
    return capacitor.settings(electrodes=capacitor.electrodes(left={"potential": 0.1}, right={"potential": right}))


def tree(right: Any = RAMP, **more: Any) -> Settings:
    return load_settings(overrides={**voltage(right), **more})


# shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "at"),
    [
        (0.3, {0: 0.3, 7: 0.3}),
        ({"ramp": {"start": 0.5, "rate": 0.1, "until": 1.0}}, {0: 0.5, 2: 0.7, 5: 1.0, 9: 1.0}),
        ({"ramp": {"start": 0.5, "rate": 0.1, "until": -1}}, {0: 0.5, 2: 0.3, 15: -1.0, 20: -1.0}),
        ({"square": {"low": -1, "high": 2, "period": 3}}, {0: -1, 1.4999: -1, 1.5: 2, 2.9: 2, 3: -1, 4.6: 2}),
        ({"cyclic": {"low": -1, "high": 1, "rate": 0.5}}, {0: -1, 2: 0, 4: 1, 5: 0.5, 8: -1, 9: -0.5, 12: 1}),
        ({"cyclic": {"low": -1, "high": 1, "rate": 0.5, "start": 0}}, {0: 0, 2: 1, 6: -1, 7: -0.5, 8: 0}),
        ({"table": {"times": [1, 2, 4], "values": [0, 1, -1]}}, {0: 0, 1: 0, 1.5: 0.5, 3: 0, 4: -1, 99: -1}),
    ],
)
def test_shapes(shape: Any, at: dict[float, float]) -> None:
    potential = tree(shape).electrodes[1].potential
    assert potential is not None
    assert {t: value_at(potential, t) for t in at} == pytest.approx(at, abs=1e-12)


def test_a_square_wave_jumps_at_its_step_and_not_one_later() -> None:
    square = tree({"square": {"low": 0, "high": 1, "period": 0.006}}).electrodes[1].potential
    assert square is not None
    times = Steps(Clock(timestep=0.1)).times(np.arange(6000))
    high = np.array([value_at(square, t) for t in times]).reshape(-1, 30)
    assert (high == np.array([0.0, 1.0] * 100)[:, None]).all()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"ramp": {"start": 0, "rate": -1, "until": 1}}, "electrodes.1.potential.ramp.rate is -1"),
        ({"ramp": {"start": 0, "rate": 1}}, "electrodes.1.potential.ramp.until is missing"),
        ({"ramp": {"start": 0, "rate": 1, "until": 1, "then": 0}}, "unknown key electrodes.1.potential.ramp.then"),
        ({"saw": {"low": 0}}, "unknown key electrodes.1.potential.saw"),
        ({"squar": {"low": 0}}, "did you mean electrodes.1.potential.square?"),
        ({}, "give exactly one of ramp, square, cyclic and table"),
        ({"cyclic": {"low": 1, "high": 0, "rate": 1}}, "low must lie below high"),
        ({"cyclic": {"low": 0, "high": 1, "rate": 1, "start": 2}}, "start must lie between low and high"),
        ({"table": {"times": [0, 1], "values": [0]}}, "as many values as times (2 times and 1 values)"),
        ({"table": {"times": [0, 1, 1], "values": [0, 1, 2]}}, "times must increase"),
        ([0, 1], "expected a number (V), or one of ramp, square, cyclic and table"),
    ],
)
def test_shapes_that_cannot_be(shape: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        tree(shape)


def test_settings_that_contradict() -> None:
    with pytest.raises(InputError, match="clock is for potentials and fields that change with time"):
        tree(0.5, clock={"timestep": 1.0})
    finite = {"coulomb": {"boundary": "finite-field-z"}}
    assert tree(**finite).scheduled == ["electrodes.1.potential"]
    with pytest.raises(InputError, match=r"electrodes\.1\.potential is for a run in i-PI"):
        Evaluator.from_settings(tree(), capacitor.structure())


# the clock ------------------------------------------------------------------------------------------------------------


def test_structures_are_counted() -> None:
    steps = Steps(Clock(timestep=0.5, first_step=10, beads=4))
    seen = []
    for b in (1, 3, 4, 2, 2):
        now = steps.of(b)
        assert (steps.of(b) == now).all()  # asking is not counting
        steps.count(now)
        seen += now.tolist()
    assert seen == [10] * 4 + [11] * 4 + [12] * 4
    assert steps.times(np.array([12])) == pytest.approx([0.006])
    with pytest.raises(VoltPIError, match="this driver has no clock: start the run with `voltpi run`"):
        Steps(None).of(1)


def test_a_failed_evaluation_is_not_counted() -> None:
    atoms = capacitor.structure()
    atoms.set_initial_charges(np.zeros(len(atoms)))
    scheduled = run_evaluator(tree(clock={"timestep": 10.0}), atoms)
    assert isinstance(scheduled, Scheduled)
    h, r = np.asarray(atoms.cell).T[None] / BOHR, atoms.positions[None] / BOHR
    broken = r * np.nan
    found = []
    for positions in (r, broken, r, broken, broken, r):
        try:
            extras = scheduled.evaluate(h, positions)[0].extras
            found.append((extras["step"], extras["electrode_potentials"][1] * HARTREE))
        except VoltPIError:
            pass
    assert [step for step, _ in found] == [0, 1, 2]
    assert [v for _, v in found] == pytest.approx([-0.2, 0.0, 0.2])  # 20 V/ps, 10 fs


def test_a_driver_that_counts_may_not_connect_again() -> None:
    class Counting:
        counts_structures = True
        n_atoms = 1

        def evaluate(self, cells: Array, positions: Array, replicas: Any = None) -> list[Any]:
            return []

    with pytest.raises(InputError, match="would have lost count; leave --reconnects at 0"):
        serve(Counting(), UnixAddress("nowhere"), reconnects=1)


@pytest.mark.parametrize(
    ("shape", "time"),
    [
        ({"ramp": {"start": 0, "rate": 0.1, "until": 0.5}}, 5.0),
        ({"ramp": {"start": -0.5, "rate": 0.1, "until": 0.5}}, None),
        ({"square": {"low": -0.1, "high": 0.2, "period": 3}}, 1.5),
        ({"square": {"low": -0.3, "high": 0.2, "period": 3}}, None),
        ({"cyclic": {"low": -0.1, "high": 0.2, "start": 0.1, "rate": 0.1}}, 1.0),
        ({"cyclic": {"low": -0.3, "high": 0.2, "start": 0.1, "rate": 0.1}}, 6.0),
        ({"table": {"times": [-9, 1, 2, 3], "values": [90, 0, -4, 3]}}, None),
        ({"table": {"times": [0, 1, 2, 3], "values": [0, 1, -4, 3]}}, 2.0),
    ],
)
def test_when_something_is_largest(shape: Any, time: float | None) -> None:
    settings = load_settings(overrides={"charges.model": "fixed", "field": [0, shape, 0.1]})
    assert extreme_times(settings) == ([] if time is None else [pytest.approx(time, abs=1e-12)])
    if time is not None:
        fields = np.abs(outside_at(settings, np.linspace(0, 12, 2401))["fields"][:, 1])
        assert abs(outside_at(settings, np.array([time]))["fields"][0, 1]) == pytest.approx(fields.max(), abs=1e-12)


# in i-PI --------------------------------------------------------------------------------------------------------------


def follows(folder: Path, steps: int, beads: int, right: Any = RAMP, first: int = 0) -> None:
    """Whether every step i-PI printed was evaluated at its own time."""
    potential = tree(right).electrodes[1].potential
    assert potential is not None
    expected = [value_at(potential, 4e-3 * step) for step in range(first, steps + 1)]
    time = np.loadtxt(folder / "run.out")[:, 1]
    np.testing.assert_allclose(time, 4e-3 * np.arange(first, steps + 1), rtol=1e-12)
    for bead in range(beads):
        assert printed(folder, "step", bead)[:, 0].tolist() == list(range(first, steps + 1))
        found = HARTREE * printed(folder, "electrode_potentials", bead)
        np.testing.assert_allclose(found[:, 0], 0.1, atol=1e-14)
        np.testing.assert_allclose(found[:, 1], expected, atol=1e-13)


@pytest.mark.parametrize(
    ("beads", "forcefield"),
    [
        (4, direct("<batch_size>2</batch_size>")),
        (4, direct().replace("name='ff'", "name='ff' threaded='True'", 1)),
        (4, UNIX),
    ],
)
def test_every_step_has_its_voltage_also_after_a_restart(tmp_path: Path, beads: int, forcefield: str) -> None:
    xml = write_run(tmp_path, voltage(), steps=7, beads=beads, forcefield=forcefield, extras=EXTRAS)
    assert main(["run", str(xml), "--quiet"]) == 0
    follows(tmp_path, 7, beads)
    restart = tmp_path / "RESTART"
    restart.write_text(restart.read_text().replace("<total_steps>7<", "<total_steps>11<"))
    assert main(["run", str(restart), "--quiet"]) == 0
    follows(tmp_path, 11, beads)
    charges = printed(tmp_path, "electrode_charges")[:, 1]
    rise = np.array([20.0 * 4e-3] * 11) * capacitor.capacitance()
    np.testing.assert_allclose(np.diff(charges), rise, atol=1e-9)


CYCLE = {"cyclic": {"low": -0.5, "high": 0.5, "rate": 30.0, "start": 0.2}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["run", str(write_run(folder, voltage(CYCLE), steps=24, extras=EXTRAS)), "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("forcefield", [direct(), UNIX])
def test_a_killed_run_goes_on_at_the_same_time(tmp_path: Path, whole: Path, forcefield: str) -> None:
    follows(whole, 24, 1, CYCLE)
    xml = write_run(tmp_path, voltage(CYCLE), steps=24, forcefield=forcefield, extras=EXTRAS)
    run = subprocess.Popen([sys.executable, "-m", "voltpi.driver.cli", "run", str(xml), "--quiet"])
    assert until(lambda: rows(tmp_path) > 9)
    ipi = next(child for child in _children(run.pid) if "i-pi" in Path(f"/proc/{child}/cmdline").read_text())
    assert until(lambda: _stopped_with_checkpoint(ipi, tmp_path / "run.chk"))
    os.kill(ipi, signal.SIGKILL)
    assert run.wait(LIMIT) == 1
    again = tmp_path / "again.xml"
    (tmp_path / "run.chk").rename(again)
    first = read_input(again).first_step
    assert first in (7, 14, 21)
    for old in (tmp_path / "run.out", *(next(tmp_path.glob(f"run.{name}_0")) for name in EXTRAS)):
        old.unlink()
    assert main(["run", str(again), "--quiet"]) == 0
    follows(tmp_path, 24, 1, CYCLE, first=first + 1)
    expected, found = (np.loadtxt(folder / "run.out") for folder in (whole, tmp_path))
    # not bit by bit: the solution of the charges starts from elsewhere
    np.testing.assert_allclose(found, expected[first + 1 :], rtol=1e-9, atol=1e-9)


def _stopped_with_checkpoint(pid: int, checkpoint: Path) -> bool:
    """Stops i-PI where it is not just writing its checkpoint, which it does in place."""
    os.kill(pid, signal.SIGSTOP)
    if checkpoint.read_text().rstrip().endswith("</simulation>"):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_target_of_a_potentiostat_changes_too(tmp_path: Path) -> None:
    xml = write_run(
        tmp_path,
        capacitor.potentiostat(RAMP),
        charge=0.1,
        mass=30,
        steps=6,
        extras=("potentiostat_target", "step", "electrode_potentials"),
    )
    assert main(["run", str(xml), "--quiet"]) == 0
    target = HARTREE * printed(tmp_path, "potentiostat_target")[:, 0]
    np.testing.assert_allclose(target, -0.2 + 20.0 * 4e-3 * np.arange(7), atol=1e-13)
    assert printed(tmp_path, "step")[:, 0].tolist() == list(range(7))


def test_a_driver_that_counts_takes_no_batches(tmp_path: Path, processes: Processes) -> None:
    batch = UNIX.replace("</address>", "</address> <batch_size>2</batch_size>")
    xml = write_run(tmp_path, voltage(), forcefield=batch)
    processes.ipi(xml)
    command = [sys.executable, "-m", "voltpi.driver.cli", "drive", "--settings", "settings.yaml"]
    command += ["--set", "clock.timestep=4", "--unix", "capacitor", "--socket-prefix", processes.prefix]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=LIMIT, text=True)
    assert done.returncode == 1
    assert "i-PI sends batches of 2, which it fills up with copies over sockets" in done.stderr


def test_ipis_own_driver_takes_no_batches_either(tmp_path: Path) -> None:
    write_run(tmp_path, {**voltage(), "clock": {"timestep": 10.0}})
    surface = pes.VoltPI(settings=str(tmp_path / "settings.yaml"), template=str(tmp_path / "start.xyz"))
    atoms = capacitor.structure()
    h, r = np.asarray(atoms.cell).T / BOHR, atoms.positions / BOHR
    found = [json.loads(surface.compute(h, r)[3]) for _ in range(2)]
    assert [extras["step"] for extras in found] == [0, 1]
    with pytest.raises(SystemExit, match="i-PI sends batches of 2, which it fills up"):
        surface.compute([h, h], [r, r])


# refused before anything starts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("</address>", "</address> <batch_size>4</batch_size>", "<batch_size> 4: i-PI fills batches up with copies"),
        ("mode='nvt'", "mode='eda-nvt'", "<dynamics mode='eda-nvt'> may ask for more"),
        ("<motion mode='dynamics'>", "<motion mode='minimize'>", "may ask for more; use nve, nvt, npt or nst"),
        ("<timestep", "<nmts> [1, 4] </nmts> <timestep", "<nmts> asks for several"),
        ("forcefield='ff'/>", "forcefield='ff' nbeads='2'/>", "<force nbeads='2'> evaluates 2 of 4"),
        ("</system>", "</system> <smotion mode='remd'> <remd/> </smotion>", "one <system> and no <smotion>"),
        ("<timestep units='femtosecond'> 4.0 </timestep>", "", "<timestep> is missing or no number"),
    ],
)
def test_inputs_in_which_no_driver_could_count(tmp_path: Path, old: str, new: str, words: str) -> None:
    xml = write_run(tmp_path, voltage(), beads=4, forcefield=UNIX)
    text = xml.read_text()
    assert old in text
    xml.write_text(text.replace(old, new, 1))
    plan = read_input(xml)
    problems = list(schedule.refusals(plan, plan.sockets[0], tree()))
    assert len(problems) >= 1
    assert any(words in problem for problem in problems), problems
    with pytest.raises(InputError, match="potential"):
        launch.run(xml)
    assert any(not f.ok and words in f.sentence for f in check(xml))


def test_more_drivers_and_other_clocks(tmp_path: Path) -> None:
    xml = write_run(tmp_path, voltage(), forcefield=UNIX)
    with pytest.raises(InputError, match="of 2 drivers none could count the steps; run it with one"):
        launch.run(xml, drivers=2)
    xml = write_run(tmp_path, {**voltage(), "clock": {"timestep": 1.0}}, forcefield=UNIX)
    with pytest.raises(InputError, match="clock is filled in from the input by `voltpi run`"):
        launch.run(xml)


def test_another_timestep_in_a_checkpoint(tmp_path: Path, whole: Path) -> None:
    text = (whole / "RESTART").read_text().replace("settings: settings", f"settings: {whole}/settings")
    text = text.replace("template: start", f"template: {whole}/start").replace("<total_steps>24<", "<total_steps>30<")
    again = tmp_path / "again.xml"

    def problems() -> list[str]:
        plan = read_input(again)
        return list(schedule.refusals(plan, plan.direct[0], tree()))

    again.write_text(text)
    assert problems() == []
    (value,) = re.findall(r"<timestep[^>]*>([^<]*)</timestep>", text)
    again.write_text(text.replace(value, repr(float(value) / 2)))
    (problem,) = problems()
    assert "is at step 24 and 96 fs, so <timestep> 2 fs is not that of the first part; keep the timestep" in problem
