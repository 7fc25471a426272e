"""Training: loss, errors, freezing, schedule, resume."""

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
from torch import Tensor

from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.systems import Systems
from voltpi.potential.training.baseline import load_dataset
from voltpi.potential.training.config import TrainConfig
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.freezing import freeze
from voltpi.potential.training.loss import Errors, Loss, Prediction, by_atoms, collate, pack, predict
from voltpi.potential.training.references import reference_energies, subtract_references
from voltpi.potential.training.storage import read_weights
from voltpi.potential.training.trainer import Trainer

from training_toys import CUTOFF, TinyNetwork, flexible_water, stored, water


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    loaded = load_dataset(stored(tmp_path, [water(2, seed) for seed in range(6)]), CUTOFF)
    return subtract_references(loaded, reference_energies(loaded))


# -- forces and loss -------------------------------------------------------------------------------------------------


def test_forces_are_the_derivative_of_the_energy(samples: list[Sample]) -> None:
    network = TinyNetwork().double()

    def energy(systems: Systems) -> float:
        neighbors = neighbor_list(systems, CUTOFF)
        return float(network(systems.numbers, neighbors.index, neighbors.vectors).sum().detach())

    systems = samples[0].systems
    forces = predict(network, pack(samples[0], dtype=torch.float64), create_graph=False).forces
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
    energy, forces, *_ = predict(network, collate(packed), create_graph=False)
    torch.testing.assert_close(energy, torch.cat([s.energy for s in single]))
    torch.testing.assert_close(forces, torch.cat([s.forces for s in single]))
    assert [len(b.energy) for b in by_atoms(packed, 12)] == [2, 1]
    assert [len(b.energy) for b in by_atoms(packed, 1)] == [1, 1, 1]


def test_loss_and_errors_by_hand(samples: list[Sample]) -> None:
    weighted = [replace(samples[0], weight=1.0), replace(samples[1], weight=3.0)]
    batch = collate([pack(s, dtype=torch.float64) for s in weighted])
    energy, forces = batch.energy.clone(), batch.forces.clone()
    energy[1] += 0.6  # 0.1 eV/atom
    forces[0, 0] += 3.0
    forces[0, 1] += 4.0  # |ΔF| = 5 eV/Å on one of 12 atoms
    loss = Loss(energy=2.0, forces=5.0)
    assert float(loss(Prediction(energy, forces, None), batch)) == pytest.approx(2.0 * 3 * 0.01 / 2 + 5.0 * 25 / 12 / 3)
    huber = Loss(energy=2.0, forces=5.0, huber_energy=0.2, huber_forces=0.5)
    assert float(huber(Prediction(energy, forces, None), batch)) == pytest.approx(
        2.0 * 3 * 0.01 / 2 + 5.0 * 0.5 * 9.5 / 12 / 3
    )
    errors = Errors("cpu")
    answer = Prediction(energy, forces, None)
    errors.add(answer, batch, loss(answer, batch))
    means = errors.means()
    assert means["force_rmse"] == pytest.approx((25 / 36) ** 0.5)
    assert means["force_mae"] == pytest.approx(7 / 36)
    assert means["energy_rmse"] == pytest.approx(1000 * (0.01 / 2) ** 0.5)


@pytest.fixture
def stressed(tmp_path: Path) -> list[Sample]:
    """Six frames with stress labels, and one without."""
    frames = [flexible_water(2, seed) for seed in range(7)]
    del frames[-1].info["REF_stress"]
    loaded = load_dataset(stored(tmp_path, frames, "stressed.xyz", stress_key="REF_stress"), CUTOFF)
    return subtract_references(loaded, reference_energies(loaded))


def test_stress_is_the_strain_derivative_of_the_energy(stressed: list[Sample]) -> None:
    network = TinyNetwork().double()
    batch = collate([pack(s, dtype=torch.float64) for s in (stressed[0], stressed[6], stressed[1])])
    assert batch.stressed == 2
    stress = predict(network, batch, create_graph=False).stress
    assert not stress[1].any()
    for k, sample in ((0, stressed[0]), (2, stressed[1])):
        for a, b in ((0, 0), (1, 2)):
            strain = torch.zeros(3, 3, dtype=torch.float64)
            strain[a, b] += 0.5e-4
            strain[b, a] += 0.5e-4
            energies = []
            for sign in (1, -1):
                strained = sample.vectors @ (torch.eye(3, dtype=torch.float64) + sign * strain)
                atomic = network(sample.systems.numbers, sample.edge_index, strained)
                energies.append(float(atomic.detach().sum()))
            slope = (energies[0] - energies[1]) / 2e-4 / sample.volume
            assert float(stress[k, a, b]) == pytest.approx(slope, rel=1e-6, abs=1e-10)


