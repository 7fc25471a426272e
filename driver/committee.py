"""The committee of a trained model: fitted, calibrated, described; ``voltpi.driver.train`` decides when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voltpi.driver.training_report import TrainingTask
from voltpi.driver.training_settings import TrainingSettings
from voltpi.potential.committee import Committee, Seeds
from voltpi.potential.training.evaluation import Evaluated, evaluate_samples
from voltpi.potential.training.last_layers import calibrate, fit_last_layers

__all__ = ["CommitteeMade", "describe_report", "make_committee"]

# another zero of energy is a part of the errors that follows the composition: so much (eV/atom), and so many times what
# it leaves; looked for in so many frames
_OFFSET, _TIMES_SCATTER = 0.05, 5.0
_FRAMES = 200


@dataclass(frozen=True)
class CommitteeMade:
    """A calibrated committee, and what it says of the validation data (``last_layers.calibrate``)."""

    network: Committee
    report: dict[str, Any]


def make_committee(settings: TrainingSettings, task: TrainingTask, say: Callable[[str], None]) -> CommitteeMade | None:
    """The committee that the settings ask for around the task's trained network, or None.

    Raises InputError as ``fit_last_layers`` and ``calibrate`` do, and where the energies of the data have another zero
    than those of a model that keeps its own (``reference_energies: keep``).
    """
    training = settings.training
    if training.committee is None:
        return None
    if isinstance(task.network, Seeds):
        committee: Committee = task.network
    else:
        if settings.reference_energies == "keep":
            some = task.train[:: -(-len(task.train) // _FRAMES)]
            offset, scatter = _offset(evaluate_samples(task.network, some))
            if offset > max(_OFFSET, _TIMES_SCATTER * scatter):
                raise settings.refusal(
                    "data.train",
                    f"energies are {offset:.3g} eV/atom off those of model {Path(str(settings.start)).name} and "
                    f"scatter by {scatter:.2g}, as where they have another zero or come from another level of theory: "
                    "give data of the model's own, or fit the zero with --set reference_energies=fit",
                )
        say(f"fitting {training.committee} last layers")
        committee = fit_last_layers(
            task.network, task.train, settings.loss.build(), members=training.committee, seed=training.seed
        )
    committee.calibration, report = calibrate(committee, task.validation)
    return CommitteeMade(committee, report)


def _offset(answers: Sequence[Evaluated]) -> tuple[float, float]:
    """What energies a constant for each element explains of the errors, and what it leaves: eV/atom, root mean square.

    (0, 0) for too few frames to tell them apart.
    """
    numbers = [answer.sample.systems.numbers.numpy() for answer in answers]
    species = np.unique(np.concatenate(numbers))
    atoms = np.array([len(own) for own in numbers], dtype=float)
    parts = np.array([[(own == z).sum() for z in species] for own in numbers]) / atoms[:, None]
    errors = np.array([answer.sample.energy - answer.energy for answer in answers]) / atoms
    if len(errors) < np.linalg.matrix_rank(parts) + 2:
        return 0.0, 0.0
    explained = parts @ np.linalg.lstsq(parts, errors, rcond=1e-8)[0]
    offset, scatter = (float(np.sqrt(np.mean(x**2))) for x in (explained, errors - explained))
    return offset, scatter


def describe_report(report: dict[str, Any]) -> str:
    """One sentence on the calibration."""
    parts = []
    for name, unit in (("energy", "eV"), ("forces", "eV/Å")):
        own = report[name]
        parts.append(
            f"{name} uncertain by {own['uncertainty']:.3g} {unit} (RMSE {own['rmse']:.3g}; spread times "
            f"{own['alpha']:.3g}), {100 * own['within_1_sigma']:.0f}% of errors within one and "
            f"{100 * own['within_2_sigma']:.0f}% within two standard deviations"
        )
    return f"committee of {report['members']} {report['kind']} on {report['frames']} frames: {'; '.join(parts)}"
