"""Spectra against lines and line shapes that are known: oscillators, and a molecule in the real i-PI."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_molecule
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_masses
from scipy import constants
from scipy.linalg import expm
from written_runs import BOHR, write_run

from voltpi.analysis import ANALYSES
from voltpi.analysis.ipi_files import read_velocities
from voltpi.analysis.spectra import (
    CORRECTIONS,
    KT,
    LIGHT,
    WINDOWS,
    Series,
    activity,
    correction,
    find_lines,
    make_plan,
)
from voltpi.potential.errors import InputError

HERE = Path(__file__).parent
KELVIN = 300.0
MASS = 1.7


def oscillators(places: list[float], slopes: list[float], n: int, spacing: float, *, rates: bool = False) -> Series:
    """One channel: Σ_k slope_k Q_k of oscillators at ``places`` (cm⁻¹), each of energy k_B T."""
    t = np.arange(n) * spacing
    x = np.zeros(n)
    for place, slope, phase in zip(places, slopes, (0.3, 1.1, 2.0, 4.0), strict=False):
        omega = 2.0 * np.pi * LIGHT * place
        amplitude = slope * np.sqrt(2.0 * KT * KELVIN) / omega
        x += amplitude * (-omega * np.sin(omega * t + phase) if rates else np.cos(omega * t + phase))
    return Series("oscillators", x[:, None], spacing, rates, 0.5, KELVIN)


@pytest.mark.parametrize("rates", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_lines_have_place_area_and_width(window: str, rates: bool) -> None:
    series = oscillators([800.0, 1650.0, 3700.0], [1.0, 0.5, 2.0], 20000, 2.0, rates=rates)
    a = activity([series], np.ones((1, 1)), make_plan([series], window, 30.0))
    middle = [np.abs(a.plan.grid - place) < 250.0 for place in (800.0, 1650.0, 3700.0)]
    for near, place, slope in zip(middle, (800.0, 1650.0, 3700.0), (1.0, 0.5, 2.0), strict=True):
        x, y = a.plan.grid[near], a.values[0, near]
        assert np.trapezoid(y, x) == pytest.approx(slope**2, rel=0.03 if window != "none" else 0.15)
        line = max(find_lines(x, y, 0.0), key=lambda peak: peak.height)
        assert line.place == pytest.approx(place, abs=0.5)
        assert line.width == pytest.approx(30.0, abs=1.0 if window != "none" else 6.0)
    assert a.total[0] == pytest.approx(1.0 + 0.25 + 4.0, rel=5e-3)


def brownian(place: float, friction: float, n: int, spacing: float, seed: int) -> np.ndarray:
    """Position and velocity [n, 2] of a damped oscillator in equilibrium, exact at any spacing (friction in 1/fs)."""
    omega = 2.0 * np.pi * LIGHT * place
    drift = expm(np.array([[0.0, 1.0], [-(omega**2), -friction]]) * spacing)
    equilibrium = KT * KELVIN / MASS * np.diag([omega**-2.0, 1.0])
    noise = np.linalg.cholesky(equilibrium - drift @ equilibrium @ drift.T)
    rng = np.random.default_rng(seed)
    kicks = rng.normal(size=(n, 2)) @ noise.T
    state = np.linalg.cholesky(equilibrium) @ rng.normal(size=2)
    out = np.empty((n, 2))
    for k in range(n):
        out[k] = state
        state = drift @ state + kicks[k]
    return out


def test_damped_oscillator_has_its_line_shape_and_honest_bands() -> None:
    place, friction, charge = 1000.0, 0.02, 0.7
    states = brownian(place, friction, 120000, 2.0, 3)
    omega0 = 2.0 * np.pi * LIGHT * place
    for k, rates in ((0, False), (1, True)):
        series = Series("damped", charge * states[:, [k]], 2.0, rates, 0.5, KELVIN)
        a = activity([series], np.ones((1, 1)), make_plan([series], "hann", 12.0, 3000.0))
        omega = 2.0 * np.pi * LIGHT * a.plan.grid
        lorentz = 2.0 * friction * omega**2 / ((omega0**2 - omega**2) ** 2 + (friction * omega) ** 2)
        exact = 2.0 * LIGHT * charge**2 / MASS * lorentz
        assert a.blocks == 16
        near = np.abs(a.plan.grid - place) < 150.0
        z = (a.values[0, near] - exact[near]) / a.errors[0, near]
        assert 0.5 < np.sqrt(np.mean(z**2)) < 1.7
        assert a.values[0, near].max() == pytest.approx(exact.max(), rel=0.12)
        assert a.total[0] == pytest.approx(charge**2 / MASS, rel=0.05)
        assert np.trapezoid(a.values[0], a.plan.grid) == pytest.approx(a.total[0], rel=0.05)


def test_several_runs_are_averaged() -> None:
    states = brownian(1000.0, 0.02, 30000, 2.0, 4)
    long, short = (
        Series(name, part[:, :1], 2.0, False, 0.5, KELVIN)
        for name, part in (("a", states[:20000]), ("b", states[20000:]))
    )
    plan = make_plan([long, short], "gaussian", 20.0)
    both, first, second = (activity(runs, np.ones((1, 1)), plan) for runs in ([long, short], [long], [short]))
    np.testing.assert_allclose(both.values, (19999 * first.values + 9999 * second.values) / 29998, rtol=1e-12)
    assert both.blocks == 8 + 4
    assert both.length == pytest.approx(2.0 * 29998)


def test_plans() -> None:
    series = oscillators([1000.0], [1.0], 1001, 2.0)  # 2000 fs
    assert make_plan([series], "hann").resolution == pytest.approx(1.0 / (LIGHT * 1000.0), rel=1e-3)
    assert make_plan([dataclasses.replace(series, spacing=20.0)], "hann").resolution == 20.0
    assert make_plan([dataclasses.replace(series, spacing=20.0)]).grid[-1] == pytest.approx(1.0 / (2.0 * LIGHT * 20.0))
    with pytest.raises(InputError, match=r"resolution is 5 cm⁻¹, but oscillators has 2000 fs.* give 16\.7 or more"):
        make_plan([series], "hann", 5.0)
    with pytest.raises(InputError, match="window is box: give one of hann"):
        make_plan([series], "box")
    with pytest.raises(InputError, match="max-wavenumber is -1"):
        make_plan([series], top=-1.0)


def test_fast_vibrations_that_fold_down_are_noticed() -> None:
    slow = oscillators([3200.0], [1.0], 4000, 5.0)  # Nyquist 3336 cm⁻¹
    a = activity([slow], np.ones((1, 1)), make_plan([slow]))
    assert any("faster vibrations fold down; print at every 2.5 fs" in line for line in a.cautions)
    fine = oscillators([3200.0], [1.0], 4000, 2.0)
    assert activity([fine], np.ones((1, 1)), make_plan([fine])).cautions == ()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_quantum_corrections(name: str) -> None:
    wavenumber = np.array([100.0, 1000.0, 3500.0])
    x = constants.h * constants.c * 100.0 * wavenumber / (constants.k * KELVIN)
    q = {
        "none": np.ones(3),
        "standard": 2.0 / (1.0 + np.exp(-x)),
        "harmonic": x / (1.0 - np.exp(-x)),
        "schofield": np.exp(0.5 * x),
    }
    np.testing.assert_allclose(correction(name, wavenumber, KELVIN), q[name] / q["harmonic"], rtol=1e-12)
    assert correction(name, np.zeros(1), KELVIN)[0] == pytest.approx(1.0)


def test_time_step_error_of_verlet_is_taken_off() -> None:
    omega, step = 2.0 * np.pi * LIGHT * 3700.0, 0.5
    x, v, places = 0.0, 1.0, []
    for _ in range(16000):
        v -= 0.5 * step * omega**2 * x
        x += step * v
        v -= 0.5 * step * omega**2 * x
        places.append(x)
    series = Series("verlet", np.array(places)[::4, None], 2.0, False, step, KELVIN)
    a = activity([series], np.ones((1, 1)), make_plan([series], resolution=15.0))
    (line,) = find_lines(a.plan.grid, a.values[0], step)
    assert line.place == pytest.approx(3700.0 * (1.0 + (omega * step) ** 2 / 24.0), abs=1.0)
    assert line.place > 3715.0
    assert line.corrected == pytest.approx(3700.0, abs=0.5)


INPUT = """<simulation verbosity='low' floatformat='%24.17e'>
  <output prefix='run'>
    <properties stride='8' filename='out'>
      [ step, time{{femtosecond}}, conserved{{electronvolt}}, temperature{{kelvin}} ]
    </properties>
    <trajectory filename='pos' stride='8' format='ase'> positions </trajectory>
    <trajectory filename='vel' stride='8'> velocities </trajectory>
    <trajectory filename='dipole' stride='8' extra_type='dipole'> extras </trajectory>
    <trajectory filename='born' stride='8' extra_type='BEC'> extras </trajectory>
    <trajectory filename='polarizability' stride='8' extra_type='polarizability'> extras </trajectory>
  </output>
  <total_steps> 8000 </total_steps>
  <ffdirect name='toy'><pes>custom</pes><pes_path>{pes}</pes_path></ffdirect>
  <system>
    <initialize nbeads='1'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='manual'> [ {velocities} ] </velocities>
    </initialize>
    <forces><force forcefield='toy'/></forces>
    <ensemble><temperature units='kelvin'> 1 </temperature></ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nve'><timestep units='femtosecond'> {step} </timestep></dynamics>
    </motion>
  </system>
