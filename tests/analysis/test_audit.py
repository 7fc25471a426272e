"""Potentials recovered from written charges: what the driver answered, and wrong charges found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import read

from voltpi.analysis import ANALYSES
from voltpi.analysis.audit import Spread, audit_of
from voltpi.analysis.capacitance import charge_summary
from voltpi.analysis.capacitor import setup_of
from voltpi.analysis.profiles import profiles_of
from voltpi.analysis.runs import find_run
from voltpi.driver.run_setup import describe_run

from toy_capacitor import BOHR, HARTREE, gold, gold_settings, water_between_gold, write_run


def run_of_gold(folder: Path, boundary: str = "slab-z", scale: float = 1.0, **others: Any) -> Path:
    """A run of three equal frames with the published charges, those of the metal times ``scale``."""
    atoms, charges, role = gold(f"case2_au_ions_dV2_{'ew2d' if boundary == 'slab-z' else 'ffield'}")
    charges = np.where(role == "E", charges, scale * charges)
    totals = [charges[role == side].sum() for side in "AB"]
    frame = {"positions": atoms.positions, "charges": charges, "totals": totals, "potentials": [-1.0, 1.0]}
    return write_run(folder, atoms, [[frame]] * 3, gold_settings(boundary), **others)


@pytest.mark.parametrize("boundary", ["slab-z", "finite-field-z"])
def test_published_charges_pass(tmp_path: Path, boundary: str) -> None:
    run = find_run(run_of_gold(tmp_path / "run", boundary))
    audit = audit_of(run, setup_of(run, describe_run))
    assert audit is not None
    assert audit.names == ("left", "right")
    np.testing.assert_allclose(audit.drop, 2.0, atol=1e-6)
    assert audit.agrees
    assert audit.unequal.max() < 1e-6
    # what a planar average lacks: 6.077 V per e of an atom's mean charge, and a little from the layers beneath
    rest = audit.drop - (audit.planar[:, 1] - audit.planar[:, 0])
    np.testing.assert_allclose(rest, 2 * 6.0773 * 0.521 / 48, rtol=5e-2)
    assert "agrees with the applied 2 V" in audit.report()[0]


def test_other_charges_do_not(tmp_path: Path) -> None:
    run = find_run(run_of_gold(tmp_path / "run", scale=1.01))
    audit = audit_of(run, setup_of(run, describe_run))
    assert audit is not None
    assert not audit.agrees
    assert "IS NOT the applied" in audit.report()[0]
    assert "IS NOT the applied 2 V" in audit.title()


def with_potentiostat(folder: Path, target: float, written: bool) -> Path:
    run_of_gold(folder)
    settings = gold_settings("slab-z").replace("potential: -1.0", "charge: 0").replace("potential: 1.0", "charge: 0")
    settings += f"potentiostat: {{electrodes: [left, right], potential: {target}}}\n"
    (folder / "settings.yaml").write_text(settings)
    start = read(folder / "start.xyz") + Atoms("X", [[0.5, 0.0, 0.0]])
    start.write(folder / "start.xyz", format="extxyz")
    if not written:
        (folder / "run.electrode_potentials_0").unlink()
    return folder


@pytest.mark.parametrize(
    ("target", "written", "sentence"),
    [
        (2.0, True, "2.000000 V agrees with the applied 2 V to 0.001 V (difference "),
        (1.5, True, "2.000000 V agrees with the written 2 V to 0.001 V (difference "),
        (2.0, False, "2.000000 V agrees with the applied 2 V on average to 0.001 V (difference "),
        (1.5, False, "2.000000 V IS NOT the applied 1.5 V on average to 0.001 V (difference 5.0e-01"),
    ],
)
def test_potentiostats(tmp_path: Path, target: float, written: bool, sentence: str) -> None:
    run = find_run(with_potentiostat(tmp_path / "run", target, written))
    audit = audit_of(run, setup_of(run, describe_run))
    assert audit is not None
    report = audit.report()
    assert sentence in report[0]
    assert any(f"target {target:g} V" in line for line in report) == (target == 1.5 or not written)


def test_potentials_of_other_steps_are_not_compared(tmp_path: Path) -> None:
    folder = run_of_gold(tmp_path / "run")
    path = folder / "run.electrode_potentials_0"
    lines = path.read_text().splitlines()
    lines[3] = " ".join(f"{0.9 * float(x):.12e}" for x in lines[3].split())  # of step 5: another voltage
    path.write_text("\n".join(lines[:4]) + "\n")  # and nothing of step 10
    run = find_run(folder)
    audit = audit_of(run, setup_of(run, describe_run))
    assert audit is not None
    assert np.isfinite(audit.stated_drop).tolist() == [True, True, False]
    assert not audit.agrees
    np.testing.assert_allclose(audit.drop - audit.stated_drop, [0.0, 0.2, np.nan], atol=1e-6)


def test_the_digits_of_ipis_own_xyz_are_enough(tmp_path: Path) -> None:
    run = find_run(run_of_gold(tmp_path / "run", digits=5))
    audit = audit_of(run, setup_of(run, describe_run))
    assert audit is not None
    assert abs(audit.difference[0]) > 1e-8
    assert audit.agrees


CASES = {
    "ideal": ("", ", eta: 1.8, potential: -0.6", ", eta: 1.6, potential: 0.4"),
    "thomas-fermi": (
        "",
        ", eta: 1.8, thomas_fermi: 1.2, potential: 0.0",
        ", eta: 1.8, hardness: 2.0, chi: 0.3, potential: 1.0",
    ),
    "pqeq": ("", ", potential: 0.5", ", polarizable: true, potential: -0.5"),
    "charge": ("", ", eta: 1.8, charge: -0.3", ", eta: 1.8, potential: 0.7"),
}


# a finite field needs two potentials
PAIRS = [(c, b) for c in CASES for b in ("slab-z", "finite-field-z", "periodic") if (c, b[:6]) != ("charge", "finite")]


def answered_run(folder: Path, start: Atoms, settings: str) -> Path:
    """Two frames that the driver answered."""
    from voltpi.driver.evaluator import Evaluator
    from voltpi.driver.settings import load_settings

    (folder / "settings.yaml").write_text(settings)
    evaluator = Evaluator.from_settings(load_settings(folder / "settings.yaml"), start)
    rng = np.random.default_rng(8)
    frames = []
    for _ in range(2):
        r = start.positions + rng.normal(0, 0.03, start.positions.shape)
        result = evaluator.evaluate(start.cell.array.T[None] / BOHR, r[None] / BOHR)[0]
        extras = {key: np.array(value) for key, value in result.extras.items()}
        frame = {
            "positions": r,
            "charges": extras["charges"],
            "totals": extras["electrode_charges"],
            "potentials": extras["electrode_potentials"] * HARTREE,
        }
        frames.append([frame | ({"shells": extras["shells"] * BOHR} if "shells" in extras else {})])
    return write_run(folder / "run", start, frames, settings)


@pytest.mark.parametrize(("case", "boundary"), PAIRS)
def test_what_the_driver_answers_is_recovered(tmp_path: Path, case: str, boundary: str) -> None:
    start = water_between_gold()
    _, low, high = CASES[case]
    settings = f"""
