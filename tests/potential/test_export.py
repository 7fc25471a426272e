"""Exported models against the potentials they come from, through metatomic's own calculator and i-PI's own driver."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from voltpi.potential.checkpoints import load_potential, read_card
from voltpi.potential.committee import LastLayers, Seeds
from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import InputError
from voltpi.potential.export.charges import ScriptedPQEq
from voltpi.potential.export.network import ScriptedMean, ScriptedNequIP, networks_of
from voltpi.potential.model import Potential
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.shortrange.pair import BornMayerHuggins, PairPotential, read_set
from voltpi.potential.systems import Systems

# metatomic and i-PI warn of names of their own that are to change
pytestmark = pytest.mark.filterwarnings("ignore")
REASON = "metatomic-torch and metatomic-ase are not installed (the extra [metatomic])"


def water(side: int, *, pbc: bool = True, seed: int = 1) -> Atoms:
    """``side``³ molecules on a lattice of 3.1 Å, turned and moved at random, some across a boundary."""
    rng = np.random.default_rng(seed)
    out = Atoms()
    for place in np.ndindex(side, side, side):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate(3.1 * np.array(place) + 0.1 * rng.normal(size=3))
        out += one
    out.set_cell([3.1 * side] * 3)
    out.pbc = pbc
    if pbc:
        out.wrap()
    else:
        out.cell[:] = 0.0
    return out


def titanate(*, skewed: bool = False) -> Atoms:
    """2 × 2 × 1 cells of BaTiO3, rattled."""
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    out = Atoms("BaTiO3", scaled_positions=sites, cell=[4.0] * 3, pbc=True).repeat((2, 2, 1))
    if skewed:
        out.set_cell(out.cell.array @ [[1.02, 0.1, 0], [0, 0.97, -0.08], [0.05, 0, 1]], scale_atoms=True)
    out.rattle(0.06, seed=3)
    return out


def exact(name: str) -> Potential:
    """A shipped model in float64, its Coulomb sums tight enough to compare two of them."""
    potential = load_potential(name, precision="double")
    potential.charges = dataclasses.replace(potential.charges, accuracy=1e-9, tolerance=1e-9)
    return potential


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Potential]]:
    """Exported shipped models: name -> file, potential."""
    pytest.importorskip("metatomic.torch", reason=REASON)
    from voltpi.potential.export.metatomic import export_metatomic

    out = {}
    for name in ("water", "batio3"):
        file = tmp_path_factory.mktemp("export") / f"{name}.pt"
        potential = exact(name)
        export_metatomic(file, potential, read_card(name))
        out[name] = file, potential
    return out


@functools.cache  # TorchScript optimises a model that is loaded anew
def calculator(file: Path) -> Any:
    metatomic_ase = pytest.importorskip("metatomic_ase", reason=REASON)
    from metatomic.torch import ModelOutput

    charge = ModelOutput(unit="e", sample_kind="atom")
    return metatomic_ase.MetatomicCalculator(
        file, check_consistency=True, device="cpu", additional_outputs={"charge": charge}
    )


STRUCTURES = {
    "liquid": ("water", lambda: water(2)),
    "cluster": ("water", lambda: water(2, pbc=False)),
    "one molecule": ("water", lambda: water(1, pbc=False)),
    "crystal": ("batio3", titanate),
    "skewed crystal": ("batio3", lambda: titanate(skewed=True)),
}


@pytest.mark.parametrize("key", STRUCTURES)
def test_the_exported_model_computes_what_the_potential_does(files: dict[str, Any], key: str) -> None:
    """Energy, forces, stress and charges, through metatomic's ASE calculator with its consistency checks."""
    name, build = STRUCTURES[key]
    file, potential = files[name]
    atoms = build()
    atoms.calc = calculator(file)
    systems = potential.prepare(Systems.from_atoms(atoms))
    expected = potential(systems)
    assert atoms.get_potential_energy() == pytest.approx(float(expected.energy[0]), abs=1e-6)
    np.testing.assert_allclose(atoms.get_forces(), expected.forces.numpy(), atol=1e-6)
    charges = atoms.calc.additional_outputs["charge"].block().values[:, 0].numpy()
    np.testing.assert_allclose(charges, expected.charges.numpy(), atol=1e-7)
    assert abs(charges.sum()) < 1e-10
    if atoms.pbc.all():
        stress = -expected.virial[0].numpy() / atoms.get_volume()
        np.testing.assert_allclose(atoms.get_stress(voigt=False), stress, atol=1e-7)