</simulation>
"""
COLD = 1.0  # K: harmonic


@dataclasses.dataclass
class Exact:
    """Of the molecule's Hessian: wavenumbers [3] cm⁻¹, modes [3, 9] (mass-weighted, rows), slopes of M and α by Q."""

    folder: Path
    wavenumbers: np.ndarray
    modes: np.ndarray
    dipole: np.ndarray  # [3, 3] e/√amu
    polarizability: np.ndarray  # [3, 3, 3] Å²/√amu


def hessian_lines() -> Exact:
    """By central differences of the forces, in Å, eV and amu."""
    bohr, hartree = toy_molecule.BOHR, 27.211386245988
    start, step = toy_molecule.START, 1e-4
    hessian, alpha = np.zeros((9, 9)), np.zeros((9, 3, 3))
    for k in range(9):
        for sign in (1.0, -1.0):
            moved = start.copy()
            moved.flat[k] += sign * step
            hessian[k] -= sign * toy_molecule.energy_forces(moved)[1].ravel() / (2.0 * step)
            alpha[k] += sign * toy_molecule.polarizability(moved) / (2.0 * step)
    root = np.sqrt(np.repeat(atomic_masses[[8, 1, 1]], 3))
    values, vectors = np.linalg.eigh(hessian * hartree / bohr**2 / np.outer(root, root))
    per_second = np.sqrt(constants.e / constants.atomic_mass) * 1e10
    modes = vectors.T[6:]
    return Exact(
        Path(),
        np.sqrt(values[6:]) * per_second / (2.0 * np.pi * constants.c * 100.0),
        modes,
        (modes / root) @ np.kron(toy_molecule.CHARGES[:, None], np.eye(3)),
        np.einsum("mk,kab->mab", modes / root, alpha) * bohr**2,
    )


