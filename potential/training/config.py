"""How a training runs and how it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from voltpi.potential.errors import InputError
from voltpi.potential.training.loss import Loss

__all__ = ["State", "TrainConfig", "TrainResult"]

Reason = Literal["done", "time", "early", "stopped", "interrupted"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes
    ----------
    epochs, max_seconds : where the run ends, and the schedule with it; at least one (seconds add up over resumes)
    batch_size : structures a step
    batch_atoms : largest number of atoms a step (at least one structure), instead of ``batch_size``; or None
    loss : weights and Huber thresholds
    learning_rate, min_learning_rate : at the start and at the end
    schedule : ``cosine`` in max(epochs done, time spent); ``plateau`` (multiplied by ``plateau_factor`` after
        ``plateau_patience`` validations without a better loss); ``constant``
    warmup_steps : steps over which the rate rises linearly
    weight_decay, amsgrad : of AdamW
    clip_norm : largest norm of the gradient, or None
    ema_decay : of the averaged weights, which are validated and saved; shorter in the first steps, 0 switches off
    validate_every : epochs
    patience : validations without a better loss after which the run ends, or None
    checkpoint_seconds : time between checkpoints while running (one is always written at the end)
    dtype : precision of the network
    threads : of torch on the CPU; None leaves them
    tf32 : allow TensorFloat-32 products on a GPU
    """

    epochs: int | None = 100
    max_seconds: float | None = None
    batch_size: int = 4
    batch_atoms: int | None = None
    loss: Loss = field(default_factory=Loss)
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
    patience: int | None = None
    checkpoint_seconds: float = 60.0
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    threads: int | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_seconds is None:
            raise InputError("epochs and max_seconds are both None: give at least one, so that the training ends")
        for key in ("epochs", "max_seconds", "batch_size", "batch_atoms", "learning_rate", "validate_every"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise InputError(f"{key} is {value}: give a positive number")
        if self.schedule not in ("cosine", "plateau", "constant"):
            raise InputError(f"schedule is '{self.schedule}': choose cosine, plateau or constant")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}: give a number from 0 to below 1")

    def batches(self, atoms: Sequence[int], epoch: int) -> list[list[int]]:
        """Which structures make up each step of an epoch, from the number of ``atoms`` of every one.

        Nothing else decides, so that a run resumed within an epoch sees the same batches.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(atoms), generator=generator).tolist()
        if self.batch_atoms is None:
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        batches: list[list[int]] = []
        filled = self.batch_atoms
        for i in order:
            if filled + atoms[i] > self.batch_atoms:
                batches.append([])
                filled = 0
            batches[-1].append(i)
            filled += atoms[i]
        return batches

    def rate(self, progress: float, updates: int, plateau_scale: float) -> float:
        """Learning rate after ``updates`` steps, ``progress`` (0 … 1) through the run."""
        top, low = self.learning_rate, min(self.min_learning_rate, self.learning_rate)
        warmup = min(1.0, (updates + 1) / max(self.warmup_steps, 1))
        if self.schedule == "cosine":
            return warmup * (low + (top - low) * 0.5 * (1 + math.cos(math.pi * progress)))
        return warmup * (max(low, top * plateau_scale) if self.schedule == "plateau" else top)


@dataclass(frozen=True)
class TrainResult:
    """How a call of ``fit`` ended.

    ``reason`` is done (all epochs), time, early (``patience``), stopped (``stop_after``) or interrupted.
    """

    reason: Reason
    epoch: int
    best_epoch: int
    best_score: float
    metrics: dict[str, float]


@dataclass
class State:
    """Everything a resume needs besides tensors."""

    epoch: int = 0
    step: int = 0  # within the epoch
    updates: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0  # of the slowest one: only growing, so that a run that is over stays over
    best_score: float = math.inf
    best_epoch: int = -1
    waited: int = 0  # validations since the best one
    plateau_scale: float = 1.0
    plateau_wait: int = 0
    plateau_best: float = math.inf
    skipped: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
