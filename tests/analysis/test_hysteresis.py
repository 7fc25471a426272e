"""Loops and double wells that are known exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.build import bulk
from gaussian_model import FOUR_PI_K_E, write_run
from scipy.optimize import brentq

from voltpi.analysis.double_well import DoubleWell, double_well, points_of
from voltpi.analysis.hysteresis import Loop, loop_of
from voltpi.analysis.runs import find_run
from voltpi.driver import pes
from voltpi.driver.analyze import analyze
from voltpi.driver.schedule import value_at
from voltpi.driver.settings import Schedule
from voltpi.potential.errors import InputError

VOLUME = 1000.0
E_PER_A2 = 16.02176634  # C/m²


def triangle(n: int, periods: float, amplitude: float) -> tuple[np.ndarray, np.ndarray]:
    """From 0 up, down and up again; and whether it rises."""
    x = np.linspace(0.0, periods, n)
    return amplitude * 2.0 / np.pi * np.arcsin(np.sin(2.0 * np.pi * x)), np.cos(2.0 * np.pi * x) > 0


def hysteron(folder: Path, *, amplitude: float = 0.5, shift: float = 0.0, noise: float = 0.0) -> Path:
    """P = P_s tanh((ε ∓ ε_c)/w), P_s 0.01 e/Å², ε_c 0.1 and w 0.05 V/Å: two periods along [0, 0.6, 0.8]."""
    field, rises = triangle(8001, 2.0, amplitude)
    p = 0.01 * np.tanh((field - np.where(rises, 0.1, -0.1)) / 0.05) + shift
    p = p + noise * np.random.default_rng(0).normal(size=p.shape)
    axis = np.array([0.0, 0.6, 0.8])
    rate = "{cyclic: {low: -1, high: 1, rate: 1}}"
    return write_run(
        folder,
        VOLUME * p[:, None] * axis,
        settings=f"field: [0, {rate}, {rate}]\n",
        volume=VOLUME,
        field=field[:, None] * axis,
    )


def loss_of_hysteron(amplitude: float) -> float:
    """∮ε dP of the above in eV/Å³: the area between the branches."""
    ends = np.array([amplitude, -amplitude])

    def integral(centre: float) -> float:
        upper, lower = np.log(np.cosh((ends - centre) / 0.05))
        return float(upper - lower)

    return 0.01 * 0.05 * (integral(-0.1) - integral(0.1))


def loop(folder: Path, **options: object) -> Loop:
    return loop_of(find_run(folder), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_loop_in_a_field(tmp_path: Path, noise: float) -> None:
    found = loop(hysteron(tmp_path / "run", noise=noise))
    assert found.kind == "field"
    np.testing.assert_allclose(found.axis, [0.0, 0.6, 0.8], atol=1e-6)
    assert len(found.cycles) == 1  # the first quarter is the virgin curve, the last three quarters do not close
    (remanent, _), (coercive, _), (loss, _) = (found.mean(x) for x in ("remanent", "coercive", "loss"))
    assert remanent == pytest.approx(0.01 * np.tanh(2.0), abs=1e-5 if noise == 0 else 5e-4)
    assert coercive == pytest.approx(0.1, abs=1e-4 if noise == 0 else 3e-3)
    assert loss == pytest.approx(loss_of_hysteron(0.5), rel=1e-3 if noise == 0 else 0.02)
    assert loss == pytest.approx(4.0 * 0.01 * 0.1, rel=1e-3 if noise == 0 else 0.02)  # saturated: 4 P_s ε_c
    assert found.rate == pytest.approx(2.0 * 4.0 * 0.5 / 80.0, rel=1e-6)


def test_several_cycles_have_an_error(tmp_path: Path) -> None:
    field, rises = triangle(9001, 4.25, 0.5)
    p = 0.01 * np.tanh((field - np.where(rises, 0.1, -0.1)) / 0.05)
    p += 0.0005 * np.random.default_rng(1).normal(size=p.shape)
    run = write_run(
        tmp_path / "run",
        VOLUME * p[:, None] * [0.0, 0.0, 1.0],
        settings="field: [0, 0, {cyclic: {low: -1, high: 1, rate: 1}}]",
        field=field[:, None] * np.array([0.0, 0.0, 1.0]),
    )
    found = loop(run)
    assert len(found.cycles) == 4
    value, error = found.mean("remanent")
    assert 0.0 < error < 2e-4
    assert abs(value - 0.01 * np.tanh(2.0)) < 5.0 * error


def test_centred(tmp_path: Path) -> None:
    run = hysteron(tmp_path / "run", shift=0.02)
    assert np.isnan(loop(run).mean("coercive")[0])  # P never vanishes
    assert loop(run, centred=True).mean("coercive")[0] == pytest.approx(0.1, abs=1e-4)


def landau(p: np.ndarray) -> np.ndarray:
    """dg/dP (V/Å) of g = −a P²/2 + b P⁴/4 with P_s = 0.02 e/Å², 0.05 V/Å at most against it; P in e/Å²."""
    a, b = LANDAU
    return -a * p + b * p**3


# 2/(3√3) a P_s = 0.05 V/Å, a = b P_s²
LANDAU = (0.05 * 3.0 * np.sqrt(3.0) / 2.0 / 0.02, 0.05 * 3.0 * np.sqrt(3.0) / 2.0 / 0.02**3)


def at_displacement(folder: Path, d: float, noise: float = 0.0, n: int = 400, seed: int = 0) -> Path:
    """A run of the Landau crystal at constant D along z; ``noise``: fluctuations of P, e/Å²."""
    p = brentq(lambda p: landau(p) + FOUR_PI_K_E * p - d, -1.0, 1.0)
    series = p + noise * np.random.default_rng(seed).normal(size=n)
    axis = np.array([0.0, 0.0, 1.0])
    return write_run(
        folder,
        VOLUME * series[:, None] * axis,
        settings=f"displacement: [null, null, {d}]\n",
        field=(d - FOUR_PI_K_E * series)[:, None] * axis,
    )


def well(root: Path, displacements: np.ndarray, symmetric: bool = False, **options: float) -> DoubleWell:
    folders = [at_displacement(root / str(k), float(d), seed=k, **options) for k, d in enumerate(displacements)]
    return double_well([points_of(find_run(folder)) for folder in folders], symmetric=symmetric)


def exact_energy(p: np.ndarray) -> np.ndarray:
    """U (eV per cell) at constant D, from D = 0: V (g + ε²/8πk_e)."""
    a, b = LANDAU
    return VOLUME * (-0.5 * a * p**2 + 0.25 * b * p**4 + landau(p) ** 2 / (2.0 * FOUR_PI_K_E))


def test_double_well_is_that_of_landau(tmp_path: Path) -> None:
    found = well(tmp_path, np.linspace(-5.0, 5.0, 21))
    assert [s.stable for s in found.stationary] == [True, False, True]
    for s, p in zip(found.stationary, (-0.02, 0.0, 0.02), strict=True):
        assert s.polarization == pytest.approx(p, abs=2e-5)
    assert found.spontaneous[0] == pytest.approx(0.02, rel=2e-3)
    barrier = VOLUME * LANDAU[0] ** 2 / (4.0 * LANDAU[1])
    assert found.barrier == pytest.approx(barrier, rel=5e-3)
    # ε_r = 1 + 4πk_e/g'' at the minimum, g'' = 2a
    assert found.stationary[2].slope == pytest.approx(1.0 / (1.0 + FOUR_PI_K_E / (2.0 * LANDAU[0])), rel=0.02)
    p = (found.grid - found.grid_field) / FOUR_PI_K_E
    np.testing.assert_allclose(found.grid_energy - barrier, exact_energy(p), atol=0.01 * barrier)


def test_errors_of_the_barrier_are_those_of_repetitions(tmp_path: Path) -> None:
    d = np.linspace(0.0, 5.0, 9)
    found = []
    for k in range(25):
        folders = [
            at_displacement(tmp_path / f"{k}-{j}", x, noise=2e-4, n=60, seed=100 * k + j) for j, x in enumerate(d)
        ]
        found.append(double_well([points_of(find_run(folder)) for folder in folders], symmetric=True))
    heights, errors = np.array([w.barrier for w in found]), np.array([w.barrier_error for w in found])
    places = np.array([w.stationary[-1].displacement for w in found])
    stated = np.mean([w.stationary[-1].displacement_error for w in found])
    assert heights.std() == pytest.approx(errors.mean(), rel=0.4)
    assert places.std() == pytest.approx(stated, rel=0.4)


def test_symmetric_halves_the_work(tmp_path: Path) -> None:
    half = well(tmp_path / "half", np.linspace(0.0, 5.0, 11), symmetric=True)
    whole = well(tmp_path / "whole", np.linspace(-5.0, 5.0, 21))
    assert half.barrier == pytest.approx(whole.barrier, rel=1e-9)
    np.testing.assert_allclose(half.grid_energy, whole.grid_energy, atol=1e-12)


def ramped(folder: Path) -> Path:
    """D along x up, down and up again, slowly: the crystal follows the one curve ε(D), unstable part and all."""
    d, _ = triangle(8001, 1.25, 5.0)
    curve = np.linspace(-0.06, 0.06, 4001)
    p = np.interp(d, landau(curve) + FOUR_PI_K_E * curve, curve)
    axis = np.array([1.0, 0.0, 0.0])
    return write_run(
        folder,
        VOLUME * p[:, None] * axis,
        settings="displacement: [{cyclic: {low: -5, high: 5, rate: 0.1}}, null, null]\n",
        field=(d - FOUR_PI_K_E * p)[:, None] * axis,
    )


def test_loop_at_imposed_displacement(tmp_path: Path) -> None:
    """No loss on a curve that is single-valued in D; the largest field against P is Landau's coercive field."""
    run = ramped(tmp_path / "run")
    found = loop(run)
    assert found.kind == "displacement"
    assert found.mean("remanent")[0] == pytest.approx(0.02, rel=2e-3)
    assert found.mean("coercive")[0] == pytest.approx(0.05, rel=2e-3)
    assert abs(found.mean("loss")[0]) < 1e-3 * 4.0 * 0.02 * 0.05
    binned = double_well([points_of(find_run(run), bins=25)])
    assert binned.barrier == pytest.approx(VOLUME * LANDAU[0] ** 2 / (4.0 * LANDAU[1]), rel=0.02)


