"""Training: labels, references, baseline, reduction, loss, resume."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from torch import Tensor, nn

from voltpi.potential.errors import InputError, NoStablePointError, VoltPIError
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.systems import Systems
from voltpi.potential.training.dataset import (
    Sample,
    Source,
    check_disjoint,
    load_dataset,
    read_frames,
    reduce_translations,
    reference_energies,
    split,
    structure_hash,
    subtract_references,
    summarize,
)
from voltpi.potential.training.loss import EnergyForceLoss, Errors, by_atoms, collate, pack, predict
from voltpi.potential.training.trainer import TrainConfig, Trainer, read_weights

CUTOFF = 3.0


class TinyNetwork(nn.Module):
    """Pair energies from a small perceptron on Gaussians of the distance: smooth to the cutoff, conservative."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = {"seed": seed}
        self.species = nn.Parameter(torch.randn(10, 4, generator=generator))
        self.first = nn.Parameter(torch.randn(16, 12, generator=generator) * 0.3)
        self.last = nn.Parameter(torch.randn(12, generator=generator) * 0.3)
        self.register_buffer("centres", torch.linspace(0.5, CUTOFF, 8))

    def forward(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        i, j = edge_index
        r = vectors.norm(dim=1, keepdim=True)
        radial = torch.exp(-4 * (r - self.centres) ** 2)
        species = torch.cat([self.species[numbers[i]], self.species[numbers[j]]], dim=1)
        smooth = (0.5 * (1 + torch.cos(torch.pi * r / CUTOFF)))[:, 0]
        pair = (torch.tanh(torch.cat([radial, species], dim=1) @ self.first) @ self.last) * smooth
        return torch.zeros(len(numbers), dtype=vectors.dtype).index_add(0, i, pair)


def water(n: int = 2, seed: int = 0, box: float = 5.0) -> Atoms:
    """A labelled cell of ``n`` distorted water molecules; labels are smooth but arbitrary."""
    rng = np.random.default_rng(seed)
    molecule = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    places = np.array([[0.2, 0.3, 0.4], [2.7, 2.4, 2.9], [0.3, 2.6, 2.2], [2.5, 0.1, 0.5]])[:n]
    positions = np.concatenate([molecule + p + rng.normal(scale=0.05, size=(3, 3)) for p in places])
    atoms = Atoms("OH2" * n, positions=positions, cell=[box] * 3, pbc=True)
    atoms.info["REF_energy"] = -468.0 * n + rng.normal(scale=0.1)
    atoms.arrays["REF_forces"] = rng.normal(scale=0.5, size=(3 * n, 3))
    return atoms


def molecule(symbols: str, energy: float, seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = Atoms(symbols)
    atoms.positions = np.arange(len(atoms))[:, None] * [1.1, 0.3, 0.0] + rng.normal(scale=0.02, size=(len(atoms), 3))
    atoms.info["REF_energy"] = energy
    atoms.arrays["REF_forces"] = np.zeros((len(atoms), 3))
    return atoms


def stored(tmp_path: Path, frames: list[Atoms], file: str = "set.xyz", **options: object) -> Source:
    write(tmp_path / file, frames, format="extxyz")
    return Source(**{"path": tmp_path / file, "name": "water", **options})  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without_energy, ["energy_key 'REF_energy'", "missing", "name one of"]),
        (_with_nan, ["forces_key 'REF_forces'", "not finite at index [2, 1]"]),
        (_with_text, ["energy_key", "'unconverged'", "not numbers"]),
        (_with_charges_as_forces, ["shape [3], expected [3, 3]"]),
        (_with_field, ["electric_field", "field_key='electric_field'"]),
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
    with pytest.raises(InputError, match="frame 0: no reference energy for atomic number 1"):
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

    def __call__(self, systems: Systems) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x = systems.positions
        return x.square().sum().reshape(1) + (systems.field @ x.sum(0)), -2 * x - systems.field


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
        def __call__(self, systems: Systems) -> tuple[Tensor, Tensor]:
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
    assert summarize([reduced]) == pytest.approx(summarize([whole]))
    with pytest.raises(InputError, match="'polarizability' is missing"):
        read_frames(replace(source, extensive=("polarizability",)))


# -- forces and loss -------------------------------------------------------------------------------------------------


def test_forces_are_the_derivative_of_the_energy(samples: list[Sample]) -> None:
    network = TinyNetwork().double()

    def energy(systems: Systems) -> float:
        neighbors = neighbor_list(systems, CUTOFF)
        return float(network(systems.numbers, neighbors.index, neighbors.vectors).sum().detach())

    systems = samples[0].systems
    _, forces = predict(network, pack(samples[0], dtype=torch.float64), create_graph=False)
    h = 1e-4
    for atom, axis in ((0, 0), (1, 2), (5, 1)):
        step = torch.zeros_like(systems.positions)
        step[atom, axis] = h
        ends = [energy(systems.replace(positions=systems.positions + s * step)) for s in (1, -1)]
        assert -(ends[0] - ends[1]) / (2 * h) == pytest.approx(float(forces[atom, axis]), rel=1e-6, abs=1e-8)


def test_batches_equal_single_structures(samples: list[Sample]) -> None:
    network = TinyNetwork().double()
    packed = [pack(s, dtype=torch.float64) for s in samples[:3]]
    single = [predict(network, p, create_graph=False) for p in packed]
    energy, forces = predict(network, collate(packed), create_graph=False)
    torch.testing.assert_close(energy, torch.cat([e for e, _ in single]))
    torch.testing.assert_close(forces, torch.cat([f for _, f in single]))
    assert [len(b.energy) for b in by_atoms(packed, 12)] == [2, 1]
    assert [len(b.energy) for b in by_atoms(packed, 1)] == [1, 1, 1]


def test_loss_and_errors_by_hand(samples: list[Sample]) -> None:
    weighted = [replace(samples[0], weight=1.0), replace(samples[1], weight=3.0)]
    batch = collate([pack(s, dtype=torch.float64) for s in weighted])
    energy, forces = batch.energy.clone(), batch.forces.clone()
    energy[1] += 0.6  # 0.1 eV/atom
    forces[0, 0] += 3.0
    forces[0, 1] += 4.0  # |ΔF| = 5 eV/Å on one of 12 atoms
    loss = EnergyForceLoss(energy=2.0, forces=5.0)
    assert float(loss(energy, forces, batch)) == pytest.approx(2.0 * 3 * 0.01 / 2 + 5.0 * 25 / 12 / 3)
    huber = EnergyForceLoss(energy=2.0, forces=5.0, huber_energy=0.2, huber_forces=0.5)
    assert float(huber(energy, forces, batch)) == pytest.approx(2.0 * 3 * 0.01 / 2 + 5.0 * 0.5 * 9.5 / 12 / 3)
    errors = Errors("cpu")
    errors.add(energy, forces, batch, loss(energy, forces, batch))
    means = errors.means()
    assert means["force_rmse"] == pytest.approx((25 / 36) ** 0.5)
    assert means["force_mae"] == pytest.approx(7 / 36)
    assert means["energy_rmse"] == pytest.approx(1000 * (0.01 / 2) ** 0.5)


def test_huber_bounds_the_pull_of_a_wrong_label(samples: list[Sample]) -> None:
    batch = pack(samples[0], dtype=torch.float64)

    def pull(loss: EnergyForceLoss, error: float) -> float:
        forces = batch.forces.clone()
        forces[0, 0] += error
        forces.requires_grad_()
        loss(batch.energy, forces, batch).backward()
        assert torch.isfinite(forces.grad).all()
        return float(forces.grad[0, 0])

    plain, huber = EnergyForceLoss(), EnergyForceLoss(huber_forces=0.1)
    assert pull(huber, 0.05) == pytest.approx(pull(plain, 0.05))
    assert pull(huber, 50.0) == pytest.approx(pull(huber, 5.0))
    assert pull(plain, 50.0) == pytest.approx(10 * pull(plain, 5.0))


# -- training --------------------------------------------------------------------------------------------------------

QUICK = TrainConfig(epochs=4, batch_size=2, warmup_steps=3, learning_rate=0.01, threads=1)


def trainer(samples: list[Sample], folder: Path, config: TrainConfig = QUICK) -> Trainer:
    return Trainer(TinyNetwork(), samples[:5], samples[5:], config, folder, progress=False)


def assert_same_weights(a: Trainer, b: Trainer) -> None:
    for x, y in zip([*a.parameters, *a.average], [*b.parameters, *b.average], strict=True):
        assert torch.equal(x, y)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_time(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]


def test_overfits_two_frames(samples: list[Sample], tmp_path: Path) -> None:
    # labels that the network can reach: those of another network of its kind
    teacher = TinyNetwork(seed=5).double()
    labelled = []
    for sample in samples[:3]:
        energy, forces = predict(teacher, pack(sample, dtype=torch.float64), create_graph=False)
        labelled.append(replace(sample, energy=float(energy), forces=forces))
    config = replace(QUICK, epochs=250, validate_every=50)
    run = Trainer(TinyNetwork(), labelled[:2], labelled[2:], config, tmp_path / "run", progress=False)
    result = run.fit()
    log = rows(tmp_path / "run")
    assert result.reason == "done"
    assert len(log) == 250
    assert float(log[-1]["train_force_rmse"]) < 0.05 * float(log[0]["train_force_rmse"])
    assert result.metrics["water_force_rmse"] < 0.3 * float(log[0]["train_force_rmse"])
    assert float(log[-1]["learning_rate"]) < 1e-4


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_resume_is_bit_identical(samples: list[Sample], tmp_path: Path, schedule: str) -> None:
    config = replace(QUICK, schedule=schedule, plateau_patience=0)
    whole = trainer(samples, tmp_path / "whole", config)
    assert whole.fit().reason == "done"
    assert trainer(samples, tmp_path / "parts", config).fit(stop_after=2).reason == "stopped"
    torch.rand(7)  # the generator's state must come from the checkpoint
    resumed = trainer(samples, tmp_path / "parts", config)
    result = resumed.fit(resume=True)
    assert (result.reason, result.epoch) == ("done", 4)
    assert_same_weights(whole, resumed)
    assert whole.state.best_score == resumed.state.best_score
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "parts")
    best, header = read_weights(tmp_path / "parts" / "best.safetensors")
    assert header["state"]["best_epoch"] == whole.state.best_epoch
    assert all(torch.equal(v, best[k]) for k, v in read_weights(tmp_path / "whole" / "best.safetensors")[0].items())


