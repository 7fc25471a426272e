"""The file for chemiscope: what is in it, and that chemiscope's own package would have written the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.analysis.written_runs import BOHR, write_beads, write_run
from voltpi.analysis import ANALYSES
from voltpi.analysis.chemiscope_file import Collected, collect, content_of
from voltpi.analysis.runs import Run, find_run
from voltpi.potential.errors import InputError

HARTREE = 27.211386245988
N, FRAMES = 6, 21


def made(folder: Path) -> tuple[Run, dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    r = rng.uniform(-2.0, 12.0, (FRAMES, N, 3))
    extras = {
        "charges": rng.normal(size=(FRAMES, N)),
        "shells": rng.normal(0.0, 0.1, (FRAMES, N, 3)),
        "dipole": rng.normal(size=(FRAMES, 3)),
        "field": np.tile([0.0, 0.01, 0.0], (FRAMES, 1)),
        "BEC": rng.normal(size=(FRAMES, 3 * N, 3)),
    }
    write_run(folder, ["O", "H", "H"] * 2, r, np.array([9.0, 10.0, 11.0]), 2.0, extras=extras)
    comment = "# CELL(abcABC): 17 19 21 90.0 90.0 90.0 Step: {} Bead: 0 forces{{atomic_unit}} cell{{atomic_unit}}"
    forces = [f"{N}\n{comment.format(k)}\n" + f"O {k} 0.5 0.25\n" * N for k in range(0, FRAMES, 2)]
    (folder / "run.for_0.xyz").write_text("".join(forces))
    return find_run(folder, field=np.zeros(3)), extras | {"positions": r}


def test_all_that_was_written(tmp_path: Path) -> None:
    run, given = made(tmp_path)
    done = collect(run)
    assert done.steps == list(range(0, FRAMES, 2))  # where forces were written too
    every = np.arange(0, FRAMES, 2)
    assert set(done.structures) == {
        *("step", "time", "temperature", "volume"),
        *(f"{name}_{axis}" for name in ("dipole", "polarization", "field") for axis in "xyz"),
    }
    assert done.structures["time"][0].tolist() == (2.0 * every).tolist()
    assert done.structures["dipole_y"][0] == pytest.approx(given["dipole"][every, 1] * BOHR)
    assert done.structures["polarization_x"][0] == pytest.approx(given["dipole"][every, 0] * BOHR / 990.0 * 16.02176634)
    assert done.structures["field_y"][0] == pytest.approx(0.01 * HARTREE / BOHR)
    assert done.atoms["charge"][0] == pytest.approx(given["charges"][every])
    assert done.atoms["shell"][0] == pytest.approx(np.linalg.norm(given["shells"][every], axis=2) * BOHR)
    assert done.arrows["shell"][0] == pytest.approx(given["shells"][every] * BOHR)
    assert done.arrows["force"][0][3, 2] == pytest.approx(np.array([6.0, 0.5, 0.25]) * HARTREE / BOHR, rel=1e-6)
    born = given["BEC"][every].reshape(-1, N, 3, 3)
    assert done.atoms["born"][0] == pytest.approx(np.einsum("fnaa->fn", born) / 3.0)
    assert done.atoms["born_zz"][0] == pytest.approx(born[..., 2, 2])


def test_the_package_writes_the_same(tmp_path: Path) -> None:
    chemiscope = pytest.importorskip("chemiscope")
    run, _ = made(tmp_path)
    done = collect(run, frames=4)
    mine = content_of(done, "a name", "a description")
    wrapped = [atoms.copy() for atoms in done.frames]
    for atoms in wrapped:
        atoms.wrap()
    targets = {"structure": done.structures, "atom": done.atoms}
    theirs = chemiscope.create_input(
        structures=wrapped,
        metadata={"name": "a name", "description": "a description"},
        properties={
            key: {"target": target, "values": values.ravel(), "units": unit, "description": text}
            for target, found in targets.items()
            for key, (values, unit, text) in found.items()
        },
        environments=chemiscope.all_atomic_environments(wrapped),
        shapes=mine["shapes"],
        settings=mine["settings"],
    )
    assert theirs.keys() == mine.keys()
    for key in mine:
        assert same(theirs[key], mine[key]), key
    path = tmp_path / "chemiscope.json.gz"
    ANALYSES["chemiscope"].run([tmp_path], frames=4)
    assert same(json.loads(gzip.decompress(path.read_bytes()))["shapes"], mine["shapes"])


def same(a: Any, b: Any) -> bool:
    """Two trees of JSON, numbers to the six digits that are written."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float | int) and isinstance(b, float | int):
        return bool(np.isclose(a, b, rtol=1e-5, atol=1e-12))
    return bool(a == b)


def test_the_command(tmp_path: Path) -> None:
    made(tmp_path / "run")
    answer = ANALYSES["chemiscope"].run([tmp_path / "run"], tmp_path / "out", frames=3, skip=10.0)
    assert answer["figure"] == str(tmp_path / "out" / "chemiscope.json.gz")
    first = (tmp_path / "out" / "chemiscope.json.gz").read_bytes()
    content = json.loads(gzip.decompress(first))
    assert content["properties"]["time"]["values"] == [12.0, 24.0, 36.0]
    assert len(content["environments"]) == len(content["properties"]["charge"]["values"]) == 3 * N
    assert content["structures"][0]["names"] == ["O", "H", "H"] * 2
    assert all(0.0 <= x <= 9.0 for x in content["structures"][0]["x"])
    lengths = np.linalg.norm([v["vector"] for v in content["shapes"]["shell"]["parameters"]["atom"]], axis=1)
    assert lengths.max() == pytest.approx(2.0, rel=1e-4)
    assert set(content["settings"]["map"]["x"].values()) <= set(content["properties"])
    ANALYSES["chemiscope"].run([tmp_path / "run"], tmp_path / "out", frames=3, skip=10.0)
    assert (tmp_path / "out" / "chemiscope.json.gz").read_bytes() == first


def test_another_program_and_one_bead(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    beads = [rng.uniform(0.0, 5.0, (4, 2, 3)) for _ in range(2)]
    write_run(tmp_path, ["Na", "Cl"], beads[0], np.full(3, 5.0))
    write_beads(tmp_path, ["Na", "Cl"], beads, np.full((4, 3), 5.0))
    (tmp_path / "q.csv").write_text("element,charge\nNa,1\nCl,-1\n")
    run = find_run(tmp_path, field=np.zeros(3))
    done = collect(run, bead=1, charges=str(tmp_path / "q.csv"))
    assert isinstance(done, Collected)
    assert np.allclose([atoms.positions for atoms in done.frames], beads[1])
    assert done.atoms["charge"][0].tolist() == [[1.0, -1.0]] * 4
    assert not collect(run).atoms
    for options, words in (({"bead": 2}, "of 2 beads"), ({"frames": 0}, "frames is 0"), ({"skip": 1e9}, "nothing")):
        with pytest.raises(InputError, match=words):
            collect(run, **options)  # type: ignore[arg-type]