def test_stress_counts_where_it_is_labelled(stressed: list[Sample]) -> None:
    batch = collate([pack(s, dtype=torch.float64) for s in (stressed[0], stressed[6])])
    exact = Prediction(batch.energy, batch.forces, batch.stress.clone())
    exact.stress[0, 0, 1] += 0.03
    assert float(Loss(stress=7.0)(exact, batch)) == pytest.approx(7.0 * 0.03**2 / 9)
    huber = Loss(stress=7.0, huber_stress=0.01)
    assert float(huber(exact, batch)) == pytest.approx(7.0 * 0.01 * (2 * 0.03 - 0.01) / 9)
    errors = Errors("cpu")
    errors.add(exact, batch, huber(exact, batch))
    assert errors.means()["stress_rmse"] == pytest.approx(0.01 * 160.21766208, rel=1e-6)


def test_shares_of_a_batch_add_up_to_its_loss(stressed: list[Sample]) -> None:
    network, loss = TinyNetwork().double(), Loss(huber_forces=0.5)
    parts = [pack(replace(s, weight=1.0 + k), dtype=torch.float64) for k, s in enumerate(stressed)]
    whole = collate(parts)
    total = loss(predict(network, whole, create_graph=False), whole)
    counts = loss.counts(parts)
    shares = [collate(parts[k::3]) for k in range(3)]
    summed = sum(loss(predict(network, s, create_graph=False), s, counts) for s in shares)
    assert float(summed) == pytest.approx(float(total), rel=1e-12)


def test_huber_bounds_the_pull_of_a_wrong_label(samples: list[Sample]) -> None:
    batch = pack(samples[0], dtype=torch.float64)

    def pull(loss: Loss, error: float) -> float:
        forces = batch.forces.clone()
        forces[0, 0] += error
        forces.requires_grad_()
        loss(Prediction(batch.energy, forces, None), batch).backward()
        assert torch.isfinite(forces.grad).all()
        return float(forces.grad[0, 0])

    plain, huber = Loss(), Loss(huber_forces=0.1)
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
        energy, forces, *_ = predict(teacher, pack(sample, dtype=torch.float64), create_graph=False)
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
    answer = predict(network, batch, create_graph=False)
    errors.add(answer, batch, QUICK.loss(answer, batch))
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


def test_freezing_by_name(samples: list[Sample], tmp_path: Path) -> None:
    network = TinyNetwork()
    assert freeze(network, ["spec*", "last"]) == ["last", "species"]
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["first"]
    with pytest.raises(InputError, match=r"no parameter of the network matches 'fist'; did you mean first\?"):
        freeze(TinyNetwork(), ["fist"])
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze(TinyNetwork(), ["*"])


def test_a_pattern_may_name_a_part() -> None:
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    assert freeze(network, ["a"]) == ["a.bias", "a.weight"]
    assert freeze(network, ["*.bias"]) == ["a.bias", "b.bias"]


def test_batches_by_atoms_hold_every_structure_once() -> None:
    config = replace(QUICK, batch_atoms=20)
    sizes = [5, 12, 9, 30, 3, 8, 7]
    batches = config.batches(sizes, epoch=3)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(sum(sizes[i] for i in batch) <= 20 or len(batch) == 1 for batch in batches)
    assert batches == config.batches(sizes, epoch=3) != config.batches(sizes, epoch=4)


def test_batches_by_atoms_resume_exactly(samples: list[Sample], tmp_path: Path) -> None:
    config = replace(QUICK, batch_atoms=13)
    whole = trainer(samples, tmp_path / "whole", config)
    whole.fit()
    stopped = Trainer(InterruptingNetwork(), samples[:5], samples[5:], config, tmp_path / "parts", progress=False)
    assert stopped.fit().reason == "interrupted"
    resumed = trainer(samples, tmp_path / "parts", config)
    resumed.fit(resume=True)
    assert_same_weights(whole, resumed)


def test_early_stopping(samples: list[Sample], tmp_path: Path) -> None:
    # labels without any rule: soon nothing gets better
    config = replace(QUICK, epochs=400, patience=5, schedule="constant", learning_rate=0.05)
    result = trainer(samples, tmp_path / "run", config).fit()
    assert result.reason == "early"
    assert result.epoch == result.best_epoch + 6
    again = trainer(samples, tmp_path / "run", config).fit(resume=True)
    assert (again.reason, again.epoch) == ("early", result.epoch)
