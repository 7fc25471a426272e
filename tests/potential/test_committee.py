"""Committees: exact derivatives of mean and members, one file format, a fit that solves what it says, calibration."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from voltpi.potential.checkpoints import load_potential, read_description, save_potential
from voltpi.potential.committee import Calibration, Committee, LastLayers, Seeds, force_spread
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems
from voltpi.potential.training import last_layers
from voltpi.potential.training.dataset import make_samples, read_frames
from voltpi.potential.training.evaluation import evaluate_samples
from voltpi.potential.training.last_layers import calibrate, fit_last_layers
from voltpi.potential.training.loss import Loss

from structures import water_box
from training_toys import flexible_water, stored

CALIBRATION = Calibration(energy=1.7, forces=2.3)
CUTOFF = 3.0


def network(seed: int = 0) -> NequIP:
    torch.manual_seed(seed)
    shape = {"hidden_irreps": "6x0e+3x1o", "sh_irreps": "1x0e+1x1o", "layers": 2, "r_max": CUTOFF, "radial_hidden": 8}
    return NequIP([1, 8], **shape, scale=[1.3, 0.9])


def last_layers_of(own: NequIP) -> LastLayers:
    generator = torch.Generator().manual_seed(3)
    return LastLayers(own, 0.2 * torch.randn(5, 6, generator=generator), CALIBRATION)


def committee(kind: str) -> Committee:
    return last_layers_of(network()) if kind == "last-layers" else Seeds([network(k) for k in range(4)], CALIBRATION)


def whole(kind: str, precision: str = "double") -> Potential:
    charges = PQEq(conserve="fragments", response="all", tolerance=1e-11)
    references = {1: -3.5, 8: -430.0}
    return Potential(committee(kind), charges, reference_energies=references, precision=precision)


def some_water(field: float = 0.05) -> Systems:
    return Systems.from_atoms(water_box(), field=[0.0, field, 0.0])


KINDS = pytest.mark.parametrize("kind", ["last-layers", "seeds"])


# -- energies, forces, virials -----------------------------------------------------------------------------------------


@KINDS
def test_forces_and_virials_of_mean_and_members_are_derivatives(kind: str) -> None:
    """Central differences of the energy and of every member's energy, float64, 1e-7."""
    potential = whole(kind)
    systems = potential.prepare(some_water(field=0.0))
    answer = potential(systems, uncertainty="members")
    members = answer.members
    assert members is not None
    assert members.forces is not None
    assert members.virials is not None
    step = 1e-4

    def both(moved: Systems) -> Tensor:
        there = potential(moved, uncertainty="energy")
        return torch.cat([there.energy[None], there.members.energies])[:, 0]

    for atom, axis in ((0, 0), (4, 2)):
        shift = torch.zeros_like(systems.positions)
        shift[atom, axis] = step
        up, down = (both(systems.replace(positions=systems.positions + s * shift)) for s in (1, -1))
        slope = -(up - down) / (2 * step)
        found = torch.cat([answer.forces[None], members.forces])[:, atom, axis]
        torch.testing.assert_close(found, slope, rtol=0, atol=1e-7)
    strain = torch.zeros(3, 3, dtype=torch.float64)
    strain[0, 1] = strain[1, 0] = 0.5 * step

    def strained(sign: float) -> Tensor:
        s = torch.eye(3, dtype=torch.float64) + sign * strain
        return both(systems.replace(positions=systems.positions @ s, cell=systems.cell @ s))

    slope = -(strained(1) - strained(-1)) / (2 * step)
    found = torch.cat([answer.virial, members.virials[:, 0]])[:, 0, 1]
    torch.testing.assert_close(found, slope, rtol=0, atol=2e-6)


