"""Other people's models as the short range, and charges that give only the response beside them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.lj import LennardJones

from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.external.electrodes import Electrode, assign_electrodes
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.ase_calculator import ASEModel
from voltpi.potential.shortrange.foundation import load_foundation
from voltpi.potential.shortrange.pair import BornMayerHuggins, PairPotential, read_set
from voltpi.potential.systems import Systems

from random_mace import random_mace, save_random_mace

FIELD = np.array([0.02, -0.03, 0.05])
TIGHT = {"accuracy": 1e-9, "tolerance": 1e-11, "shell_limit": 0.5}


def salt():
    atoms = bulk("NaCl", "rocksalt", 5.6, cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def ten_structures():
    """Crystals, strained and rattled, an alloy, a molecule, a slab, one atom a cell."""
    random = np.random.default_rng(7)
    frames = [
        bulk("NaCl", "rocksalt", 5.6, cubic=True),
        bulk("MgO", "rocksalt", 4.2) * (2, 2, 1),
        bulk("Si", "diamond", 5.43),
        bulk("Cu", "fcc", 3.6),
        bulk("Fe", "bcc", 2.87, cubic=True),
        bulk("ZnO", "wurtzite", a=3.25, c=5.2),
        bulk("CsCl", "cesiumchloride", 4.1),
        bulk("GaAs", "zincblende", 5.65),
        molecule("CH3OH", vacuum=4.0),
    ]
    slab = bulk("NaCl", "rocksalt", 5.6, cubic=True)
    slab.center(vacuum=5.0, axis=2)
    slab.pbc = [True, True, False]
    for atoms in [*frames, slab]:
        atoms.rattle(0.05, rng=random)
        if atoms.pbc.all():
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.02 * random.normal(size=(3, 3))), scale_atoms=True)
    return [*frames, slab]


def stand_in():
    """A pair potential in the place of the foundation model: the sum of the two is all that matters here."""
    return PairPotential([BornMayerHuggins(read_set("nacl"))], 7.0)


def response_only(**keywords):
    return Potential(stand_in(), PQEq(**(TIGHT | keywords)), response_only=True, precision="double")


def in_field(potential, atoms, field, carried=None):
    return potential(potential.prepare(Systems.from_atoms(atoms, field=field).replace(carried=carried)))


def test_zero_field_is_the_foundation_model_alone():
    systems = Systems.from_atoms(salt())
    alone = Potential(stand_in(), precision="double")(systems)
    potential = response_only()
    answer = potential(potential.prepare(systems))
    assert torch.equal(answer.energy, alone.energy)
    assert torch.equal(answer.forces, alone.forces)
    assert torch.equal(answer.virial, alone.virial)
    assert float(answer.energy_terms["response"]) == 0.0
    assert float(answer.charges.abs().max()) > 0.3


def test_response_is_the_difference_of_two_whole_potentials():
    atoms = salt()
    potential = response_only()
    carried = potential.prepare(Systems.from_atoms(atoms)).carried
    whole = Potential(stand_in(), PQEq(**TIGHT), precision="double")
    here, there = (in_field(whole, atoms, field, carried) for field in (FIELD, 0 * FIELD))
    short = Potential(stand_in(), precision="double")(Systems.from_atoms(atoms))
    answer = in_field(potential, atoms, FIELD, carried)
    assert float(answer.energy) == pytest.approx(float(short.energy + here.energy - there.energy), abs=1e-9)
    assert torch.allclose(answer.forces, short.forces + here.forces - there.forces, atol=1e-9)
    assert torch.allclose(answer.virial, short.virial + here.virial - there.virial, atol=1e-8)
    assert torch.allclose(answer.dipole, here.dipole, atol=1e-9)


@pytest.mark.parametrize("response", ["shells", "frozen"])
def test_energy_falls_with_the_field_by_the_dipole(response):
    atoms = salt()
    potential = response_only(response=response)
    carried = potential.prepare(Systems.from_atoms(atoms)).carried
    step = 2e-3
    slope = []
    for axis in np.eye(3):  # five points
        at = {k: float(in_field(potential, atoms, FIELD + k * step * axis, carried).energy) for k in (-2, -1, 1, 2)}
        slope.append((8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step))
    dipole = in_field(potential, atoms, FIELD, carried).dipole[0].numpy()
    np.testing.assert_allclose(slope, -dipole, rtol=1e-7)


def test_a_voltage_acts_and_no_voltage_does_not():
    """Nothing at 0 V, continuous there, and −∫Q dψ from there on."""
    atoms = salt() * (1, 1, 2)
    atoms.center(vacuum=6.0, axis=2)
    atoms.pbc = [True, True, False]
    z = atoms.positions[:, 2]
    electrodes = (Electrode("left", "potential", eta=1.8), Electrode("right", "potential", eta=1.8))
    members = [np.flatnonzero(z < z.min() + 1.5), np.flatnonzero(z > z.max() - 1.5)]
    potential = response_only(electrodes=electrodes)
    short = Potential(stand_in(), precision="double")(Systems.from_atoms(atoms))

    def at(left, right):
        systems = assign_electrodes(Systems.from_atoms(atoms), electrodes, members, [left, right])
        return potential(potential.prepare(systems))

    still, pushed, hardly = at(0.0, 0.0), at(0.0, 1.0), at(0.0, 1e-6)
    assert float(still.energy) == pytest.approx(float(short.energy), abs=1e-12)
    moved = float(pushed.electrodes["right"]["charge"] - still.electrodes["right"]["charge"])
    assert moved > 0.01
    charges = [float(at(0.0, volts).electrodes["right"]["charge"]) for volts in (0.0, 0.5, 1.0)]
    simpson = (charges[0] + 4 * charges[1] + charges[2]) / 6
    assert float(pushed.energy - still.energy) == pytest.approx(-simpson, rel=1e-4)
    assert float(hardly.energy - still.energy) == pytest.approx(0.0, abs=1e-5)
    assert float((hardly.forces - still.forces).abs().max()) < 1e-4


def test_any_ase_calculator(tmp_path, monkeypatch):
    (tmp_path / "my_calculator.py").write_text(
        "from ase.calculators.lj import LennardJones\n\n\ndef make():\n    return LennardJones(sigma=2.3, rc=5.0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    frames = [bulk("Ar", "fcc", 3.8, cubic=True), bulk("Ar", "fcc", 3.6) * (2, 1, 1), molecule("CH4")]
    frames[0].rattle(0.1, seed=2)
    answer = Potential(load_foundation("ase:my_calculator:make"))(Systems.from_atoms(frames))
    first = 0
    for k, atoms in enumerate(frames):
        atoms.calc = LennardJones(sigma=2.3, rc=5.0)
        here = slice(first, first + len(atoms))
        first = here.stop
        assert float(answer.energy[k]) == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        np.testing.assert_allclose(answer.forces[here], atoms.get_forces(), atol=1e-12)
        expected = -atoms.get_stress(voigt=False) * atoms.get_volume() if atoms.pbc.any() else np.zeros((3, 3))
        np.testing.assert_allclose(answer.virial[k], expected, atol=1e-10)


def test_an_ase_calculator_in_a_slab():
    """A slab has no volume, but a virial: ∂E/∂strain in its plane, whatever the cell is across it."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=4)
    atoms.pbc = True, True, False
    atoms.cell[2] = 0
    potential = Potential(load_foundation("ase:ase.calculators.emt:EMT"))
    strain = np.array([[0.3, 0.1, 0.0], [0.2, -0.4, 0.0], [0.0, 0.0, 0.0]])

    def energy(x):
        moved = atoms.copy()
        moved.set_cell(atoms.cell @ (np.eye(3) + x * strain).T)
        moved.positions = atoms.positions @ (np.eye(3) + x * strain).T
        return potential(Systems.from_atoms(moved)).energy.item()

    h = 1e-4
    slope = (energy(-2 * h) - 8 * energy(-h) + 8 * energy(h) - energy(2 * h)) / (12 * h)
    virial = potential(Systems.from_atoms(atoms)).virial[0].numpy()
    assert -(virial * strain).sum() == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sevennet", "choose sevennet-0"),
        ("chgnet:file", "choose sevennet-0"),
        ("qet", "choose sevennet-0"),
        ("qet-matgl2:", "choose sevennet-0"),
        ("somebody", "choose sevennet-0"),
        ("mace", "choose sevennet-0"),
        ("ase:module", "write ase:module:function"),
        ("ase:no_such_module:make", "No module named 'no_such_module'"),
        ("ase:ase.calculators.lj:nothing", "has no attribute 'nothing'"),
        ("ase:ase.build:molecule_names", "molecule_names"),
        ("ase:math:cos", "callable without arguments"),
    ],
)
def test_names_that_cannot_be(name, said):
    with pytest.raises(InputError, match=said):
        load_foundation(name)


