"""Labels of training data: their names, their units, and whether they are in them."""

from __future__ import annotations

from pathlib import Path

import ase.db
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from voltpi.potential.errors import InputError
from voltpi.potential.training.baseline import load_dataset
from voltpi.potential.training.dataset import read_source
from voltpi.potential.training.labels import Source, Units
from voltpi.potential.training.unit_check import check_units, measure_units

from training_toys import ALL_AUTO, CUTOFF, flexible_water, molecule, stored, water

# -- names and units of labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["energy", "forces"], ("energy", "forces")),
        (["energy", "REF_energy", "forces", "REF_forces"], ("REF_energy", "REF_forces")),
        (["MACE_energy", "dft_energy", "force", "MACE_forces"], ("dft_energy", "force")),
        (["energy_ref", "energy", "forces_ref"], ("energy_ref", "forces_ref")),
    ],
)
def test_usual_names_of_labels_are_found(tmp_path: Path, names: list[str], found: tuple[str, str]) -> None:
    atoms = water(1)
    energy, forces = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
    for name in names:
        (atoms.arrays if "force" in name else atoms.info)[name] = forces if "force" in name else energy
    source, _ = read_source(stored(tmp_path, [atoms], **ALL_AUTO))
    assert (source.energy_key, source.forces_key) == found
    assert source.stress_key is source.field_key is source.dipole_key is None


def test_further_labels_are_found_and_kept(tmp_path: Path) -> None:
    atoms = water(1)
    atoms.info |= {"electric_field": [0.1, 0.0, 0.0], "total_charge": 0, "config_type": "a b", "virials": np.eye(3)}
    atoms.info |= {"REF_dipole": [[0.1, 0.2, 0.3]], "polarizability": np.eye(3)}
    atoms.arrays["bec"] = np.arange(27.0).reshape(3, 9)
    (sample,) = load_dataset(stored(tmp_path, [atoms], **ALL_AUTO, units=Units(dipole="debye")), CUTOFF)
    assert sample.group == "a b"
    np.testing.assert_allclose(sample.observed["dipole"], np.array([0.1, 0.2, 0.3]) * 0.20819434)
    np.testing.assert_allclose(sample.observed["born_charges"][1], np.arange(9.0, 18.0).reshape(3, 3))
    torch.testing.assert_close(
        sample.stress, -torch.eye(3, dtype=torch.float64) / 125.0
    )  # a virial is −stress × volume


def test_no_energy_at_all_says_what_there_is(tmp_path: Path) -> None:
    atoms = water(1)
    del atoms.info["REF_energy"]
    with pytest.raises(InputError, match=r"set\.xyz, frame 0: no label looks like energy .*REF_forces.*labels\.energy"):
        read_source(stored(tmp_path, [atoms], **ALL_AUTO))


def test_ase_database_with_its_pairs_and_data(tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "set.db") as database:
        for seed in range(3):
            atoms = water(1, seed)
            labels = {"energy": atoms.info.pop("REF_energy"), "forces": atoms.arrays.pop("REF_forces")}
            atoms.calc = SinglePointCalculator(atoms, **labels, stress=np.arange(6.0))
            database.write(atoms, total_charge=seed, data={"field": [0.0, 0.1, 0.0]})
    source = Source(tmp_path / "set.db", "db", frames="1:", **{**ALL_AUTO, "field_key": "field"})
    samples = load_dataset(source, CUTOFF)
    assert [float(s.systems.net_charge) for s in samples] == [1.0, 2.0]
    assert samples[0].systems.field.tolist() == [[0.0, 0.1, 0.0]]
    # Voigt order: xx yy zz yz xz xy
    assert samples[0].stress.tolist() == [[0.0, 5.0, 4.0], [5.0, 1.0, 3.0], [4.0, 3.0, 2.0]]
    with pytest.raises(InputError, match=r"none\.db: cannot be read"):
        read_source(Source(tmp_path / "none.db", "db"))