@pytest.fixture(scope="module")
def molecule(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    """A run of i-PI from the minimum in which every normal mode has k_B T; and what its spectra must be."""
    exact = hessian_lines()
    folder = tmp_path_factory.mktemp("spectra") / "run"
    folder.mkdir()
    root = np.sqrt(np.repeat(atomic_masses[[8, 1, 1]], 3))
    speeds = np.sqrt(2.0 * KT * COLD) * exact.modes.sum(axis=0) / root / 21.876912636  # bohr per atomic unit of time
    (folder / "start.xyz").write_text(
        '3\nLattice="15 0 0 0 15 0 0 0 15" Properties=species:S:1:pos:R:3 pbc="T T T"\n'
        + "".join(
            f"{s} {x:.12f} {y:.12f} {z:.12f}\n"
            for s, (x, y, z) in zip("OHH", toy_molecule.START * toy_molecule.BOHR, strict=True)
        )
    )
    velocities = ", ".join(f"{v:.15e}" for v in speeds)
    (folder / "input.xml").write_text(INPUT.format(pes=HERE / "toy_molecule.py", velocities=velocities, step=0.25))
    command = [str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dataclasses.replace(exact, folder=folder)


def near(peaks: list[dict[str, float]], place: float) -> int:
    return int(np.argmin([abs(peak["wavenumber_cm-1"] - place) for peak in peaks]))


@pytest.mark.parametrize("source", ["dipole", "born", "charges"])
def test_infrared_lines_of_a_molecule_are_those_of_its_hessian(molecule: Exact, tmp_path: Path, source: str) -> None:
    options: dict[str, object] = {"source": "dipole" if source == "dipole" else "current"}
    if source == "charges":
        (tmp_path / "q.csv").write_text("element,charge\nO,-0.8\nH,0.4\n")
        options["charges"] = str(tmp_path / "q.csv")
    out = ANALYSES["ir"].run([molecule.folder], tmp_path, temperature=COLD, resolution=20.0, **options)
    strengths = (molecule.dipole**2).sum(axis=1)
    assert 1000 < molecule.wavenumbers[0] < 2000 < 3000 < molecule.wavenumbers[1] < molecule.wavenumbers[2] < 4200
    for place, strength in zip(molecule.wavenumbers, strengths, strict=True):
        k = near(out["peaks"], place)
        assert out["peaks"][k]["without_time_step_error_cm-1"] == pytest.approx(place, abs=1.0)
        assert out["peak_km_per_mol_of_cells"][k] == pytest.approx(974.8801 * strength, rel=0.02)
    assert out["sum_rule_km_per_mol_of_molecules"] == pytest.approx(974.8801 * strengths.sum(), rel=0.02)
    assert out["integral_km_per_mol_of_molecules"] == pytest.approx(974.8801 * strengths.sum(), rel=0.02)
    assert out["n_molecules"] == 1
    assert out["spacing_fs"] == pytest.approx(2.0)
    assert out["time_step_fs"] == pytest.approx(0.25)
    assert out["window"] == "hann"
    assert out["quantum_correction"] == "harmonic"


def test_at_constant_displacement_the_axis_is_left_out(tmp_path: Path) -> None:
    """M of TO modes along x and y and of an LO mode along z, as D_z held makes it; other masses for the same area."""
    t, places = 4.0 * np.arange(2500), (160.0, 160.0, 260.0)
    omega = 2.0 * np.pi * LIGHT * np.array(places)
    dipole = np.sqrt(2.0 * KT * KELVIN) / omega * np.cos(t[:, None] * omega + np.array([0.3, 1.0, 2.0]))
    positions = np.broadcast_to([[1.0, 1.0, 1.0], [3.8, 1.0, 1.0]], (2500, 2, 3))
    folder = write_run(
        tmp_path / "run", ["Na", "Cl"], positions, np.full(3, 8.0), 4.0, extras={"dipole": dipole / BOHR}
    )
    ir = ANALYSES["ir"].run
    both = ir([folder], tmp_path / "o", temperature=KELVIN)
    assert [round(peak["wavenumber_cm-1"], -1) for peak in both["peaks"]] == [160.0, 260.0]
    assert both["cautions"] == []
    (folder / "settings.yaml").write_text("model: none\ndisplacement: [null, null, 0.1]\n")
    out = ir([folder], tmp_path / "d", temperature=KELVIN)
    assert [round(peak["wavenumber_cm-1"], -1) for peak in out["peaks"]] == [160.0]
    assert out["axes"] == ["x", "y"]
    # x and y stand for all three axes: 3 · 1 e²/amu
    assert out["sum_rule_e2_per_amu"] == pytest.approx(3.0, rel=0.02)
    assert out["peak_km_per_mol_of_cells"][0] == pytest.approx(3.0 * 974.8801, rel=0.03)
    assert any("the infrared spectrum is that along x, y alone" in line for line in out["cautions"])
    assert any("caution" in line and "along x, y alone" in line for line in out["report"])
    with (tmp_path / "d" / "ir.csv").open() as file:
        header = file.readline()
    assert "absorption_x_cm-1" in header
    assert "absorption_z_cm-1" not in header
    (folder / "settings.yaml").write_text("model: none\ndisplacement: [0, 0, 0.1]\n")
    with pytest.raises(InputError, match="the infrared spectrum takes an axis at constant field, and there is none"):
        ir([folder], tmp_path / "e", temperature=KELVIN)
    # two settings of which one was not used
    (folder / "settings-b.yaml").write_text("model: none\ndisplacement: [null, null, 0.1]\n")
    out = ir([folder], tmp_path / "f", temperature=KELVIN)
    assert any("whether an axis was at constant displacement is not known" in line for line in out["cautions"])


def test_intensities_are_in_known_units() -> None:
    """42.256 km/mol for 1 (D/Å)²/amu, and 974.88 for 1 e²/amu: what quantum chemistry programs print."""
    from voltpi.analysis.spectra_kinds import ABSORPTION

    assert pytest.approx(974.8801, rel=1e-6) == constants.N_A * ABSORPTION / 1000.0
    assert pytest.approx(42.2561, rel=1e-5) == constants.N_A * ABSORPTION / 1000.0 / 4.80320471**2


def test_absorption_of_fixed_charges_is_the_direct_formula(molecule: Exact, tmp_path: Path) -> None:
    """n α = β/(6 ε_0 c V) ∫ dt ⟨Ṁ(0)·Ṁ(t)⟩ w cos ωt, in SI, by plain sums over a trajectory of positions."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in ("run.out", "run.pos_0.extxyz", "run.vel_0.xyz"):
        shutil.copy(molecule.folder / name, folder / name)
    (tmp_path / "q.csv").write_text("element,charge\nO,-0.8\nH,0.4\n")
    lag, dt, beta, volume = 400, 2e-15, 1.0 / (constants.k * 250.0), 15e-10**3
    v = np.array([frame.values for frame in read_velocities(folder / "run.vel_0.xyz")]) * 1e5  # m/s
    current = constants.e * np.einsum("i,fia->fa", toy_molecule.CHARGES, v)
    n = len(current)
    c = np.array([(current[: n - k] * current[k:]).sum() / (n - k) for k in range(lag)])
    c *= 0.5 + 0.5 * np.cos(np.pi * np.arange(lag) / lag)
    options = {"charges": str(tmp_path / "q.csv"), "temperature": 250.0, "resolution": 1.0 / (LIGHT * 800.0)}
    by_velocity = ANALYSES["ir"].run([folder], tmp_path / "v", source="current", **options)
    table = np.genfromtxt(tmp_path / "v" / "ir.csv", delimiter=",", names=True)
    omega = 2.0 * np.pi * constants.c * 100.0 * table["wavenumber_cm1"]
    integral = dt * (2.0 * np.cos(np.outer(omega, np.arange(lag) * dt)) @ c - c[0])
    expected = beta / (6.0 * constants.epsilon_0 * constants.c * volume) * integral / 100.0
    np.testing.assert_allclose(table["absorption_cm1"], expected, rtol=1e-4, atol=1e-4 * expected.max())
    mean = np.mean([table[f"absorption_{x}_cm1"] for x in "xyz"], axis=0)
    np.testing.assert_allclose(mean, table["absorption_cm1"], rtol=1e-6, atol=1e-9 * expected.max())
    # positions say the same, up to the error of velocity Verlet's velocities
    by_position = ANALYSES["ir"].run([folder], tmp_path / "r", source="auto", **options)
    assert "positions" in by_position["source"]
    assert by_position["integral_cm-2"] == pytest.approx(by_velocity["integral_cm-2"], rel=0.03)


def test_raman_activities_of_a_molecule(molecule: Exact, tmp_path: Path) -> None:
    options = {"temperature": COLD, "resolution": 20.0}
    out = ANALYSES["raman"].run([molecule.folder], tmp_path, **options)
    table = np.genfromtxt(tmp_path / "raman.csv", delimiter=",", names=True, deletechars="")
    x = table["wavenumber_cm-1"]
    columns = {name.split("_")[0]: table[name] for name in table.dtype.names if "error" not in name}
    slopes = molecule.polarizability
    mean = np.trace(slopes, axis1=1, axis2=2) / 3.0
    rest = slopes - mean[:, None, None] * np.eye(3)
    gamma2 = 1.5 * np.einsum("mab,mab->m", rest, rest)
    for k, place in enumerate(molecule.wavenumbers):
        band = np.abs(x - place) < 60.0 if k else np.abs(x - place) < 300.0
        area = {name: np.trapezoid(y[band], x[band]) for name, y in columns.items()}
        scale = mean[k] ** 2 + gamma2[k] / 15.0
        assert area["isotropic"] == pytest.approx(mean[k] ** 2, abs=0.03 * scale)
        assert area["anisotropic"] == pytest.approx(gamma2[k], abs=0.45 * scale)
        assert area["VV"] == pytest.approx(mean[k] ** 2 + 4.0 / 45.0 * gamma2[k], abs=0.03 * scale)
        assert area["VH"] == pytest.approx(gamma2[k] / 15.0, abs=0.03 * scale)
        assert area["unpolarized"] == pytest.approx(area["VV"] + area["VH"])
    assert out["raman_activity_A4_per_amu"] == pytest.approx((45.0 * mean**2 + 7.0 * gamma2).sum(), rel=0.02)
    start = toy_molecule.polarizability(toy_molecule.START).trace() / 3.0 * toy_molecule.BOHR**3
    assert out["mean_polarizability_A3"] == pytest.approx(start, rel=1e-3)


def test_raman_intensities(molecule: Exact, tmp_path: Path) -> None:
    def spectrum(name: str, **options: object) -> tuple[np.ndarray, np.ndarray]:
        ANALYSES["raman"].run([molecule.folder], tmp_path / name, temperature=300.0, resolution=60.0, **options)
        table = np.genfromtxt(tmp_path / name / "raman.csv", delimiter=",", skip_header=1)
        return table[1:, 0], table[1:, 1]

    x, reduced = spectrum("reduced")
    boson = 1.0 / (np.exp(1.438776877 * x / 300.0) - 1.0)
    _, susceptibility = spectrum("susceptibility", intensity="susceptibility")
    _, stokes = spectrum("stokes", intensity="stokes")
    _, green = spectrum("laser", intensity="stokes", laser=532.0)
    np.testing.assert_allclose(susceptibility, reduced / x, rtol=1e-6)
    np.testing.assert_allclose(stokes, reduced / x * (boson + 1.0), rtol=1e-6)
    np.testing.assert_allclose(green, stokes * ((1e7 / 532.0 - x) / (1e7 / 532.0)) ** 4, rtol=1e-6)
    with pytest.raises(InputError, match="laser is 532 nm with intensity reduced"):
        spectrum("x", laser=532.0)


@pytest.mark.parametrize("source", ["velocities", "positions"])
def test_density_of_states_counts_modes(molecule: Exact, tmp_path: Path, source: str) -> None:
    files = [molecule.folder / name for name in ("run.out", "run.pos_0.extxyz", "run.vel_0.xyz")]
    out = ANALYSES["vdos"].run(
        files if source == "velocities" else files[:2], tmp_path, temperature=COLD, resolution=20.0
    )
    assert source in out["source"]
    assert out["modes"] == pytest.approx(3.0, rel=0.02)
    table = np.genfromtxt(tmp_path / "vdos.csv", delimiter=",", names=True)
    for k, place in enumerate(molecule.wavenumbers):
        band = np.abs(table["wavenumber_cm1"] - place) < (60.0 if k else 300.0)
        x = table["wavenumber_cm1"][band]
        oxygen = (molecule.modes[k, :3] ** 2).sum()
        for name, share in (("modes_per_cm1", 1.0), ("modes_O_per_cm1", oxygen), ("modes_H_per_cm1", 1.0 - oxygen)):
            assert np.trapezoid(table[name][band], x) == pytest.approx(share, abs=0.03)


def test_beads_are_averaged(molecule: Exact, tmp_path: Path) -> None:
    """Two beads whose dipoles are M ± δ give the spectrum of M."""
    folder = tmp_path / "beads"
    folder.mkdir()
    for name in ("run.out", "run.pos_0.extxyz"):
        shutil.copy(molecule.folder / name, folder / name)
    shutil.copy(folder / "run.pos_0.extxyz", folder / "run.pos_1.extxyz")
    lines = (molecule.folder / "run.dipole_0").read_text().splitlines()
    for bead, sign in ((0, 1.0), (1, -1.0)):
        changed = [
            line if "#" in line else "  ".join(f"{float(x) + sign * 0.01 * np.sin(0.3 * k):.15e}" for x in line.split())
            for k, line in enumerate(lines)
        ]
        (folder / f"run.dipole_{bead}").write_text("\n".join(changed) + "\n")
    options = {"temperature": COLD, "resolution": 30.0, "source": "dipole"}
    one = ANALYSES["ir"].run([molecule.folder], tmp_path / "1", **options)
    two = ANALYSES["ir"].run([folder], tmp_path / "2", **options)
    assert two["integral_cm-2"] == pytest.approx(one["integral_cm-2"], rel=1e-6)


def test_what_is_written(molecule: Exact, tmp_path: Path) -> None:
    for name in ("ir", "raman", "vdos"):
        out = ANALYSES[name].run([molecule.folder], tmp_path, temperature=COLD, window="gaussian")
        assert [Path(f).name for f in out["files"]] == [f"{name}.{s}" for s in ("csv", "json", "png", "svg")]
        assert all(Path(f).stat().st_size > 500 for f in out["files"])
        assert any("window gaussian, resolution" in line for line in out["report"])
        assert any("sampled every 2 fs: Nyquist wavenumber 8339 cm⁻¹" in line for line in out["report"])
        assert json.loads((tmp_path / f"{name}.json").read_text())["temperature_K"] == COLD
    from voltpi.driver.analyze import analyze

    lines = analyze(["ir", str(molecule.folder), "--out", str(tmp_path), "--quantum-correction", "schofield"])
    assert any("quantum correction schofield" in line for line in lines)
    assert (tmp_path / "ir.json").read_text().count("schofield") == 1


def test_refusals(molecule: Exact, tmp_path: Path) -> None:
    ir, raman = ANALYSES["ir"].run, ANALYSES["raman"].run
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.out", "run.pos_0.extxyz", "run.dipole_0"):
        shutil.copy(molecule.folder / name, folder / name)
    with pytest.raises(InputError, match="no velocities for the current"):
        ir([folder], tmp_path, source="current")
    with pytest.raises(InputError, match="no polarizabilities"):
        raman([folder], tmp_path)
    with pytest.raises(InputError, match="temperature is 0"):
        ir([folder], tmp_path, temperature=0.0)
    with pytest.raises(InputError, match=r"skip is 1e\+06 fs but the run is 2000 fs long"):
        ir([folder], tmp_path, skip=1e6)
    lines = (folder / "run.dipole_0").read_text().splitlines(keepends=True)
    (folder / "run.dipole_0").write_text("".join(lines[:200] + lines[204:]))
    with pytest.raises(InputError, match="not equally spaced: after step 792 comes 816"):
        ir([folder], tmp_path)
    (folder / "run.dipole_0").write_text("".join(lines[:12]))
    with pytest.raises(InputError, match="6 records are no time series"):
        ir([folder], tmp_path)
    rare = "".join(a + b for k, (a, b) in enumerate(zip(lines[::2], lines[1::2], strict=True)) if k % 3 == 0)
    (folder / "run.dipole_0").write_text(rare)
    out = ir([folder], tmp_path)
    assert any("vibrations up to 4000 cm⁻¹, which fold down below the Nyquist" in line for line in out["cautions"])


def test_normal_modes_of_the_example() -> None:
    """examples/infrared-molecule: its Hessian, with the forces of this molecule."""
    path = HERE.parents[1] / "examples" / "infrared-molecule" / "run.py"
    spec = importlib.util.spec_from_file_location("infrared_molecule", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    class Springs(Calculator):
        implemented_properties = ("energy", "forces")

        def calculate(self, atoms: Atoms, *_: object) -> None:
            energy, forces = toy_molecule.energy_forces(atoms.positions / toy_molecule.BOHR)
            hartree = 27.211386245988
            self.results = {"energy": energy * hartree, "forces": forces * hartree / toy_molecule.BOHR}

    atoms = Atoms("OHH", toy_molecule.START * toy_molecule.BOHR, calculator=Springs())
    wavenumbers, modes = example.normal_modes(atoms)
    exact = hessian_lines()
    np.testing.assert_allclose(wavenumbers[6:], exact.wavenumbers, rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.einsum("mk,mk->m", modes[6:], exact.modes)), 1.0, atol=1e-5)