def test_what_is_no_calculator():
    with pytest.raises(InputError, match="must return an ASE calculator"):
        load_foundation("ase:collections:OrderedDict")


@pytest.mark.parametrize(
    ("name", "package"), [("sevennet-0", "sevenn"), ("chgnet", "chgnet"), ("qet:x", "matgl"), ("mace:x", "mace")]
)
def test_missing_package_names_the_extra(name, package, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'voltpi\[(sevennet|chgnet|qet|mace)\]'"):
        load_foundation(name)


class Failing(Calculator):
    implemented_properties = ("energy", "forces")

    def calculate(self, *args, **keywords):
        raise RuntimeError("no licence")


class WithoutStress(Calculator):
    implemented_properties = ("energy", "forces")

    def calculate(self, atoms, *args, **keywords):
        self.results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}


def test_calculators_that_fail_or_lack_a_stress():
    with pytest.raises(VoltPIError, match="mine failed: RuntimeError: no licence"):
        ASEModel("mine", Failing()).evaluate(Systems.from_atoms(salt()))
    with pytest.raises(InputError, match="mine has no stress"):
        ASEModel("mine", WithoutStress()).evaluate(Systems.from_atoms(salt()))
    ASEModel("mine", WithoutStress()).evaluate(Systems.from_atoms(molecule("H2O")))


