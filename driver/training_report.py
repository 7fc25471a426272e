"""What a training made: the card of its model, and a table of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from rich.console import Console
from rich.table import Table

from voltpi.driver.training_settings import TrainingSettings
from voltpi.potential.committee import Seeds
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.training.charge_fit import ElementTable
from voltpi.potential.training.config import State, TrainResult
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.joint import JointCharges
from voltpi.potential.training.workers import Workers

__all__ = ["TrainedRun", "TrainingTask", "make_card", "print_errors", "print_parameters"]


@dataclass(frozen=True)
class TrainingTask:
    """What is trained: the network, the long range that was subtracted, reference energies, samples without both.

    ``latent`` : how the network's own charges interact, where it has them; then ``long_range`` has no charges.
    ``joint`` : charges that are trained along; they stay in the samples until they are.
    """

    network: NequIP | Seeds
    long_range: Potential | None
    latent: LatentCharges | None
    references: dict[str, dict[int, float]]
    train: list[Sample]
    validation: list[Sample]
    card: dict[str, Any]
    joint: JointCharges | None = None


@dataclass(frozen=True)
class TrainedRun:
    """A training that is over: its folder and seed, how it ended, and where it stood."""

    folder: Path
    seed: int
    result: TrainResult
    state: State


def make_card(
    settings: TrainingSettings,
    task: TrainingTask,
    runs: Sequence[TrainedRun],
    errors: Mapping[str, Mapping[str, float]],
    responses: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
    """What the model is made of, in a form that any JSON reader has."""
    elements = [chemical_symbols[z] for z in task.network.species if z]
    long_range = task.long_range
    parts = ["NequIP"]
    if task.latent is not None:
        parts.append("latent charges")
    elif long_range is not None and long_range.charges is not None:
        parts.append("PQEq" if any(row.Z for row in long_range.charges.parameters.values()) else "QEq")
    if long_range is not None and long_range.dispersion is not None:
        parts.append("D3")
    atoms = sum(s.systems.n_atoms for s in task.train)
    begun = {"fine-tuned from": Path(settings.start).name} if settings.start else {}
    return {
        "name": settings.name,
        "summary": f"{' + '.join(parts)} for {', '.join(elements)}",
        **begun,
        "elements": elements,
        "data": {
            "files": task.card["files"],
            "train": len(task.train),
            "train_atoms": atoms,
            "validation": len(task.validation),
        },
        "errors": {
            "units": "validation; forces eV/Å, energies meV/atom, stress GPa; force_rms of what the network learns",
            **errors,
        },
        **({"charges_alone": dict(responses)} if responses else {}),
        **({} if task.joint is None else {"charges_trained": _parameters(settings, task.joint.elements)}),
        "reference_energies": {
            k: {chemical_symbols[z]: e for z, e in own.items()} for k, own in task.references.items()
        },
        "references_in_the_model": name,
        "training": {
            **settings.training.model_dump(),
            "loss": settings.loss.model_dump(),
            "freeze": list(settings.freeze),
            **_ending(runs[0]),
            "processes": Workers().size,
            **({"members": [{"seed": run.seed, **_ending(run)} for run in runs]} if len(runs) > 1 else {}),
        },
        "versions": {"voltpi": version("voltpi"), "torch": torch.__version__},
    }


def _parameters(settings: TrainingSettings, elements: ElementTable) -> dict[str, Any]:
    assert settings.charges.fit is not None
    sides = {"before": elements.start, "after": elements.table()}
    return {
        **settings.charges.fit.model_dump(include={"prior", "rate"}),
        "targets": settings.charges.fit.weights(),
        "trained": elements.trained,
        "units": "chi, eta eV; R Å; K kcal/mol/Å²",
        **{side: {symbol: row._asdict() for symbol, row in table.items()} for side, table in sides.items()},
    }


def print_parameters(console: Console, elements: ElementTable) -> None:
    """The parameters that were trained, before and after."""
    table = Table("charges", *elements.trained)
    after = elements.table()
    for symbol, row in elements.start.items():
        pairs = ((getattr(row, name), getattr(after[symbol], name)) for name in elements.trained)
        table.add_row(symbol, *(f"{old:.4g} → {new:.4g}" for old, new in pairs))
    console.print(table)


def _ending(run: TrainedRun) -> dict[str, Any]:
    return {
        "epochs_done": run.result.epoch,
        "best_epoch": run.result.best_epoch,
        "updates": run.state.updates,
        "seconds": round(run.state.seconds, 1),
        "ended": run.result.reason,
    }


def print_errors(console: Console, errors: Mapping[str, Mapping[str, float]], responses: Mapping[str, Any]) -> None:
    stressed = any("stress_rmse" in e for e in errors.values())
    columns = ["validation", "frames", "force RMSE", "MAE (eV/Å)", "energy RMSE", "MAE (meV/atom)"]
    table = Table(*columns, *(["stress RMSE (GPa)"] if stressed else []))
    for name, e in errors.items():
        row = [name, str(e["frames"]), f"{e['force_rmse']:.4f}", f"{e['force_mae']:.4f}"]
        row += [f"{e['energy_rmse']:.2f}", f"{e['energy_mae']:.2f}"]
        table.add_row(*row, *([f"{e.get('stress_rmse', float('nan')):.4f}"] if stressed else []))
    console.print(table)
    before = responses.get("before", {})
    named = {**responses, **{f"{kind} before": found for kind, found in before.items()}}
    for kind, found in named.items():
        if kind in ("frames", "frames before", "before"):
            continue
        shown = (
            found
            if isinstance(found, str)
            else ", ".join(
                f"{k.replace('_', ' ')} {v:.3g}" if isinstance(v, float) else str(v) for k, v in found.items()
            )
        )
        console.print(f"charges alone, {kind}: {shown}", markup=False, highlight=False, soft_wrap=True)
