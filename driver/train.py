"""``voltpi train`` and ``voltpi finetune``: from labelled files to a model file with its card and figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ase.data import atomic_numbers
from rich.console import Console

from voltpi.driver.build import build_potential, choose_device
from voltpi.driver.training_data import TrainingData, read_training_data
from voltpi.driver.training_report import TrainingTask, make_card, print_errors
from voltpi.driver.training_settings import TrainingSettings, load_training, made_of
from voltpi.potential.checkpoints import load_potential, model_path, save_potential
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.training.baseline import describe
from voltpi.potential.training.charge_report import report_charges
from voltpi.potential.training.config import TrainResult
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.evaluation import errors_by_group, evaluate_samples
from voltpi.potential.training.freezing import freeze
from voltpi.potential.training.references import reference_energies, subtract_references, summarize
from voltpi.potential.training.storage import read_weights
from voltpi.potential.training.trainer import Trainer
from voltpi.potential.training.workers import launched, local_device

__all__ = ["finetune", "train"]

_REASONS = {
    "done": "all epochs are done",
    "time": "the time is over",
    "early": "no better validation for training.patience validations",
}
_MOST_EVALUATED = 2000


def train(config: Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Path:
    """Trains as a settings file says, or goes on with what is in its output folder; returns the model file.

    Raises InputError for settings and data that cannot be right, VoltPIError where the run was interrupted (the same
    command goes on).
    """
    return _run(load_training(config, overrides), quiet)


def finetune(
    model: str,
    files: Sequence[Path],
    *,
    frozen: Sequence[str] = (),
    out: Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Path:
    """Trains a model's network further on other data; long range and dispersion stay those of the model.

    ``frozen`` : patterns of parameters that stay; ``out`` : folder (default: MODEL-finetuned). Settings of ``train``
    may be given as ``overrides``; the learning rate starts at a fifth of that of a training from scratch.
    """
    stem = Path(model).name.removesuffix(".safetensors")
    data = {
        "name": out.name if out is not None else f"{stem}-finetuned",
        "output": str(out or f"{stem}-finetuned"),
        "data": {"train": [str(f) for f in files]},
        "start": model,
        "freeze": list(frozen),
        "training": {"learning_rate": 1e-3},
    }
    return _run(
        made_of(data, {("start",): "MODEL", ("freeze",): "--freeze", ("data", "train"): "DATA"}, overrides), quiet
    )


def _run(settings: TrainingSettings, quiet: bool) -> Path:
    device = choose_device(settings.run_settings().model_copy(update={"device": settings.training.device}))
    with launched(device) as workers:
        device = local_device(device)
        console = Console(quiet=quiet or not workers.first)

        def say(sentence: str) -> None:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)

        torch.manual_seed(settings.training.seed)
        folder = Path(settings.output)
        if workers.first:
            _make_folder(folder)
        task = _prepare(settings, say, progress=not console.quiet)
        _check_same_run(folder, task.card["run"])
        config = settings.training.build(settings.loss.build(), device)
        trainer = Trainer(
            task.network, task.train, task.validation, config, folder, card=task.card, progress=not console.quiet
        )
        result = trainer.fit(resume=True)
        model = folder / f"{settings.name}.safetensors"
        if result.reason == "interrupted":
            raise VoltPIError(
                f"stopped in epoch {result.epoch}; the same command goes on from there (what there is is in {folder})"
            )
        trainer.load_best()
        if workers.first:
            _finish(settings, task, trainer, result, model, console)
        workers.barrier()
    return model


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {folder} cannot be made ({error}); give a folder that can") from None


def _prepare(settings: TrainingSettings, say: Callable[[str], None], *, progress: bool) -> TrainingTask:
    start = None
    if settings.start is not None:
        start = load_potential(settings.start, precision="double")
        if not isinstance(start.short_range, NequIP):
            raise settings.refusal("start", f"model {settings.start} has no network to train further; use another")
        start.short_range.train().requires_grad_(True)
    long_range = _long_range(settings, start)
    known = [] if start is None else [z for z in start.short_range.species if z]
    cutoff = settings.network.r_max if start is None else start.short_range.cutoff
    data = read_training_data(settings, long_range, known, cutoff, say=say, progress=progress)
    references = _references(settings, data, start)
    train, validation = (subtract_references(side, references) for side in (data.train, data.validation))
    summary = summarize(train)
    if start is None:
        network = NequIP(
            summary.species,
            **settings.network.model_dump(),
            n_neighbors=max(summary.average_neighbors, 1.0),
            scale=summary.force_rms or 1.0,
        )
        references_sentence = ""
    else:
        network = start.short_range
        references_sentence = f"; starts from {Path(str(settings.start)).name}"
        if names := freeze(network, settings.freeze):
            references_sentence += f", {len(names)} of {len(list(network.parameters()))} tensors frozen"
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    say(
        f"{'residual ' if long_range else ''}forces to learn {summary.force_rms:.3g} eV/Å (RMS), "
        f"{summary.average_neighbors:.1f} neighbours an atom, {trained} parameters to train{references_sentence}"
    )
    card = {"files": data.files, "run": _identity(settings, network, long_range, data)}
    return TrainingTask(network, long_range, references, train, validation, card)


def _long_range(settings: TrainingSettings, start: Potential | None) -> Potential | None:
    """Charges and dispersion that the network does not learn, or None for neither."""
    if start is not None:
        if start.charges is None and start.dispersion is None:
            return None
        return Potential(charges=start.charges, dispersion=start.dispersion)
    if settings.charges.model == "none" and settings.dispersion is None:
        return None
    return build_potential(settings.run_settings().model_copy(update={"device": "cpu"}))


def _references(settings: TrainingSettings, data: TrainingData, start: Potential | None) -> dict[str, dict[int, float]]:
    """Reference energies (eV) by data set and atomic number."""
    names = list(dict.fromkeys(s.dataset for s in data.train))
    chosen = settings.reference_energies
    if isinstance(chosen, dict):
        return {name: {atomic_numbers[symbol]: e for symbol, e in chosen.items()} for name in names}
    if start is None:
        return reference_energies(data.train, ridge=settings.ridge)
    if chosen == "keep":
        return {name: dict(start.reference_energies) for name in names}
    # what the network gives is not for the references to explain
    assert isinstance(start.short_range, NequIP)
    answers = evaluate_samples(start.short_range, data.train)
    left = [replace(a.sample, energy=a.sample.energy - a.energy) for a in answers]
    fitted = reference_energies(left, ridge=settings.ridge, start=start.reference_energies)
    return {name: {**start.reference_energies, **own} for name, own in fitted.items()}


def _identity(
    settings: TrainingSettings, network: NequIP, long_range: Potential | None, data: TrainingData
) -> dict[str, Any]:
    """What must not change from one call to the next for a run to go on exactly."""
    parts = [] if long_range is None else [long_range.charges, long_range.dispersion]
    start = settings.start
    identity = {
        "data": [[f["sha256"], f["use"], f["name"], f["frames"], f["labels"], f["units"]] for f in data.files],
        "data.validation": settings.data.validation if isinstance(settings.data.validation, float) else "files",
        "data.split_seed": settings.data.split_seed,
        "network": network.config,
        "charges and dispersion": [describe(part) for part in parts],
        "start": None if start is None else hashlib.sha256(model_path(start).read_bytes()).hexdigest(),
        "freeze": list(settings.freeze),
        "reference_energies": settings.reference_energies,
        "ridge": settings.ridge,
        "training.seed": settings.training.seed,
        "training.precision": settings.training.precision,
    }
    return json.loads(json.dumps(identity))


def _check_same_run(folder: Path, identity: Mapping[str, Any]) -> None:
    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.exists():
        return
    _, header = read_weights(checkpoint)
    before = header.get("card", {}).get("run", {})
    changed = [key for key, value in identity.items() if before.get(key) != value]
    if changed:
        raise InputError(
            f"output: {folder} holds a training that was begun with other {changed[0]}: give another output folder, or "
            f"restore {changed[0]} to go on"
        )


def _finish(
    settings: TrainingSettings,
    task: TrainingTask,
    trainer: Trainer,
    result: TrainResult,
    path: Path,
    console: Console,
) -> None:
    """Writes model, report and figures from the best weights, and prints the errors."""
    folder = path.parent
    if settings.reference_energies == "fit":
        task = _refitted(task, settings.ridge)
    validated = evaluate_samples(task.network, task.validation)
    errors = errors_by_group(validated)
    charges = None if task.long_range is None else task.long_range.charges
    responses = {} if charges is None else report_charges(charges, task.validation)
    name = next(iter(task.references))
    card = make_card(settings, task, trainer, result, errors, responses, name)
    dispersion = None if task.long_range is None else task.long_range.dispersion
    # a copy in single precision, which is what a model file holds
    network = NequIP(**task.network.config)
    network.load_state_dict(task.network.state_dict())
    save_potential(path, Potential(network, charges, dispersion, reference_energies=task.references[name]), card)
    (folder / "report.json").write_text(json.dumps(card, indent=1) + "\n")
    if settings.figures:
        from voltpi.driver.training_figures import draw_learning, draw_parity

        draw_learning(folder / "log.csv", folder / "learning")
        draw_parity(evaluate_samples(task.network, _some(task.train)), validated, folder / "parity")
    print_errors(console, errors, responses)
    console.print(
        f"{_REASONS[result.reason]}: {path} (best epoch {result.best_epoch}); "
        f"{'learning and parity figures, ' if settings.figures else ''}log.csv and report.json in {folder}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _some(samples: list[Sample]) -> list[Sample]:
    return samples[:: -(-len(samples) // _MOST_EVALUATED)]


def _refitted(task: TrainingTask, ridge: float) -> TrainingTask:
    """The same with reference energies fitted once more, to what the trained network leaves of the training data."""
    answers = evaluate_samples(task.network, _some(task.train))
    change = reference_energies([replace(a.sample, energy=a.sample.energy - a.energy) for a in answers], ridge=ridge)
    for name, own in task.references.items():  # elements that are not in these frames
        change[name] = dict.fromkeys(own, 0.0) | change.get(name, {})
    return replace(
        task,
        references={n: {z: e + change[n][z] for z, e in own.items()} for n, own in task.references.items()},
        train=subtract_references(task.train, change),
        validation=subtract_references(task.validation, change),
    )