charges: {{model: pqeq, conserve: fragments}}
coulomb: {{boundary: {boundary}, accuracy: 1.0e-8}}
electrodes:
  - {{name: low, atoms: "tag 1"{low}}}
  - {{name: high, atoms: "tag 2"{high}}}
precision: double
output: {{shells: true}}
"""
    run = find_run(answered_run(tmp_path, start, settings))
    setup = setup_of(run, describe_run)
    audit = audit_of(run, setup)
    assert audit is not None
    assert not audit.without_shells
    np.testing.assert_allclose(audit.drop, audit.stated[:, 1] - audit.stated[:, 0], atol=2e-5)
    assert audit.unequal.max() < 2e-5
    if case != "charge":
        np.testing.assert_allclose(audit.drop, audit.target[1] - audit.target[0], atol=2e-5)
    # the profile has the same planar share
    profiles = profiles_of(run, setup)
    drops = {i.electrode: i.value for i in profiles.interfaces}
    assert drops["high"] - drops["low"] == pytest.approx(audit.drop.mean(), abs=2e-4)


def test_a_reference_electrode_is_not_of_the_pair(tmp_path: Path) -> None:
    """Its atoms are the lowest; the voltage is between the two others."""
    start = water_between_gold(0)
    start.pbc = [True, True, False]
    tags = start.get_tags()
    tags[start.positions[:, 2] < 2.5] = 3
    start.set_tags(tags)
    settings = """