def test_declared_units_are_converted(tmp_path: Path) -> None:
    atoms = flexible_water(2, 3)
    bare = load_dataset(stored(tmp_path, [atoms], stress_key="REF_stress"), CUTOFF)[0]
    hartree, bohr = 27.211386024367243, 0.5291772105638411
    other = atoms.copy()
    other.set_cell(atoms.cell.array / bohr)
    other.positions = atoms.positions / bohr
    other.info |= {"REF_energy": atoms.info["REF_energy"] / hartree}
    other.info["REF_stress"] = atoms.info["REF_stress"] / 0.0062415091
    other.arrays["REF_forces"] = atoms.arrays["REF_forces"] / (hartree / bohr)
    units = Units(length="Bohr", energy="hartree", forces="Hartree/bohr", stress="GPa")
    source = stored(tmp_path, [other], "other.xyz", stress_key="REF_stress", units=units)
    same = load_dataset(source, CUTOFF)[0]
    assert same.energy == pytest.approx(bare.energy, abs=1e-5)
    torch.testing.assert_close(same.forces, bare.forces, atol=1e-6, rtol=0)
    torch.testing.assert_close(same.vectors, bare.vectors, atol=1e-6, rtol=0)
    torch.testing.assert_close(same.stress, bare.stress, atol=1e-8, rtol=1e-6)
    assert Units(forces="kcal/mol/Å", polarizability="Å³").factor("forces") == pytest.approx(0.0433641, rel=1e-5)
    with pytest.raises(InputError, match=r"units\.energy is 'erg': choose one of eV"):
        Units(energy="erg")


# -- are they what they are said to be? ------------------------------------------------------------------------------


def _scaled(energy: float = 1.0, forces: float = 1.0, length: float = 1.0) -> list[Atoms]:
    frames = [flexible_water(2, seed) for seed in range(24)]
    for atoms in frames:
        atoms.info["REF_energy"] *= energy
        atoms.arrays["REF_forces"] *= forces
        atoms.set_cell(atoms.cell.array * length, scale_atoms=True)
    return frames


def test_units_that_are_right_pass(tmp_path: Path) -> None:
    report = check_units(load_dataset(stored(tmp_path, _scaled()), CUTOFF))
    assert report.bond == "H-O"
    assert 0.7 < report.stiffness < 1.4
    assert report.energy == pytest.approx(1.0, abs=0.35)
    assert 0.9 < report.distance < 1.1
    assert report.atoms == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"energy": 1 / 27.2114}, ["energy labels change by 0.02", "hartree: set units.energy to hartree"]),
        ({"energy": 23.0605}, ["energy labels change by 18", "kcal/mol"]),
        ({"energy": 1 / 27.2114, "forces": 1 / 51.4221}, ["bonds H-O", "stiffness of 0.9", "hartree/bohr"]),
        ({"energy": 23.0605, "forces": 23.0605}, ["bonds H-O", "kcal/mol/A"]),
        ({"forces": -1.0}, ["gradients"]),
        ({"energy": -1.0}, ["change the sign of the energies"]),
        ({"length": 1 / 0.529177}, ["positions in bohr are read as Å: set units.length to bohr"]),
    ],
)
def test_unit_slips_are_recognised(tmp_path: Path, change: dict[str, float], words: list[str]) -> None:
    samples = load_dataset(stored(tmp_path, _scaled(**change)), CUTOFF)
    with pytest.raises(InputError) as error:
        check_units(samples)
    for word in ["set.xyz: ", "data.check_units: false", *words]:
        assert word in str(error.value)


def test_positions_in_nm_are_recognised_before_there_are_neighbours(tmp_path: Path) -> None:
    """A thousand times too dense, a cell would have too many neighbours to list."""
    with pytest.raises(
        InputError, match=r"set\.xyz, frame 0: .* as where positions in nm are .*: set units\.length to nm"
    ):
        load_dataset(stored(tmp_path, _scaled(length=0.1)), CUTOFF)


def _copper() -> list[Atoms]:
    frames = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        atoms = bulk("Cu", cubic=True).repeat(2)
        atoms.rattle(0.03 + 0.1 * rng.random(), seed=seed)
        atoms.calc = EMT()
        atoms.info["REF_energy"] = atoms.get_potential_energy()
        atoms.arrays["REF_forces"] = atoms.get_forces()
        atoms.calc = None
        frames.append(atoms)
    return frames


def test_a_metal_has_its_own_stiffness(tmp_path: Path) -> None:
    frames = _copper()
    report = measure_units(load_dataset(stored(tmp_path, frames), 5.0))
    assert 1 / 4 < report.stiffness < 4
    assert 1 / 3 < report.energy < 3
    for atoms in frames:
        atoms.info["REF_energy"] /= len(atoms)
    with pytest.raises(InputError, match="per atom: give energies of whole frames"):
        check_units(load_dataset(stored(tmp_path, frames), 5.0))


def test_no_trend_no_opinion(tmp_path: Path) -> None:
    # random labels, a single frame, an isolated atom
    report = check_units(load_dataset(stored(tmp_path, [water(2, seed) for seed in range(20)]), CUTOFF))
    assert report.stiffness is report.energy is None
    assert check_units(load_dataset(stored(tmp_path, [water(1)]), CUTOFF)).energy is None
    assert check_units(load_dataset(stored(tmp_path, [molecule("O", -400.0)]), CUTOFF)).distance is None
