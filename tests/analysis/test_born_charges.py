"""Maps of Born charges against tensors that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read
from written_run import write_run

from voltpi.analysis import ANALYSES
from voltpi.analysis.born_charges import born_charges
from voltpi.analysis.runs import find_run
from voltpi.potential.errors import InputError

ATOMS = Atoms("Na4Cl4", [[0, 0, z] for z in (0.5, 3.0, 5.5, 8.0, 1.75, 4.25, 6.75, 9.25)], cell=[6, 6, 10], pbc=True)


def tensors(rng: np.random.Generator, frames: int) -> np.ndarray:
    """[f, n, dipole, displacement]; an average of ±1.1, parts that are not symmetric, and a sum of zero."""
    z = np.array([1.1] * 4 + [-1.1] * 4)[:, None, None] * np.eye(3)
    z = z + np.array([[0.0, 0.3, 0.0], [-0.1, 0.2, 0.0], [0.0, 0.0, -0.2]]) * np.sign(z[:, :1, :1])
    noise = 0.05 * rng.normal(size=(frames, 8, 3, 3))
    return np.asarray(z + noise - noise.mean(axis=1, keepdims=True))


def written(folder: Path, z: np.ndarray, **more: object) -> Path:
    rows = [frame.transpose(0, 2, 1).reshape(24, 3) for frame in z]  # row 3·atom + displacement, column dipole
    return write_run(folder, [ATOMS] * len(z), {"BEC": rows, **more})  # type: ignore[dict-item]


def test_elements_and_atoms(tmp_path: Path) -> None:
    z = tensors(np.random.default_rng(0), 64)
    q = np.array([0.9] * 4 + [-0.9] * 4)
    found = born_charges(find_run(written(tmp_path / "run", z, charges=[q] * 64), [0.0, 0.0, 0.0]))
    np.testing.assert_allclose(found.mean, z.mean(axis=0), atol=1e-12)
    sodium = found.elements[0]
    assert (sodium.symbol, sodium.atoms, sodium.charge) == ("Na", 4, pytest.approx(0.9))
    isotropic = np.trace(z[:, :4], axis1=2, axis2=3) / 3.0
    assert sodium.isotropic == pytest.approx(isotropic.mean())
    assert sodium.spread == pytest.approx(isotropic.std())
    assert sodium.between == pytest.approx(isotropic.mean(axis=0).std())
    np.testing.assert_allclose(sodium.tensor, z[:, :4].mean(axis=(0, 1)), atol=1e-12)
    assert sodium.tensor[0, 1] == pytest.approx(0.3, abs=0.02)  # dipole along x, displacement along y
    assert sodium.tensor[1, 0] == pytest.approx(-0.1, abs=0.02)
    values = np.linalg.eigvalsh(0.5 * (z[:, :4] + z[:, :4].transpose(0, 1, 3, 2)))
    np.testing.assert_allclose(sodium.eigenvalues, values.mean(axis=(0, 1)), atol=1e-10)
    np.testing.assert_allclose(sodium.eigenvalue_spread, values.std(axis=(0, 1)), atol=1e-8)
    odd = 0.5 * (z[:, :4] - z[:, :4].transpose(0, 1, 3, 2))
    assert sodium.antisymmetric == pytest.approx(np.sqrt((odd**2).sum() / (64 * 4 * 6)))
    assert sodium.counts.sum() == 64 * 4
    assert sodium.eigenvalue_counts.sum() == 3 * 64 * 4
    assert found.acoustic < 1e-12
    assert found.net == pytest.approx(0.0, abs=1e-12)
    # the error of the mean is that of independent frames
    assert sodium.error == pytest.approx(isotropic.mean(axis=1).std() / 8.0, rel=0.5)


def test_a_broken_sum_rule_shows(tmp_path: Path) -> None:
    z = tensors(np.random.default_rng(1), 4)
    z[2, 3, 0, 1] += 0.02
    z[:, 0] += np.eye(3)
    found = born_charges(find_run(written(tmp_path / "run", z), [0.0, 0.0, 0.0]))
    assert found.acoustic == pytest.approx(0.02)
    assert found.net == pytest.approx(1.0)


def test_profile_and_files(tmp_path: Path) -> None:
    z = tensors(np.random.default_rng(2), 6)
    z[:, 1] *= 2.0  # the sodium at 3.0 Å
    folder = written(tmp_path / "run", z)
    out = ANALYSES["born-charges"].run([folder], tmp_path / "out", axis="c", bin=2.5)
    names = {Path(f).name for f in out["files"]}
    assert names == {f"born-charges.{s}" for s in ("csv", "json", "png", "svg", "xyz")} | {"born-charges-profile.csv"}
    profile = np.genfromtxt(tmp_path / "out" / "born-charges-profile.csv", delimiter=",", names=True)
    np.testing.assert_allclose(profile["height_A"], [1.25, 3.75, 6.25, 8.75])
    np.testing.assert_allclose(profile["atoms_Na"], 1.0)
    np.testing.assert_allclose(
        profile["isotropic_Na_e"], np.trace(z[:, :4], axis1=2, axis2=3).mean(axis=0) / 3.0, rtol=1e-8
    )
    np.testing.assert_allclose(profile["Z_c_Na_e"], z[:, :4, 2, 2].mean(axis=0), rtol=1e-8)
    assert profile["isotropic_Na_e"][1] > 2.0 > profile["isotropic_Na_e"][0]
    table = np.genfromtxt(tmp_path / "out" / "born-charges.csv", delimiter=",", names=True)
    np.testing.assert_allclose(table["Z_xy_e"], z[:, :, 0, 1].mean(axis=0), rtol=1e-8)
    atoms = read(tmp_path / "out" / "born-charges.xyz")
    np.testing.assert_allclose(atoms.arrays["born_charges"][:, 1], z[:, :, 0, 1].mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(atoms.arrays["born_isotropic"], table["isotropic_e"], atol=1e-7)
    assert list(out["elements"]) == ["Na", "Cl"]
    assert any(line.startswith("acoustic sum rule") for line in out["report"])
    skipped = born_charges(find_run(folder, [0.0, 0.0, 0.0]), skip=5.0)
    assert skipped.frames == 3
    np.testing.assert_allclose(skipped.mean, z[3:].mean(axis=0), atol=1e-12)


def test_refusals(tmp_path: Path) -> None:
    run = ANALYSES["born-charges"].run
    z = tensors(np.random.default_rng(3), 3)
    folder = written(tmp_path / "run", z)
    with pytest.raises(InputError, match="bin is 0"):
        run([folder], tmp_path, bin=0.0)
    with pytest.raises(InputError, match="no Born charges are left"):
        run([folder], tmp_path, skip=1000.0)
    plain = write_run(tmp_path / "plain", [ATOMS] * 3, {"dipole": [np.zeros(3)] * 3})
    with pytest.raises(InputError, match=r"no Born charges; set output\.born_charges: true"):
        run([plain], tmp_path)
    short = write_run(tmp_path / "short", [ATOMS] * 3, {"BEC": [np.zeros((12, 3))] * 3})
    with pytest.raises(InputError, match=r"Born charges of the shape \(12, 3\), but 8 atoms need \(24, 3\)"):
        run([short], tmp_path)
