"""Fits a short-range network to prepared samples: interruptible, resumable bit for bit, limited by epochs or time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voltpi.potential.errors import InputError, NoStablePointError, NotConvergedError, VoltPIError
from voltpi.potential.training.config import Reason, State, TrainConfig, TrainResult
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.display import Display
from voltpi.potential.training.joint import JointCharges
from voltpi.potential.training.loss import Batch, Errors, Prediction, by_atoms, collate, pack, predict
from voltpi.potential.training.signals import SoftStop
from voltpi.potential.training.splitting import check_disjoint
from voltpi.potential.training.storage import Log, read_tensors, read_weights, write_tensors
from voltpi.potential.training.workers import Workers

__all__ = ["Trainer"]

MAX_BAD_STEPS = 20
"""Steps in a row with a loss or gradient that is not finite before a run gives up."""
VALIDATION_ATOMS = 512
"""Atoms in a batch of validation."""


class Trainer:
    """Trains ``network`` on ``train``, validates on ``validation``, leaves everything in ``folder``.

    ``network(numbers [n], edge_index [2, e], vectors [e, 3]) -> atomic energies [n]`` (eV); the energies of the
    samples should count from reference energies (``subtract_references``). Parameters that require no gradient stay as
    they are. The folder receives ``log.csv`` (a line an epoch), ``checkpoint.safetensors`` (to resume) and
    ``best.safetensors`` (averaged weights of the best validation, see ``read_weights``). ``card`` is JSON-able and goes
    along with the weights. Without ``validation`` the training loss decides what is best.

    ``charges`` are trained along (the labels of the samples then contain them): their parameters are averaged, saved
    and resumed as those of the network. Where these leave a structure without a stable stationary point the step is
    skipped and they go halfway back to their averages; a validation without one is never the best.

    Where torch's process group is initialised every process builds the same trainer and calls ``fit``.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Sequence[Sample],
        validation: Sequence[Sample],
        config: TrainConfig,
        folder: str | Path,
        *,
        card: Mapping[str, Any] | None = None,
        progress: bool = True,
        charges: JointCharges | None = None,
    ) -> None:
        if not train:
            raise InputError("no structures to train on: give at least one")
        check_disjoint(train, validation)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        self.workers = Workers()
        self.config, self.folder, self.card = config, Path(folder), dict(card or {})
        self.progress = progress and self.workers.first
        self.device = torch.device(config.device)
        dtype = getattr(torch, config.dtype)
        torch.manual_seed(config.seed)
        self.network = network.to(device=self.device, dtype=dtype)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not trained:
            raise InputError("every parameter of the network is frozen: leave some to train")
        groups = [{"params": list(trained.values()), "factor": 1.0, "weight_decay": config.weight_decay}]
        self.charges = charges
        if charges is not None:
            for name, p in charges.named_parameters(prefix="charges"):
                trained[name] = p
                groups.append({"params": [p], "factor": charges.rates[name.rpartition(".")[2]], "weight_decay": 0.0})
        self.names, self.parameters = list(trained), list(trained.values())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            amsgrad=config.amsgrad,
            fused=True,
        )
        self.train = [self._packed(s) for s in train]
        self.validation: dict[str, list[Batch]] = {}
        for name in dict.fromkeys(s.dataset for s in validation):
            parts = (self._packed(s) for s in validation if s.dataset == name)
            self.validation[name] = by_atoms(parts, VALIDATION_ATOMS)
        self.state = State()
        self._log = Log(self.folder / "log.csv", self._columns(validation))
        self._errors = Errors(self.device)
        self._bad_steps = 0
        self._unstable = ""  # what the charges last failed of
        self._stop = SoftStop()
        self._steps = math.ceil(len(train) / config.batch_size)  # of the running epoch
        self._started = self._saved = time.monotonic()
        self._clock: float | None = None  # seconds, where all processes have to agree on them

    def _packed(self, sample: Sample) -> Batch:
        batch = pack(sample, dtype=getattr(torch, self.config.dtype), device=self.device)
        return batch if self.charges is None else batch._replace(charged=(self.charges.add(sample),))

    def _columns(self, validation: Sequence[Sample]) -> list[str]:
        def names(prefix: str, stressed: bool) -> list[str]:
            keys = ["force_rmse", "force_mae", "energy_rmse", "energy_mae", *(["stress_rmse"] if stressed else [])]
            return [prefix + key for key in keys]

        stressed = {s.dataset for s in validation if s.stress is not None}
        columns = ["updates", "seconds", "learning_rate", "train_loss"]
        columns += names("train_", any(part.stressed for part in self.train))
        return [*columns, "loss", *(c for n in self.validation for c in names(f"{n}_", n in stressed))]

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self, *, resume: bool = False, stop_after: int | None = None) -> TrainResult:
        """Train to the end of ``config``, or for ``stop_after`` more epochs.

        Ctrl-C and SIGTERM finish the running step, write a checkpoint and return; a second one raises. A folder that
        holds a run is only taken up with ``resume``, and a resumed run continues bit for bit (on a CPU, when the
        schedule does not depend on time).
        """
        checkpoint = self.folder / "checkpoint.safetensors"
        found = checkpoint.exists()
        self.workers.barrier()  # before the first writes one
        if found and not resume:
            raise InputError(f"{self.folder} holds a training run: resume it (resume=True) or choose another folder")
        if found:
            self._load(checkpoint)
        if self.workers.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log.keep(self.state.epoch)
        self._started = time.monotonic() - self.state.seconds
        self._saved = time.monotonic()
        self._clock = None
        last = math.inf if stop_after is None else self.state.epoch + stop_after
        with self._stop, Display(self.progress) as display:
            reason = self._loop(last, display)
        self.workers.sum([self._errors.sums])  # of an epoch that was interrupted
        self._save()
        state = self.state
        return TrainResult(reason, state.epoch, state.best_epoch, state.best_score, dict(state.metrics))

    def load_best(self) -> nn.Module:
        """The network (and charges) with the best averaged weights of this folder; :meth:`validate` then judges it.

        Raises VoltPIError where no validation has given a number.
        """
        self.workers.barrier()
        best = self.folder / "best.safetensors"
        if not best.exists():
            raise VoltPIError(
                f"no validation gave finite errors, so that {self.folder} has no best weights: lower learning_rate "
                f"(now {self.config.learning_rate}){self._about_charges()}"
            )
        weights, _ = read_weights(best)
        self._put(weights)
        with torch.no_grad():
            torch._foreach_copy_(self.average, self.parameters)
        return self.network

    def _loop(self, last: float, display: Display) -> Reason:
        state, config = self.state, self.config
        while True:
            self._agree()
            if config.epochs is not None and state.epoch >= config.epochs:
                return "done"
            if config.patience is not None and state.waited >= config.patience:
                return "early"
            if state.epoch >= last:
                return "stopped"
            if self._progress() >= 1:
                return "time"
            batches = config.batches([part.numbers.shape[0] for part in self.train], state.epoch)
            self._steps = len(batches)
            while state.step < len(batches):
                self._step(batches[state.step])
                state.step += 1
                self._agree()
                done = self._progress()
                if self.progress and (self.device.type == "cpu" or state.step % 10 == 0):  # errors wait for a GPU
                    display.step(done, state.epoch, self._errors.means())
                if self._stop.asked:
                    return "interrupted"
                if done >= 1 and state.step < len(batches):
                    break  # out of time: this epoch ends here, with its validation
                if time.monotonic() - self._saved > config.checkpoint_seconds:
                    self._save()
            self._end_epoch(display)

    def _step(self, indices: Sequence[int]) -> None:
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        counts = self.config.loss.counts([self.train[i] for i in indices])
        own = [self.train[i] for i in self.workers.share(indices)]
        answer: Prediction | None = None
        loss = torch.zeros((), device=self.device)
        if own:
            batch = collate(own)
            try:
                answer = predict(self.network, batch, create_graph=True, charges=self.charges)
                loss = self.config.loss(answer, batch, counts)
                if self.charges is not None:
                    loss = loss + self.charges.prior * self.charges.elements.drift() * (len(own) / counts[0])
                loss.backward()
            except (NoStablePointError, NotConvergedError) as error:
                self._failed(error, batch)
                for p in self.parameters:
                    p.grad = torch.full_like(p, math.nan)  # seen by all processes
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norms = []
        for group in self.optimizer.param_groups:
            self._sum_gradients(group["params"])
            norms.append(float(nn.utils.clip_grad_norm_(group["params"], limit)))
        # a loss that is not finite has no finite gradient; the norms are the same in all processes
        if not all(map(math.isfinite, norms)):
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
            if answer is not None:
                share = counts[0] / len(own)  # the loss of a share is its part of the batch's
                self._errors.add(answer.detach(), batch, loss.detach() * share)

    def _sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.workers.shared:
            there = [_gradient(p).to(self.device) for p in parameters]
            self.workers.sum(there)
            for p, gradient in zip(parameters, there, strict=True):
                _gradient(p).copy_(gradient)

    def _failed(self, error: VoltPIError, batch: Batch) -> None:
        """Charges found no stable point: the last answers of the batch are no start for the next ones."""
        if self.charges is None:
            raise error
        self._unstable = str(error)
        self.charges.forget(batch.charged)

    def _about_charges(self) -> str:
        if self.charges is None:
            return ""
        last = f"; the charges last said: {self._unstable}" if self._unstable else ""
        return f" or charges.fit.rate (now {self.charges.rate:g}), or raise charges.fit.prior{last}"

    def _skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.state.skipped += 1
        self._bad_steps += 1
        if self._bad_steps >= MAX_BAD_STEPS:
            raise VoltPIError(
                f"{MAX_BAD_STEPS} steps in a row gave numbers that are not finite: lower learning_rate "
                f"(now {self.config.learning_rate}) or clip_norm{self._about_charges()}"
            )
        if self.charges is not None:
            with torch.no_grad():
                for name, p, average in zip(self.names, self.parameters, self.average, strict=True):
                    if name.startswith("charges."):
                        p.lerp_(average, 0.5)

    def _end_epoch(self, display: Display) -> None:
        state, config = self.state, self.config
        self.workers.sum([self._errors.sums])
        row = {f"train_{k}": v for k, v in self._errors.means().items()}
        self._errors.sums.zero_()
        final = self._progress() >= 1
        validated = state.epoch % config.validate_every == config.validate_every - 1 or final
        if validated:
            score = row["train_loss"]
            if self.validation:
                answer = self.validate()
                score = answer["loss"]
                row |= answer
            state.metrics = row
            self._judge(score)
        rate = self._rate()
        self._agree()
        state.epoch, state.step, state.seconds = state.epoch + 1, 0, self._elapsed()
        if self.workers.first:
            head = {"updates": state.updates, "seconds": round(state.seconds, 1), "learning_rate": rate}
            self._log.write(state.epoch - 1, {**head, **row})
        names = list(self.validation) if validated else []
        display.epoch(state.epoch - 1, state.seconds, rate, row, names, state.best_epoch == state.epoch - 1)

    def _judge(self, score: float) -> None:
        state, config = self.state, self.config
        state.waited += 1
        if score < state.best_score:
            state.best_score, state.best_epoch, state.waited = score, state.epoch, 0
            if self.workers.first:
                with self.averaged():
                    write_tensors(self.folder / "best.safetensors", self._weights(), self._header())
        if score < state.plateau_best:
            state.plateau_best, state.plateau_wait = score, 0
            return
        state.plateau_wait += 1
        if state.plateau_wait > config.plateau_patience:
            state.plateau_scale *= config.plateau_factor
            state.plateau_wait = 0

    # -- schedule ------------------------------------------------------------------------------------------------

    def _agree(self) -> None:
        """All processes stop together, and go by one clock."""
        if self.workers.shared:
            asked, self._clock = self.workers.largest(
                [float(self._stop.asked), time.monotonic() - self._started], self.device
            )
            self._stop.asked = asked > 0

    def _elapsed(self) -> float:
        return time.monotonic() - self._started if self._clock is None else self._clock

    def _progress(self) -> float:
        """Part of the run that is over, by epochs or by time, whichever is further; time is kept for validation."""
        config, state = self.config, self.state
        done = 0.0
        if config.epochs is not None:
            done = (state.epoch + state.step / self._steps) / config.epochs
        if config.max_seconds is not None:
            reserve = min(state.validation_seconds, 0.5 * config.max_seconds)
            done = max(done, self._elapsed() / (config.max_seconds - reserve))
        return min(done, 1.0)

    def _rate(self) -> float:
        return self.config.rate(self._progress(), self.state.updates, self.state.plateau_scale)

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
        """Errors of the averaged weights: ``loss`` over all, ``NAME_force_rmse`` … by data set (``Errors.means``)."""
        began = time.monotonic()
        total = Errors(self.device)
        row: dict[str, float] = {}
        self.network.eval()
        with self.averaged():
            for name, batches in self.validation.items():
                errors = Errors(self.device)
                for batch in self.workers.share(batches):
                    try:
                        answer = predict(self.network, batch, create_graph=False, charges=self.charges)
                    except (NoStablePointError, NotConvergedError) as error:
                        self._failed(error, batch)
                        errors.spoil()
                        break
                    errors.add(answer, batch, self.config.loss(answer, batch))
                self.workers.sum([errors.sums])
                total.sums += errors.sums
                row |= {f"{name}_{k}": v for k, v in errors.means().items() if k != "loss"}
        self.network.train()
        seconds = self.workers.largest([time.monotonic() - began], self.device)[0]
        self.state.validation_seconds = max(self.state.validation_seconds, seconds)
        return {"loss": total.means()["loss"], **row}

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        """What is trained, as the network names it; charges with a name before theirs."""
        own = {} if self.charges is None else self.charges.state_dict(prefix="charges.")
        return {**self.network.state_dict(), **own}

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        """The reverse of :meth:`_weights`. Raises RuntimeError where the weights are others'."""
        if self.charges is not None:
            own = {k for k in weights if k.startswith("charges.")}
            self.charges.load_state_dict({k.removeprefix("charges."): weights[k] for k in own})
            weights = {k: v for k, v in weights.items() if k not in own}
        self.network.load_state_dict(weights)

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
        self._saved = time.monotonic()
        if not self.workers.first:
            return
        tensors = {f"network.{k}": v for k, v in self._weights().items()}
        tensors |= {f"average.{name}": v for name, v in zip(self.names, self.average, strict=True)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{self.names[i]}.{k}": v for k, v in moments.items()}
        if self.charges is not None:
            tensors["answers"] = self.charges.answers()
        tensors |= {"rng.cpu": torch.get_rng_state(), "errors": self._errors.sums}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        write_tensors(self.folder / "checkpoint.safetensors", tensors, self._header())

    def _load(self, path: Path) -> None:
        tensors, header = read_tensors(path)
        network = {k[8:]: v for k, v in tensors.items() if k.startswith("network.")}
        if {k[8:] for k in tensors if k.startswith("average.")} != set(self.names):
            raise InputError(f"{path}: other parameters were trained in this run: resume with the same settings")
        try:
            self._put(network)
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
        if self.charges is not None:
            self.charges.take_answers(tensors["answers"])
        self._errors.sums.copy_(tensors["errors"] if self.workers.first else torch.zeros(9))  # are summed later
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.state = State(**{f.name: header["state"][f.name] for f in fields(State) if f.name in header["state"]})


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, zero where this process had nothing to compute."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
