"""Radial distributions: ideal gas, lattices with known shells, changing cells, beads, molecules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from tests.analysis.written_runs import write_beads, write_run
from voltpi.analysis import ANALYSES
from voltpi.analysis.rdf import radial_distributions
from voltpi.analysis.runs import Run, find_run
from voltpi.potential.errors import InputError


def opened(folder: Path) -> Run:
    return find_run(folder, field=np.zeros(3))


def test_an_ideal_gas_has_no_structure(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    edges = np.array([9.0, 10.0, 12.0])
    folder = write_run(tmp_path, ["Ar"] * 60 + ["Kr"] * 20, rng.uniform(-1.0, 2.0, (400, 80, 3)) * edges, edges)
    rdf = radial_distributions(opened(folder), bin_width=0.25)
    assert rdf.r[-1] == 4.5
    assert [pair.name for pair in rdf.pairs] == ["Ar-Ar", "Ar-Kr", "Kr-Kr"]
    for pair in rdf.pairs:
        # errors are those of 400 independent frames: about one in three bins is further away than its error
        pulls = (pair.g[2:] - 1.0) / pair.g_error[2:]
        assert np.abs(pulls).max() < 5.0
        assert 0.5 < np.sqrt((pulls**2).mean()) < 1.7
        others = {"Ar-Ar": 59, "Ar-Kr": 20, "Kr-Kr": 19}[pair.name]
        expected = others * 4.0 / 3.0 * np.pi * rdf.r[-1] ** 3 / edges.prod()
        assert pair.coordination[-1] == pytest.approx(expected, abs=5.0 * pair.coordination_error[-1])


def rock_salt(n: int = 3, a: float = 4.0) -> tuple[list[str], np.ndarray, float]:
    grid = np.array([[i, j, k] for i in range(2 * n) for j in range(2 * n) for k in range(2 * n)])
    symbols = ["Na" if sum(site) % 2 == 0 else "Cl" for site in grid]
    return symbols, grid * 0.5 * a, n * a


def test_shells_of_rock_salt_beyond_half_the_cell(tmp_path: Path) -> None:
    symbols, sites, edge = rock_salt(2)
    run = opened(write_run(tmp_path, symbols, np.array([sites, sites + 0.3]), np.full(3, edge)))
    # at a/2 √m, of the other kind for odd m: 6, 8, 24 (m = 5) and 30 (9); of one's own: 12, 6, 24, 12, 24 (10)
    rdf = radial_distributions(run, pairs="Na-Cl,Na-Na", bin_width=0.0301, farthest=6.5)
    other, own = rdf.pairs
    for m, count in ((1, 6), (3, 14), (5, 38), (9, 68)):
        assert other.coordination[np.searchsorted(rdf.r, 2.0 * np.sqrt(m) + 0.04)] == pytest.approx(count)
    for m, count in ((2, 12), (4, 18), (6, 42), (8, 54), (10, 78)):
        assert own.coordination[np.searchsorted(rdf.r, 2.0 * np.sqrt(m) + 0.04)] == pytest.approx(count)
    occupied = rdf.r[other.g > 0] - 0.5 * rdf.bin
    assert np.allclose(occupied, 2.0 * np.sqrt([1, 3, 5, 9]), atol=0.0151)
    assert other.coordination_error.max() == 0.0


def test_a_primitive_cell_of_one_atom(tmp_path: Path) -> None:
    """Face-centred cubic, angles of 60°: 12, 6, 24, 12 neighbours at a √(m/2), all of them images."""
    a = 4.0
    cell = 0.5 * a * np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    atoms = Atoms("Ar", positions=[[0.1, 0.2, 0.3]], cell=cell, pbc=True)
    atoms.info["ipi_comment"] = "Step: 0 Bead: 0 positions{ase} cell{ase}"
    write(str(tmp_path / "run.pos_0.extxyz"), [atoms], format="extxyz")
    (tmp_path / "run.out").write_text("# column 1 --> step : \n# column 2 --> time{femtosecond} : \n0 0.0\n")
    rdf = radial_distributions(opened(tmp_path), bin_width=0.03, farthest=5.8)
    for m, count in ((1, 12), (2, 18), (3, 42), (4, 54)):
        k = np.searchsorted(rdf.r, a * np.sqrt(m / 2) + 0.04)
        assert rdf.pairs[0].coordination[k] == pytest.approx(count)


def test_each_frame_has_its_own_volume(tmp_path: Path) -> None:
    symbols, sites, edge = rock_salt(2)
    scales = np.array([1.0, 1.1])
    run = opened(write_run(tmp_path, symbols, sites * scales[:, None, None], edge * scales[:, None] * np.ones(3)))
    rdf = radial_distributions(run, pairs="Na-Cl", bin_width=0.097, farthest=3.0)
    shell = 4.0 / 3.0 * np.pi * np.diff((0.097 * np.arange(31)) ** 3)
    for r, scale in ((2.0, 1.0), (2.2, 1.1)):
        k = np.searchsorted(rdf.r, r)
        # one of the two frames: 6 of 32 neighbours lie in this shell
        assert rdf.pairs[0].g[k] == pytest.approx(0.5 * 6 / 32 * (edge * scale) ** 3 / shell[k])


def test_molecules_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    oxygen = np.array([[i, j, k] for i in range(3) for j in range(3) for k in range(3)]) * 4.0
    water = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    frames = np.array([(o[:, None] + water).reshape(-1, 3) for o in oxygen + rng.normal(0, 0.05, (10, 27, 3))])
    run = opened(write_run(tmp_path, ["O", "H", "H"] * 27, frames, np.full(3, 12.0)))
    both, inside, outside = (
        radial_distributions(run, pairs="O-H", molecules=which, farthest=5.0) for which in ("all", "intra", "inter")
    )
    assert inside.pairs[0].coordination[-1] == pytest.approx(2.0)
    assert outside.pairs[0].coordination[np.searchsorted(outside.r, 1.5)] == 0.0
    assert np.allclose(inside.pairs[0].g + outside.pairs[0].g, both.pairs[0].g, atol=1e-12)


def test_beads_are_averaged(tmp_path: Path) -> None:
    frames = np.array([[[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]] * 3)
    further = frames + np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    folder = write_run(tmp_path, ["H", "F"], frames, np.full(3, 10.0))
    write_beads(folder, ["H", "F"], [frames, further], np.full((3, 3), 10.0))
    rdf = radial_distributions(opened(folder), pairs="H-F", bin_width=0.1)
    assert rdf.n_beads == 2
    n = rdf.pairs[0].coordination
    assert n[np.searchsorted(rdf.r, 2.5)] == pytest.approx(0.5)
    assert n[-1] == pytest.approx(1.0)


def test_the_command(tmp_path: Path) -> None:
    symbols, sites, edge = rock_salt(3)
    rng = np.random.default_rng(4)
    folder = write_run(tmp_path / "run", symbols, sites + rng.normal(0.0, 0.1, (12, 216, 3)), np.full(3, edge))
    answer = ANALYSES["rdf"].run([folder], tmp_path / "out", pairs="Na-Cl")
    assert [Path(path).name for path in answer["files"]] == ["rdf.csv", "rdf.json", "rdf.png", "rdf.svg"]
    assert all(Path(path).stat().st_size > 500 for path in answer["files"][:1] + answer["files"][2:])
    numbers = json.loads((tmp_path / "out" / "rdf.json").read_text())
    assert numbers["pairs"]["Na-Cl"]["coordination"] == pytest.approx(6.0, abs=0.01)
    assert numbers["pairs"]["Na-Cl"]["first_maximum_A"] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": "Na-K"}, "there is no K"),
        ({"pairs": "NaCl"}, "give pairs of elements"),
        ({"bin_width": 0.0}, "give a bin above zero"),
        ({"farthest": 0.01}, "below the range"),
        ({"skip": 1e6}, "nothing is left"),
    ],
)
def test_refuses(tmp_path: Path, options: dict[str, object], words: str) -> None:
    symbols, sites, edge = rock_salt(2)
    run = opened(write_run(tmp_path, symbols, sites[None], np.full(3, edge)))
    with pytest.raises(InputError, match=words):
        radial_distributions(run, **options)  # type: ignore[arg-type]
