"""Training data: labels, units, references, baseline, reduction, split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError, NoStablePointError
from voltpi.potential.model import Potential
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.shortrange.pair import ZBL
from voltpi.potential.systems import Systems
from voltpi.potential.training.baseline import LongRange, load_dataset
from voltpi.potential.training.charge_report import nearest_branch, report_charges
from voltpi.potential.training.dataset import Sample, read_frames
from voltpi.potential.training.labels import Source, Units
from voltpi.potential.training.references import reference_energies, subtract_references, summarize
from voltpi.potential.training.splitting import check_disjoint, check_repeats, split, structure_hash
from voltpi.potential.training.translations import reduce_translations

from training_toys import ALL_AUTO, CUTOFF, flexible_water, molecule, stored, water


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    loaded = load_dataset(stored(tmp_path, [water(2, seed) for seed in range(6)]), CUTOFF)
    return subtract_references(loaded, reference_energies(loaded))


# -- data ------------------------------------------------------------------------------------------------------------


def test_labels_under_their_names_or_from_a_calculator(tmp_path: Path) -> None:
    atoms = water(1)
    named = load_dataset(stored(tmp_path, [atoms]), CUTOFF)[0]
    plain = water(1)
    plain.calc = SinglePointCalculator(
        plain, energy=plain.info.pop("REF_energy"), forces=plain.arrays.pop("REF_forces")
    )
    source = stored(tmp_path, [plain], "plain.xyz", energy_key="energy", forces_key="forces")
    from_calculator = load_dataset(source, CUTOFF)[0]
    assert named.energy == pytest.approx(atoms.info["REF_energy"], abs=1e-7)
    assert from_calculator.energy == pytest.approx(named.energy, abs=1e-7)
    torch.testing.assert_close(named.forces, torch.as_tensor(atoms.arrays["REF_forces"]), atol=1e-7, rtol=0)
    torch.testing.assert_close(from_calculator.forces, named.forces, atol=1e-7, rtol=0)
    assert named.forces.dtype == named.vectors.dtype == torch.float64


def test_field_and_charge_reach_the_systems(tmp_path: Path) -> None:
    atoms = water(1)
    atoms.info |= {"eps": [0.1, 0.0, -0.2], "total_charge": 1}
    sample = load_dataset(stored(tmp_path, [atoms], field_key="eps", charge_key="total_charge"), CUTOFF)[0]
    assert sample.systems.field.tolist() == [[0.1, 0.0, -0.2]]
    assert sample.systems.net_charge.tolist() == [1.0]


def _without_energy(atoms: Atoms) -> None:
    del atoms.info["REF_energy"]


def _with_nan(atoms: Atoms) -> None:
    atoms.arrays["REF_forces"][2, 1] = np.nan


def _with_text(atoms: Atoms) -> None:
    atoms.info["REF_energy"] = "unconverged"


def _with_charges_as_forces(atoms: Atoms) -> None:
    atoms.arrays["REF_forces"] = np.zeros(len(atoms))


def _with_field(atoms: Atoms) -> None:
    atoms.info["electric_field"] = [0.1, 0.0, 0.0]


def _with_overlap(atoms: Atoms) -> None:
    atoms.positions[2] = atoms.positions[1] + [0.01, 0.0, 0.0]


def _without_cell(atoms: Atoms) -> None:
    atoms.set_cell([0.0, 0.0, 0.0])


def _with_dependent_cell_vectors(atoms: Atoms) -> None:
    atoms.set_cell([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [5.0, 5.0, 0.0]])


def _with_a_dummy(atoms: Atoms) -> None:
    atoms.numbers[2] = 0


def _without_atoms(atoms: Atoms) -> None:
    del atoms[:]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without_energy, ["energy label 'REF_energy'", "missing", "name one of"]),
        (_with_nan, ["forces label 'REF_forces'", "not finite at index [2, 1]"]),
        (_with_text, ["energy label", "'unconverged'", "not numbers"]),
        (_with_charges_as_forces, ["shape [3], expected [3, 3]"]),
        (_with_field, ["electric_field", "labels.field"]),
        (_with_overlap, ["atoms 1 (H) and 2 (H) are 0.010 Å apart"]),
        (_without_cell, ["periodic but has no cell vector"]),
        (_with_dependent_cell_vectors, ["linearly dependent"]),
        (_with_a_dummy, ["atom 2 is the dummy element X"]),
        (_without_atoms, ["has no atoms: remove the frame"]),
    ],
)
def test_bad_labels_are_named_by_file_frame_and_key(tmp_path: Path, spoil, words) -> None:
    frames = [water(1, 0), water(1, 1)]
    spoil(frames[1])
    source = stored(tmp_path, frames)
    with pytest.raises(InputError) as error:
        load_dataset(source, CUTOFF)
    for word in ["set.xyz, frame 1", *words]:
        assert word in str(error.value)


def test_unreadable_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.xyz: cannot be read"):
        load_dataset(Source(tmp_path / "absent.xyz", "x"), CUTOFF)
    (tmp_path / "text.xyz").write_text("this is\nno structure\n")
    with pytest.raises(InputError, match=r"text\.xyz: cannot be read"):
        load_dataset(Source(tmp_path / "text.xyz", "x"), CUTOFF)


def test_a_file_that_ends_early_names_the_frame(tmp_path: Path) -> None:
    source = stored(tmp_path, [water(1, 0), water(1, 1), water(1, 2)])
    text = Path(source.path).read_text()
    Path(source.path).write_text(text.rstrip().rsplit("\n", 1)[0] + "\n")
    with pytest.raises(InputError, match=r"set\.xyz, frame 2: cannot be read .*2 atoms, expected 3"):
        load_dataset(source, CUTOFF)


def test_references_recover_the_energies_of_atoms_by_dataset(tmp_path: Path) -> None:
    low, high = {1: -13.6, 8: -2040.0}, {1: -12.5, 8: -430.0}
    samples = []
    for name, atoms in (("low", low), ("high", high)):
        frames = [molecule(s, sum(atoms[z] for z in Atoms(s).numbers)) for s in ("H2O", "H2", "O2", "H4O2")]
        samples += load_dataset(stored(tmp_path, frames, f"{name}.xyz", name=name), CUTOFF)
    references = reference_energies(samples)
    assert references["low"] == pytest.approx(low, abs=1e-6)
    assert references["high"] == pytest.approx(high, abs=1e-6)
    assert max(abs(s.energy) for s in subtract_references(samples, references)) < 1e-5


def test_references_of_one_composition_are_the_smallest_that_give_the_mean(tmp_path: Path) -> None:
    frames = [water(n, seed) for n, seed in ((1, 0), (2, 1), (4, 2), (4, 3))]
    samples = load_dataset(stored(tmp_path, frames), CUTOFF)
    (references,) = reference_energies(samples).values()
    # H2O alone fixes 2 e_H + e_O; the shortest (e_H, e_O) is along (2, 1)
    assert references[1] == pytest.approx(2 * references[8], rel=1e-9)
    mean = np.mean([s.energy / s.systems.n_atoms for s in samples])
    assert (2 * references[1] + references[8]) / 3 == pytest.approx(mean, abs=1e-9)
    assert (
        abs(sum(s.energy / s.systems.n_atoms for s in subtract_references(samples, references={"water": references})))
        < 1e-6
    )


def test_references_refuse_unknown_datasets_and_elements(samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="'water' has no reference"):
        subtract_references(samples, {"other": {1: 0.0, 8: 0.0}})
    with pytest.raises(InputError, match="frame 0: no reference energy for H"):
        subtract_references(samples, {"water": {8: 0.0}})


def test_split_depends_on_the_structure_alone(tmp_path: Path) -> None:
    frames = [water(1, seed) for seed in range(60)]
    samples = load_dataset(stored(tmp_path, frames), CUTOFF)
    train, validation = split(samples, 0.3)
    assert 5 < len(validation) < 35
    held_out = {structure_hash(s.systems) for s in validation}
    again, held_again = split(load_dataset(stored(tmp_path, frames[::-1][10:], "part.xyz"), CUTOFF), 0.3)
    assert {structure_hash(s.systems) for s in held_again} <= held_out
    assert not {structure_hash(s.systems) for s in again} & held_out
    assert {s.frame for s in split(samples, 0.3, seed=1)[1]} != {s.frame for s in validation}
    check_disjoint(train, validation)
    with pytest.raises(InputError, match=f"frame {train[0].frame} is also in training"):
        check_disjoint(train, [*validation, train[0]])
    with pytest.raises(InputError, match="leaves one side empty"):
        split(samples[:1], 0.5)


def test_one_geometry_under_two_fields_stays_on_one_side(tmp_path: Path) -> None:
    frames = []
    for seed in range(20):
        for strength in (0.0, 0.3):
            frames.append(water(1, seed))
            frames[-1].info["eps"] = [strength, 0.0, 0.0]
    train, validation = split(load_dataset(stored(tmp_path, frames, field_key="eps"), CUTOFF), 0.5)
    assert not {s.frame // 2 for s in train} & {s.frame // 2 for s in validation}
    check_disjoint(train, validation)


class CountingBaseline:
    """E = Σ x² + ε·Σ r; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        x = systems.positions
        virial = torch.eye(3, dtype=x.dtype)[None] * 0.3
        return x.square().sum().reshape(1) + (systems.field @ x.sum(0)), -2 * x - systems.field, virial


