"""A run of plain i-PI with another program's potential and fixed charges, as MDAnalysis and plain formulae see it.

data/plain_ipi: the run (600 fs of salt water, 40 atoms, 4 fs a frame) and what made reference.json.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voltpi.analysis import ANALYSES
from voltpi.analysis.polarization import polarization_of
from voltpi.analysis.runs import find_run
from voltpi.analysis.statistics import autocorrelation_time

DATA = Path(__file__).parent / "data" / "plain_ipi"
REFERENCE: dict[str, Any] = json.loads((DATA / "reference.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    for name in ("run.out", "run.pos_0.xyz"):
        with gzip.open(DATA / f"{name}.gz", "rb") as packed, (folder / name).open("wb") as file:
            shutil.copyfileobj(packed, file)
    shutil.copy(DATA / "charges.csv", folder)
    (folder / "water.csv").write_text("element,charge\nO,-0.82\nH,0.41\nNa,0\nCl,0\n")
    return folder


def columns(answer: dict[str, Any]) -> np.ndarray:
    return np.genfromtxt(answer["files"][0], delimiter=",", names=True, deletechars="")


def test_radial_distributions(run: Path) -> None:
    given = REFERENCE["rdf"]
    answer = ANALYSES["rdf"].run(
        [run], run / "o", pairs="O-O,O-H,Na-O", bin=given["bin_A"], range=given["range_A"] + 1e-6
    )
    table = columns(answer)
    volume, pairs = REFERENCE["edge_A"] ** 3, {"O-O": 12 * 11, "O-H": 12 * 24, "Na-O": 2 * 12}
    edges = given["bin_A"] * np.arange(43)
    for name, count in pairs.items():
        mine, theirs = table[f"g_{name}"], np.array(given[name])
        # MDAnalysis works in single precision: a distance in a thousand may fall to the other side of an edge
        one = 151**-1 * volume / count / (4 / 3 * np.pi * np.diff(edges**3)) * 2
        assert np.all(np.abs(mine - theirs) < 1e-4 * theirs.max() + 1.5 * one)
        assert np.abs(mine - theirs).sum() < 1e-3 * theirs.sum()


def test_mean_squared_displacements(run: Path) -> None:
    table = columns(ANALYSES["msd"].run([run], run / "o"))
    for name, theirs in REFERENCE["msd_A2"].items():
        assert table[f"msd_{name}_A2"] == pytest.approx(np.array(theirs), rel=2e-4, abs=2e-5)


def test_conductivity(run: Path) -> None:
    given = REFERENCE["conductivity"]
    answer = ANALYSES["conductivity"].run(
        [run], run / "o", charges=str(run / "charges.csv"), temperature=400.0, fit=(0.015, 0.06)
    )
    helfand = next(e for e in answer["estimates"] if e["method"] == "Einstein-Helfand")
    assert helfand["sigma_S_per_m"] == pytest.approx(given["einstein_helfand_S_per_m"], rel=1e-5)
    assert columns(answer)["dM2_charges_e2A2"] == pytest.approx(np.array(given["dM2_e2A2"]), rel=1e-5)
    running = np.genfromtxt(run / "o" / "conductivity-green-kubo.csv", delimiter=",", names=True)
    theirs = np.array(given["green_kubo_running_S_per_m"])[: len(running)]
    assert running["running_integral_S_per_m"] == pytest.approx(theirs, rel=1e-5, abs=1e-3)


def test_dielectric_constant_of_the_water(run: Path) -> None:
    """MDAnalysis takes the plain variance; VoltPI frees it of the bias 2τ/n of a short correlated series."""
    given = REFERENCE["dielectric_of_water"]
    answer = ANALYSES["dielectric"].run(
        [run], run / "o", charges=str(run / "water.csv"), field=(0.0, 0.0, 0.0), temperature=400.0
    )
    dipole = polarization_of(find_run(run, field=np.zeros(3)), run / "water.csv").dipole
    assert dipole.var(axis=0) == pytest.approx(given["fluct_e2A2"], rel=2e-4)
    biased = [1.0 - 2.0 * autocorrelation_time(dipole[:, k]) / len(dipole) for k in range(3)]
    ratio = float(np.sum(np.array(given["fluct_e2A2"]) / biased) / np.sum(given["fluct_e2A2"]))
    found = answer["estimates"][0]["relative_permittivity"]
    assert found - 1.0 == pytest.approx(ratio * (given["eps_mean"] - 1.0), rel=5e-4)


def test_infrared_absorption(run: Path) -> None:
    given = REFERENCE["infrared"]
    answer = ANALYSES["ir"].run([run], run / "o", charges=str(run / "charges.csv"), temperature=400.0)
    assert answer["correlations_up_to_fs"] == given["correlations_up_to_fs"]
    table = columns(answer)
    for wavenumber, absorption in given["absorption_per_cm"].items():
        mine = np.interp(float(wavenumber), table["wavenumber_cm-1"], table["absorption_cm-1"])
        assert mine == pytest.approx(absorption, rel=5e-3)  # a straight line between the points of the table
