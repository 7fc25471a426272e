"""The committee of a trained model: fitted, calibrated, described; ``voltpi.driver.train`` decides when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from voltpi.driver.training_report import TrainingTask
from voltpi.driver.training_settings import TrainingSettings
from voltpi.potential.committee import Committee, Seeds
from voltpi.potential.training.last_layers import calibrate, fit_last_layers

__all__ = ["CommitteeMade", "describe_report", "make_committee"]


@dataclass(frozen=True)
class CommitteeMade:
    """A calibrated committee, and what it says of the validation data (``last_layers.calibrate``)."""

    network: Committee
    report: dict[str, Any]


def make_committee(settings: TrainingSettings, task: TrainingTask, say: Callable[[str], None]) -> CommitteeMade | None:
    """The committee that the settings ask for around the task's trained network, or None.

    Raises InputError as ``fit_last_layers`` and ``calibrate`` do.
    """
    training = settings.training
    if training.committee is None:
        return None
    if isinstance(task.network, Seeds):
        committee: Committee = task.network
    else:
        say(f"fitting {training.committee} last layers")
        committee = fit_last_layers(
            task.network, task.train, settings.loss.build(), members=training.committee, seed=training.seed
        )
    committee.calibration, report = calibrate(committee, task.validation)
    return CommitteeMade(committee, report)


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
