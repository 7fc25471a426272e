"""Fits a short-range network to prepared samples: interruptible, resumable bit for bit, limited by epochs or time."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.training.dataset import Sample, check_disjoint
from voltpi.potential.training.loss import Batch, EnergyForceLoss, Errors, by_atoms, collate, pack, predict

__all__ = ["TrainConfig", "TrainResult", "Trainer", "read_weights"]

MAX_BAD_STEPS = 20
"""Steps in a row with a loss or gradient that is not finite before a run gives up."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes
    ----------
    epochs, max_seconds : where the run ends, and the schedule with it; at least one (seconds add up over resumes)
    batch_size : structures a step
    loss : weights and Huber thresholds
    learning_rate, min_learning_rate : at the start and at the end
    schedule : ``cosine`` in max(epochs done, time spent); ``plateau`` (multiplied by ``plateau_factor`` after
        ``plateau_patience`` validations without a better loss); ``constant``
    warmup_steps : steps over which the rate rises linearly
    weight_decay, amsgrad : of AdamW
    clip_norm : largest norm of the gradient, or None
    ema_decay : of the averaged weights, which are validated and saved; shorter in the first steps, 0 switches off
    validate_every : epochs
    checkpoint_seconds : time between checkpoints while running (one is always written at the end)
    dtype : precision of the network
    threads : of torch on the CPU; None leaves them
    tf32 : allow TensorFloat-32 products on a GPU
    """

    epochs: int | None = 100
    max_seconds: float | None = None
    batch_size: int = 4
    loss: EnergyForceLoss = field(default_factory=EnergyForceLoss)
    learning_rate: float = 5e-3
    min_learning_rate: float = 1e-5
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    plateau_factor: float = 0.5
    plateau_patience: int = 20
    warmup_steps: int = 50
    weight_decay: float = 0.0
    amsgrad: bool = True
    clip_norm: float | None = 10.0
    ema_decay: float = 0.999
    validate_every: int = 1
    checkpoint_seconds: float = 60.0
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    threads: int | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_seconds is None:
            raise InputError("epochs and max_seconds are both None: give at least one, so that the training ends")
        for key in ("epochs", "max_seconds", "batch_size", "learning_rate", "validate_every"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise InputError(f"{key} is {value}: give a positive number")
        if self.schedule not in ("cosine", "plateau", "constant"):
            raise InputError(f"schedule is '{self.schedule}': choose cosine, plateau or constant")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}: give a number from 0 to below 1")


@dataclass(frozen=True)
class TrainResult:
    """How a call of ``fit`` ended: ``reason`` is done, time, stopped (``stop_after``) or interrupted."""

    reason: Literal["done", "time", "stopped", "interrupted"]
    epoch: int
    best_epoch: int
    best_score: float
    metrics: dict[str, float]


@dataclass
class _State:
    """Everything a resume needs besides tensors."""

    epoch: int = 0
    step: int = 0  # within the epoch
    updates: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0  # of the slowest one: only growing, so that a run that is over stays over
    best_score: float = math.inf
    best_epoch: int = -1
    plateau_scale: float = 1.0
    plateau_wait: int = 0
    plateau_best: float = math.inf
    skipped: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains ``network`` on ``train``, validates on ``validation``, leaves everything in ``folder``.

    ``network(numbers [n], edge_index [2, e], vectors [e, 3]) -> atomic energies [n]`` (eV); the energies of the
    samples should count from reference energies (:func:`~voltpi.potential.training.dataset.subtract_references`).
    The folder receives ``log.csv`` (a line an epoch), ``checkpoint.safetensors`` (to resume) and ``best.safetensors``
    (averaged weights of the best validation, see :func:`read_weights`). ``card`` is JSON-able and goes along with
    the weights (reference energies, data, settings). Without ``validation`` the training loss decides what is best.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Sequence[Sample],
        validation: Sequence[Sample],
        config: TrainConfig,
        folder: str | Path,
        *,
        card: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        if not train:
            raise InputError("no structures to train on: give at least one")
        check_disjoint(train, validation)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        self.config, self.folder, self.card, self.progress = config, Path(folder), card or {}, progress
        self.device = torch.device(config.device)
        dtype = getattr(torch, config.dtype)
        torch.manual_seed(config.seed)
        self.network = network.to(device=self.device, dtype=dtype)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            amsgrad=config.amsgrad,
            fused=True,
        )
        self.train = [pack(s, dtype=dtype, device=self.device) for s in train]
        self.validation: dict[str, list[Batch]] = {}
        for name in dict.fromkeys(s.dataset for s in validation):
            own = (pack(s, dtype=dtype, device=self.device) for s in validation if s.dataset == name)
            self.validation[name] = by_atoms(own, 512)
        self.state = _State()
        self._errors = Errors(self.device)
        self._bad_steps = 0
        self._stop_asked = False
        self._started = self._saved = time.monotonic()

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self, *, resume: bool = False, stop_after: int | None = None) -> TrainResult:
        """Train to the end of ``config``, or for ``stop_after`` more epochs.

        Ctrl-C and SIGTERM finish the running step, write a checkpoint and return; a second one raises. A folder that
        holds a run is only taken up with ``resume``, and a resumed run continues bit for bit (on a CPU, when the
        schedule does not depend on time).
        """
        checkpoint = self.folder / "checkpoint.safetensors"
        if checkpoint.exists() and not resume:
            raise InputError(f"{self.folder} holds a training run: resume it (resume=True) or choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            self._load(checkpoint)
        self._truncate_log()
        self._started = self._saved = time.monotonic() - self.state.seconds
        last = math.inf if stop_after is None else self.state.epoch + stop_after
        with self._interruptible(), self._bar() as (bar, task):
            reason = self._loop(last, bar, task)
        self.state.seconds = self._elapsed()
        self._save()
        state = self.state
        return TrainResult(reason, state.epoch, state.best_epoch, state.best_score, dict(state.metrics))

    def load_best(self) -> nn.Module:
        """The network with the best averaged weights of this folder, which :meth:`validate` then judges."""
        weights, _ = read_weights(self.folder / "best.safetensors")
        self.network.load_state_dict(weights)
        with torch.no_grad():
            torch._foreach_copy_(self.average, self.parameters)
        return self.network

    def _loop(self, last: float, bar: Progress, task: Any) -> Literal["done", "time", "stopped", "interrupted"]:
        state, config = self.state, self.config
        size = config.batch_size
        while True:
            if config.epochs is not None and state.epoch >= config.epochs:
                return "done"
            if state.epoch >= last:
                return "stopped"
            if self._progress() >= 1:
                return "time"
            order = self._order(state.epoch)
            batches = [order[i : i + size] for i in range(0, len(order), size)]
            while state.step < len(batches):
                self._step(collate([self.train[i] for i in batches[state.step]]))
                state.step += 1
                done = self._progress()
                self._show(bar, task, done)
                if self._stop_asked:
                    return "interrupted"
                if done >= 1 and state.step < len(batches):
                    break  # out of time: this epoch ends here, with its validation
                if time.monotonic() - self._saved > config.checkpoint_seconds:
                    self._save()
            self._end_epoch(bar.console)

    def _order(self, epoch: int) -> list[int]:
        # from the epoch alone, so that a run resumed within an epoch sees the same batches
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.train), generator=generator).tolist()

    def _step(self, batch: Batch) -> None:
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        energy, forces = predict(self.network, batch, create_graph=True)
        loss = self.config.loss(energy, forces, batch)
        loss.backward()
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        if not math.isfinite(float(norm)) or not math.isfinite(float(loss.detach())):
            self._skip()
            return
        self._bad_steps = 0
        self.optimizer.step()
        self.state.updates += 1
        # the average forgets the first, untrained weights faster
        decay = min(self.config.ema_decay, (1 + self.state.updates) / (10 + self.state.updates))
        with torch.no_grad():
            if self.config.ema_decay > 0:
                torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
            else:
                torch._foreach_copy_(self.average, self.parameters)
            self._errors.add(energy.detach(), forces.detach(), batch, loss.detach())

    def _skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.state.skipped += 1
        self._bad_steps += 1
        if self._bad_steps >= MAX_BAD_STEPS:
            raise VoltPIError(
                f"{MAX_BAD_STEPS} steps in a row gave numbers that are not finite: lower learning_rate "
                f"(now {self.config.learning_rate}) or clip_norm"
            )

    def _end_epoch(self, console: Console) -> None:
        state, config = self.state, self.config
        row = {f"train_{k}": v for k, v in self._errors.means().items()}
        self._errors.sums.zero_()
        final = self._progress() >= 1
        if state.epoch % config.validate_every == config.validate_every - 1 or final:
            score = row["train_loss"]
            if self.validation:
                validated = self.validate()
                score = validated["loss"]
                row |= validated
            state.metrics = row
            self._judge(score)
        rate = self._rate()
        state.epoch, state.step, state.seconds = state.epoch + 1, 0, self._elapsed()
        self._write_log(row, rate)
        if self.progress:
            console.print(self._line(row, rate), highlight=False, soft_wrap=True)

    def _judge(self, score: float) -> None:
        state, config = self.state, self.config
        if score < state.best_score:
            state.best_score, state.best_epoch = score, state.epoch
            with self.averaged():
                _write(self.folder / "best.safetensors", self._network_tensors(), self._header())
        if score < state.plateau_best:
            state.plateau_best, state.plateau_wait = score, 0
            return
        state.plateau_wait += 1
        if state.plateau_wait > config.plateau_patience:
            state.plateau_scale *= config.plateau_factor
            state.plateau_wait = 0

    # -- schedule ------------------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _progress(self) -> float:
        """Part of the run that is over, by epochs or by time, whichever is further; time is kept for validation."""
        config, state = self.config, self.state
        done = 0.0
        if config.epochs is not None:
            steps = math.ceil(len(self.train) / config.batch_size)
            done = (state.epoch + state.step / steps) / config.epochs
        if config.max_seconds is not None:
            reserve = min(state.validation_seconds, 0.5 * config.max_seconds)
            done = max(done, self._elapsed() / (config.max_seconds - reserve))
        return min(done, 1.0)

    def _rate(self) -> float:
        config, state = self.config, self.state
        top, low = config.learning_rate, min(config.min_learning_rate, config.learning_rate)
        warmup = min(1.0, (state.updates + 1) / max(config.warmup_steps, 1))
        if config.schedule == "cosine":
            return warmup * (low + (top - low) * 0.5 * (1 + math.cos(math.pi * self._progress())))
        return warmup * (max(low, top * state.plateau_scale) if config.schedule == "plateau" else top)

    # -- validation ----------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with its averaged weights, for a while."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        try:
            yield self.network
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    def validate(self) -> dict[str, float]:
        """Errors of the averaged weights: ``loss`` over all, ``NAME_force_rmse`` … by data set (eV/Å, meV/atom)."""
        began = time.monotonic()
        total = Errors(self.device)
        row: dict[str, float] = {}
        self.network.eval()
        with self.averaged():
            for name, batches in self.validation.items():
                errors = Errors(self.device)
                for batch in batches:
                    energy, forces = predict(self.network, batch, create_graph=False)
                    errors.add(energy, forces, batch, self.config.loss(energy, forces, batch))
                total.sums += errors.sums
                row |= {f"{name}_{k}": v for k, v in errors.means().items() if k != "loss"}
        self.network.train()
        self.state.validation_seconds = max(self.state.validation_seconds, time.monotonic() - began)
        return {"loss": total.means()["loss"], **row}

    # -- files ---------------------------------------------------------------------------------------------------

    def _network_tensors(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def _header(self) -> dict[str, Any]:
        return {
            "format": "voltpi-training-1",
            "state": asdict(self.state),
            "train_config": asdict(self.config),
            "network": {"class": type(self.network).__name__, "config": getattr(self.network, "config", None)},
            "card": self.card,
        }

    def _save(self) -> None:
        self.state.seconds = self._elapsed()
        tensors = {f"network.{k}": v for k, v in self._network_tensors().items()}
        tensors |= {f"average.{name}": v for name, v in zip(self.names, self.average, strict=True)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{self.names[i]}.{k}": v for k, v in moments.items()}
        tensors |= {"rng.cpu": torch.get_rng_state(), "errors": self._errors.sums}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        _write(self.folder / "checkpoint.safetensors", tensors, self._header())
        self._saved = time.monotonic()

    def _load(self, path: Path) -> None:
        tensors, header = _read(path)
        network = {k[8:]: v for k, v in tensors.items() if k.startswith("network.")}
        if {k[8:] for k in tensors if k.startswith("average.")} != set(self.names):
            raise InputError(f"{path}: other parameters were trained in this run: resume with the same settings")
        try:
            self.network.load_state_dict(network)
        except RuntimeError as error:
            raise InputError(f"{path}: made by another network ({error}): resume with the same settings") from error
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(tensors[f"average.{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                name, moment = key[10:].rsplit(".", 1)
                moments.setdefault(self.names.index(name), {})[moment] = tensor
        # hyperparameters come from the present settings, only moments from the file
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self._errors.sums.copy_(tensors["errors"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.state = _State(**{f.name: header["state"][f.name] for f in fields(_State) if f.name in header["state"]})

    @property
    def _columns(self) -> list[str]:
        sets = [f"{n}_{k}" for n in self.validation for k in ("force_rmse", "force_mae", "energy_rmse")]
        train = [f"train_{k}" for k in ("loss", "force_rmse", "force_mae", "energy_rmse")]
        return ["epoch", "updates", "seconds", "learning_rate", *train, "loss", *sets]

    def _truncate_log(self) -> None:
        """Keep the epochs that the state knows: a killed run may have logged more than its checkpoint holds."""
        path = self.folder / "log.csv"
        rows: list[dict[str, str]] = []
        if path.exists() and self.state.epoch:
            with path.open(newline="") as file:
                rows = [r for r in csv.DictReader(file) if int(r["epoch"]) < self.state.epoch]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def _write_log(self, row: dict[str, float], rate: float) -> None:
        state = self.state
        head = {"epoch": str(state.epoch - 1), "updates": str(state.updates), "seconds": f"{state.seconds:.1f}"}
        numbers = {k: f"{v:.6g}" for k, v in {"learning_rate": rate, **row}.items()}
        with (self.folder / "log.csv").open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow({**head, **numbers})

    # -- what a person sees --------------------------------------------------------------------------------------

    def _show(self, bar: Progress, task: Any, done: float) -> None:
        if not self.progress or (self.device.type != "cpu" and self.state.step % 10):
            return  # reading errors waits for the device
        means = self._errors.means()
        errors = f"F {means['force_rmse']:.4f} eV/Å · E {means['energy_rmse']:.2f} meV/atom"
        bar.update(task, completed=done, live=f"epoch {self.state.epoch} · {errors}")

    def _line(self, row: dict[str, float], rate: float) -> str:
        text = f"epoch {self.state.epoch - 1:4d} {self._elapsed():7.0f} s  rate {rate:.1e}  "
        text += f"train F {row['train_force_rmse']:.4f} E {row['train_energy_rmse']:.2f}"
        for name in self.validation if "loss" in row else ():
            text += f"  {name} F {row[f'{name}_force_rmse']:.4f} E {row[f'{name}_energy_rmse']:.2f}"
        return text + ("  *" if self.state.best_epoch == self.state.epoch - 1 else "")

    @contextmanager
    def _bar(self) -> Iterator[tuple[Progress, Any]]:
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[live]}"), disable=not self.progress) as bar:
            yield bar, bar.add_task("training", total=1.0, live="")

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request to stop after the running step."""
        self._stop_asked = False
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop_asked:
                raise KeyboardInterrupt
            self._stop_asked = True

        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in previous.items():
                signal.signal(which, handler)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights for ``network.load_state_dict`` and the header (``card``, ``network``, ``state``) of best.safetensors."""
    return _read(Path(path))


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """One safetensors file with a JSON header, replaced as a whole or not at all."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(plain, partial, metadata={"voltpi": json.dumps(header)})
    os.replace(partial, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["voltpi"])
            return {k: file.get_tensor(k) for k in file.keys()}, header  # noqa: SIM118 (safe_open is no dict)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a training checkpoint ({error}): give a file that this trainer wrote") from error