class InterruptingNetwork(TinyNetwork):
    """Sends its own process the signal of Ctrl-C during one forward pass."""

    countdown = 5

    def forward(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        self.countdown -= 1
        if self.countdown == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(numbers, edge_index, vectors)


def test_interrupt_within_an_epoch_leaves_an_exact_checkpoint(samples: list[Sample], tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    stopped = Trainer(InterruptingNetwork(), samples[:5], samples[5:], QUICK, tmp_path / "parts", progress=False)
    result = stopped.fit()
    assert result.reason == "interrupted"
    assert (stopped.state.epoch, stopped.state.step) == (1, 1)  # 3 steps and a validation, then 1 step
    assert signal.getsignal(signal.SIGINT) is before
    resumed = trainer(samples, tmp_path / "parts")
    resumed.fit(resume=True)
    whole = trainer(samples, tmp_path / "whole")
    whole.fit()
    assert_same_weights(whole, resumed)
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "parts")


def test_log_lines_beyond_the_checkpoint_are_dropped(samples: list[Sample], tmp_path: Path) -> None:
    run = trainer(samples, tmp_path / "run")
    run.fit(stop_after=1)
    kept = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    trainer(samples, tmp_path / "run").fit(resume=True, stop_after=2)
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(kept)  # as after a kill
    trainer(samples, tmp_path / "run").fit(resume=True)
    assert [r["epoch"] for r in rows(tmp_path / "run")] == ["0", "1", "2", "3"]


def test_time_limit_ends_the_run_and_its_schedule(samples: list[Sample], tmp_path: Path) -> None:
    config = replace(QUICK, epochs=None, max_seconds=1.0, warmup_steps=1)
    began = time.monotonic()
    result = trainer(samples, tmp_path / "run", config).fit()
    assert result.reason == "time"
    assert 0.5 < time.monotonic() - began < 4.0
    rates = [float(r["learning_rate"]) for r in rows(tmp_path / "run")]
    assert rates[0] > 0.5 * config.learning_rate
    assert rates[-1] == pytest.approx(config.min_learning_rate, rel=0.5)
    assert sorted(rates, reverse=True) == rates
    assert trainer(samples, tmp_path / "run", config).fit(resume=True).epoch == result.epoch


def test_best_weights_are_the_averaged_ones_of_the_best_epoch(samples: list[Sample], tmp_path: Path) -> None:
    run = trainer(samples, tmp_path / "run", replace(QUICK, epochs=6, ema_decay=0.5))
    result = run.fit()
    _, header = read_weights(tmp_path / "run" / "best.safetensors")
    assert header["network"] == {"class": "TinyNetwork", "config": {"seed": 0}}
    losses = [float(r["loss"]) for r in rows(tmp_path / "run")]
    assert result.best_epoch == int(np.argmin(losses))
    fresh = trainer(samples, tmp_path / "run")
    network = fresh.load_best()
    assert fresh.validate()["loss"] == pytest.approx(min(losses), rel=1e-5)
    errors = Errors("cpu")
    batch = pack(samples[5])
    energy, forces = predict(network, batch, create_graph=False)
    errors.add(energy, forces, batch, QUICK.loss(energy, forces, batch))
    assert errors.means()["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_frozen_parameters_stay(samples: list[Sample], tmp_path: Path) -> None:
    network = TinyNetwork()
    network.species.requires_grad_(False)
    frozen, trained = network.species.clone(), network.last.clone()
    Trainer(network, samples[:5], samples[5:], QUICK, tmp_path / "run", progress=False).fit()
    assert torch.equal(network.species, frozen)
    assert not torch.equal(network.last, trained)
    with pytest.raises(InputError, match="other parameters were trained"):
        trainer(samples, tmp_path / "run").fit(resume=True)


def test_runs_are_not_overwritten_or_mixed(samples: list[Sample], tmp_path: Path) -> None:
    trainer(samples, tmp_path / "run").fit(stop_after=1)
    with pytest.raises(InputError, match="holds a training run"):
        trainer(samples, tmp_path / "run").fit()
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="not a training checkpoint"):
        trainer(samples, tmp_path / "run").fit(resume=True)
    with pytest.raises(InputError, match="is also in training"):
        Trainer(TinyNetwork(), samples, samples[:1], QUICK, tmp_path / "other", progress=False)


def test_numbers_that_are_not_finite_end_the_run(samples: list[Sample], tmp_path: Path) -> None:
    network = TinyNetwork()
    with torch.no_grad():
        network.last[0] = torch.nan
    config = replace(QUICK, epochs=50)
    with pytest.raises(VoltPIError, match="steps in a row"):
        Trainer(network, samples[:5], samples[5:], config, tmp_path / "run", progress=False).fit()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": None}, "both None"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"schedule": "linear"}, "choose cosine, plateau or constant"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainConfig(**changes)  # type: ignore[arg-type]
