"""Charges of atoms from every place that may say them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from tests.analysis.written_runs import write_run
from voltpi.analysis.charges_of import charges_of, read_charges
from voltpi.analysis.polarization import polarization_of
from voltpi.analysis.runs import Run, find_run
from voltpi.potential.errors import InputError

SYMBOLS = ["Na", "Cl", "Na"]


def made(folder: Path, extras: dict[str, np.ndarray] | None = None) -> Run:
    rng = np.random.default_rng(0)
    write_run(folder, SYMBOLS, rng.uniform(0.0, 8.0, (4, 3, 3)), np.full(3, 9.0), extras=extras)
    return find_run(folder, field=np.zeros(3))


def settings(folder: Path, text: str, charges: list[float]) -> None:
    (folder / "settings.yaml").write_text(text)
    atoms = Atoms(SYMBOLS, positions=np.eye(3), cell=[9.0] * 3, pbc=True)
    atoms.set_initial_charges(charges)
    atoms.arrays["formal"] = 2.0 * np.array(charges)
    write(str(folder / "start.xyz"), atoms, format="extxyz")


def test_from_a_table_of_elements(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("element, charge\n# formal charges\nNa, 1\nCl,-2e0\nK,1\n")
    found = charges_of(made(tmp_path), tmp_path / "q.csv")
    assert found.constant is not None
    assert found.constant.tolist() == [1.0, -2.0, 1.0]
    assert found.at(None, 3) is not None


@pytest.mark.parametrize("name", ["initial_charges", "charges"])
def test_from_a_structure(tmp_path: Path, name: str) -> None:
    (tmp_path / "q.xyz").write_text(
        f'3\nLattice="9 0 0 0 9 0 0 0 9" Properties=species:S:1:pos:R:3:{name}:R:1\n'
        "Na 0 0 0 0.9\nCl 1 0 0 -0.7\nNa 2 0 0 0.8\n"
    )
    assert charges_of(made(tmp_path), str(tmp_path / "q.xyz")).at(0, 3).tolist() == [0.9, -0.7, 0.8]  # type: ignore[union-attr]


def test_what_the_driver_sent_comes_before_the_settings(tmp_path: Path) -> None:
    sent = np.arange(12.0).reshape(4, 3)
    run = made(tmp_path, {"charges": sent})
    settings(tmp_path, "charges: {model: fixed}\n", [1.0, -1.0, 1.0])
    found = charges_of(run)
    assert found.at(1, 3).tolist() == sent[1].tolist()  # type: ignore[union-attr]
    assert found.at(3, 3).tolist() == sent[3].tolist()  # type: ignore[union-attr]
    assert found.at(7, 3) is None
    assert found.at(0, 3).tolist() == sent[0].tolist()  # type: ignore[union-attr]
    with pytest.raises(InputError, match="3 charges but 5 atoms"):
        found.at(1, 5)


def test_a_restarted_run_has_the_charges_and_the_moment_of_its_later_branch(tmp_path: Path) -> None:
    """Restarted behind step 1, and killed before step 3."""
    sent = np.arange(12.0).reshape(4, 3)
    run = made(tmp_path, {"charges": sent})
    places = np.random.default_rng(1).uniform(0.0, 8.0, (3, 3, 3))
    later = write_run(tmp_path / "later", SYMBOLS, places, np.full(3, 9.0), extras={"charges": sent + 0.25})
    for name, lines in (("run.charges_0", 2), ("run.pos_0.xyz", 5)):
        rows = (later / name).read_text().splitlines(keepends=True)
        with (tmp_path / name).open("a") as file:
            file.writelines(rows[2 * lines : 3 * lines])
    found = charges_of(run)
    assert found.at(1, 3).tolist() == sent[1].tolist()  # type: ignore[union-attr]
    assert found.at(2, 3).tolist() == (sent[2] + 0.25).tolist()  # type: ignore[union-attr]
    assert found.at(3, 3) is None
    dipoles = polarization_of(run)
    assert dipoles.steps.tolist() == [0, 1, 2]
    images = (dipoles.dipole[2] - (sent[2] + 0.25) @ places[2]) / 9.0 / 0.25
    assert np.allclose(images, np.rint(images), atol=1e-7)  # whole images of atoms


def test_fixed_ones_of_the_settings(tmp_path: Path) -> None:
    run = made(tmp_path)
    settings(tmp_path, "charges: {model: fixed, values: formal}\n", [1.0, -1.0, 1.0])
    assert charges_of(run).constant.tolist() == [2.0, -2.0, 2.0]  # type: ignore[union-attr]
    settings(tmp_path, "charges: {model: pqeq}\n", [1.0, -1.0, 1.0])
    with pytest.raises(InputError, match=r"charges.model: pqeq.*--charges FILE"):
        charges_of(run)
    settings(tmp_path, "charges: {model: fixed}\nelectrodes: [{name: left}]\n", [1.0, -1.0, 1.0])
    with pytest.raises(InputError, match="has electrodes"):
        charges_of(run)


def test_a_dipole_of_given_charges(tmp_path: Path) -> None:
    """M of a run that another potential drove."""
    run = made(tmp_path, {"dipole": np.zeros((4, 3))})
    (tmp_path / "q.csv").write_text("element,charge\nNa,0.5\nCl,-1\n")
    assert not polarization_of(run).dipole.any()
    dipoles = polarization_of(run, tmp_path / "q.csv")
    moved = np.array([[0.5, -1.0, 0.5] @ atoms for atoms in frames_of_file(tmp_path)])
    steps = (dipoles.dipole - moved) / 9.0 / 0.5
    assert np.allclose(steps, np.rint(steps), atol=1e-8)  # whole images of atoms
    assert "q.csv" in dipoles.source


def frames_of_file(folder: Path) -> list[np.ndarray]:
    lines = (folder / "run.pos_0.xyz").read_text().splitlines()
    return [np.array([[float(x) for x in line.split()[1:]] for line in lines[k + 2 : k + 5]]) for k in range(0, 20, 5)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("q.csv", "element,charge\nNa,1\n", "no charge of Cl; add a line 'Cl,CHARGE'"),
        ("q.csv", "Na,1\nCl,-1\n", "the first line is not 'element,charge'"),
        ("q.csv", "element,charge\nNa,one\n", "line 2: 'Na,one'"),
        ("q.csv", "element,charge\nSodium,1\n", "line 2"),
        ("q.csv", "element,charge\nNa,1\nNa,2\n", "a second charge of Na"),
        ("q.csv", "element,charge\nNa,nan\n", "line 2"),
        ("q.xyz", "2\nProperties=species:S:1:pos:R:3:initial_charges:R:1\nNa 0 0 0 1\nCl 0 0 1 -1\n", "1 Na 1 Cl, but"),
        ("q.xyz", "3\nProperties=species:S:1:pos:R:3\nNa 0 0 0\nCl 0 0 1\nNa 0 0 3\n", "no per-atom array"),
        ("q.xyz", "what is this\n", "no extended XYZ"),
    ],
)
def test_refuses(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        read_charges(tmp_path / name, Atoms(SYMBOLS))
    with pytest.raises(InputError, match="there is no such file"):
        read_charges(tmp_path / "other.csv", Atoms(SYMBOLS))
