"""Charge of electrodes layer by layer."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from voltpi.analysis.capacitor import setup_of
from voltpi.analysis.layers import layer_map, layers_of
from voltpi.analysis.runs import find_run
from voltpi.driver.analyze import analyze
from voltpi.driver.run_setup import describe_run
from voltpi.potential.errors import InputError

from toy_capacitor import gold, gold_settings, write_run


def fluctuating(folder: Path, n: int = 6, beads: int = 1) -> tuple[Path, np.ndarray]:
    """Charges q (1 ± 0.1) in turn, on every bead."""
    atoms, charges, role = gold()
    metal = role != "E"
    frames = []
    for f in range(n):
        q = np.where(metal, charges * (1 + 0.1 * (-1) ** f), charges)
        frames.append([{"positions": atoms.positions, "charges": q}] * beads)
    return write_run(folder, atoms, frames, gold_settings("slab-z")), charges


def test_layers_face_the_electrolyte(tmp_path: Path) -> None:
    folder, _ = fluctuating(tmp_path / "run")
    layers = layers_of(setup_of(find_run(folder), describe_run))
    heights = [(layer.electrode, layer.place, round(layer.height, 2)) for layer in layers]
    assert heights == [(0, 0, 5.1), (0, 1, 3.06), (0, 2, 1.02), (1, 0, 25.1), (1, 1, 27.14), (1, 2, 29.18)]
    assert all(len(layer.atoms) == 16 for layer in layers)


@pytest.mark.parametrize("beads", [1, 2])
def test_means_and_fluctuations(tmp_path: Path, beads: int) -> None:
    folder, charges = fluctuating(tmp_path / "run", beads=beads)
    run = find_run(folder)
    setup = setup_of(run, describe_run)
    m = layer_map(run, setup)
    metal = setup.labels >= 0
    np.testing.assert_allclose(m.mean[metal], charges[metal], atol=1e-12)
    np.testing.assert_allclose(m.rms[metal], 0.1 * np.abs(charges[metal]), atol=1e-9)
    assert not m.mean[~metal].any()
    for layer, total in zip(m.layers, m.total, strict=True):
        assert total == pytest.approx(charges[layer.atoms].sum(), abs=1e-12)
    # alternating ±10 % in six frames
    np.testing.assert_allclose(m.error, 0.1 * np.abs(m.total) * np.sqrt(6 / 5) / np.sqrt(6), atol=1e-9)


def test_command(tmp_path: Path) -> None:
    folder, charges = fluctuating(tmp_path / "run")
    lines = analyze(["layers", str(folder), "--skip", "1"])
    assert any(line.startswith("left layer 0 at    5.10 Å") for line in lines)
    assert any(line.startswith("audit: recovered drop") for line in lines)
    numbers = json.loads((folder / "layers.json").read_text())
    assert numbers["frames"] == 5
    assert [layer["electrode"] for layer in numbers["layers"]] == ["left"] * 3 + ["right"] * 3
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 96
    for row in rows:
        assert float(row["charge_e"]) == pytest.approx(charges[int(row["atom"])] * (1 - 0.02), rel=1e-6)
    assert (folder / "layers.png").stat().st_size > 10000


def test_charges_are_needed(tmp_path: Path) -> None:
    folder, _ = fluctuating(tmp_path / "run")
    (folder / "run.charges_0").unlink()
    with pytest.raises(InputError, match="no charges; add <trajectory extra_type='charges'>"):
        analyze(["layers", str(folder)])