@KINDS
@pytest.mark.parametrize("precision", ["double", "mixed"])
def test_the_mean_is_what_is_answered_whatever_is_asked(kind: str, precision: str) -> None:
    potential = whole(kind, precision)
    systems = potential.prepare(some_water())
    plain = potential(systems)
    assert plain.members is None
    exact = precision == "double"
    near: dict[str, Any] = {"rtol": 0, "atol": 1e-11 if exact else 2e-4}
    for asked in ("energy", "forces", "members"):
        answer = potential(systems, uncertainty=asked)
        for name in ("energy", "forces", "virial"):
            torch.testing.assert_close(getattr(answer, name), getattr(plain, name), **near)
        members = answer.members
        torch.testing.assert_close(members.energies.mean(0), answer.energy, **near)
        torch.testing.assert_close(members.energies.std(0), members.energy_uncertainty, **near)
        assert float(members.energy_uncertainty) > 1e-3
        assert (members.forces is None) == (asked == "energy")
    torch.testing.assert_close(members.forces.mean(0), answer.forces, **near)
    torch.testing.assert_close(members.virials.mean(0), answer.virial, **near)
    spread = members.forces.std(0).square().mean(1).sqrt() / CALIBRATION.energy * CALIBRATION.forces
    torch.testing.assert_close(members.forces_uncertainty, spread, rtol=1e-9, atol=1e-11)


def test_members_are_potentials_of_their_own() -> None:
    """Each seed alone, and a network with each readout, give what the committee says of its member (α = 1)."""
    seeds = Seeds([network(k) for k in range(4)])
    layers = LastLayers(network().double(), last_layers_of(network()).deviations.double())
    systems = some_water(field=0.0)
    for own in (seeds, layers):
        potential = Potential(own, precision="double")
        members = potential(systems, uncertainty="members").members
        for k in range(own.size):
            if own is layers:
                alone = network().double()
                first, second = alone.readout  # the readout is linear: W1 W2 / √(s h)
                weights = (first.data @ second.data)[:, 0] / (first.shape[0] * first.shape[1]) ** 0.5
                alone = with_readout(alone, weights + layers.deviations[k])
            else:
                alone = network(k)
            answer = Potential(alone, precision="double")(systems)
            torch.testing.assert_close(members.energies[k], answer.energy, rtol=0, atol=1e-10)
            torch.testing.assert_close(members.forces[k], answer.forces, rtol=0, atol=1e-10)
            torch.testing.assert_close(members.virials[k], answer.virial, rtol=0, atol=1e-9)