def test_exported_forces_are_the_derivatives_of_the_exported_energy(files: dict[str, Any]) -> None:
    """Central differences: what is returned at fixed charges is the whole derivative."""
    atoms = water(2)
    atoms.calc = calculator(files["water"][0])
    forces = atoms.get_forces()
    for atom, axis in ((0, 2), (4, 0)):
        ends = []
        for step in (1e-3, -1e-3):
            moved = atoms.copy()
            moved.positions[atom, axis] += step
            moved.calc = atoms.calc
            ends.append(moved.get_potential_energy())
        assert forces[atom, axis] == pytest.approx(-(ends[0] - ends[1]) / 2e-3, abs=5e-6)


def test_forces_of_a_part_are_refused(files: dict[str, Any]) -> None:
    """Per-atom energies add up; a domain of its own, whose forces would miss the other atoms' charges, is refused."""
    from metatensor.torch import Labels
    from metatomic.torch import ModelEvaluationOptions, ModelOutput, load_atomistic_model, systems_to_torch
    from vesin.metatomic import compute_requested_neighbors

    model = load_atomistic_model(files["water"][0])
    cluster = water(1, pbc=False)
    some = Labels(["system", "atom"], torch.tensor([[0, 0], [0, 2]], dtype=torch.int32))

    def energies(kind: str, selected: Any, moving: bool) -> Any:
        system = systems_to_torch(cluster, dtype=torch.float64, positions_requires_grad=moving)
        compute_requested_neighbors([system], "angstrom", model)
        outputs = {"energy": ModelOutput(unit="eV", sample_kind=kind)}
        options = ModelEvaluationOptions(length_unit="angstrom", outputs=outputs, selected_atoms=selected)
        return model([system], options, True)["energy"].block().values[:, 0]

    atomic = energies("atom", None, False)
    assert float(atomic.sum()) == pytest.approx(float(energies("system", None, False)[0]), abs=1e-10)
    torch.testing.assert_close(energies("system", some, False)[0], atomic[0] + atomic[2])
    with pytest.raises(Exception, match="one MPI process"):
        energies("system", some, True)


def test_ipi_runs_it(files: dict[str, Any]) -> None:
    """i-PI's own driver, in i-PI's own units (its eV differs from ASE's in the eighth digit)."""
    from ase.io import write
    from ipi.pes.metatomic import MetatomicDriver
    from ipi.utils.units import unit_to_internal, unit_to_user

    file, potential = files["water"]
    atoms = water(2)
    template = file.with_name("start.xyz")
    write(template, atoms)
    driver = MetatomicDriver(template=str(template), model=str(file))
    lengths = unit_to_internal("length", "angstrom", 1.0)
    energy, forces, virial, _ = driver.compute_structure(atoms.cell.array.T * lengths, atoms.positions * lengths)
    energy, virial = (unit_to_user("energy", "electronvolt", x) for x in (energy, virial))
    forces = unit_to_user("force", "ev/ang", forces).reshape(-1, 3)
    expected = potential(potential.prepare(Systems.from_atoms(atoms)))
    assert float(energy) == pytest.approx(float(expected.energy[0]), abs=1e-6)
    np.testing.assert_allclose(forces, expected.forces.numpy(), atol=1e-6)
    np.testing.assert_allclose(virial, expected.virial[0].numpy(), atol=1e-5)


def test_metadata(files: dict[str, Any]) -> None:
    from metatomic.torch import load_atomistic_model

    model = load_atomistic_model(files["water"][0])
    capabilities = model.capabilities()
    assert capabilities.atomic_types == [1, 8]
    assert capabilities.interaction_range == float("inf")
    assert {"energy", "charge"} <= set(capabilities.outputs)
    assert model.metadata().name == "water"
    assert "dissociation" in model.metadata().description