def test_baseline_is_subtracted_and_cached(tmp_path: Path) -> None:
    frames = [water(1, seed) for seed in range(3)]
    source, baseline, cache = stored(tmp_path, frames), CountingBaseline(), tmp_path / "cache"
    options = {"baseline": baseline, "cache": cache, "progress": False}
    first = load_dataset(source, CUTOFF, baseline_key="a", **options)
    assert baseline.calls == 3
    bare = load_dataset(source, CUTOFF)
    for with_, without in zip(first, bare, strict=True):
        assert with_.energy == pytest.approx(without.energy - float(without.systems.positions.square().sum()))
        torch.testing.assert_close(with_.forces, without.forces + 2 * without.systems.positions)
    again = load_dataset(source, CUTOFF, baseline_key="a", **options)
    assert baseline.calls == 3
    assert all(a.energy == b.energy and torch.equal(a.forces, b.forces) for a, b in zip(first, again, strict=True))
    load_dataset(stored(tmp_path, [*frames, water(1, 9)]), CUTOFF, baseline_key="a", **options)
    assert baseline.calls == 4  # only the new frame
    load_dataset(source, CUTOFF, baseline_key="b", **options)
    assert baseline.calls == 4 + 4
    for atoms in frames:
        atoms.info["eps"] = [0.1, 0.0, 0.0]
    fielded = load_dataset(stored(tmp_path, frames, field_key="eps"), CUTOFF, baseline_key="a", **options)
    assert baseline.calls == 8 + 3  # the field is part of the structure
    torch.testing.assert_close(fielded[0].forces - first[0].forces, fielded[0].systems.field.expand(3, 3))
    with pytest.raises(InputError, match="baseline_key is empty"):
        load_dataset(source, CUTOFF, **options)