def test_polynomial_through_noise(tmp_path: Path) -> None:
    """ε(D) is no polynomial, but nearly one of degree 9: the same well, with the noise averaged out."""
    d = np.linspace(-4.0, 4.0, 33)
    folders = [at_displacement(tmp_path / str(k), float(x), noise=1e-3, n=100, seed=k) for k, x in enumerate(d)]
    points = [points_of(find_run(folder)) for folder in folders]
    fitted, through = double_well(points, degree=9), double_well(points)
    barrier = VOLUME * LANDAU[0] ** 2 / (4.0 * LANDAU[1])
    assert abs(fitted.barrier - barrier) < 4.0 * fitted.barrier_error
    assert [s.stable for s in fitted.stationary] == [True, False, True]
    curve = np.linspace(-0.06, 0.06, 4001)
    exact = np.interp(fitted.grid, landau(curve) + FOUR_PI_K_E * curve, landau(curve))
    misses = [float(np.sqrt(np.mean((w.grid_field - exact) ** 2))) for w in (fitted, through)]
    assert misses[0] < 0.8 * misses[1]
    with pytest.raises(InputError, match="degree is 40"):
        double_well(points, degree=40)


def test_relaxed_takes_the_last_record(tmp_path: Path) -> None:
    folder = at_displacement(tmp_path / "run", 1.0, noise=1e-3)
    points = points_of(find_run(folder), relaxed=True)
    last = [float(x) for x in (folder / "run.field_0").read_text().splitlines()[-1].split()]
    np.testing.assert_allclose(points.field[0], np.array(last) * units.Hartree / units.Bohr, atol=1e-6)
    assert np.isnan(points.error).all()