@KINDS
def test_a_batch_is_its_structures(kind: str) -> None:
    potential = whole(kind)
    one = potential.prepare(some_water())
    two = one.replace(positions=one.positions * 1.01)
    both = potential(Systems.join([one, two]), uncertainty="members").members
    n = one.n_atoms
    for k, systems in enumerate((one, two)):
        own = potential(systems, uncertainty="members").members
        part = slice(k * n, (k + 1) * n)
        torch.testing.assert_close(both.energies[:, k], own.energies[:, 0], rtol=0, atol=1e-8)
        torch.testing.assert_close(both.energy_uncertainty[k], own.energy_uncertainty[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(both.forces[:, part], own.forces, rtol=0, atol=1e-8)
        torch.testing.assert_close(both.virials[:, k], own.virials[:, 0], rtol=0, atol=1e-8)
        torch.testing.assert_close(both.forces_uncertainty[part], own.forces_uncertainty, rtol=0, atol=1e-9)


def test_last_layers_share_latent_charges() -> None:
    torch.manual_seed(0)
    own = NequIP([1, 8], hidden_irreps="6x0e+3x1o", layers=1, r_max=CUTOFF, latent=True).double()
    plain = Potential(own, LatentCharges(conserve="fragments"), precision="double")
    potential = Potential(last_layers_of(own).double(), LatentCharges(conserve="fragments"), precision="double")
    systems = potential.prepare(some_water())
    answer, alone = potential(systems, uncertainty="members"), plain(systems)
    assert torch.equal(answer.charges, alone.charges)
    torch.testing.assert_close(answer.forces, alone.forces, rtol=0, atol=1e-11)
    shift = torch.zeros_like(systems.positions)
    shift[3, 1] = 1e-4
    up, down = (
        potential(systems.replace(positions=systems.positions + s * shift), uncertainty="energy") for s in (1, -1)
    )
    slope = -(up.members.energies - down.members.energies)[:, 0] / 2e-4
    torch.testing.assert_close(answer.members.forces[:, 3, 1], slope, rtol=0, atol=1e-6)


def test_a_potential_without_committee_refuses() -> None:
    with pytest.raises(InputError, match="needs a model with a committee, which this potential has not"):
        Potential(network())(some_water(field=0.0), uncertainty="energy")


def test_committees_that_cannot_be() -> None:
    with pytest.raises(InputError, match="a committee of 3 members: give at least 4"):
        Seeds([network(k) for k in range(3)])
    with pytest.raises(InputError, match=r"shape \(5, 4\): give \[members, 6\]"):
        LastLayers(network(), torch.zeros(5, 4))
    with pytest.raises(InputError, match="differ in their configuration"):
        Seeds([network(), network(), network(), NequIP([8, 1])])
    latent = NequIP([1, 8], hidden_irreps="6x0e+3x1o", layers=1, latent=True)
    with pytest.raises(InputError, match="cannot have latent charges"):
        Seeds([latent] * 4)


# -- files -------------------------------------------------------------------------------------------------------------


@KINDS
def test_round_trip(tmp_path, kind: str) -> None:
    path = tmp_path / "own.safetensors"
    potential = whole(kind, "mixed")
    save_potential(path, potential, {"name": "own"})
    again = load_potential(path)
    assert isinstance(again.short_range, Committee)
    assert (again.short_range.kind, again.short_range.calibration) == (kind, CALIBRATION)
    systems = potential.prepare(some_water())
    one, two = (p(systems, uncertainty="members") for p in (potential, again))
    for name in ("energy", "forces"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    for name in ("energies", "forces", "virials", "energy_uncertainty", "forces_uncertainty"):
        assert torch.equal(getattr(one.members, name), getattr(two.members, name))


def test_the_shipped_models_load_as_before() -> None:
    assert "committee" not in read_description("batio3")["short_range"]
    assert isinstance(load_potential("batio3").short_range, NequIP)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kind", "dropout", "committee of kind 'dropout', this version reads last-layers and seeds"),
        ("members", 2, "a committee of 2 members"),
        ("members", "8", "committee.members is '8'"),
        ("calibration", {"energy": -1.0, "forces": 1.0}, "calibration.energy is -1.0: give a positive number"),
        ("members", 6, "do not fit its own description"),
    ],
)
def test_descriptions_that_cannot_be(tmp_path, key: str, value: object, said: str) -> None:
    path = tmp_path / "own.safetensors"
    save_potential(path, whole("last-layers", "mixed"), {})
    description = read_description(path)
    description["short_range"]["committee"][key] = value
    tensors = {k: v.contiguous() for k, v in load_potential(path).short_range.state_dict().items()}
    save_file(tensors, path, metadata={"voltpi": json.dumps(description)})
    with pytest.raises(InputError, match=said) as refusal:
        load_potential(path)
    assert str(path) in str(refusal.value)


# -- fit and calibration -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = stored(folder, [flexible_water(2, seed) for seed in range(12)], stress_key="REF_stress")
    return make_samples(source, read_frames(source), CUTOFF)


def loss_of(own: NequIP, samples, counts) -> float:
    """The training's loss of structures that are counted so often, from ``evaluate_samples``."""
    loss = Loss()
    atoms, total = sum(s.systems.n_atoms for s in samples), 0.0
    for answer, count in zip(evaluate_samples(own, samples), counts, strict=True):
        s = answer.sample
        total += count * loss.energy * ((answer.energy - s.energy) / s.systems.n_atoms) ** 2 / len(samples)
        total += count * loss.forces * float(((answer.forces - s.forces.numpy()) ** 2).sum()) / (3 * atoms)
        total += count * loss.stress * float(((answer.stress - s.stress.numpy()) ** 2).sum()) / (9 * len(samples))
    return total


def with_readout(own: NequIP, weights: Tensor) -> NequIP:
    scalars = len(weights)
    copy = NequIP(**own.config).double()
    copy.load_state_dict(own.state_dict())
    copy.readout = torch.nn.ParameterList([scalars**0.5 * torch.eye(scalars).double(), scalars**0.5 * weights[:, None]])
    return copy


def test_the_fit_is_the_least_squares_solution(samples, monkeypatch) -> None:
    """Every structure drawn once: no other readout has a smaller loss, by its slopes in all directions."""
    own = network().double()
    monkeypatch.setattr(last_layers, "_RIDGE", 0.0)
    matrices, sides = last_layers._normal_equations(own, samples, Loss())
    first, second = own.readout
    start = (first.data @ second.data)[:, 0] / (first.shape[0] * first.shape[1]) ** 0.5
    best = start + torch.linalg.solve(matrices.sum(0), sides.sum(0))
    ones = [1] * len(samples)
    least = loss_of(with_readout(own, best), samples, ones)
    assert least < 0.9 * loss_of(own, samples, ones)
    for direction in torch.linalg.eigh(matrices.sum(0))[1].T:
        step = 1e-2 * direction * float(start.norm())
        assert loss_of(with_readout(own, best + step), samples, ones) > least
        assert loss_of(with_readout(own, best - step), samples, ones) > least


def test_members_leave_the_network_as_it_is(samples) -> None:
    own = network()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    made = fit_last_layers(own, samples, Loss(), members=6, seed=1)
    assert made.deviations.shape == (6, 6)
    assert made.deviations.dtype == torch.float32
    assert float(made.deviations.sum(0).abs().max()) < 1e-6 * float(made.deviations.abs().max())
    assert float(made.deviations.std(0).min()) > 0
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    again = fit_last_layers(own, samples, Loss(), members=6, seed=1)
    other = fit_last_layers(own, samples, Loss(), members=6, seed=2)
    assert torch.equal(made.deviations, again.deviations)
    assert not torch.equal(made.deviations, other.deviations)
    with pytest.raises(InputError, match="2 structures cannot tell members apart"):
        fit_last_layers(own, samples[:2], Loss(), members=6, seed=1)


@KINDS
def test_calibration_undoes_a_scale(samples, kind: str) -> None:
    """The spread over errors, counted from the members one by one; twice the deviations take half the factor."""
    made = committee(kind).double()
    found, report = calibrate(made, samples)
    potential = Potential(made, precision="double")
    made.calibration = found
    energy, force, errors_e, errors_f = [], [], [], []
    for sample in samples:
        answer = potential(sample.systems, uncertainty="forces")
        energy.append(float(answer.members.energy_uncertainty))
        force.append(answer.members.forces_uncertainty.numpy())
        errors_e.append(float(answer.energy) - sample.energy)
        errors_f.append((answer.forces - sample.forces).numpy())
    k = made.size
    z = np.array(errors_e) / np.array(energy)
    assert np.mean(z**2) == pytest.approx((k - 1) / (k - 3), rel=1e-6)
    ratios = np.concatenate(errors_f) / np.concatenate(force)[:, None]
    assert np.mean(ratios**2) == pytest.approx((k - 1) / (k - 3), rel=1e-6)
    assert report["energy"]["within_1_sigma"] == np.mean(np.abs(z) <= 1)
    assert report["forces"]["within_2_sigma"] == np.mean(np.abs(ratios) <= 2)
    assert report["energy"]["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors_e))))
    assert (report["kind"], report["members"], report["frames"]) == (kind, k, 12)
    if isinstance(made, LastLayers):
        half, _ = calibrate(LastLayers(made.network, 2 * made.deviations), samples)
        assert half.energy == pytest.approx(found.energy / 2)
        assert half.forces == pytest.approx(found.forces / 2)


def test_a_known_spread_is_found() -> None:
    """Members of a Gaussian of known width in each component."""
    generator = torch.Generator().manual_seed(0)
    forces = torch.randn(4000, 2, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 0.4])[:, None]
    spread = force_spread(forces - forces.mean(0))
    torch.testing.assert_close(spread, torch.tensor([0.1, 0.4], dtype=torch.float64), rtol=0.02, atol=0)


def test_nothing_to_calibrate_on() -> None:
    with pytest.raises(InputError, match="calibrated on validation data, and there are none"):
        calibrate(committee("seeds"), [])
