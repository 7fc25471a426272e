"""The continuous branch, molecules, and what the analyses say about runs of the real i-PI."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read

from voltpi.analysis import ANALYSES
from voltpi.analysis.field_response import field_response, summarize
from voltpi.analysis.molecules import molecules_of, whole
from voltpi.analysis.polarization import continuous_branch, polarization_of
from voltpi.analysis.runs import find_run
from voltpi.potential.errors import InputError

TRICLINIC = np.array([[7.0, 0.0, 0.0], [2.5, 6.0, 0.0], [-1.5, 1.0, 8.0]])


def random_walk(n: int, step: float, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).normal(scale=step, size=(n, 3)), axis=0)


def test_branch_in_a_triclinic_cell_that_changes() -> None:
    rng = np.random.default_rng(1)
    true = random_walk(500, 0.3)
    cells = TRICLINIC * (1.0 + 0.05 * np.sin(np.arange(500) / 40.0))[:, None, None]
    # the true branch moves with the cell, as charges in fractional coordinates do
    true = np.einsum("fi,fij->fj", true @ np.linalg.inv(TRICLINIC), cells)
    quanta = rng.integers(-3, 4, (500, 3))
    quanta[0] = 0
    folded = true + np.einsum("fi,fij->fj", quanta, cells)
    np.testing.assert_allclose(continuous_branch(folded, cells), true, atol=1e-9)
    assert np.abs(folded - true).max() > 10


def test_open_directions_are_left_alone() -> None:
    dipoles = np.array([[0.0, 0, 0], [6.9, 0, 6.9], [0.2, 0, 0.2]])
    cells = np.tile(np.diag([7.0, 7.0, 7.0]), (3, 1, 1))
    branch = continuous_branch(dipoles, cells, (True, True, False))
    np.testing.assert_allclose(branch, [[0, 0, 0], [-0.1, 0, 6.9], [0.2, 0, 0.2]], atol=1e-12)


def test_molecules_are_found_and_made_whole(nvt_run: Path) -> None:
    atoms = read(nvt_run / "start.xyz")
    wrapped = atoms.copy()
    wrapped.positions += [0.0, 0.0, 10.9]
    wrapped.wrap()
    labels = molecules_of(wrapped)
    np.testing.assert_array_equal(labels, np.repeat(np.arange(64), 3))
    r, expected = whole(wrapped), whole(atoms)
    for hydrogen in (1, 2):
        bonds = expected[hydrogen::3] - expected[0::3]
        # the wrapped molecules are the same molecules: no image is left between their atoms
        np.testing.assert_allclose(r[hydrogen::3] - r[0::3], bonds, atol=1e-9)
        for k, bond in enumerate(bonds):
            nearest = atoms.get_distance(3 * k, 3 * k + hydrogen, mic=True, vector=True)
            np.testing.assert_allclose(bond, nearest, atol=1e-9)
    assert np.linalg.norm(wrapped.positions[1::3] - wrapped.positions[0::3], axis=1).max() > 10
    assert molecules_of(Atoms("Ar2", [[0, 0, 0], [0, 0, 5]])).tolist() == [0, 1]


def crowded() -> Atoms:
    """Two molecules whose hydrogens touch, a stretched one, H2, and ions within the reach of their covalent radii."""
    water = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    parts = [
        water,
        water * [-1, 1, 1] + [2.32, 0, 0],  # H–H 0.4 Å
        water * 1.23 + [0, 0, 5],  # O–H 1.18 Å
        np.array([[6.0, 6, 6], [6.74, 6, 6]]),
        np.array([[2.1, 0, 5.9], [4.0, 6, 0], [6.4, 6, 0]]),  # Na–O 2.3 Å; Ca–Cl 2.4 Å
    ]
    return Atoms("OH2OH2OH2" + "H2" + "NaCaCl", np.concatenate(parts), cell=[12.0, 12, 12], pbc=True)


def test_molecules_are_those_of_the_potential(nvt_run: Path) -> None:
    from voltpi.potential.fragments import assign_fragments
    from voltpi.potential.systems import Systems

    atoms = crowded()
    assert molecules_of(atoms).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6]
    stretched = atoms[:11]
    stretched.positions[7] += [0.25, 0, 0]  # O–H 1.43 Å
    stretched.positions[10] += [0.11, 0, 0]  # H–H 0.85 Å
    assert molecules_of(stretched).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    ions = atoms[[*range(9), 11, 12, 13]]
    ions.set_initial_charges([0.0] * 9 + [1, 2, -3])
    for structure in (atoms[:9], stretched, ions, read(nvt_run / "start.xyz")):
        given = torch.as_tensor(structure.get_initial_charges()) if structure is ions else None
        fragments = assign_fragments(Systems.from_atoms(structure), initial_charges=given).fragments
        np.testing.assert_array_equal(molecules_of(structure), fragments)


def test_dipole_of_a_run(nvt_run: Path) -> None:
    p = polarization_of(find_run(nvt_run))
    assert p.n_molecules == 64
    np.testing.assert_allclose(p.time, 2.0 * np.arange(51))
    np.testing.assert_allclose(p.volume, 12.42**3, rtol=1e-6)
    # P = M/V: 1 e/Å² is 16.0217663 C/m²
    np.testing.assert_allclose(p.density, p.dipole / 12.42**3 * 16.02176634, rtol=1e-6)


def wrap_files(run: Path, folder: Path, *, dipoles: bool) -> Path:
    """A copy whose positions are wrapped into the cell and whose dipoles jump by quanta."""
    shutil.copytree(run, folder)
    path = folder / "run.pos_0.extxyz"
    frames = read(path, ":")
    comments = [frame.info["ipi_comment"] for frame in frames]
    for frame in frames:
        frame.wrap()
    path.unlink()
    for frame, comment in zip(frames, comments, strict=True):
        frame.info = {"ipi_comment": comment}
        frame.write(path, format="extxyz", append=True)
    lines = (folder / "run.dipole_0").read_text().splitlines()
    if not dipoles:
        (folder / "run.dipole_0").unlink()
        return folder
    rng = np.random.default_rng(2)
    length = 12.42 / 0.529177210903
    for i in range(3, len(lines), 2):
        vector = np.array(lines[i].split(), dtype=float) + length * rng.integers(-2, 3, 3)
        lines[i] = "  ".join(f"{x:.12e}" for x in vector)
    (folder / "run.dipole_0").write_text("\n".join(lines) + "\n")
    return folder


def test_jumps_in_the_files_do_not_show(nvt_run: Path, tmp_path: Path) -> None:
    expected = polarization_of(find_run(nvt_run))
    jumping = polarization_of(find_run(wrap_files(nvt_run, tmp_path / "dipoles", dipoles=True)))
    np.testing.assert_allclose(jumping.dipole, expected.dipole, atol=1e-5)
    charges = polarization_of(find_run(wrap_files(nvt_run, tmp_path / "charges", dipoles=False)))
    assert "without shells" in charges.source
    np.testing.assert_array_equal(charges.steps, np.arange(0, 201, 20))
    np.testing.assert_allclose(charges.dipole, expected.dipole[::5], atol=1e-4)


def test_beads_are_averaged(bead_run: Path) -> None:
    run = find_run(bead_run)
    assert [path.name for path in run.extras["dipole"]] == [f"run.dipole_{bead}" for bead in range(4)]
    p = polarization_of(run)
    last = [float((bead_run / f"run.dipole_{bead}").read_text().split()[-3]) for bead in range(4)]
    assert p.dipole[-1, 0] == pytest.approx(np.mean(last) * 0.529177210903, rel=1e-6)


def test_analysis_writes_numbers_and_figures(nve_run: Path, tmp_path: Path) -> None:
    result = ANALYSES["polarization"].run([nve_run], tmp_path / "new" / "out")
    assert [Path(f).name for f in result["files"]] == [f"polarization.{s}" for s in ("csv", "json", "png", "svg")]
    assert all(Path(f).stat().st_size > 500 for f in result["files"])
    assert Path(result["figure"]).read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "new" / "out" / "polarization.json").read_text())
    with (tmp_path / "new" / "out" / "polarization.csv").open() as file:
        rows = list(csv.DictReader(file))
    m = np.array([float(row["Mx_eA"]) for row in rows])
    assert len(m) == 101
    table = np.loadtxt(nve_run / "run.out")
    drift = np.polyfit(table[:, 1] / 1000.0, table[:, 2] / 192, 1)[0]
    assert numbers["induced_dipole_per_molecule_eA"] == pytest.approx(m.mean() / 64)
    assert numbers["induced_dipole_per_molecule_D"] == pytest.approx(m.mean() / 64 * 4.80320471, rel=1e-6)
    assert numbers["field_V_per_A"] == [0.05, 0.0, 0.0]
    assert 50 < numbers["temperature_K"] < 300
    assert numbers["conserved_drift_eV_per_atom_ps"] == pytest.approx(drift, rel=1e-6)
    assert abs(drift) < 3 * numbers["conserved_drift_error_eV_per_atom_ps"]
    assert len(result["report"]) == 3
    assert "e·Å along the field" in result["report"][0]


def test_skip_and_field_options(nvt_run: Path, tmp_path: Path) -> None:
    polarization = ANALYSES["polarization"]
    result = polarization.run([nvt_run], tmp_path, skip=50.0, field=[0.0, -0.3, 0.0])
    assert result["n_records"] == 26
    assert result["induced_dipole_per_molecule_eA"] == pytest.approx(-result["dipole_eA"][1] / 64)
    none = polarization.run([nvt_run], tmp_path, field=[0.0, 0.0, 0.0])
    assert "induced_dipole_per_molecule_eA" not in none
    assert "mean cell dipole" in none["report"][0]
    with pytest.raises(InputError, match="skip is 500 fs but the run is 100 fs long"):
        polarization.run([nvt_run], tmp_path, skip=500.0)
    with pytest.raises(InputError, match="skip is -1"):
        polarization.run([nvt_run], tmp_path, skip=-1.0)


def test_one_record_has_no_error(nvt_run: Path, tmp_path: Path) -> None:
    for field in (None, [0.0, 0.0, 0.0]):
        result = ANALYSES["polarization"].run([nvt_run], tmp_path, skip=100.0, field=field)
        assert result["n_records"] == 1
        assert result["temperature_error_K"] is None
        assert len(result["report"]) == 2
        for line in result["report"]:
            assert "no error from one record" in line
            assert "nan" not in line
    assert "nan" not in (tmp_path / "polarization.svg").read_text()


def test_times_beyond_the_properties(nvt_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(nvt_run, folder)
    lines = (folder / "run.out").read_text().splitlines(keepends=True)
    rows = [line for line in lines if not line.startswith("#")]
    (folder / "run.out").write_text("".join([*(x for x in lines if x.startswith("#")), *rows[5:-5]]))
    run = find_run(folder)
    np.testing.assert_allclose(run.times([0, 7, 20, 190, 200]), [0.0, 3.5, 10.0, 95.0, 100.0], atol=1e-9)
    np.testing.assert_allclose(polarization_of(run).time, 2.0 * np.arange(51), atol=1e-9)
    (folder / "run.out").write_text("".join([*(x for x in lines if x.startswith("#")), rows[2]]))
    np.testing.assert_allclose(find_run(folder).times([8, 8]), [4.0, 4.0])
    with pytest.raises(InputError, match="only one step"):
        find_run(folder).times([8, 12])


def test_files_instead_of_a_folder(nvt_run: Path, tmp_path: Path) -> None:
    files = [nvt_run / name for name in ("run.out", "run.pos_0.extxyz", "run.dipole_0")]
    by_file = ANALYSES["polarization"].run(files, tmp_path)
    by_folder = ANALYSES["polarization"].run([nvt_run], tmp_path)
    assert by_file["dipole_eA"] == by_folder["dipole_eA"]


def polarized(run: Path, folder: Path, field: float, slope: float) -> Path:
    """A copy at another field whose dipole is slope·field per molecule along x, with a small oscillation."""
    shutil.copytree(run, folder)
    (folder / "settings.yaml").write_text(f"model: water\nfield: [{field}, 0, 0]\n")
    mx = 64 * (slope * field + 0.01 * np.sin(np.arange(51.0))) / 0.529177210903
    text = "".join(f" #EXTRAS(dipole)# Step: {4 * i:11d} \n {x:.12e} 0.0 0.0\n" for i, x in enumerate(mx))
    (folder / "run.dipole_0").write_text(text)
    return folder


def test_field_response(nvt_run: Path, tmp_path: Path) -> None:
    fields = (-0.01, 0.0, 0.01, 0.02)
    folders = [polarized(nvt_run, tmp_path / f"run{i}", field, 1.5) for i, field in enumerate(fields)]
    result = ANALYSES["field-response"].run(folders, tmp_path)
    # ε_r − 1 = N·slope·e/(ε_0 V), with ε_0 = 0.0055263494 e/(V·Å) (CODATA 2018)
    expected = 1.0 + 64 * 1.5 / (0.0055263494 * 12.42**3)
    assert result["slope_eA_per_V_per_A"] == pytest.approx(1.5, abs=0.05)
    assert result["relative_permittivity"] == pytest.approx(
        expected, abs=4 * result["relative_permittivity_error"] + 1e-9
    )
    assert result["relative_permittivity"] == pytest.approx(expected, rel=0.02)
    assert result["contains_electronic_part"] is True
    assert len(result["runs"]) == 4
    assert (tmp_path / "field-response.svg").stat().st_size > 500


def test_field_response_refuses(nvt_run: Path, tmp_path: Path) -> None:
    run = ANALYSES["field-response"].run
    with pytest.raises(InputError, match="but only one was given"):
        run([nvt_run])
    with pytest.raises(InputError, match="same field"):
        run([nvt_run, nvt_run], tmp_path)
    one = summarize(find_run(nvt_run))
    other = summarize(find_run(nvt_run, [0.0, 0.2, 0.0]))
    with pytest.raises(InputError, match="is not along"):
        field_response([one, other])


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("run.pos_0.extxyz", "no trajectory of positions"),
        ("run.out", "no properties file"),
        ("settings.yaml", "no settings.yaml that says the field"),
    ],
)
def test_missing_files(nvt_run: Path, tmp_path: Path, remove: str, message: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(nvt_run, folder)
    (folder / remove).unlink()
    with pytest.raises(InputError, match=message):
        ANALYSES["polarization"].run([folder])


def test_wrong_folders(nvt_run: Path, tmp_path: Path) -> None:
    run = ANALYSES["polarization"].run
    with pytest.raises(InputError, match="there is no such file or folder"):
        run([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no output of i-PI"):
        run([tmp_path])
    with pytest.raises(InputError, match="polarization is of one run, but 2 were given"):
        run([nvt_run, nvt_run])
    folder = tmp_path / "two"
    shutil.copytree(nvt_run, folder)
    shutil.copy(folder / "run.dipole_0", folder / "other.dipole_0")
    with pytest.raises(InputError, match=r"dipole in several outputs \(other\.dipole, run\.dipole\)"):
        run([folder])


@pytest.mark.parametrize("value", ["from-frame", "[1, 2]", "[a, 0, 0]", "{x: 1}"])
def test_unclear_field(nvt_run: Path, tmp_path: Path, value: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(nvt_run, folder)
    (folder / "settings.yaml").write_text(f"field: {value}\n")
    with pytest.raises(InputError, match="give three numbers in V/Å"):
        ANALYSES["polarization"].run([folder])


def test_analysis_never_imports_torch(nvt_run: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from voltpi.analysis import ANALYSES; "
        "ANALYSES['polarization'].run([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2])); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(nvt_run), str(tmp_path)], check=True, timeout=120)