def original(name):
    if name == "chgnet":
        pytest.importorskip("chgnet", reason="needs voltpi[chgnet]")
        from chgnet.model import CHGNet
        from chgnet.model.dynamics import CHGNetCalculator

        return CHGNetCalculator(CHGNet.load(use_device="cpu", verbose=False), use_device="cpu")
    pytest.importorskip("sevenn", reason="needs voltpi[sevennet]")
    from sevenn.calculator import SevenNetCalculator

    return SevenNetCalculator("7net-0" if name == "sevennet-0" else "7net-l3i5", device="cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sevennet-0", "sevennet-l3i5", "chgnet"])
def test_original_package_on_ten_structures(name):
    """In float32, as the originals: energies to 1e-6 of their size, forces and stress to float32's digits."""
    calculator = original(name)
    frames = ten_structures()
    if name == "chgnet":  # it takes structures that are periodic in all directions only
        frames = [atoms for atoms in frames if atoms.pbc.all()] + [salt(), salt() * (1, 1, 2)]
    potential = Potential(load_foundation(name))
    answer = potential(Systems.from_atoms(frames))
    first = 0
    for k, atoms in enumerate(frames):
        atoms.calc = calculator
        here = slice(first, first + len(atoms))
        first = here.stop
        assert float(answer.energy[k]) == pytest.approx(atoms.get_potential_energy(), rel=1e-6)
        np.testing.assert_allclose(answer.forces[here], atoms.get_forces(), atol=2e-4 if name == "chgnet" else 2e-5)
        if atoms.pbc.all():
            stress = -answer.virial[k].numpy() / atoms.get_volume()
            np.testing.assert_allclose(stress, atoms.get_stress(voigt=False), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sevennet-0", "chgnet"])
def test_foundation_model_with_a_response(name):
    original(name)
    atoms = salt()
    model = load_foundation(name, precision="double")
    alone = Potential(model, precision="double")(Systems.from_atoms(atoms))
    potential = Potential(model, PQEq(**TIGHT), response_only=True, precision="double")
    still = potential(potential.prepare(Systems.from_atoms(atoms)))
    assert float(still.energy) == pytest.approx(float(alone.energy), abs=1e-9)
    pushed = in_field(potential, atoms, FIELD, potential.prepare(Systems.from_atoms(atoms)).carried)
    assert float((pushed.forces - alone.forces).abs().max()) > 0.01
    unknown = atoms.copy()
    unknown.numbers[0] = 117
    with pytest.raises(InputError, match=f"{name} does not know Ts"):
        Potential(model, precision="double")(Systems.from_atoms(unknown))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("double", {}),
        ("mixed", {}),
        (
            "double",
            {
                "interaction": "RealAgnosticDensityInteractionBlock",
                "pair_repulsion": True,
                "distance_transform": "Agnesi",
                "num_interactions": 1,
            },
        ),
    ],
)
def test_mace_on_ten_structures(precision, options, tmp_path, monkeypatch):
    file = save_random_mace(tmp_path / "mace.model", **options)
    from mace.calculators import MACECalculator

    model = load_foundation(f"mace:{file}", precision=precision)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # MACE's own calculator executes the file
    kind = "float64" if precision == "double" else "float32"
    calculator = MACECalculator(model_paths=str(file), device="cpu", default_dtype=kind)
    frames = ten_structures()
    answer = Potential(model, precision=precision)(Systems.from_atoms(frames))
    near = 1e-9 if precision == "double" else 2e-5
    first = 0
    for k, atoms in enumerate(frames):
        atoms.calc = calculator
        here = slice(first, first + len(atoms))
        first = here.stop
        assert float(answer.energy[k]) == pytest.approx(atoms.get_potential_energy(), rel=1e-6)
        np.testing.assert_allclose(answer.forces[here], atoms.get_forces(), atol=near)
        if atoms.pbc.all():
            stress = -answer.virial[k].numpy() / atoms.get_volume()
            np.testing.assert_allclose(stress, atoms.get_stress(voigt=False), atol=near)