@pytest.mark.parametrize(
    ("hidden", "harmonics", "options"),
    [
        ("8x0e+4x0o+4x1o+4x1e+2x2e", "1x0e+1x1o+1x2e", {}),
        ("8x0e+4x1e", "1x0e+1x1e", {"edge_sign": -1, "use_sc": False}),
        ("4x0e+2x1o+2x3o", "1x0e+1x1o+1x2e+1x3o", {"layers": 2}),
        ("4x0e+2x1o", "1x0e+1x1o", {"layers": 1, "repulsion": {"H-H": 1.8, "O-H": 1.2}}),
    ],
)
def test_networks_of_every_kind(hidden: str, harmonics: str, options: dict[str, Any]) -> None:
    """Energies and forces of the scripted network are the network's, whatever its irreps."""
    torch.manual_seed(0)
    network = NequIP([8, 1, 0], hidden, harmonics, r_max=4.0, shift=[1.0, 2.0, 0.0], **options).double().eval()
    scripted = torch.jit.script(ScriptedNequIP(network).eval())
    pairs = neighbor_list(Systems.from_atoms(water(2)), 4.0)
    numbers = Systems.from_atoms(water(2)).numbers
    found = []
    for model in (network, scripted):
        vectors = pairs.vectors.clone().requires_grad_(True)
        energy = model(numbers, pairs.index, vectors)
        found.append((energy.detach(), torch.autograd.grad(energy.sum(), vectors)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", ["last-layers", "seeds"])
def test_a_committee_is_exported_as_its_mean(kind: str) -> None:
    torch.manual_seed(0)
    networks = [NequIP([8, 1], "4x0e+2x1o", "1x0e+1x1o", r_max=3.0, layers=1, n_basis=4).double() for _ in range(4)]
    committee = Seeds(networks) if kind == "seeds" else LastLayers(networks[0], torch.randn(4, 4, dtype=torch.float64))
    systems = Systems.from_atoms(water(2))
    pairs = neighbor_list(systems, 3.0)
    scripted = torch.jit.script(ScriptedMean(networks_of(committee.eval())).eval())
    expected = committee(systems.numbers, pairs.index, pairs.vectors)
    torch.testing.assert_close(scripted(systems.numbers, pairs.index, pairs.vectors), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("limiter", ["fene", "none"])
def test_charges_of_the_published_parameters(limiter: str) -> None:
    """A charged cluster and a salt with the default table, one group for all charges."""
    model = PQEq(limiter=limiter, accuracy=1e-9)
    scripted = torch.jit.script(ScriptedPQEq(model, 1.0).eval())
    cluster = molecule("CH3OH")
    salt = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    salt.rattle(0.05, seed=2)
    for atoms in (cluster, salt):
        systems = Systems.from_atoms(atoms, net_charge=1.0)
        expected = model.solve(systems)
        positions = systems.positions.clone().requires_grad_(True)
        energy, charges, shells = scripted(
            positions, systems.cell[0], bool(atoms.pbc.all()), systems.numbers, torch.zeros_like(systems.batch)
        )
        (gradient,) = torch.autograd.grad(energy.sum(), positions)
        torch.testing.assert_close(energy.sum().detach(), expected.energy[0], atol=1e-7, rtol=0)
        torch.testing.assert_close(charges, expected.charges, atol=1e-7, rtol=0)
        torch.testing.assert_close(shells, expected.shells, atol=1e-7, rtol=0)
        torch.testing.assert_close(-gradient, expected.forces, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("atoms", "options"),
    [
        (molecule("CH3SH"), {"functional": "revpbe"}),
        (molecule("SiF4"), {"damping": "bj", "smoothing_width": 0.0}),
        (bulk("NaCl", "rocksalt", a=5.6), {"functional": "B3-LYP", "damping": "bj"}),
        (bulk("Si", a=5.4), {"functional": "pbe", "cutoff": 12.0, "smoothing_width": 3.0}),
    ],
)
def test_dispersion_is_that_of_s_dftd3(atoms: Atoms, options: dict[str, Any]) -> None:
    """To 1e-7 eV an atom (the shipped reference coefficients are float32)."""
    pytest.importorskip("metatomic.torch", reason=REASON)
    from voltpi.potential.export.dispersion import ScriptedD3

    atoms.rattle(0.05, seed=5)
    model = D3(**options)
    systems = Systems.from_atoms(atoms)
    energy, forces, _ = model(systems)
    scripted = torch.jit.script(ScriptedD3(model, sorted(set(atoms.numbers))).eval())
    pairs = neighbor_list(systems, model.cutoff, half=True)
    vectors = pairs.vectors.clone().requires_grad_(True)
    found = scripted(systems.numbers, pairs.index, vectors)
    (gradient,) = torch.autograd.grad(found.sum(), vectors)
    pulled = torch.zeros_like(systems.positions)
    pulled.index_add_(0, pairs.index[0], gradient).index_add_(0, pairs.index[1], -gradient)
    torch.testing.assert_close(found.sum().detach(), energy[0], atol=1e-7 * len(atoms), rtol=0)
    torch.testing.assert_close(pulled, forces, atol=1e-7, rtol=0)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("metatomic.torch", reason=REASON)
    from voltpi.potential.export.metatomic import export_metatomic

    def refused(potential: Potential, sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            export_metatomic(tmp_path / "x.pt", potential, {})
        assert not (tmp_path / "x.pt").exists()

    refused(Potential(charges=TaperedPQEq()), "TaperedPQEq cannot be exported")
    refused(Potential(charges=PQEq(), dispersion=D3(three_body=True)), "three_body")
    refused(Potential(PairPotential([BornMayerHuggins(read_set("nacl"))], 7.0)), "PairPotential cannot be exported")
    with pytest.raises(InputError, match="no folder"):
        export_metatomic(tmp_path / "none" / "x.pt", exact("batio3"), {})