charges: {model: fixed}
coulomb: {boundary: slab-z, accuracy: 1.0e-8}
electrodes:
  - {name: reference, atoms: "tag 3", eta: 1.8, charge: 0}
  - {name: left, atoms: "tag 1", eta: 1.8, potential: -0.3}
  - {name: right, atoms: "tag 2", eta: 1.8, potential: 0.7}
precision: double
"""
    run = find_run(answered_run(tmp_path, start, settings))
    setup = setup_of(run, describe_run)
    assert setup.in_order() == [0, 1, 2]
    assert setup.pair() == (1, 2)
    audit = audit_of(run, setup)
    assert audit is not None
    np.testing.assert_allclose(audit.drop, 1.0, atol=2e-5)
    assert "recovered drop right − left 1.000" in audit.report()[0]
    assert audit.numbers()["drop_between"] == ["left", "right"]
    profiles = profiles_of(run, setup)
    drops = {i.electrode: i.value for i in profiles.interfaces}
    assert drops["right"] - drops["left"] == pytest.approx(1.0, abs=2e-4)
    summary = charge_summary(run, setup)
    written = np.loadtxt(run.folder / "run.electrode_charges_0", comments="#")
    assert summary.voltage == 1.0
    assert summary.charge.value == pytest.approx(0.5 * (written[:, 2] - written[:, 1]).mean())
    # nothing else holds charge: the geometry says all of it (the atoms shook a little)
    assert summary.charge_per_voltage is not None
    assert summary.charge_per_voltage[0] == pytest.approx(summary.empty, rel=5e-3)
    assert summary.fluctuation is not None
    mean = audit.recovered[:, audit.names.index("reference")].mean()
    line = next(line for line in summary.report() if line.startswith("potential of reference"))
    assert summary.potentials["reference"].error > 0.0
    shift = audit.recovered[:, audit.names.index("left")].mean() + 0.3  # the audit leaves λ open
    assert summary.potentials["reference"].value == pytest.approx(mean - shift, abs=2e-5)
    assert f"{summary.potentials['reference'].value:.5f} ± " in line


def test_missing_shells_are_said(tmp_path: Path) -> None:
    start = water_between_gold(1)
    start.pbc = [True, True, False]
    settings = """
charges: {model: pqeq}
electrodes:
  - {name: low, atoms: "tag 1", eta: 1.8, potential: 0}
  - {name: high, atoms: "tag 2", eta: 1.8, potential: 1}
"""
    frame = {"positions": start.positions, "charges": np.zeros(len(start))}
    folder = write_run(tmp_path / "run", start, [[frame]], settings)
    answer = ANALYSES["profiles"].run([folder], tmp_path, describe=describe_run)
    assert any("shells were not written" in line for line in answer["report"])
    assert any(line.startswith("shells                       not written") for line in answer["report"])
    assert not answer["audit"]["agrees"]


def test_spread_is_even() -> None:
    for total in (1, 7, 20, 21, 40, 41, 1000):
        spread = Spread(10)
        for i in range(total):
            spread.add(i)
        frames = spread.frames
        assert len(frames) == min(total, 10) or (total > 10 and len(frames) == 10)
        assert frames[0] == 0
        gaps = np.diff(frames)
        assert len(gaps) == 0 or gaps.max() <= 2.01 * gaps.min()
        assert total - frames[-1] <= max(2 * total / 10, 1)