def test_baseline_errors_name_the_frame_and_keep_what_was_done(tmp_path: Path) -> None:
    class Failing(CountingBaseline):
        def __call__(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
            if self.calls == 1:
                raise NoStablePointError("no stable point at atom 0")
            return super().__call__(systems)

    source, cache = stored(tmp_path, [water(1, 0), water(1, 1)]), tmp_path / "cache"
    with pytest.raises(NoStablePointError, match=r"frame 1: no stable point"):
        load_dataset(source, CUTOFF, baseline=Failing(), baseline_key="a", cache=cache, progress=False)
    baseline = CountingBaseline()
    load_dataset(source, CUTOFF, baseline=baseline, baseline_key="a", cache=cache, progress=False)
    assert baseline.calls == 1


# -- translations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [(2, 1, 1), (1, 3, 1), (2, 1, 4)])
def test_reduction_undoes_exact_repetition(repeats: tuple[int, int, int]) -> None:
    small = water(2)
    small.set_cell([[5.0, 0.0, 0.0], [1.5, 5.0, 0.0], [0.4, -0.7, 5.0]])
    small.info |= {"dipole": np.array([0.3, -0.1, 0.2]), "label": "kept"}
    n = int(np.prod(repeats))
    large = small.repeat(repeats)
    large.info |= {"REF_energy": n * small.info["REF_energy"], "dipole": n * small.info["dipole"]}
    large.positions += 3e-5 * np.random.default_rng(0).normal(size=large.positions.shape) + [4.0, 0.0, -2.0]
    order = np.random.default_rng(1).permutation(len(large))
    reduced = reduce_translations(large[order], extensive=("dipole",))
    assert len(reduced) == len(small)
    np.testing.assert_allclose(reduced.cell.array, small.cell.array, atol=1e-12)
    assert reduced.info["REF_energy"] == pytest.approx(small.info["REF_energy"], rel=1e-12)
    np.testing.assert_allclose(reduced.info["dipole"], small.info["dipole"])
    assert reduced.info["label"] == "kept"
    # the crystal is the same: every atom sees the same neighbours and carries the same force
    pairs = [neighbor_list(Systems.from_atoms(x), CUTOFF).vectors for x in (reduced, small)]
    np.testing.assert_allclose(*(np.sort(v.norm(dim=1).numpy()) for v in pairs), atol=1e-3)
    forces = [x.arrays["REF_forces"][np.argsort(x.arrays["REF_forces"][:, 0])] for x in (reduced, small)]
    np.testing.assert_array_equal(*forces)


def test_reduction_leaves_structures_alone_that_do_not_repeat() -> None:
    liquid = water(4)
    assert reduce_translations(liquid) is liquid
    moved, pushed, swapped, open_end = (water(2).repeat((2, 1, 1)) for _ in range(4))
    moved.positions[7] += 0.01
    pushed.arrays["REF_forces"][7, 2] += 0.01
    swapped.numbers[[6, 7]] = swapped.numbers[[7, 6]]
    open_end.pbc = [False, True, True]
    for atoms in (moved, pushed, swapped, open_end):
        atoms.info["REF_energy"] = -1.0
        assert reduce_translations(atoms) is atoms


def test_reduction_on_loading_keeps_energies_per_atom(tmp_path: Path) -> None:
    large = water(2).repeat((2, 1, 1))
    energy = 2 * water(2).info["REF_energy"]
    forces = large.arrays.pop("REF_forces")
    large.info.pop("REF_energy", None)
    large.calc = SinglePointCalculator(large, energy=energy, forces=forces)
    source = stored(tmp_path, [large], energy_key="energy", forces_key="forces", reduce=True)
    (reduced,) = load_dataset(source, CUTOFF)
    (whole,) = load_dataset(replace(source, reduce=False), CUTOFF)
    assert (reduced.systems.n_atoms, whole.systems.n_atoms) == (6, 12)
    assert reduced.energy / 6 == pytest.approx(whole.energy / 12)
    assert summarize([reduced]).species == summarize([whole]).species == (1, 8)
    assert summarize([reduced]).force_rms == pytest.approx(summarize([whole]).force_rms)
    assert summarize([reduced]).average_neighbors == summarize([whole]).average_neighbors
    with pytest.raises(InputError, match="'polarizability' is missing"):
        read_frames(replace(source, extensive=("polarizability",)))


# -- what is done with them ------------------------------------------------------------------------------------------


def test_repeated_frames_must_agree(tmp_path: Path) -> None:
    samples = load_dataset(stored(tmp_path, [water(1), water(1, 1), water(1)]), CUTOFF)
    assert check_repeats(samples) == 1
    wrong = [*samples[:2], replace(samples[2], energy=samples[2].energy + 1.0)]
    with pytest.raises(
        InputError, match=r"frame 2: is the structure of .*set\.xyz, frame 0, but its energy differs by 1 eV"
    ):
        check_repeats(wrong)
    assert check_repeats([*wrong[:2], replace(wrong[2], dataset="other level")]) == 0


def test_references_stay_near_where_they_start(tmp_path: Path) -> None:
    samples = load_dataset(stored(tmp_path, [water(1, seed) for seed in range(4)]), CUTOFF)
    start = {1: -16.0, 8: -435.0}
    (fitted,) = reference_energies(samples, start=start).values()
    mean = np.mean([s.energy for s in samples])
    assert 2 * fitted[1] + fitted[8] == pytest.approx(mean, abs=1e-8)
    assert fitted[1] - start[1] == pytest.approx(2 * (fitted[8] - start[8]), rel=1e-6)
    (held,) = reference_energies(samples, start=start, ridge=1e6).values()
    assert held == pytest.approx(start, abs=1e-3)


def test_long_range_is_taken_from_energy_forces_and_stress(tmp_path: Path) -> None:
    baseline = LongRange(PQEq(), None)
    source = stored(tmp_path, [flexible_water(2)], stress_key="REF_stress")
    (bare,), (left,) = (load_dataset(source, CUTOFF, baseline=b, progress=False) for b in (None, baseline))
    systems = bare.systems

    def charge_energy(strain: float) -> float:
        stretched = torch.eye(3, dtype=torch.float64)
        stretched[0, 0] += strain
        return float(
            baseline(systems.replace(positions=systems.positions @ stretched, cell=systems.cell @ stretched))[0]
        )

    assert bare.energy - left.energy == pytest.approx(charge_energy(0.0))
    slope = (charge_energy(1e-4) - charge_energy(-1e-4)) / 2e-4
    assert float((bare.stress - left.stress)[0, 0]) * bare.volume == pytest.approx(slope, rel=1e-5)


def test_fields_need_charges_that_feel_them(tmp_path: Path) -> None:
    atoms = water(1)
    atoms.info["eps"] = [0.0, 0.0, 0.1]
    atoms.pbc = False
    source = stored(tmp_path, [water(1), atoms][1:], field_key="eps")
    with pytest.raises(InputError, match=r"set\.xyz, frame 0: is in a field, but charges\.response is shells"):
        load_dataset(source, CUTOFF, baseline=LongRange(PQEq(), None), progress=False)
    (sample,) = load_dataset(source, CUTOFF, baseline=LongRange(PQEq(response="all"), None), progress=False)
    (plain,) = load_dataset(stored(tmp_path, [water(1)], "plain.xyz"), CUTOFF)
    assert sample.energy != plain.energy


def test_dipoles_differ_modulo_quanta() -> None:
    cell = np.array([[5.0, 0.0, 0.0], [2.4, 4.4, 0.0], [0.0, 1.0, 7.0]])
    small = np.array([0.3, -0.2, 0.1])
    for quanta in ([0, 0, 0], [2, -1, 3], [1, 1, -4]):
        np.testing.assert_allclose(nearest_branch(small + quanta @ cell, cell, np.ones(3, bool)), small, atol=1e-12)
    slab, up = np.array([True, True, False]), np.array([0.0, 0.0, 7.0])
    np.testing.assert_allclose(nearest_branch(small + up, cell, slab), small + up, atol=1e-12)


def test_charges_are_compared_with_labels(tmp_path: Path) -> None:
    charges = PQEq(conserve="fragments", response="all")
    answer = LongRange(charges, None).potential
    frames = []
    for seed in range(3):
        atoms = flexible_water(2, seed)
        solved = answer(answer.prepare(Systems.from_atoms(atoms)), born_charges=True, polarizability=True)
        atoms.info["dipole"] = solved.dipole[0].numpy() + seed * atoms.cell.array[1]
        atoms.info["polarizability"] = 1.1 * solved.polarizability[0].numpy()
        atoms.arrays["bec"] = solved.born_charges.numpy().reshape(-1, 9)
        frames.append(atoms)
    report = report_charges(answer, load_dataset(stored(tmp_path, frames, **ALL_AUTO), CUTOFF))
    assert report["frames"] == 3
    assert report["dipole"]["rmse"] < 1e-6 < report["dipole"]["rms_label"]
    assert report["polarizability"]["relative_error"] == pytest.approx(0.1 / 1.1, rel=1e-4)
    assert report["born_charges"]["r2"] > 0.999999
    assert "remark" not in report["born_charges"]
    for atoms in frames:
        atoms.info["dipole"] = -atoms.info["dipole"]
        atoms.arrays["bec"] = atoms.arrays["bec"].reshape(-1, 3, 3).transpose(0, 2, 1).reshape(-1, 9)
    report = report_charges(answer, load_dataset(stored(tmp_path, frames, **ALL_AUTO), CUTOFF))
    assert "opposite sign" in report["dipole"]["remark"]
    assert "transposed" in report["born_charges"]["remark"]
    assert "remark" not in report["polarizability"]
    units = Units(polarizability="e*A/(V/A)")
    report = report_charges(answer, load_dataset(stored(tmp_path, frames, **ALL_AUTO, units=units), CUTOFF))
    assert "see units.polarizability" in report["polarizability"]["remark"]


def test_scale_of_a_network_is_of_what_a_repulsion_leaves(tmp_path: Path) -> None:
    wall = ZBL({"H-H": 1.2})
    atoms = Atoms("H4", [[0, 0, 0], [0.6, 0, 0], [0.5, 0.9, 0], [3.0, 0, 0]], cell=[6, 6, 6], pbc=True)
    systems = Systems.from_atoms(atoms)
    positions = systems.positions.clone().requires_grad_()
    centre, neighbour = index = (torch.cdist(systems.positions, systems.positions) > 0).nonzero().T
    wall.atomic(systems.numbers, index, positions[neighbour] - positions[centre]).sum().backward()
    assert positions.grad is not None
    own = 0.1 * np.eye(4, 3)
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=own - positions.grad.numpy())
    source = stored(tmp_path, [atoms], energy_key="energy", forces_key="forces")
    samples = load_dataset(source, 2.5)
    assert summarize(samples).force_rms > 5
    assert summarize(samples, wall).force_rms == pytest.approx(np.sqrt(np.mean(own**2)), rel=1e-6)


