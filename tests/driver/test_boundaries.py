"""Open, slab and periodic boundaries, and the sums that go with them: files, settings, batches, i-PI inputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write
from numpy.typing import NDArray

from voltpi.driver import launch
from voltpi.driver.check import check, refuse_starts
from voltpi.driver.cli import main
from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator
from voltpi.driver.ipi_input import Barostat, read_input
from voltpi.driver.settings import load_settings
from voltpi.potential.electrostatics.ewald import DIRECT_BELOW
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.model import Potential
from voltpi.potential.response import Response
from voltpi.potential.systems import Systems

from ipi_runs import table

Array = NDArray[np.float64]
# every term there is: network and pair potentials share the neighbour lists
EVERYTHING: dict[str, Any] = {
    "short_range.pair.lennard_jones": {"O": {"epsilon": 0.0067, "sigma": 3.17}, "H": {"epsilon": 0.002, "sigma": 1.2}},
    "dispersion.functional": "pbe",
    "charges.conserve": "fragments",
    "precision": "double",
}
FRAGMENTS = {"charges.conserve": "fragments"}
IN_PLANE = np.array([[6.2, 0.0, 0.0], [1.1, 6.5, 0.0]])


def layer(pbc: Any = (True, True, False), c: Any = (0.0, 0.0, 0.0)) -> Atoms:
    """Two water molecules over a periodic plane, one of them across its edge."""
    positions = [
        [0.10, 0.05, 9.0],
        [0.86, 0.60, 9.1],
        [-0.66, 0.61, 8.9],
        [2.9, 3.1, 11.7],
        [3.66, 3.67, 11.8],
        [2.17, 3.66, 11.55],
    ]
    return Atoms("OHHOHH", positions, cell=[*IN_PLANE, c], pbc=pbc)


def evaluator(atoms: Atoms, **settings: Any) -> Evaluator:
    return Evaluator.from_settings(load_settings(overrides=settings), atoms)


def answer(e: Evaluator, atoms: Atoms, c: Any = None) -> Response:
    cell = np.asarray(atoms.cell).copy()
    if c is not None:
        cell[2] = c
    return e.evaluate_systems(cell[None], atoms.get_positions()[None])


def wire(atoms: Atoms) -> tuple[Array, Array]:
    return np.asarray(atoms.cell).T[None] / BOHR, atoms.get_positions()[None] / BOHR


# -- slabs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [(0.0, 0.0, 20.0), (2.0, -3.0, 31.0), (0.0, 0.0, 5.5), (0.0, 0.0, -40.0)])
def test_a_slab_does_not_know_its_third_cell_vector(c: tuple[float, ...]) -> None:
    """In the file or over the wire, long, short or tilted; no term sees it."""
    reference = answer(evaluator(layer(), **EVERYTHING), layer())
    over_the_wire = answer(evaluator(layer(), **EVERYTHING), layer(), c)
    in_the_file = answer(evaluator(layer(c=c), **EVERYTHING), layer(c=c))
    assert len(reference.energy_terms) > 4
    for other in (over_the_wire, in_the_file):
        for name, value in reference.energy_terms.items():
            assert float(other.energy_terms[name]) == pytest.approx(float(value), abs=1e-11), name
        np.testing.assert_allclose(other.forces, reference.forces, atol=1e-10)
        np.testing.assert_allclose(other.virial, reference.virial, atol=1e-10)


def test_auto_takes_the_files_directions_and_the_setting_overrides_them() -> None:
    c = (0.0, 0.0, 14.0)
    slab, periodic, cluster = (
        float(answer(evaluator(layer(pbc, c), **FRAGMENTS), layer(pbc, c)).energy)
        for pbc in ((True, True, False), True, False)
    )
    assert len({round(e, 5) for e in (slab, periodic, cluster)}) == 3
    for boundary, expected in (("slab-z", slab), ("periodic", periodic), ("open", cluster)):
        for pbc in (True, False, (True, True, False)):
            e = evaluator(layer(pbc, c), **FRAGMENTS, **{"coulomb.boundary": boundary})
            assert float(answer(e, layer(pbc, c)).energy) == pytest.approx(expected, abs=1e-12)


def test_the_three_slabs_are_one_slab_seen_from_three_sides() -> None:
    c = (0.3, 0.2, 14.0)
    energies, moved = [], layer(True, c)
    for name in ("slab-z", "slab-x", "slab-y"):
        energies.append(float(answer(evaluator(moved, **EVERYTHING, **{"coulomb.boundary": name}), moved).energy))
        # z becomes x, and with it the third cell vector the first
        order = [2, 0, 1]
        cell, positions = np.asarray(moved.cell)[order][:, order], moved.positions[:, order]
        moved = Atoms(moved.numbers, positions, cell=cell, pbc=True)
    np.testing.assert_allclose(energies, energies[0], atol=1e-8)


def test_forces_and_virial_of_a_slab_over_the_wire_are_derivatives() -> None:
    atoms = layer(c=(0.0, 0.0, 18.0))
    e = evaluator(atoms, **EVERYTHING, **{"field": [0.0, 0.0, 0.06], "coulomb.accuracy": 1e-8})
    h, r = (x[0] for x in wire(atoms))

    def energy(h: Array, r: Array) -> float:
        return e.evaluate(h[None], r[None])[0].energy

    result, step = e.evaluate(h[None], r[None])[0], 2e-4
    for atom, axis in ((0, 2), (4, 0)):
        shift = np.zeros_like(r)
        shift[atom, axis] = step
        slope = (energy(h, r + shift) - energy(h, r - shift)) / (2 * step)
        assert result.forces[atom, axis] == pytest.approx(-slope, rel=1e-6, abs=1e-8)
    for a, b in ((0, 0), (0, 1), (2, 2), (0, 2)):
        strain = np.zeros((3, 3))
        strain[a, b] += step
        up, down = np.eye(3) + strain, np.eye(3) - strain
        slope = (energy(up @ h, r @ up.T) - energy(down @ h, r @ down.T)) / (2 * step)
        assert result.virial[a, b] == pytest.approx(-slope, rel=1e-5, abs=1e-7)


def test_a_slab_has_no_stress_and_follows_atoms_through_its_sides_only() -> None:
    atoms = layer(c=(0.0, 0.0, 18.0))
    e = evaluator(atoms, **FRAGMENTS)
    assert e.volume(np.asarray(atoms.cell)) == 0
    first = answer(e, atoms)
    through_the_side, through_the_top = atoms.copy(), atoms.copy()
    through_the_side.positions[3:] += atoms.cell[1]
    through_the_top.positions[3:] += atoms.cell[2]
    np.testing.assert_allclose(answer(e, through_the_side).forces, first.forces, atol=1e-8)
    assert abs(float(answer(e, through_the_top).energy - first.energy)) > 1e-5


def test_a_field_across_a_slab_may_move_charge_and_one_along_it_may_not() -> None:
    keys = {"charges.response": "all", "charges.conserve": "total"}
    across = evaluator(layer(), field=[0.0, 0.0, 0.05], **keys)
    assert np.isfinite(float(answer(across, layer()).energy))
    with pytest.raises(InputError, match="field along a periodic direction"):
        evaluator(layer(), field=[0.05, 0.0, 0.0], **keys)


@pytest.mark.parametrize("boundary", ["auto", "slab-z"])
def test_a_slab_that_ipi_turns_is_refused_in_a_field(boundary: str) -> None:
    turned = layer(pbc=True if boundary != "auto" else (True, True, False), c=(0.0, 0.0, 18.0))
    turned.rotate(30, "z", rotate_cell=True)
    keys = {"coulomb.boundary": boundary, **FRAGMENTS}
    with pytest.raises(InputError, match="i-PI turns the cell"):
        evaluator(turned, field=[0.0, 0.0, 0.05], **keys).evaluate(*wire(layer(c=(0.0, 0.0, 25.0))))
    assert np.isfinite(evaluator(turned, **keys).evaluate(*wire(layer(c=(0.0, 0.0, 25.0))))[0].energy)


@pytest.mark.parametrize(
    ("atoms", "boundary", "words"),
    [
        (layer(), "periodic", "is periodic but has no cell along c"),
        (layer(pbc=False), "slab-x", "is periodic but has no cell along c"),
        (molecule("H2O"), "slab-z", "is periodic but has no cell along a, b"),
        (layer(pbc=(True, False, False)), "auto", "periodic in one direction only"),
    ],
)
def test_boundaries_that_the_cell_does_not_have(atoms: Atoms, boundary: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluator(atoms, **{"coulomb.boundary": boundary})


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pbc", [True, (True, True, False), False])
def test_methods_that_fit_the_boundary_give_what_auto_gives(pbc: Any) -> None:
    atoms = layer(pbc, (0.0, 0.0, 14.0))
    expected = float(answer(evaluator(atoms, **FRAGMENTS), atoms).energy)
    for method in ("direct", "ewald", "pme"):
        keys = {"coulomb.method": method, **FRAGMENTS}
        if (method == "direct") == (not np.any(pbc)):
            assert float(answer(evaluator(atoms, **keys), atoms).energy) == pytest.approx(expected, abs=1e-12)
        else:
            words = "direct is for open boundaries" if method == "direct" else f"{method} needs a periodic boundary"
            with pytest.raises(InputError, match=rf"coulomb.method: {words} but the structure is .*; use auto"):
                evaluator(atoms, **keys)


def test_direct_is_not_promised_where_the_sum_is_done_on_a_mesh() -> None:
    n = round(DIRECT_BELOW ** (1 / 3)) + 1
    grid = np.stack(np.meshgrid(*[4.0 * np.arange(n)] * 3), axis=-1).reshape(-1, 3)
    with pytest.raises(InputError, match=f"up to {DIRECT_BELOW} atoms but the structure has {len(grid)}; use auto"):
        evaluator(Atoms(f"Ar{len(grid)}", grid), **{"coulomb.method": "direct"})


# -- structures that the cell cuts ------------------------------------------------------------------------------------


def wrapped(atoms: Atoms, shift: float) -> Atoms:
    """The structure moved along c by this part of it, and wrapped into the cell along all directions."""
    out = atoms.copy()
    out.positions += shift * np.asarray(atoms.cell)[2]
    out.wrap(pbc=True)
    return out


def salt(vacuum: float = 15.0) -> Atoms:
    """Four layers of rock salt."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat((1, 1, 2))
    atoms.cell[2, 2] += vacuum
    atoms.set_pbc((True, True, False))
    return atoms


