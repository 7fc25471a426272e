"""Dipoles of molecules against direct sums over structures that are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import read
from written_run import BOHR, write_run

from voltpi.analysis import ANALYSES
from voltpi.analysis.capacitor import Setup
from voltpi.analysis.molecular_dipoles import molecular_dipoles
from voltpi.analysis.molecules import assembled, bond_tree, whole
from voltpi.analysis.runs import find_run
from voltpi.potential.errors import InputError

DEBYE = 4.80320471
CELL = np.array([[9.0, 0, 0], [1.5, 10.0, 0], [-1.0, 2.0, 11.0]])
CHARGES = {"O": -0.8, "H": 0.4, "N": 0.6, "Na": 1.0}
WATER = np.array([[0.0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]])
HYDROXIDE = np.array([[0.0, 0, 0], [0.97, 0, 0]])


def never(*_: Any) -> Setup:
    raise AssertionError("settings were asked for")


def turned(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.diag(r)) * (np.linalg.det(q * np.sign(np.diag(r))))


def mixture(rng: np.random.Generator, spread: float = 0.1) -> tuple[Atoms, list[np.ndarray]]:
    """Six waters, a hydroxide and a sodium, wrapped; and the places of every molecule's atoms, whole."""
    parts, symbols = [], ""
    for k in range(8):
        shape, name = [(WATER, "OH2"), (HYDROXIDE, "OH"), (np.zeros((1, 3)), "Na")][max(0, k - 5)]
        centre = np.array([k % 2, k // 2 % 2, k // 4]) / 2.0 @ CELL + rng.normal(scale=spread, size=3)
        parts.append(shape @ turned(rng).T + centre)
        symbols += name
    atoms = Atoms(symbols, np.concatenate(parts), cell=CELL, pbc=True)
    atoms.wrap()
    return atoms, parts


def charges_of(atoms: Atoms) -> np.ndarray:
    return np.array([CHARGES[s] for s in atoms.get_chemical_symbols()])


def dipole(symbols: str, places: np.ndarray, origin: str) -> np.ndarray:
    molecule = Atoms(symbols, places)
    centre = molecule.get_center_of_mass() if origin == "mass" else places.mean(axis=0)
    return charges_of(molecule) @ (places - centre)


@pytest.mark.parametrize("origin", ["mass", "geometry"])
def test_dipoles_are_direct_sums(tmp_path: Path, origin: str) -> None:
    rng = np.random.default_rng(5)
    made = [mixture(rng) for _ in range(30)]
    shells = [0.05 * rng.normal(size=(21, 3)) for _ in made]
    extras = {"charges": [charges_of(atoms) for atoms, _ in made], "shells": [x / BOHR for x in shells]}
    field = np.array([0.0, 0.03, 0.04])
    run = find_run(write_run(tmp_path / "run", [atoms for atoms, _ in made], extras, field=field.tolist()))
    found = molecular_dipoles(run, shell_charge=1.5, origin=origin)
    assert [(kind.formula, kind.dipoles.shape[:2]) for kind in found.kinds] == [
        ("H2O", (30, 6)),
        ("HO", (30, 1)),
        ("Na", (30, 1)),
    ]
    water, hydroxide, sodium = found.kinds
    for f, ((_, parts), delta) in enumerate(zip(made, shells, strict=True)):
        for m in range(6):
            own = dipole("OH2", parts[m], origin) - 1.5 * delta[3 * m : 3 * m + 3].sum(axis=0)
            np.testing.assert_allclose(water.dipoles[f, m], own, atol=1e-7)
        own = dipole("OH", parts[6], origin) - 1.5 * delta[18:20].sum(axis=0)
        np.testing.assert_allclose(hydroxide.dipoles[f, 0], own, atol=1e-7)
        np.testing.assert_allclose(sodium.dipoles[f, 0], -1.5 * delta[20], atol=1e-7)
    assert hydroxide.charge == pytest.approx(-0.4)
    assert water.charge == pytest.approx(0.0, abs=1e-12)
    sizes = np.linalg.norm(water.dipoles, axis=2)
    numbers = found.numbers()["kinds"][0]
    assert numbers["dipole_D"] == pytest.approx(sizes.mean() * DEBYE, rel=1e-7)
    assert numbers["mean_cos_theta"] == pytest.approx((water.dipoles @ [0.0, 0.6, 0.8] / sizes).mean(), abs=1e-9)
    cosines = (water.dipoles @ [0.0, 0.6, 0.8] / sizes).ravel()
    assert numbers["mean_P2_cos_theta"] == pytest.approx((1.5 * cosines**2 - 0.5).mean())
    assert numbers["dipole_along_field_D"] == pytest.approx((water.dipoles @ [0.0, 0.6, 0.8]).mean() * DEBYE, rel=1e-7)
    total = water.dipoles.sum(axis=1)
    factor = total.var(axis=0).sum() / (6 * (sizes**2).mean())
    assert numbers["kirkwood_factor"] == pytest.approx(factor)
    assert any("charge -0.400 e, about the centre of " + origin in line for line in found.report())


def test_kirkwood_by_distance(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    made = [mixture(rng, 0.4) for _ in range(8)]
    extras = {"charges": [charges_of(atoms) for atoms, _ in made]}
    water = molecular_dipoles(
        find_run(write_run(tmp_path / "run", [a for a, _ in made], extras, field=[0, 0, 0]))
    ).kinds[0]
    sums = np.zeros(len(water.radii))
    for f, (_, parts) in enumerate(made):
        centres = np.array([Atoms("OH2", part).get_center_of_mass() for part in parts[:6]])
        points = Atoms("X6", centres, cell=CELL, pbc=True)
        distances = points.get_all_distances(mic=True)
        for i in range(6):
            for j in range(6):
                if i != j:
                    product = water.dipoles[f, i] @ water.dipoles[f, j]
                    sums += np.where(distances[i, j] < water.radii, product, 0.0) / 6.0
    np.testing.assert_allclose(water.kirkwood, 1.0 + sums / 8.0 / (water.dipoles**2).sum(axis=2).mean(), atol=1e-9)
    assert np.ptp(water.kirkwood) > 0.05
    heights = 1.0 / np.linalg.norm(np.linalg.inv(CELL), axis=0)
    assert water.radii[-1] == pytest.approx(heights.min() / 2.0, abs=0.25)


@pytest.mark.parametrize("together", [True, False])
def test_kirkwood_factor_of_limits(tmp_path: Path, together: bool) -> None:
    """N when all dipoles turn as one, 1 when each turns alone."""
    rng = np.random.default_rng(3)
    frames = []
    for _ in range(300):
        turn = turned(rng)
        parts = [
            WATER @ (turn if together else turned(rng)).T + np.array([k % 2, k // 2 % 2, k // 4]) * 4.0
            for k in range(8)
        ]
        frames.append(Atoms("OH2" * 8, np.concatenate(parts), cell=[8.0, 8, 8], pbc=True))
    extras = {"charges": [charges_of(atoms) for atoms in frames]}
    (kind,) = molecular_dipoles(find_run(write_run(tmp_path / "run", frames, extras, field=[0, 0, 0]))).kinds
    factor = kind.factor()
    assert factor.value == pytest.approx(8.0 if together else 1.0, rel=0.03 if together else 0.25)
    assert abs(factor.value - (8.0 if together else 1.0)) < 4.0 * factor.error + 0.05 * together * 8
    assert kind.size().value == pytest.approx(0.8 * 0.59 * DEBYE, rel=1e-6)


def test_kirkwood_at_constant_displacement(tmp_path: Path) -> None:
    """Along z the sum of the dipoles is held back; G_K is that of x and y."""
    rng = np.random.default_rng(11)
    frames = []
    for _ in range(60):
        turns = [turned(rng) for _ in range(4)]
        turns += [np.diag([1.0, 1.0, -1.0]) @ turn for turn in turns]  # the z components cancel
        parts = [WATER @ turn.T + np.array([k % 2, k // 2 % 2, k // 4]) * 4.0 for k, turn in enumerate(turns)]
        frames.append(Atoms("OH2" * 8, np.concatenate(parts), cell=[8.0, 8, 8], pbc=True))
    folder = write_run(tmp_path / "run", frames, {"charges": [charges_of(atoms) for atoms in frames]})
    settings = folder / "settings.yaml"
    settings.write_text("model: none\ndisplacement: [null, null, 0.1]\n")
    found = molecular_dipoles(find_run(folder))
    (kind,) = found.kinds
    total, flat = kind.dipoles.sum(axis=1), kind.dipoles[:, :, :2]
    assert np.abs(total[:, 2]).max() < 1e-6
    expected = total[:, :2].var(axis=0).sum() / (8 * (flat**2).sum(axis=2).mean())
    assert kind.factor().value == pytest.approx(expected)
    sums = np.zeros(len(kind.radii))
    for atoms, mu in zip(frames, flat, strict=True):
        centres = np.array([atoms[3 * m : 3 * m + 3].get_center_of_mass() for m in range(8)])
        distances = Atoms("X8", centres, cell=[8.0, 8, 8], pbc=True).get_all_distances(mic=True)
        for i, j in np.argwhere(~np.eye(8, dtype=bool)):
            sums += np.where(distances[i, j] < kind.radii, mu[i] @ mu[j], 0.0) / 8.0 / 60.0
    below = kind.radii < 4.0  # beyond, neighbours have several images at one distance
    np.testing.assert_allclose(kind.kirkwood[below], (1.0 + sums / (flat**2).sum(axis=2).mean())[below], atol=1e-9)
    assert any("Kirkwood's factor is that along x, y alone" in line for line in found.report())
    settings.write_text("model: none\ndisplacement: [0, 0, 0.1]\n")
    found = molecular_dipoles(find_run(folder))
    assert "kirkwood_factor" not in found.numbers()["kinds"][0]
    assert not any(line.startswith("  Kirkwood") for line in found.report())
    assert len(found.kinds[0].radii) == 0
    assert "Kirkwood's factor takes an axis at constant field" in found.numbers()["cautions"][0]
    assert found.numbers()["kinds"][0]["dipole_D"] == pytest.approx(0.8 * 0.59 * DEBYE, rel=1e-6)


def test_what_has_no_dipole_is_left_out(tmp_path: Path) -> None:
    made = [mixture(np.random.default_rng(k))[0] for k in range(4)]
    extras = {"charges": [charges_of(atoms) for atoms in made]}
    found = molecular_dipoles(find_run(write_run(tmp_path / "run", made, extras, field=[0, 0, 0.1])))
    assert [kind.formula for kind in found.kinds] == ["H2O", "HO"]
    assert found.numbers()["without_dipole"] == ["1 Na"]
    assert "left out, as they have no dipole: 1 Na" in found.report()
    assert set(found.angles()[1][:, 0]) == {0.0, 1.0}
    ions = [Atoms("NaNa", [[0, 0, 0], [4, 4, 4]], cell=[8.0] * 3, pbc=True)] * 3
    folder = write_run(tmp_path / "ions", ions, {"charges": [np.ones(2)] * 3}, field=[0, 0, 0.1])
    with pytest.raises(InputError, match=r"nothing has a dipole \(Na\)"):
        molecular_dipoles(find_run(folder))


def test_assembled_is_whole() -> None:
    atoms, _ = mixture(np.random.default_rng(2))
    away = assembled(atoms, bond_tree(atoms)) - whole(atoms)
    np.testing.assert_allclose(away, 0.0, atol=1e-9)
    assert np.abs(assembled(atoms, bond_tree(atoms)) - atoms.positions).max() > 5.0


def test_a_run_of_ipi(nvt_run: Path, tmp_path: Path) -> None:
    """Charges −0.8, 0.4, 0.4 and no shells: sums over molecules are the driver's dipole."""
    result = ANALYSES["molecular-dipoles"].run([nvt_run], tmp_path, describe=never)
    names = {Path(f).name for f in result["files"]}
    tables = {f"molecular-dipoles{end}.csv" for end in ("", "-angles", "-kirkwood")}
    assert names == tables | {f"molecular-dipoles.{s}" for s in ("json", "png", "svg")}
    assert result["sum_less_driver_dipole_eA"] < 1e-4
    assert result["direction"] == [1.0, 0.0, 0.0]
    (kind,) = result["kinds"]
    assert (kind["formula"], kind["molecules"]) == ("H2O", 64)
    frames = read(nvt_run / "run.pos_0.extxyz", ":")
    sizes = []
    for atoms in frames:
        for k in range(64):
            arms = [atoms.get_distance(3 * k, 3 * k + h, mic=True, vector=True) for h in (1, 2)]
            sizes.append(np.linalg.norm(0.4 * (arms[0] + arms[1])))
    assert kind["dipole_D"] == pytest.approx(np.mean(sizes) * DEBYE, rel=1e-6)
    polarization = ANALYSES["polarization"].run([nvt_run], tmp_path)
    assert kind["dipole_along_field_D"] == pytest.approx(polarization["dipole_eA"][0] / 64 * DEBYE, abs=0.05)
    with (tmp_path / "molecular-dipoles.csv").open() as file:
        rows = list(csv.DictReader(file))
    x, y = (np.array([float(row[name]) for row in rows]) for name in ("dipole_D", "density_per_D"))
    assert (y * (x[1] - x[0])).sum() == pytest.approx(1.0)
    assert (x * y).sum() / y.sum() == pytest.approx(kind["dipole_D"], rel=0.02)
    assert json.loads((tmp_path / "molecular-dipoles.json").read_text())["kinds"][0]["formula"] == "H2O"


def test_charges_from_a_file_and_beads(nvt_run: Path, bead_run: Path, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("element,charge\nO,-1.6\nH,0.8\n")
    run = ANALYSES["molecular-dipoles"].run
    own = run([nvt_run], tmp_path, describe=never)
    twice = run([nvt_run], tmp_path, describe=never, charges=str(tmp_path / "q.csv"))
    assert twice["kinds"][0]["dipole_D"] == pytest.approx(2.0 * own["kinds"][0]["dipole_D"], rel=1e-6)
    beads = run([bead_run], tmp_path, describe=never)
    assert beads["beads"] == 4
    assert beads["frames"] == 3
    assert 1.0 < beads["kinds"][0]["dipole_D"] < 5.0


def test_refusals(nvt_run: Path, tmp_path: Path) -> None:
    run = ANALYSES["molecular-dipoles"].run
    with pytest.raises(InputError, match="origin is here: give one of mass, geometry"):
        run([nvt_run], tmp_path, describe=never, origin="here")
    atoms, _ = mixture(np.random.default_rng(1))
    folder = write_run(tmp_path / "run", [atoms] * 3, {"shells": [np.zeros((21, 3))] * 3})
    with pytest.raises(InputError, match="no charges of atoms"):
        run([folder], tmp_path, describe=never, shell_charge=1.0)
    folder = write_run(
        tmp_path / "two", [atoms] * 3, {"shells": [np.zeros((21, 3))] * 3, "charges": [charges_of(atoms)] * 3}
    )
    with pytest.raises(InputError, match=r"the charge of the shells is not known .* give --shell-charge Z"):
        run([folder], tmp_path, describe=never)
    assert run([folder], tmp_path, describe=never, shell_charge=1.0)["with_shells"] is True