class Harmful:
    """What a pickle may do."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return eval, (self.command,)


def test_nothing_in_a_mace_file_is_executed(tmp_path):
    network = random_mace()
    network.extra = Harmful(f"open({str(tmp_path / 'harm')!r}, 'w')")
    torch.save(network, tmp_path / "mace.model")
    model = load_foundation(f"mace:{tmp_path / 'mace.model'}", precision="double")
    assert not (tmp_path / "harm").exists()
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


@pytest.mark.filterwarnings("ignore")
def test_mace_files_that_cannot_be(tmp_path):
    network = random_mace(
        heads=["one", "two"],
        atomic_energies=np.ones((2, 13)),
        atomic_inter_scale=[1.0, 1.0],
        atomic_inter_shift=[0.0, 0.0],
    )
    torch.save(network, tmp_path / "heads.model")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "linear.model")
    torch.save({"weights": torch.ones(3)}, tmp_path / "state.model")
    (tmp_path / "text.model").write_text("MACE")
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "compiled.model")
    network = random_mace()
    network.products[0].linear.weight = torch.nn.Parameter(torch.ones(7))
    torch.save(network, tmp_path / "other.model")
    for name, said in {
        "nothing": "there is no such file",
        "heads": "has the heads one, two and none called default",
        "linear": "holds a Linear",
        "state": "holds a dict",
        "text": "no model file as torch.save writes it",
        "compiled": "is compiled",
        "other": "1 of its tensors, as products.0.linear.weight",
    }.items():
        with pytest.raises(InputError, match=said):
            load_foundation(f"mace:{tmp_path / name}.model")