@pytest.mark.parametrize(
    ("atoms", "keys", "part"),
    [(layer(c=(0.5, 0.0, 18.0)), FRAGMENTS, 0.05), (salt(), {}, 0.7), (molecule("CH3CH2OH", vacuum=4.0), {}, 0.7)],
)
def test_a_slab_that_is_wrapped_across_its_open_side_is_refused_with_what_to_do(
    atoms: Atoms, keys: dict[str, Any], part: float
) -> None:
    """``part`` of it lies below the face of the cell."""
    whole = wrapped(atoms, 0.5 - atoms.get_scaled_positions(wrap=False)[:, 2].mean())
    expected = float(answer(evaluator(whole, **keys), whole).energy)
    along = whole.get_scaled_positions(wrap=False)[:, 2]
    cut = wrapped(whole, 1 - along.min() - part * np.ptp(along))
    with pytest.raises(InputError) as raised:
        evaluator(cut, **keys)
    message = str(raised.value)
    found = re.search(r"atoms (\d+) \((\w+)\) and (\d+) \((\w+)\) are bonded \((.*) Å\) only across the", message)
    assert found is not None, message
    i, j = int(found[1]), int(found[3])
    assert [cut.symbols[i], cut.symbols[j]] == [found[2], found[4]]
    through = cut.copy()
    through.set_pbc(True)
    assert (
        cut.get_distance(i, j, mic=True)
        > 4
        > float(found[5])
        == pytest.approx(through.get_distance(i, j, mic=True), abs=0.006)
    )
    advice = re.search(r"open direction c; shift the slab along c by (\d\.\d\d) of that cell vector", message)
    assert advice is not None, message
    mended = wrapped(cut, float(advice[1]))
    assert float(answer(evaluator(mended, **keys), mended).energy) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "atoms",
    [
        molecule("H2O"),  # no cell
        layer(c=(0.0, 0.0, 1.0)),  # a cell that means nothing
        layer(c=(0.0, 0.0, 4.5)),  # little room, but nothing bonded
        layer(c=(1.0, 0.0, 0.0)),  # no cell at all
        wrapped(layer(c=(0.0, 0.0, 30.0)), 0.2),
        salt(vacuum=1.0),
        salt(),
        Atoms("C2", [[0, 0, 0.5], [0, 1.42, 0.5]], cell=[[2.46, 0, 0], [1.23, 2.13, 0], [0, 0, 1.6]], pbc=[1, 1, 0]),
    ],
)
def test_what_is_whole_is_not_taken_for_cut(atoms: Atoms) -> None:
    assert np.isfinite(float(answer(evaluator(atoms), atoms).energy))


