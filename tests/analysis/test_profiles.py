"""Profiles of runs whose exact answers are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from voltpi.analysis import ANALYSES
from voltpi.analysis.capacitor import setup_of
from voltpi.analysis.profiles import Profiles, profiles_of
from voltpi.analysis.runs import find_run
from voltpi.driver.analyze import analyze
from voltpi.driver.run_setup import describe_run
from voltpi.potential.errors import InputError

from toy_capacitor import gold, gold_settings, write_run

K_E = 14.3996454784255


def profiles_in(folder: Path, **options: float) -> Profiles:
    run = find_run(folder)
    return profiles_of(run, setup_of(run, describe_run), **options)


def ions(folder: Path, frames: list[list[np.ndarray]], boundary: str = "slab-z", width: str = "point") -> Path:
    """Na+ and Cl- at given heights (frames, beads, heights of the two) in a cell of 10 x 10 Å."""
    start = Atoms("NaCl", [[2.0, 2.0, 4.0], [5.0, 5.0, 9.0]], cell=[10.0, 10.0, 16.0], pbc=[True, True, False])
    start.pbc = [True, True, boundary != "slab-z"]
    start.set_initial_charges([0.8, -0.8])
    settings = f"charges: {{model: fixed, width: {width}}}\ncoulomb: {{boundary: {boundary}}}\nfield: [0, 0, 0.01]\n"
    written = []
    for beads in frames:
        places = [start.positions * [1, 1, 0] + np.array([[0, 0, z] for z in heights]) for heights in beads]
        written.append([{"positions": r, "charges": np.array([0.8, -0.8])} for r in places])
    return write_run(folder, start, written, settings)


def test_two_sheets_and_a_field(tmp_path: Path) -> None:
    p = profiles_in(ions(tmp_path / "run", [[np.array([4.0, 9.0])]]), bin_width=0.25)
    sigma = 0.8 / 100.0
    inside = (p.edges > 4.3) & (p.edges < 8.7)
    np.testing.assert_allclose(p.field[inside], 4 * np.pi * K_E * sigma + 0.01, rtol=1e-12)
    np.testing.assert_allclose(p.field[p.edges < 3.7], 0.01, atol=1e-14)
    drop = p.potential[-1] - p.potential[0] + 0.01 * np.ptp(p.edges)
    assert drop == pytest.approx(-4 * np.pi * K_E * sigma * 5.0, rel=1e-12)
    assert p.density["Na"].sum() * 0.25 * 100.0 == pytest.approx(1.0)
    assert p.charge.max() == pytest.approx(sigma / 0.25)
    assert p.audit is None
    assert p.interfaces == ()
    assert np.isnan(p.errors["potential"]).all()


def test_gaussians_are_smeared_as_they_are(tmp_path: Path) -> None:
    eta = {"Na": 1.1, "Cl": 0.7}
    p = profiles_in(ions(tmp_path / "run", [[np.array([4.0, 9.0])]], width="{Na: 1.1, Cl: 0.7}"), bin_width=0.02)
    exact = sum(
        q / 100.0 * eta[s] / np.sqrt(np.pi) * np.exp(-(eta[s] ** 2) * (p.z - z) ** 2)
        for s, q, z in (("Na", 0.8, 4.0), ("Cl", -0.8, 9.0))
    )
    np.testing.assert_allclose(p.charge, exact, atol=1e-6)
    assert p.density["Na"].max() == pytest.approx(1 / (100.0 * 0.02))  # nuclei are points all the same


def test_periodic_cells_have_the_settings_field_as_their_mean(tmp_path: Path) -> None:
    p = profiles_in(ions(tmp_path / "run", [[np.array([4.0, 9.0 + 32.0])]], boundary="periodic"), bin_width=0.1)
    assert p.edges[[0, -1]].tolist() == pytest.approx([0.0, 16.0])
    assert p.potential[-1] - p.potential[0] == pytest.approx(-0.16, abs=1e-12)
    # 5 Å of field −σ·(11/16) between the sheets the short way, and σ·(5/16) on the other
    inner = np.interp(6.0, p.edges, p.field) - 0.01
    assert inner == pytest.approx(4 * np.pi * K_E * 0.008 * 11 / 16, rel=1e-10)
    assert p.density["Cl"][90] == pytest.approx(1 / (100.0 * 0.1))


def test_beads_are_averaged(tmp_path: Path) -> None:
    heights = [np.array([4.02, 9.0]), np.array([4.22, 9.0])]
    p = profiles_in(ions(tmp_path / "run", [heights, heights]), bin_width=0.1)
    filled = p.z[p.density["Na"] > 0]
    assert len(filled) == 2
    np.testing.assert_allclose(p.density["Na"][p.density["Na"] > 0], 0.5 / (100.0 * 0.1))
    one = [profiles_in(ions(tmp_path / f"bead{b}", [[h]]), bin_width=0.1).potential for b, h in enumerate(heights)]
    np.testing.assert_allclose(p.potential, np.mean(one, axis=0), atol=1e-12)


def test_errors_are_the_scatter_of_means(tmp_path: Path) -> None:
    """Heights jump independently from frame to frame: the error of a bin is binomial."""
    rng = np.random.default_rng(9)
    frames = [[np.array([4.0 + 0.5 * rng.integers(0, 2), 9.0])] for _ in range(400)]
    p = profiles_in(ions(tmp_path / "run", frames), bin_width=0.5)
    filled = p.density["Na"] > 0
    assert filled.sum() == 2
    np.testing.assert_allclose(p.density["Na"][filled], 0.5 / 50.0, rtol=0.15)
    np.testing.assert_allclose(p.errors["density:Na"][filled], 0.5 / 50.0 / np.sqrt(400), rtol=0.4)
    late = profiles_in(tmp_path / "run", bin_width=0.5, skip=1000.0)
    assert len(late.steps) == 200


def test_command_on_the_published_capacitor(tmp_path: Path) -> None:
    atoms, charges, role = gold()
    frame = {"positions": atoms.positions, "charges": charges, "totals": [-0.52, 0.52]}
    folder = write_run(tmp_path / "run", atoms, [[frame]] * 3, gold_settings("slab-z"))
    lines = analyze(["profiles", str(folder), "--bin", "0.2", "--audit", "2"])
    assert any("audit: recovered drop right − left 2.000000 V agrees with the applied 2 V" in line for line in lines)
    numbers = json.loads((folder / "profiles.json").read_text())
    assert numbers["audit"]["agrees"]
    assert numbers["audit"]["frames"] == 2
    drops = numbers["double_layer_drop_V"]
    assert drops["right"] - drops["left"] == pytest.approx(2.0, abs=1e-4)
    with (folder / "profiles.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["z_A"]) == pytest.approx(atoms.positions[:, 2].min() - 3.0 + 0.1)
    total = sum(float(row["charge_density_e_per_A3"]) for row in rows) * 0.2 * 11.539984**2
    assert total == pytest.approx(0.0, abs=1e-6)
    metal = sum(float(row["density_left_per_A3"]) for row in rows) * 0.2 * 11.539984**2
    assert metal == pytest.approx((role == "A").sum())
    for suffix in ("png", "svg"):
        assert (folder / f"profiles.{suffix}").stat().st_size > 10000


def test_several_runs_are_refused(tmp_path: Path) -> None:
    folders = [ions(tmp_path / name, [[np.array([4.0, 9.0])]]) for name in "ab"]
    with pytest.raises(InputError, match="profiles is of one run, but 2 were given"):
        ANALYSES["profiles"].run(folders, describe=describe_run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bin", "0"], "bin is 0: give the width of a bin"),
        (["--audit", "0.5"], "audit is 0.5: give the number of frames"),
        (["--skip", "-1"], "skip is -1.0"),
        (["--skip", "100"], "skip is 100 fs but its charges are over"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: list[str], message: str) -> None:
    folder = ions(tmp_path / "run", [[np.array([4.0, 9.0])]])
    with pytest.raises(InputError, match=message):
        analyze(["profiles", str(folder), *options])


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = ions(tmp_path / "run", [[np.array([4.0, 9.0])]])
    (folder / "run.charges_0").unlink()
    with pytest.raises(InputError, match="no charges; add <trajectory extra_type='charges'>"):
        analyze(["profiles", str(folder)])
    folder = ions(tmp_path / "other", [[np.array([4.0, 9.0])]])
    (folder / "start.xyz").unlink()
    with pytest.raises(InputError, match=r"start structure is not known; put it beside as start\.xyz"):
        analyze(["profiles", str(folder)])
    folder = ions(tmp_path / "third", [[np.array([4.0, 9.0])]])
    pos = folder / "run.pos_0.xyz"
    pos.write_text(pos.read_text().replace("Cl", "Br"))
    with pytest.raises(InputError, match="has other atoms than the start structure"):
        analyze(["profiles", str(folder)])
