"""The ready inputs of capacitors: every variant is found right, runs in i-PI, says what it should and restarts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

from voltpi.analysis.ipi_files import read_extras, read_properties
from voltpi.driver import launch
from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.check import check
from voltpi.driver.settings import load_settings
from voltpi.driver.uses import copy_use

INPUTS = Path(__file__).parents[1] / "inputs"
HARTREE = 27.211386245988
STEPS = {"nacl-capacitor": 4, "water-capacitor": 2}
N_METAL = {"nacl-capacitor": 100, "water-capacitor": 64}
VARIANTS = [
    pytest.param(use, path.stem, marks=[pytest.mark.slow] if use == "water-capacitor" else [])
    for use in STEPS
    for path in sorted((INPUTS / use).glob("*.xml"))
]
VOLTAGES = {"zero-voltage": 0.0, "two-volts": 2.0}
"""Right against left; 1 V where the name does not say."""


def prepare(folder: Path, use: str, variant: str, steps: int) -> Path:
    """A copy of the use whose run is so short and writes everything at every step; the folder's XML."""
    copy_use(use, folder)
    path = folder / f"{variant}.xml"
    text = re.sub(r"stride='\d+'", "stride='1'", path.read_text())
    text, changed = re.subn(r"<total_steps> *\d+ *</total_steps>", f"<total_steps>{steps}</total_steps>", text)
    assert changed == 1
    path.write_text(text)
    return path


def extras(folder: Path, variant: str, name: str) -> np.ndarray:
    """[beads, records, numbers] of what i-PI wrote of the driver's answers."""
    prefix = "run" if variant == "input" else variant
    paths = sorted(folder.glob(f"{prefix}.{name}_[0-9]*"))
    assert paths, name
    return np.array([read_extras(path).values.reshape(len(read_extras(path).steps), -1) for path in paths])


def test_the_variants_are_those_of_the_readmes() -> None:
    for use in STEPS:
        names = {path.name for path in (INPUTS / use).glob("*.xml")}
        assert {"input.xml", "zero-voltage.xml", "potentiostat.xml", "pimd.xml"} <= names
        text = (INPUTS / use / "README.md").read_text()
        assert all(f"`{name}`" in text for name in names)


@pytest.mark.parametrize(("use", "variant"), VARIANTS)
def test_a_variant_is_found_right(use: str, variant: str) -> None:
    findings = list(check(INPUTS / use / f"{variant}.xml"))
    assert findings
    assert not [f.sentence for f in findings if not f.ok]


@pytest.mark.parametrize(("use", "variant"), VARIANTS)
def test_a_variant_runs(tmp_path: Path, use: str, variant: str) -> None:
    """Electrode charges are those of their atoms, potentials those of the settings, and the metal stays."""
    steps = STEPS[use]
    path = prepare(tmp_path / use, use, variant, steps)
    assert launch.run(path, quiet=True) == 0
    folder, n_metal, voltage = path.parent, N_METAL[use], VOLTAGES.get(variant, 1.0)
    charges = extras(folder, variant, "charges")
    totals = extras(folder, variant, "electrode_charges")
    potentials = extras(folder, variant, "electrode_potentials") * HARTREE
    beads = 1 if variant != "pimd" else {"nacl-capacitor": 4, "water-capacitor": 8}[use]
    assert totals.shape == (beads, steps + 1, 2)
    half = n_metal // 2
    sums = np.stack([charges[..., :half].sum(-1), charges[..., half:n_metal].sum(-1)], axis=-1)
    np.testing.assert_allclose(totals, sums, rtol=0, atol=1e-9)
    np.testing.assert_allclose(charges.sum(-1), 0, rtol=0, atol=1e-8)
    np.testing.assert_allclose(totals.sum(-1), 0, rtol=0, atol=1e-8)
    energy = extras(folder, variant, "capacitive_energy")[..., 0] * HARTREE
    np.testing.assert_allclose(energy, 0.5 * (totals * potentials).sum(-1), rtol=0, atol=1e-8)
    if variant == "potentiostat":
        own = extras(folder, variant, "potentiostat_charge")[..., 0]
        np.testing.assert_allclose(totals[..., 1], own, rtol=0, atol=1e-9)
        assert np.ptp(own) > 0
        settings = load_settings(folder / "settings-potentiostat.yaml")
        assert settings.potentiostat is not None
        assert settings.potentiostat.potential == voltage
    else:
        np.testing.assert_allclose(potentials[..., 1] - potentials[..., 0], voltage, rtol=0, atol=1e-9)
        assert (np.ptp(totals[..., 1], axis=1) > 0).all()
    first, last = (read(p, index) for p in trajectories(folder, variant)[:1] for index in (0, -1))
    np.testing.assert_allclose(first.positions[:n_metal], last.positions[:n_metal], rtol=0, atol=1e-12)
    assert np.abs(first.positions - last.positions)[n_metal:].max() > 1e-4
    if beads > 1:
        assert np.ptp(totals[:, -1, 1]) > 0  # every bead has a charge of its own
        centroid_is_evaluated(folder, totals.mean(0))