def test_a_blank_line_between_frames_is_named(tmp_path: Path) -> None:
    source = stored(tmp_path, [water(2), water(2)])
    path = Path(source.path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "", ""]))
    assert len(read_frames(source)) == 2  # at the end it says nothing
    half = len(lines) // 2
    path.write_text("\n".join([*lines[:half], "", *lines[half:], ""]))
    with pytest.raises(InputError, match=f"line {half + 1}: blank, where reading ends"):
        read_frames(source)


def test_ions_keep_the_charges_of_the_file(tmp_path: Path) -> None:
    """Molecules and ions of a frame are those that a run makes of the same file, also in what the network learns."""
    atoms = Atoms("NaClOH2", [[0, 0, 0], [3.2, 0, 0], [0, 3.0, 0], [0.76, 3.6, 0], [-0.76, 3.6, 0]])
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=np.zeros((5, 3)))
    charges = PQEq(conserve="fragments", response="all")
    baseline = LongRange(charges, None)
    source = stored(tmp_path, [atoms], energy_key="energy", forces_key="forces")
    with pytest.raises(InputError, match=r"frame 0: 2 fragments would be neutral .* or remove the frame"):
        load_dataset(source, CUTOFF, baseline=baseline, baseline_key="ions")
    atoms.set_initial_charges([1, -1, 0, 0, 0])
    source = stored(tmp_path, [atoms], energy_key="energy", forces_key="forces")
    (sample,) = load_dataset(source, CUTOFF, baseline=baseline, baseline_key="ions")
    assert sample.molecules.fragment_charges is not None
    assert sorted(sample.molecules.fragment_charges.tolist()) == [-1.0, 0.0, 1.0]
    run = Potential(charges=charges)
    answer = run(run.prepare(Systems.from_atoms(atoms), initial_charges=torch.tensor([1.0, -1, 0, 0, 0]).double()))
    assert sample.energy == pytest.approx(1.0 - float(answer.energy), abs=1e-8)
