"""From the files that the settings name to samples that a network can be trained on, checked on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from voltpi.driver.fit_charges import fitted
from voltpi.driver.training_settings import TrainingSettings
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.training.baseline import LongRange, subtract_baseline
from voltpi.potential.training.dataset import Sample, make_samples, read_source
from voltpi.potential.training.labels import KINDS, Source
from voltpi.potential.training.latent import with_interactions
from voltpi.potential.training.splitting import check_disjoint, check_repeats, split
from voltpi.potential.training.unit_check import UnitReport, check_units
from voltpi.potential.training.workers import Workers

__all__ = ["TrainingData", "read_samples", "read_training_data", "without_long_range"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingData:
    """Samples without their long-range part (reference energies are still in), and what the card says of the files."""

    train: list[Sample]
    validation: list[Sample]
    files: list[dict[str, Any]] = field(default_factory=list)


def read_training_data(
    settings: TrainingSettings,
    long_range: Potential | None,
    latent: LatentCharges | None,
    known: Sequence[int],
    cutoff: float,
    *,
    say: Say,
    progress: bool = True,
) -> TrainingData:
    """Reads, checks and splits all frames, then computes the long-range part of each once and subtracts it.

    With ``charges.fit`` the parameters of ``long_range``'s charges are first fitted, in place; with ``mode: joint`` the
    charges stay in the labels, and only dispersion is subtracted.

    ``known`` : atomic numbers that the model to fine-tune knows, or none. The long-range part is kept in the output
    folder. Where the network has ``latent`` charges, samples come with what these do to each other. Raises InputError
    that names file, frame and label for whatever cannot be trained on.
    """
    charged = latent is not None or (long_range is not None and long_range.charges is not None)
    train, validation, files = read_samples(settings, known, cutoff, charged=charged, say=say)
    if settings.charges.fit_of("before") and long_range is not None:
        with Workers().first_goes_ahead():
            fitted(settings, long_range, train, validation, say)
    if long_range is not None and settings.charges.fit_of("joint"):
        long_range = Potential(dispersion=long_range.dispersion) if long_range.dispersion is not None else None
    if long_range is not None:
        train, validation = without_long_range(settings, long_range, train, validation, progress=progress)
    if latent is not None:
        train, validation = (with_interactions(side, latent, progress=progress) for side in (train, validation))
    return TrainingData(train, validation, files)


def read_samples(
    settings: TrainingSettings, known: Sequence[int], cutoff: float, *, charged: bool, say: Say
) -> tuple[list[Sample], list[Sample], list[dict[str, Any]]]:
    """All frames for training and for validation, with their labels as they are, and what the card says of the files.

    ``charged`` : whether the potential has charges. Raises InputError as :func:`read_training_data`.
    """
    data = settings.data
    train_files = data.sources(data.train)
    own_validation = not isinstance(data.validation, float)
    validation_files = data.sources(data.validation) if not isinstance(data.validation, float) else []
    sides: list[list[Sample]] = [[], []]
    files: list[dict[str, Any]] = []
    for side, sources in enumerate((train_files, validation_files)):
        for source in sources:
            source, frames = read_source(source)
            samples = make_samples(source, frames, cutoff)
            _check_elements(samples, known, settings)
            _check_charges(settings, samples, charged)
            report = check_units(samples) if data.check_units else None
            sides[side] += samples
            files.append(_describe(source, samples, report, ("training", "validation")[side]))
            say(_sentence(files[-1], samples))
    train, validation = sides
    if not own_validation:
        assert isinstance(data.validation, float)
        train, validation = split(train, data.validation, seed=data.split_seed)
    repeats = check_repeats(train)
    check_disjoint(train, validation)
    say(
        f"{len(train)} frames to train on, {len(validation)} to validate"
        + (f"; {repeats} of the first repeat others" if repeats else "")
    )
    return train, validation, files


def without_long_range(
    settings: TrainingSettings, potential: Potential, train: list[Sample], validation: list[Sample], *, progress: bool
) -> tuple[list[Sample], list[Sample]]:
    """Samples whose labels are what ``potential``'s charges and dispersion leave; values are kept in the output folder.

    Every process calls it; the first computes.
    """
    baseline = LongRange(potential.charges, potential.dispersion)
    workers = Workers()
    done: list[list[Sample]] = []
    with workers.first_goes_ahead():
        for samples in (train, validation):
            by_file = [[s for s in samples if s.path == path] for path in dict.fromkeys(s.path for s in samples)]
            cache = Path(settings.output) / "long-range"
            options: dict[str, Any] = {"cache": cache, "progress": progress}
            done.append([s for own in by_file for s in subtract_baseline(own, baseline, baseline.key, **options)])
    return done[0], done[1]


def _check_elements(samples: Sequence[Sample], known: Sequence[int], settings: TrainingSettings) -> None:
    for sample in samples if known else ():
        unknown = sorted(set(sample.systems.numbers.tolist()) - set(known))
        if unknown:
            raise InputError(
                f"{sample.path}, frame {sample.frame}: has {chemical_symbols[unknown[0]]}, which model "
                f"{Path(str(settings.start)).name} does not know (it knows "
                f"{', '.join(chemical_symbols[z] for z in known)}): remove the frame, or train from scratch"
            )


def _check_charges(settings: TrainingSettings, samples: Sequence[Sample], charged: object) -> None:
    """Refuses labels that nothing in the potential could answer to."""
    if charged:
        return
    for sample in samples:
        for kind, value, unit in (
            ("field", sample.systems.field[0].tolist(), "V/Å"),
            ("charge", sample.systems.net_charge.tolist(), "e"),
        ):
            if np.any(value):
                shown = ", ".join(f"{x:g}" for x in value)
                leave = f"labels.{kind}: none" if kind == "charge" else "only frames without one"
                raise InputError(
                    f"{sample.path}, frame {sample.frame}: has a {kind} of {shown} {unit}, but the potential has no "
                    f"charges to feel it: set charges.model (for example pqeq), or use {leave}"
                )


def _describe(source: Source, samples: Sequence[Sample], report: UnitReport | None, use: str) -> dict[str, Any]:
    numbers = sorted({int(z) for s in samples for z in s.systems.numbers.unique()})
    described: dict[str, Any] = {
        "file": Path(source.path).name,
        "sha256": hashlib.sha256(Path(source.path).read_bytes()).hexdigest(),
        "use": use,
        "name": source.name,
        "frames": len(samples),
        "elements": [chemical_symbols[z] for z in numbers],
        "labels": {kind: source.key(kind) for kind in KINDS if source.key(kind) is not None},
        "units": {name: getattr(source.units, name) for name in ("length", "energy", "forces", "stress")},
        "with_stress": sum(s.stress is not None for s in samples),
    }
    if report is not None:
        measured = {"stiffness_over_usual": report.stiffness, "energy_over_forces": report.energy}
        described["units_measured"] = {k: round(v, 3) for k, v in measured.items() if v is not None}
    return described


def _sentence(file: dict[str, Any], samples: Sequence[Sample]) -> str:
    labels = ", ".join(f"{kind} '{key}'" for kind, key in file["labels"].items())
    atoms = [s.systems.n_atoms for s in samples]
    size = f"{min(atoms)}" if min(atoms) == max(atoms) else f"{min(atoms)}–{max(atoms)}"
    text = f"{file['file']}: {len(samples)} frames of {size} atoms ({', '.join(file['elements'])}); labels {labels}"
    stressed = file["with_stress"]
    if ("stress" in file["labels"] or "virial" in file["labels"]) and stressed < len(samples):
        text += f" ({stressed} frames have a stress that counts)"
    measured = file.get("units_measured")
    if measured is None:
        return text + "; units not checked"
    shown = [f"{k.replace('_', ' ')} {v:.2g}" for k, v in measured.items()]
    return text + (f"; units: {', '.join(shown)}" if shown else "; units: no trend to tell them by")