def centroid_is_evaluated(folder: Path, mean: np.ndarray) -> None:
    """The centroid's charges are those of the potential there, and not the ``mean`` [records, 2] over beads."""
    frames = read(folder / "pimd.centroid.xyz", ":", format="xyz")
    beads = [read(path, "-1") for path in trajectories(folder, "pimd")]
    np.testing.assert_allclose(
        frames[-1].positions, np.mean([b.positions for b in beads], axis=0), rtol=1e-5, atol=1e-5
    )
    totals = np.loadtxt(folder / "pimd.centroid_electrode_charges")
    assert len(totals) == len(frames) == len(mean)
    start = read(folder / "start.xyz")
    start.positions = np.mean([b.positions for b in beads], axis=0)
    start.calc = VoltPICalculator(folder / "settings.yaml")
    start.get_potential_energy()
    expected = [start.calc.results["electrodes"][name]["charge"] for name in ("left", "right")]
    np.testing.assert_allclose(totals[-1], expected, rtol=0, atol=2e-6)
    atoms = np.loadtxt(folder / "pimd.centroid_charges")
    np.testing.assert_allclose(atoms[-1], start.calc.results["charges"], rtol=0, atol=2e-6)
    assert np.abs(totals[-1] - mean[-1]).max() > 1e-9


def trajectories(folder: Path, variant: str) -> Sequence[Path]:
    prefix = "run" if variant == "input" else variant
    return sorted(folder.glob(f"{prefix}.pos_*.extxyz"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["input", "potentiostat"])
def test_a_restart_continues_as_if_nothing_had_happened(tmp_path: Path, variant: str) -> None:
    """Five steps at once, and three and two: the same numbers, to what the charges are converged to."""
    use = "nacl-capacitor"
    whole = prepare(tmp_path / "whole", use, variant, 5)
    assert launch.run(whole, quiet=True) == 0
    parts = prepare(tmp_path / "parts", use, variant, 3)
    assert launch.run(parts, quiet=True) == 0
    restart = parts.parent / "RESTART"
    text, changed = re.subn(r"<total_steps>\s*3\s*</total_steps>", "<total_steps>5</total_steps>", restart.read_text())
    assert changed == 1
    restart.write_text(text)
    assert launch.run(restart, quiet=True) == 0
    prefix = "run" if variant == "input" else variant
    one, other = (read_properties(path.parent / f"{prefix}.out") for path in (whole, parts))
    assert one.get("step").tolist() == other.get("step").tolist() == list(range(6))
    for name in ("conserved", "temperature", "potential", "kinetic_md"):
        np.testing.assert_allclose(other.get(name), one.get(name), rtol=1e-11, atol=0)
    for name in ("charges", "electrode_charges", "electrode_potentials"):
        np.testing.assert_allclose(
            extras(parts.parent, variant, name), extras(whole.parent, variant, name), rtol=0, atol=1e-10
        )