def test_refusals(tmp_path: Path) -> None:
    constant = at_displacement(tmp_path / "d", 1.0)
    with pytest.raises(InputError, match="does not change with time"):
        loop(constant)
    with pytest.raises(InputError, match="two or more different displacements"):
        double_well([points_of(find_run(constant))])
    field = write_run(tmp_path / "e", np.zeros((4, 3)), settings="field: [0, 0, 0]", field=np.zeros((4, 3)))
    with pytest.raises(InputError, match="has no displacement"):
        points_of(find_run(field))
    silent = write_run(
        tmp_path / "f", np.zeros((4, 3)), settings="field: [0, 0, {ramp: {start: 0, rate: 1, until: 1}}]"
    )
    with pytest.raises(InputError, match="extra_type='field'"):
        loop(silent)


CRYSTAL = """<simulation verbosity='quiet'>
  <output prefix='run'>
    <properties stride='1' filename='out'> [ step, time{femtosecond}, temperature{kelvin} ] </properties>
    <trajectory filename='pos' stride='10' format='ase'> positions </trajectory>
    <trajectory filename='dipole' stride='1' extra_type='dipole'> extras </trajectory>
    <trajectory filename='field' stride='1' extra_type='field'> extras </trajectory>
  </output>
  <total_steps> 130 </total_steps>
  <prng> <seed> 31 </seed> </prng>
  <ffdirect name='voltpi'>
    <pes>custom</pes> <pes_path> PES </pes_path>
    <parameters>{settings: settings.yaml, template: start.xyz}</parameters>
  </ffdirect>
  <system>
    <initialize nbeads='1'><file mode='ase'> start.xyz </file></initialize>
    <forces><force forcefield='voltpi'/></forces>
    <ensemble><temperature units='kelvin'> 10 </temperature></ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 8 </timestep>
        <thermostat mode='langevin'><tau units='femtosecond'> 20 </tau></thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""


@pytest.mark.parametrize("key", ["field", "displacement"])
def test_what_a_real_run_leaves(tmp_path: Path, key: str) -> None:
    """NaCl of constant charges, 10 K, under a cyclic field, or D: what is imposed, what answers, and its sign."""
    crystal = bulk("NaCl", "rocksalt", 5.64, cubic=True)
    crystal.set_initial_charges([1.0 if symbol == "Na" else -1.0 for symbol in crystal.symbols])
    crystal.write(tmp_path / "start.xyz")
    cyclic = "{cyclic: {low: -0.1, high: 0.1, rate: 0.5, start: 0.0}}"  # a cycle of 0.8 ps, 100 steps
    (tmp_path / "settings.yaml").write_text(
        "short_range: {pair: {set: nacl, cutoff: 6.0}}\ncharges: {model: fixed}\ndevice: cpu\n"
        f"{key}: [{'0, 0' if key == 'field' else 'null, null'}, {cyclic}]\n"
    )
    (tmp_path / "input.xml").write_text(CRYSTAL.replace("PES", pes.__file__))
    command = [str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = loop(tmp_path)
    assert found.kind == key
    assert len(found.cycles) == 1
    control = found.field if key == "field" else found.displacement
    schedule = Schedule.model_validate({"cyclic": {"low": -0.1, "high": 0.1, "rate": 0.5, "start": 0.0}})
    np.testing.assert_allclose(control, [value_at(schedule, 1e-3 * t) for t in found.time], atol=1e-6)
    # ε_r 4.2 (docs/uses/dielectric-constant.md): nearly so at this pace
    slope = np.polyfit(control, FOUR_PI_K_E * found.polarization, 1)[0]
    assert slope == pytest.approx(3.2 if key == "field" else 3.2 / 4.2, rel=0.35)


def test_commands(tmp_path: Path) -> None:
    lines = analyze(["hysteresis", str(hysteron(tmp_path / "run")), "--average", "200"])
    assert any(line.startswith("coercive field            0.1") for line in lines)
    numbers = json.loads((tmp_path / "run" / "hysteresis.json").read_text())
    assert numbers["remanent_polarization_C_per_m2"] == pytest.approx(0.01 * np.tanh(2.0) * E_PER_A2, rel=1e-2)
    assert numbers["loss_MJ_per_m3"] == pytest.approx(0.004 * 160217.6634, rel=1e-3)
    folders = [str(at_displacement(tmp_path / f"d{k}", d)) for k, d in enumerate(np.linspace(0.0, 5.0, 9))]
    lines = analyze(["double-well", *folders, "--symmetric", "--out", str(tmp_path / "out")])
    assert any(line.startswith("barrier") for line in lines)
    for stem in (tmp_path / "run" / "hysteresis", tmp_path / "out" / "double-well"):
        for suffix in ("csv", "png", "svg"):
            assert stem.with_suffix(f".{suffix}").stat().st_size > 1000
