"""Four estimates of the dielectric constant where it is known exactly, and what the command says about runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from gaussian_model import BOLTZMANN, FOUR_PI_K_E, Medium, isotropic, write_run

from voltpi.analysis import ANALYSES
from voltpi.analysis.dielectric import Dielectric, DielectricRun, dielectric_of, dielectric_run
from voltpi.analysis.runs import find_run
from voltpi.analysis.statistics import mean_with_error
from voltpi.driver.analyze import analyze
from voltpi.potential.errors import InputError

TENSOR = Medium(
    stiffness=np.array([[2.0, 0.3, 0.1], [0.3, 1.5, -0.2], [0.1, -0.2, 1.0]]),
    charge=np.array([[3.0, 0.2, 0.0], [0.1, 2.5, 0.3], [-0.2, 0.0, 2.0]]),
    alpha=np.array([[5.0, 0.4, 0.2], [0.4, 4.0, -0.3], [0.2, -0.3, 6.0]]),
)


def setting(control: list[float], held: list[bool]) -> str:
    field = ", ".join("0" if d else str(x) for x, d in zip(control, held, strict=True))
    given = ", ".join(str(x) if d else "null" for x, d in zip(control, held, strict=True))
    return f"field: [{field}]\ndisplacement: [{given}]\n"


def simulate(
    folder: Path,
    medium: Medium,
    control: list[float],
    held: list[bool] | bool = False,
    n: int = 8000,
    seed: int = 1,
    alpha: bool = True,
) -> Path:
    d = [held] * 3 if isinstance(held, bool) else held
    dipoles = medium.series(control, d, n, seed)
    return write_run(
        folder, dipoles, settings=setting(control, d), volume=medium.volume, alpha=medium.alpha if alpha else None
    )


def run_of(folder: Path, **options: object) -> DielectricRun:
    return dielectric_run(find_run(folder), **options)  # type: ignore[arg-type]


def four(root: Path, medium: Medium, **options: object) -> Dielectric:
    """Runs at ε = 0, ±0.02 and D = 0, ±0.2 V/Å along z."""
    folders = [simulate(root / f"e{k}", medium, [0, 0, x], seed=k) for k, x in enumerate((0.0, 0.02, -0.02))]
    folders += [simulate(root / f"d{k}", medium, [0, 0, x], True, seed=9 + k) for k, x in enumerate((0.0, 0.2, -0.2))]
    return dielectric_of([run_of(folder) for folder in folders], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ions", "electrons"), [(4.0, 1.5), (0.5, 0.0), (30.0, 0.8)])
def test_four_estimates_are_the_exact_constant(tmp_path: Path, ions: float, electrons: float) -> None:
    """Each within four of its errors, and the errors small enough to tell wrong formulas."""
    exact = 1.0 + ions + electrons
    result = four(tmp_path, isotropic(ions, electrons))
    assert [e.name[:3] for e in result.estimates] == ["(a)", "(b)", "(c)", "(d)"]
    for estimate in result.estimates:
        measured, error = estimate.measured
        aim = exact if estimate.kind == "field" else 1.0 / exact
        assert abs(measured - aim) < 4.0 * error
        assert error < (0.05 * exact if estimate.kind == "field" else 0.04)
    assert result.chance > 0.01
    value, low, high = result.combined
    assert low < value < high
    assert value == pytest.approx(exact, abs=3.0 * (high - low))


def test_the_electronic_part_is_counted(tmp_path: Path) -> None:
    """Without it, fluctuations would miss by many errors: the electrons do not fluctuate in M."""
    medium = isotropic(2.0, 1.5)
    for held, exact, without in ((False, 4.5, 3.0), (True, 1.0 / 4.5, 1.0 / 4.5 + 1.0 - 1.0 / 2.5)):
        folder = simulate(tmp_path / str(held), medium, [0, 0, 0], held)
        (estimate,) = dielectric_of([run_of(folder)]).estimates
        measured, error = estimate.measured
        assert abs(measured - exact) < 4.0 * error
        assert abs(measured - without) > 10.0 * error
        (given,) = dielectric_of([run_of(folder, electronic=2.5)]).estimates
        assert given.measured == pytest.approx(estimate.measured, rel=1e-6)


@pytest.mark.parametrize("held", [[False] * 3, [True] * 3, [False, False, True], [True, False, True]])
def test_tensor_of_an_anisotropic_medium(tmp_path: Path, held: list[bool]) -> None:
    """From fluctuations in any mixture of ε and D, also in a field."""
    folder = simulate(tmp_path / "run", TENSOR, [0.01, 0.0, 0.1], held, n=30000)
    found = run_of(folder).permittivity
    assert found is not None
    value, error = found
    assert (np.abs(value - TENSOR.permittivity) < 4.5 * error).all()
    assert error.max() < 0.35
    np.testing.assert_allclose(value, value.T, atol=1e-9)


def test_component_along_an_axis(tmp_path: Path) -> None:
    """The slope with D in one direction alone is 1/ε_zz, that of ε is ε_zz."""
    folders = [simulate(tmp_path / f"e{k}", TENSOR, [0, 0, x], seed=k) for k, x in enumerate((0.0, 0.05))]
    z_alone = [False, False, True]
    folders += [simulate(tmp_path / f"d{k}", TENSOR, [0, 0, x], z_alone, seed=5 + k) for k, x in enumerate((0.0, 0.5))]
    result = dielectric_of([run_of(folder, along=2) for folder in folders], along=2)
    exact = TENSOR.permittivity[2, 2]
    assert len(result.estimates) == 4
    for estimate in result.estimates:
        measured, error = estimate.measured
        assert abs(measured - (exact if estimate.kind == "field" else 1.0 / exact)) < 4.0 * error
    assert (
        "not y"
        in dielectric_of([run_of(folder, along=1) for folder in folders[:2]], along=1).missing[
            "(b) slope of ⟨P⟩ against ε"
        ]
    )


def test_errors_are_those_of_repetitions(tmp_path: Path) -> None:
    """Scatter of 25 short runs against the error that each of them states."""
    medium = isotropic(4.0, 1.5)
    for held in (False, True):
        found = [
            dielectric_of([run_of(simulate(tmp_path / f"{held}{k}", medium, [0, 0, 0], held, n=1500, seed=100 + k))])
            for k in range(25)
        ]
        measured = np.array([result.estimates[0].measured for result in found])
        aim = 1.0 / 6.5 if held else 6.5
        assert measured[:, 0].std() == pytest.approx(measured[:, 1].mean(), rel=0.35)
        assert abs(measured[:, 0].mean() - aim) < 4.0 * measured[:, 0].std() / np.sqrt(25)


def test_beads_are_averaged(tmp_path: Path) -> None:
    """What the beads of a ring polymer have beyond its mean does not count."""
    medium = isotropic(4.0, 0.0)
    dipoles = medium.series([0, 0, 0], [False] * 3, 4000, 3)
    spread = np.random.default_rng(1).normal(scale=0.5, size=(4, 4000, 3))
    spread -= spread.mean(axis=0)
    run = write_run(tmp_path / "p", dipoles, settings="field: [0, 0, 0]\n", alpha=medium.alpha, beads=spread)
    alone = write_run(tmp_path / "c", dipoles, settings="field: [0, 0, 0]\n", alpha=medium.alpha)
    ring, classical = (dielectric_of([run_of(folder)]).estimates[0] for folder in (run, alone))
    assert ring.value == pytest.approx(classical.value, rel=1e-9)


def test_volume_that_changes(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    volume = 1000.0 + 30.0 * rng.normal(size=8000)
    scale = np.sqrt(BOLTZMANN * 30.0 * 3.0 / FOUR_PI_K_E * 1000.0)
    dipoles = scale * rng.normal(size=(8000, 3))
    free = write_run(tmp_path / "a", dipoles, settings="{}", volume=volume)
    (estimate,) = dielectric_of([run_of(free, electronic=1.0)]).estimates
    assert abs(estimate.value - 4.0) < 4.0 * estimate.error
    strained = write_run(tmp_path / "b", dipoles[:50], settings="field: [0, 0, 0.1]", volume=volume[:50])
    assert "volume changes" in run_of(strained, electronic=1.0).lacking


def test_saturation_is_seen(tmp_path: Path) -> None:
    """P = 4 tanh: the strongest fields are left out, and said to be."""
    rng = np.random.default_rng(0)
    runs = []
    for k, x in enumerate((-0.3, -0.02, -0.01, 0.0, 0.01, 0.02, 0.3)):
        mean = np.array([0.0, 0.0, 4.0 * np.tanh(x / 0.1)])
        folder = write_run(
            tmp_path / str(k), mean + 0.2 * rng.normal(size=(4000, 3)), settings=f"field: [0, 0, {x}]", temperature=None
        )
        runs.append(run_of(folder))
    result = dielectric_of(runs)
    (estimate,) = result.estimates
    assert result.slopes[0].used.tolist() == [False, True, True, True, True, True, False]
    assert "not straight beyond 0.02" in estimate.report()
    exact = 1.0 + FOUR_PI_K_E / 1000.0 * 40.0
    assert abs(estimate.value - exact) < 0.02 * exact + 4.0 * estimate.error
    assert "temperature" in result.missing["(a) fluctuations at constant ε"] or "electrons" in str(result.missing)


def test_trajectory_of_another_program(tmp_path: Path, nvt_run: Path) -> None:
    """Positions and a file of charges, without settings: the textbook formula, summed here directly."""
    for file in nvt_run.glob("run.*"):
        if "dipole" not in file.name and "charges" not in file.name and file.suffix != ".json":
            shutil.copy(file, tmp_path)
    (tmp_path / "charges.csv").write_text("element,charge\nO,-0.8\nH,0.4\n")
    options = ["--field", "0", "0", "0", "--temperature", "310", "--charges", str(tmp_path / "charges.csv"), "--json"]
    answer = analyze(["dielectric", str(tmp_path), *options])
    (estimate,) = json.loads(answer[0])["estimates"]
    frames = read(tmp_path / "run.pos_0.extxyz", ":")
    dipoles = np.array([np.tile([-0.8, 0.4, 0.4], 64) @ frame.positions for frame in frames])
    n = len(dipoles)
    variance = sum(dipoles[:, k].var() / (1.0 - 2.0 * mean_with_error(dipoles[:, k]).tau / n) for k in range(3))
    direct = 1.0 + FOUR_PI_K_E * variance / (3.0 * 12.42**3 * BOLTZMANN * 310.0)
    assert estimate["relative_permittivity"] == pytest.approx(direct, rel=1e-6)
    assert direct > 1.001


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    medium = isotropic(4.0, 1.0)
    lone = simulate(tmp_path / "a", medium, [0, 0, 0], n=500, alpha=False)
    with pytest.raises(InputError, match=r"output\.polarizability"):
        dielectric_of([run_of(lone)])
    moving = write_run(
        tmp_path / "b",
        np.zeros((5, 3)),
        settings="field: [0, 0, {cyclic: {low: -1, high: 1, rate: 1}}]",
    )
    with pytest.raises(InputError, match=r"changes with time.*hysteresis"):
        run_of(moving)
    displaced = [simulate(tmp_path / f"d{k}", medium, [0, 0, 0.1 * k], True, n=50) for k in (0, 1)]
    with pytest.raises(InputError, match=r"displacement along xyz is no constant field.*analyze dielectric"):
        analyze(["field-response", *map(str, displaced)])
    crossed = [simulate(tmp_path / f"c{k}", medium, v, n=200) for k, v in enumerate(([0.1, 0, 0], [0, 0.2, 0]))]
    with pytest.raises(InputError, match=r"not along .* alone"):
        dielectric_of([run_of(folder) for folder in crossed])


def test_command(tmp_path: Path) -> None:
    """One table and one figure of all four."""
    medium = isotropic(4.0, 1.5)
    runs = [simulate(tmp_path / f"e{k}", medium, [0, 0, x], n=3000, seed=k) for k, x in enumerate((0.0, 0.02))]
    runs += [simulate(tmp_path / f"d{k}", medium, [0, 0, x], True, 3000, 7 + k) for k, x in enumerate((0.0, 0.2))]
    lines = analyze(["dielectric", *map(str, runs), "--skip", "100", "--out", str(tmp_path / "out")])
    assert sum(line.startswith(("(a)", "(b)", "(c)", "(d)")) for line in lines) == 4
    assert any("the estimates agree" in line for line in lines)
    rows = list(csv.reader((tmp_path / "out" / "dielectric.csv").read_text().splitlines()))
    assert [row[0][:3] for row in rows[1:]] == ["(a)", "(b)", "(c)", "(d)"]
    assert all(abs(float(row[1]) - 6.5) < 5.0 * float(row[2]) for row in rows[1:])
    numbers = json.loads((tmp_path / "out" / "dielectric.json").read_text())
    assert numbers["runs"][2]["displacement_V_per_A"] == [0.0, 0.0, 0.0]
    assert numbers["runs"][0]["displacement_V_per_A"] == [None, None, None]
    assert numbers["runs"][0]["length_ps"] == pytest.approx(29.89)
    for suffix in ("png", "svg"):
        assert (tmp_path / "out" / f"dielectric.{suffix}").stat().st_size > 5000
    with pytest.raises(InputError, match="electronic is 0"):
        ANALYSES["dielectric"].run(runs, tmp_path, electronic=0.5)
