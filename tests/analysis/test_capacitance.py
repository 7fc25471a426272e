"""Capacitances of runs whose charge is a process of known mean and variance, and of metals without an electrolyte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read
from scipy.signal import lfilter

from voltpi.analysis.capacitance import MICROFARAD_PER_CM2, ChargeSummary, charge_summary, variance
from voltpi.analysis.capacitor import setup_of
from voltpi.analysis.empty_capacitance import empty_capacitance
from voltpi.analysis.runs import find_run
from voltpi.driver.analyze import analyze
from voltpi.driver.run_setup import describe_run
from voltpi.potential.errors import InputError

from toy_capacitor import gold, gold_settings, write_run

KT = 8.617333262e-5 * 300.0  # eV
C_FLUCTUATION = 0.4  # e/V
C_EMPTY = 0.036591  # e/V, of the published structure
AREA = 11.539984**2


def correlated(n: int, tau: float, rng: np.random.Generator) -> np.ndarray:
    """x_t = φ x_{t−1} + noise of unit variance, with integrated autocorrelation time τ."""
    phi = (2 * tau - 1) / (2 * tau + 1)
    noise = rng.normal(size=n) * np.sqrt(1 - phi**2)
    noise[0] = rng.normal()
    return lfilter([1.0], [1.0, -phi], noise)


def charge_run(
    folder: Path,
    voltage: float,
    n: int = 4000,
    seed: int = 0,
    beads: int = 1,
    write_potentials: bool = True,
    settings: str | None = None,
) -> Path:
    """Charge of the two slabs: (C_FLUCTUATION + C_EMPTY)·Ψ plus noise of variance kT C_FLUCTUATION."""
    atoms, _, _ = gold("case2_au_ions_dV2_ew2d")
    rng = np.random.default_rng(seed)
    mean = (C_FLUCTUATION + C_EMPTY) * voltage
    centroid = mean + np.sqrt(KT * C_FLUCTUATION) * correlated(n, 6.0, rng)
    spread = rng.normal(size=(n, beads))  # of beads about their mean, which is no capacitance
    spread -= spread.mean(axis=1, keepdims=True)
    frames = []
    for f in range(n):
        row = []
        for b in range(beads):
            q = centroid[f] + spread[f, b]
            frame = {"totals": [-q, q]}
            if write_potentials:
                frame["potentials"] = [-0.5 * voltage, 0.5 * voltage]
            row.append(frame)
        frames.append(row)
    settings = settings or gold_settings("slab-z", -0.5 * voltage, 0.5 * voltage)
    return write_run(folder, atoms, frames, settings)


def summary_of(folder: Path, **options: float) -> ChargeSummary:
    run = find_run(folder)
    return charge_summary(run, setup_of(run, describe_run), **options)


def test_variance_and_its_error() -> None:
    rng = np.random.default_rng(1)
    found = [variance(correlated(2000, 5.0, rng)) for _ in range(150)]
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(1.0, abs=3 * values.std() / np.sqrt(150))
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)
    # a short series is not biased by its own mean
    short = [variance(correlated(100, 5.0, rng))[0] for _ in range(2000)]
    assert np.mean(short) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(("kind", "expected"), [("ew2d", 0.0365912446), ("ffield", 0.0366058771)])
def test_capacitance_of_the_empty_slabs(tmp_path: Path, kind: str, expected: float) -> None:
    atoms, charges, role = gold(f"case1_au_vacuum_dV1_{kind}")
    assert charges[role == "B"].sum() == pytest.approx(expected, rel=1e-8)  # at 1 V
    boundary = "slab-z" if kind == "ew2d" else "finite-field-z"
    folder = write_run(tmp_path / "run", atoms, [[{"charges": charges}]], gold_settings(boundary, -0.5, 0.5))
    setup = setup_of(find_run(folder), describe_run)
    assert empty_capacitance(setup, atoms.positions, np.asarray(atoms.cell)) == pytest.approx(expected, rel=1e-6)


def test_one_run(tmp_path: Path) -> None:
    s = summary_of(charge_run(tmp_path / "run", 1.0))
    mean = C_FLUCTUATION + C_EMPTY
    assert s.charge.value == pytest.approx(mean, abs=3 * s.charge.error)
    assert s.charge.error == pytest.approx(np.sqrt(2 * 6.0 / 4000 * KT * C_FLUCTUATION), rel=0.3)
    assert [m.value for m in s.means] == pytest.approx([-s.charge.value, s.charge.value])
    assert s.empty == pytest.approx(C_EMPTY, abs=1e-6)
    assert s.temperature == 300.0
    assert s.capacitance is not None
    value, error = s.capacitance
    assert value == pytest.approx(mean, abs=3 * error)
    assert error < 0.05
    numbers = s.numbers()
    assert numbers["fluctuation_capacitance_uF_per_cm2"] == pytest.approx(value * 1602.176634 / AREA)
    assert pytest.approx(1602.176634) == MICROFARAD_PER_CM2
    assert numbers["charge_per_voltage_e_per_V"] == pytest.approx(s.charge.value)


def test_options_replace_what_files_say(tmp_path: Path) -> None:
    folder = charge_run(tmp_path / "run", 1.0, n=400)
    s, other = summary_of(folder), summary_of(folder, temperature=600.0, empty=0.1)
    assert s.fluctuation is not None
    assert other.fluctuation is not None
    assert other.fluctuation[0] == pytest.approx(0.5 * s.fluctuation[0])
    assert other.empty == 0.1
    (folder / "input.xml").write_text(
        "<simulation><output prefix='run'/><system><ensemble><temperature units='kelvin'> 450 </temperature>"
        "</ensemble></system></simulation>"
    )
    assert summary_of(folder).temperature == pytest.approx(450.0)
    with pytest.raises(InputError, match="temperature is -1: give a positive number"):
        summary_of(folder, temperature=-1.0)
    with pytest.raises(InputError, match="skip less"):
        summary_of(folder, skip=1e6)


def test_beads_are_averaged(tmp_path: Path) -> None:
    """The spread of beads about their mean is no capacitance."""
    s = summary_of(charge_run(tmp_path / "run", 1.0, n=2000, beads=3, seed=4))
    assert s.fluctuation is not None
    assert s.fluctuation[0] == pytest.approx(C_FLUCTUATION, abs=3 * s.fluctuation[1])


def test_responding_electrolytes_need_their_share(tmp_path: Path) -> None:
    settings = gold_settings("slab-z", -0.5, 0.5).replace("model: fixed", "model: pqeq")
    s = summary_of(charge_run(tmp_path / "run", 1.0, n=300, settings=settings))
    assert s.fluctuation is not None
    assert s.capacitance is None
    assert any("the electrolyte responds at fixed nuclei" in line for line in s.report())
    (tmp_path / "run" / "run.electrode_capacitance_0").write_text(
        "".join(
            f" #EXTRAS(electrode_capacitance)# Step:  {5 * f:10d} \n {27.211386 * (0.05 + 0.01 * (f % 2))}\n"
            for f in range(300)
        )
    )
    known = summary_of(tmp_path / "run")
    assert known.capacitance is not None
    assert known.capacitance[0] == pytest.approx(s.fluctuation[0] + 0.055, rel=1e-6)
    (tmp_path / "run" / "run.electrode_capacitance_0").write_text(
        "".join(f" #EXTRAS(electrode_capacitance)# Step:  {5 * f:10d} \n {27.211386 * 1e-3 * f}\n" for f in range(300))
    )
    late = summary_of(tmp_path / "run", skip=float(np.ptp(known.series.time)) / 2)
    assert late.empty == pytest.approx(1e-3 * (late.series.steps / 5).mean(), rel=1e-6)  # of the part that is kept
    assert late.empty > 0.2


def test_a_potentiostat_needs_nothing_added(tmp_path: Path) -> None:
    settings = gold_settings("slab-z").replace("potential: -1.0", "charge: 0").replace("potential: 1.0", "charge: 0")
    settings += "potentiostat: {electrodes: [left, right], potential: 1.0}\n"
    folder = charge_run(tmp_path / "run", 1.01, n=300, settings=settings)
    start = read(folder / "start.xyz")
    start += Atoms("X", [[0.4, 0.0, 0.0]])
    start.write(folder / "start.xyz", format="extxyz")
    s = summary_of(folder)
    assert s.voltage == 1.0
    assert s.answered is not None
    assert s.answered.value == pytest.approx(1.01)
    assert any(line.endswith("1.0100 ± 0.0000 V, target 1 V") for line in s.report())
    assert s.empty == 0.0
    assert s.fluctuation == s.capacitance


def test_a_voltage_that_changes_has_no_fluctuations(tmp_path: Path) -> None:
    ramp = "{ramp: {start: 0.0, until: 1.0, rate: 0.1}}"
    settings = gold_settings("slab-z", 0.0).replace("potential: 1.0", f"potential: {ramp}")
    folder = charge_run(tmp_path / "run", 0.4, n=50, settings=settings)
    s = summary_of(folder)
    assert s.fluctuation is None
    assert s.source == "the voltage changes with time"
    assert s.voltage == pytest.approx(0.4)
    assert s.charge_per_voltage is None
    assert "charge_per_voltage_e_per_V" not in s.numbers()
    lines = s.report()
    assert "charge/voltage               left out: the voltage changes with time" in lines
    assert any(line.startswith("mean of the voltage          0.4000") and "target" not in line for line in lines)
    other = charge_run(tmp_path / "other", 1.0, n=50)
    with pytest.raises(InputError, match="its voltage changes with time; leave it out"):
        analyze(["electrode-charge", str(other), str(folder)])


def test_constant_charge_has_no_fluctuations(tmp_path: Path) -> None:
    settings = (
        gold_settings("slab-z").replace("potential: -1.0", "charge: -0.4").replace("potential: 1.0", "charge: 0.4")
    )
    s = summary_of(charge_run(tmp_path / "run", 1.0, n=50, settings=settings))
    assert s.fluctuation is None
    assert s.voltage == pytest.approx(1.0)
    assert s.potentials["left"].value == pytest.approx(-0.5)
    folder = charge_run(tmp_path / "other", 1.0, n=50, write_potentials=False, settings=settings)
    assert np.isnan(summary_of(folder).voltage)


@pytest.mark.parametrize("n", [30, 4000])
def test_at_constant_charge_the_voltage_has_the_error(tmp_path: Path, n: int) -> None:
    atoms, _, _ = gold("case2_au_ions_dV2_ew2d")
    settings = (
        gold_settings("slab-z").replace("potential: -1.0", "charge: -0.4").replace("potential: 1.0", "charge: 0.4")
    )
    noise = 0.2 * correlated(n, 6.0, np.random.default_rng(3))
    frames = [[{"totals": [-0.4, 0.4], "potentials": [-0.3 - x, 0.7 + x]}] for x in noise]
    s = summary_of(write_run(tmp_path / "run", atoms, frames, settings))
    error = 2 * 0.2 * np.sqrt(2 * 6.0 / n)
    assert s.answered is not None
    assert s.charge_per_voltage is not None
    if n > 1000:
        assert s.answered.value == pytest.approx(1.0, abs=3 * error)
        assert s.answered.error == pytest.approx(error, rel=0.3)
        assert s.charge_per_voltage[1] == pytest.approx(0.4 * error, rel=0.35)
    assert s.charge.error == pytest.approx(0.0, abs=1e-12)
    assert s.charge_per_voltage[0] == pytest.approx(0.4 / s.answered.value)
    assert s.charge_per_voltage[1] == pytest.approx(0.4 * s.answered.error / s.answered.value**2)
    voltages = [line for line in s.report() if line.startswith(("charge/voltage", "mean of", "potential of"))]
    assert len(voltages) == 4
    assert all("±" in line and "± 0.0000 " not in line for line in voltages)
    # the charge is exact however few its records, the voltage is not
    assert all(("a guess" in line) == (n == 30) for line in voltages)
    assert not any("a guess" in line for line in s.report() if line.startswith("charge of"))


def test_guesses_are_called_so(tmp_path: Path) -> None:
    guess = " (a guess: fewer than 20 independent samples)"
    few, many = charge_run(tmp_path / "few", 1.0, n=100), charge_run(tmp_path / "many", 2.0)
    start = ("charge of left", "charge/voltage", "β⟨δQ²⟩", "fluctuation capacitance")
    for folder, expected in ((few, True), (many, False)):
        s = summary_of(folder)
        assert s.charge.reliable != expected
        lines = [line for line in s.report() if line.startswith(start)]
        assert len(lines) == 4
        assert all(line.endswith(guess) == expected for line in lines)
    for other, expected in ((few, True), (charge_run(tmp_path / "zero", 0.0, seed=1), False)):
        slope = analyze(["electrode-charge", str(many), str(other), "--out", str(tmp_path)])
        assert any(line.startswith("capacitance dQ/dΨ") and line.endswith(guess) == expected for line in slope)
        assert json.loads((tmp_path / "electrode-charge.json").read_text())["error_is_reliable"] != expected


def test_slope_over_several_voltages(tmp_path: Path) -> None:
    folders = [
        charge_run(tmp_path / f"{v}V", v, n=2000, seed=seed) for seed, v in enumerate((0.0, 0.5, 1.0, 2.0), start=20)
    ]
    lines = analyze(["electrode-charge", *map(str, folders), "--out", str(tmp_path)])
    assert any(line.startswith("capacitance dQ/dΨ") for line in lines)
    assert sum("audit: not possible" in line for line in lines) == 4  # no per-atom charges were written
    numbers = json.loads((tmp_path / "electrode-charge.json").read_text())
    assert numbers["capacitance_e_per_V"] == pytest.approx(
        C_FLUCTUATION + C_EMPTY, abs=3 * numbers["capacitance_error_e_per_V"]
    )
    assert numbers["capacitance_error_e_per_V"] < 0.01
    assert numbers["charge_at_zero_voltage_e"] == pytest.approx(0, abs=3 * numbers["charge_at_zero_voltage_error_e"])
    assert len(numbers["runs"]) == 4
    assert (tmp_path / "electrode-charge.png").stat().st_size > 10000
    with pytest.raises(InputError, match="all runs have the same voltage"):
        analyze(["electrode-charge", str(folders[0]), str(folders[0])])


def test_charges_of_atoms_do_where_totals_lack(tmp_path: Path) -> None:
    atoms, charges, role = gold()
    folder = write_run(tmp_path / "run", atoms, [[{"charges": charges}]] * 4, gold_settings("slab-z"))
    s = summary_of(folder)
    assert s.means[1].value == pytest.approx(charges[role == "B"].sum())
    assert s.voltage == 2.0  # of the settings
    (folder / "run.charges_0").unlink()
    with pytest.raises(InputError, match="no charges of electrodes"):
        summary_of(folder)


def test_runs_without_electrodes_are_refused(nvt_run: Path) -> None:
    with pytest.raises(InputError, match="its settings have 0 electrodes"):
        analyze(["electrode-charge", str(nvt_run)])