def test_a_periodic_box_that_is_opened_through_its_molecules_is_refused() -> None:
    box = Atoms("OH2OH2", layer().positions - [0, 0, 8.5], cell=[6.2, 6.5, 4.6], pbc=True)
    box.wrap()
    answer(evaluator(box), box)
    with pytest.raises(InputError, match=r"--set .*cut by its cell: .* across the open direction a; put molecules"):
        Evaluator.from_settings(load_settings(overrides=["coulomb.boundary=open"]), box)


def test_the_command_line_names_file_and_atoms_of_a_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "s.xyz", wrapped(salt(), 0.85), format="extxyz")
    assert main(["evaluate", str(tmp_path / "s.xyz"), "--set", "charges.model=pqeq", "--json"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 's.xyz'}: the structure is cut by its cell: atoms ")
    assert err.count("\n") == 1


# -- batches ----------------------------------------------------------------------------------------------------------


def beads(n: int, scale: float = 0.03) -> tuple[Array, Array]:
    atoms = layer(c=(0.0, 0.0, 18.0))
    rng = np.random.default_rng(7)
    positions = atoms.positions + rng.normal(scale=scale, size=(n, len(atoms), 3))
    return np.repeat(np.asarray(atoms.cell)[None], n, axis=0), positions


def test_a_message_is_one_batch_in_which_every_structure_has_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two known beads, then four, two of them new: one call of the potential, warm for all, the same answers."""
    calls: list[tuple[int, Response | None]] = []
    original = Potential.__call__

    def spy(self: Potential, systems: Systems, *, start: Response | None = None, **options: Any) -> Response:
        calls.append((systems.n_systems, start))
        return original(self, systems, start=start, **options)

    monkeypatch.setattr(Potential, "__call__", spy)
    cells, positions = beads(4)
    e = evaluator(layer(c=(0.0, 0.0, 18.0)), **FRAGMENTS)
    e.evaluate_systems(cells[:2], positions[:2])
    cold = evaluator(layer(c=(0.0, 0.0, 18.0)), **FRAGMENTS).evaluate_systems(cells, positions)
    warm = e.evaluate_systems(cells[[0, 2, 3, 1]], positions[[0, 2, 3, 1]] + 0.001)
    assert [n for n, _ in calls] == [2, 4, 4]
    start = calls[2][1]
    assert start is not None
    assert start.charges.shape == (24,)
    assert start.shells.shape == (24, 3)
    assert bool((start.charges.reshape(4, 6).abs().amin(1) > 0.1).all())
    assert bool((warm.iterations < cold.iterations[[0, 2, 3, 1]]).all())
    back = warm.energy[[0, 3, 1, 2]]
    np.testing.assert_allclose(back, cold.energy, atol=1e-9)  # moved as a whole
    fewer = e.evaluate_systems(cells[:1], positions[2:3])
    np.testing.assert_allclose(fewer.energy, cold.energy[2:3], atol=1e-9)


def test_errors_of_a_batch_name_the_structure() -> None:
    cells, positions = beads(3)
    e = evaluator(layer(c=(0.0, 0.0, 18.0)), **FRAGMENTS)
    bad = positions.copy()
    bad[1, 4] = bad[1, 3] + 0.1
    with pytest.raises(InputError, match=r"atoms 3 \(O\) and 4 \(H\) of structure 1 are 0\.173 Å apart"):
        e.evaluate_systems(cells, bad)
    with pytest.raises(InputError, match=r"atoms 3 \(O\) and 4 \(H\) are 0\.173 Å apart"):
        e.evaluate_systems(cells[:1], bad[1:2])
    bad[1, 4] = [0, 0, 1e6]
    with pytest.raises(InputError, match=r"atom 4 \(H\) of structure 1 is 1e\+06 Å from the rest"):
        e.evaluate_systems(cells, bad)
    bad[1, 4] = np.nan
    with pytest.raises(VoltPIError, match="the position of atom 4 of structure 1 is not a finite number"):
        e.evaluate_systems(cells, bad)
    cells[2, 1, 0] = np.inf
    with pytest.raises(VoltPIError, match="the cell of structure 2 is not finite"):
        e.evaluate_systems(cells, positions)
    cells, _ = beads(3)
    cells[2, 2, 2] = np.inf  # an open direction
    assert bool(e.evaluate_systems(cells, positions).energy.isfinite().all())


def test_an_answer_that_is_not_finite_names_the_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Potential.__call__

    def broken(self: Potential, *arguments: Any, **options: Any) -> Response:
        response = original(self, *arguments, **options)
        response.forces[8, 1] = np.nan
        return response

    cells, positions = beads(3)
    e = evaluator(layer(c=(0.0, 0.0, 18.0)), **FRAGMENTS)
    monkeypatch.setattr(Potential, "__call__", broken)
    with pytest.raises(VoltPIError, match="the forces of structure 1 came out as not a finite number"):
        e.evaluate(cells.transpose(0, 2, 1) / BOHR, positions / BOHR)


# -- i-PI -------------------------------------------------------------------------------------------------------------

XML = """<simulation verbosity='low'>
  <output prefix='run'> <properties stride='1' filename='out'> [step, potential] </properties> </output>
  <total_steps>2</total_steps> <prng><seed>5</seed></prng>
  <ffsocket name='ff' mode='unix'{pbc}> <address>voltpi-slab</address> </ffsocket>
  <system>
    <initialize nbeads='1'> <file mode='ase'> start.xyz </file> {cell} </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> <pressure units='megapascal'> 0.1 </pressure> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='{mode}'>
        <timestep units='femtosecond'> 0.25 </timestep>
        <thermostat mode='langevin'> <tau units='femtosecond'> 100 </tau> </thermostat>
        {barostat}
      </dynamics>
    </motion>
  </system>
</simulation>
"""


def run_folder(
    folder: Path, atoms: Atoms, settings: str = "", *, cell: str = "", pbc: str = "", barostat: str = ""
) -> Path:
    write(folder / "start.xyz", atoms, format="extxyz")
    (folder / "settings.yaml").write_text("charges: {conserve: fragments}\n" + settings)
    if barostat:
        inner = "<thermostat mode='langevin'> <tau units='femtosecond'> 100 </tau> </thermostat>"
        barostat = barostat.replace("</barostat>", f"<tau units='femtosecond'> 200 </tau> {inner} </barostat>")
    text = XML.format(cell=cell, pbc=pbc, barostat=barostat, mode="npt" if barostat else "nvt")
    (folder / "input.xml").write_text(text)
    return folder / "input.xml"


def problems(path: Path) -> list[str]:
    return [finding.sentence for finding in check(path) if not finding.ok]


ISOTROPIC = "<barostat mode='isotropic'> </barostat>"
FLEXIBLE = "<barostat mode='flexible'> {} </barostat>"


@pytest.mark.parametrize(
    ("boundary", "barostat", "words"),
    [
        ("slab-z", ISOTROPIC, r"<barostat mode='isotropic'> scales the structure along c, .*<hfix> \[zz, xz, yz\]"),
        ("slab-x", FLEXIBLE.format("<hfix> [zz, xz, yz] </hfix>"), r"along a, .*<hfix> \[xx, xy, xz\] </hfix>"),
        ("slab-z", FLEXIBLE.format("<hfix> [ xx, yy, offdiagonal ] </hfix>"), "along c, "),
        ("slab-z", FLEXIBLE.format("<hfix> [zz, xz] </hfix>"), "along c, "),
        ("slab-z", FLEXIBLE.format("<hfix> [ zz, xz, yz ] </hfix>"), None),
        ("slab-y", FLEXIBLE.format("<hfix> [ yy, offdiagonal ] </hfix>"), None),
        ("open", ISOTROPIC, "along a and b and c, .*use <dynamics mode='nvt'>$"),
        ("periodic", ISOTROPIC, None),
        ("slab-z", "", None),
    ],
)
def test_a_barostat_along_an_open_direction_is_a_problem(
    tmp_path: Path, boundary: str, barostat: str, words: str | None
) -> None:
    atoms = layer(True, (0.0, 0.0, 18.0))
    xml = run_folder(tmp_path, atoms, f"coulomb: {{boundary: {boundary}}}\n", barostat=barostat)
    found = problems(xml)
    if words is None:
        assert found == []
    else:
        (sentence,) = found
        assert re.search(words, sentence), sentence
        with pytest.raises(InputError, match=r"input.xml, <ffsocket name='ff'>: <barostat"):
            refuse_starts(read_input(xml), {"ff": tmp_path / "settings.yaml"})


def test_a_barostat_is_read_with_what_it_holds_fixed(tmp_path: Path) -> None:
    barostat = FLEXIBLE.format("<hfix> [ zx, yy ] </hfix>")
    plan = read_input(run_folder(tmp_path, layer(c=(0.0, 0.0, 18.0)), barostat=barostat))
    assert plan.barostat == Barostat("flexible", frozenset({"xz", "yy"}))
    assert not plan.cell_is_given
    text = (tmp_path / "input.xml").read_text()
    (tmp_path / "input.xml").write_text(text.replace("'npt'", "'nvt'"))  # i-PI then does not use it
    assert read_input(tmp_path / "input.xml").barostat is None


@pytest.mark.parametrize(
    ("pbc", "problem"), [((True, True, False), True), (False, True), (True, False), ((True, False, True), True)]
)
def test_ipi_must_not_fold_atoms_along_open_directions(tmp_path: Path, pbc: Any, problem: bool) -> None:
    found = problems(run_folder(tmp_path, layer(pbc, (0.0, 0.0, 18.0)), pbc=" pbc='True'"))
    assert bool(found) == problem
    if problem:
        letter = "abc"[int(np.argmin(np.broadcast_to(pbc, 3)))]
        assert f"pbc='True' folds atoms into the cell along {letter} too, which is open" in found[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"c": (0.0, 0.0, 0.0)}, "i-PI wants a cell with a volume"),
        ({"turn": 30}, "i-PI could not read its own checkpoints"),
        ({"swap": True}, "i-PI wants a cell with a volume"),
        ({"c": (0.0, 0.0, 0.0), "cell": "<cell mode='abc' units='angstrom'> [ 6.2, 6.5, 20 ] </cell>"}, None),
        ({"turn": 30, "pbc": True}, None),  # i-PI turns it itself
        ({"turn": 30, "pbc": True, "field": True}, "i-PI turns the cell of the start structure"),
        ({"turn": 30, "pbc": True, "field": True, "boundary": "open"}, "i-PI turns the cell of the start structure"),
        ({"turn": 30, "pbc": True, "field": True, "boundary": "slab-z"}, "i-PI turns the cell of the start structure"),
        ({"field": True}, None),
    ],
)
def test_cells_that_ipi_cannot_use_are_found_before_the_run(
    tmp_path: Path, change: dict[str, Any], words: str | None
) -> None:
    atoms = layer(change.get("pbc", (True, True, False)), change.get("c", (0.0, 0.0, 18.0)))
    if "turn" in change:
        atoms.rotate(change["turn"], "z", rotate_cell=True)
    if "swap" in change:
        atoms.set_cell([[0.0, 6.5, 0.0], [6.2, 0.0, 0.0], [0.0, 0.0, 18.0]])
    settings = f"coulomb: {{boundary: {change.get('boundary', 'auto')}}}\n"
    settings += "field: [0, 0, 0.05]\n" if "field" in change else ""
    xml = run_folder(tmp_path, atoms, settings, cell=change.get("cell", ""))
    found = problems(xml)
    assert [words in sentence for sentence in found] == ([True] if words else []), found
    if words:
        with pytest.raises(InputError, match=words):
            launch.run(xml, quiet=True)
        assert not list(tmp_path.glob("*.log"))  # nothing was started


def test_a_run_of_a_slab_starts_at_its_energy(tmp_path: Path) -> None:
    atoms = layer(c=(0.0, 0.0, 18.0))
    xml = run_folder(tmp_path, atoms)
    assert launch.run(xml, quiet=True) == 0
    energies = table(tmp_path)[:, 1]
    e = evaluator(atoms, **FRAGMENTS)
    assert energies[0] == pytest.approx(float(answer(e, atoms).energy) / HARTREE, rel=1e-7)
    assert energies[1] != energies[0]
