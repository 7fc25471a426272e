"""A real run with electrodes, i-PI and VoltPI's own potential, through all analyses at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from voltpi.analysis.capacitor import charge_frames, setup_of
from voltpi.analysis.runs import find_run
from voltpi.driver import pes
from voltpi.driver.analyze import analyze
from voltpi.driver.run_setup import describe_run

from toy_capacitor import water_between_gold

SETTINGS = """
charges: {model: pqeq, conserve: fragments}
short_range: {pair: {lennard_jones: {O: {epsilon: 0.0, sigma: 3.1}, H: {epsilon: 0.0, sigma: 1.0},
  Au: {epsilon: 0.02, sigma: 2.6}}, cutoff: 5.0}}
coulomb: {boundary: finite-field-z}
electrodes:
  - {name: left, atoms: "tag 1", eta: 1.8, potential: -0.25}
  - {name: right, atoms: "tag 2", eta: 1.8, potential: 0.25}
output: {shells: true}
"""

XML = """<simulation verbosity='low'>
  <output prefix='run'>
    <properties stride='1' filename='out'> [ step, time{{femtosecond}}, conserved, temperature{{kelvin}} ] </properties>
    <trajectory filename='pos' stride='2' cell_units='angstrom'> positions{{angstrom}} </trajectory>
    <trajectory filename='charges' stride='2' extra_type='charges'> extras </trajectory>
    <trajectory filename='shells' stride='2' extra_type='shells'> extras </trajectory>
    <trajectory filename='electrode_charges' stride='1' extra_type='electrode_charges'> extras </trajectory>
    <trajectory filename='electrode_potentials' stride='1' extra_type='electrode_potentials'> extras </trajectory>
  </output>
  <total_steps> 4 </total_steps>
  <ffdirect name='voltpi'>
    <pes>custom</pes> <pes_path> {pes} </pes_path>
    <parameters>{{settings: settings.yaml, template: start.xyz, electrodes.right.potential: 0.75}}</parameters>
  </ffdirect>
  <system>
    <initialize nbeads='2'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces><force forcefield='voltpi'/></forces>
    <ensemble><temperature units='kelvin'> 310 </temperature></ensemble>
    <motion mode='dynamics'>
      <fixatoms> {fixed} </fixatoms> <fixcom> False </fixcom>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 0.1 </timestep>
        <thermostat mode='pile_g'><tau units='femtosecond'> 50 </tau></thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Water between gold at 1 V, two beads: settings say 0.5 V, the parameters of i-PI's input 1 V."""
    folder = tmp_path_factory.mktemp("capacitor")
    atoms = water_between_gold()
    metal = np.flatnonzero(atoms.symbols == "Au")
    atoms.write(folder / "start.xyz", format="extxyz")
    (folder / "settings.yaml").write_text(SETTINGS)
    fixed = "[" + ", ".join(map(str, metal)) + "]"
    (folder / "input.xml").write_text(XML.format(pes=pes.__file__, fixed=fixed))
    command = [str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert (folder / "run.electrode_charges_1").is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_frames_of_all_beads(real_run: Path) -> None:
    run = find_run(real_run)
    setup = setup_of(run, describe_run)
    assert [e.potential for e in setup.electrodes] == [-0.25, 0.75]
    frames = list(charge_frames(run, setup))
    assert [step for step, _ in frames] == [0, 2, 4]
    for _, beads in frames:
        assert len(beads) == 2
        for bead in beads:
            assert bead.shells is not None
            assert 0.0 < np.abs(bead.shells).max() < 0.25  # Å
            assert bead.charges.sum() == pytest.approx(0.0, abs=1e-6)
            np.testing.assert_allclose(bead.positions[0], setup.start.positions[0], atol=1e-4)


def test_one_command(real_run: Path, tmp_path: Path) -> None:
    lines = analyze(["capacitor", str(real_run), "--out", str(tmp_path)])
    audit = next(line for line in lines if line.startswith("audit:"))
    assert "agrees with the applied 1 V" in audit
    numbers = json.loads((tmp_path / "capacitor.json").read_text())
    assert numbers["frames"] == 3
    assert abs(numbers["audit"]["difference_V"]) < 5e-4  # what six digits of positions leave
    assert numbers["audit"]["shells_known"]
    charge = numbers["electrode_charge"]
    assert charge["records"] == 5
    assert charge["temperature_K"] == pytest.approx(310.0, abs=1e-3)
    assert charge["electrode_charge_e"]["left"] == pytest.approx(-charge["electrode_charge_e"]["right"], abs=1e-8)
    layers = {(layer["electrode"], layer["layer"]): layer["charge_e"] for layer in numbers["layers"]}
    total = sum(value for (name, _), value in layers.items() if name == "right")
    # the layers' frames are every other record
    written = [np.loadtxt(real_run / f"run.electrode_charges_{b}", comments="#")[::2, 1] for b in range(2)]
    assert total == pytest.approx(np.mean(written), abs=1e-9)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"capacitor.csv", "capacitor.json", "capacitor.png", "capacitor.svg"} | {
        "electrode-charge.csv",
        "layers.csv",
    }
    assert (tmp_path / "capacitor.png").stat().st_size > 50000


def test_electrodes_of_another_count_are_found_out(real_run: Path) -> None:
    from voltpi.analysis.electrode_series import electrode_series
    from voltpi.potential.errors import InputError

    run = find_run(real_run)
    setup = setup_of(run, describe_run)
    fewer = type(setup)(**(vars(setup) | {"electrodes": setup.electrodes[:1]}))
    with pytest.raises(InputError, match="2 values a step but the settings have 1 electrodes"):
        electrode_series(run, fewer)


def test_analysis_of_capacitors_needs_no_torch() -> None:
    code = (
        "import sys; from voltpi.analysis import audit, capacitance, figures_capacitor, layers, profiles, registry; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_colours_of_figures(real_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An electrode has one colour on the page; the colour scale of charges has zero in its middle."""
    from voltpi.analysis import figures_capacitor

    drawn: list[Figure] = []

    def keep(figure: Figure, stem: Path) -> list[Path]:
        drawn.append(figure)
        return [stem.with_suffix(".png")]

    monkeypatch.setattr(figures_capacitor, "save_figure", keep)
    analyze(["capacitor", str(real_run), "--out", str(tmp_path)])
    analyze(["layers", str(real_run), "--out", str(tmp_path)])
    page, layers = drawn
    panels = {axes.get_ylabel(): axes for axes in page.axes}
    for name in ("left", "right"):
        colours = [
            next(str(line.get_color()) for line in panels[label].lines if str(line.get_label()).startswith(f"{name} "))
            for label in ("potential (V)", "electrode charge (e)")
        ]
        assert colours[0] == colours[1]
    scales = [maps.get_clim() for axes in layers.axes[:2] for maps in axes.collections]
    assert len(scales) == 2
    assert all(low == -high < 0.0 for low, high in scales)
