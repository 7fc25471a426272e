"""``voltpi train`` and ``voltpi finetune``: from labelled files to a model file with its card and figures."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ase.data import atomic_numbers
from rich.console import Console

from voltpi.driver.build import build_potential, choose_device, read_charge_parameters
from voltpi.driver.committee import describe_report, make_committee
from voltpi.driver.settings import Charges
from voltpi.driver.settings_file import Origins
from voltpi.driver.training_data import TrainingData, read_training_data, without_long_range
from voltpi.driver.training_report import TrainedRun, TrainingTask, make_card, print_errors, print_parameters
from voltpi.driver.training_settings import TrainingSettings, load_training, made_of
from voltpi.potential.checkpoints import load_potential, model_path, read_card, save_potential
from voltpi.potential.committee import Committee, LastLayers, Seeds
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, PQEq
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.shortrange.pair import ZBL, nuclear_repulsion
from voltpi.potential.training.baseline import describe
from voltpi.potential.training.charge_fit import write_table
from voltpi.potential.training.charge_report import report_charges
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.evaluation import errors_by_group, evaluate_samples
from voltpi.potential.training.freezing import freeze
from voltpi.potential.training.joint import JointCharges
from voltpi.potential.training.latent import begin_charges, set_sign
from voltpi.potential.training.references import (
    reference_energies,
    subtract_references,
    summarize,
    without_repulsion,
)
from voltpi.potential.training.storage import read_weights
from voltpi.potential.training.trainer import Trainer
from voltpi.potential.training.workers import launched, local_device

__all__ = ["add_committee", "finetune", "train"]

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


def add_committee(
    model: str,
    files: Sequence[Path],
    *,
    members: int = 8,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Path:
    """Gives a trained model a committee of last layers, fitted and calibrated on labelled files; returns the new file.

    Energies, forces and charges stay those of the model. ``out`` : folder (default: MODEL-committee). Settings of
    ``train`` on data and loss may be given as ``overrides``. Raises InputError as ``train`` does.
    """
    stem = Path(model).name.removesuffix(".safetensors")
    data = {
        "name": out.name if out is not None else f"{stem}-committee",
        "output": str(out or f"{stem}-committee"),
        "data": {"train": [str(f) for f in files]},
        "start": model,
        "reference_energies": "keep",
        "training": {"committee": members},
    }
    origins: Origins = {("start",): "MODEL", ("training", "committee"): "--members", ("data", "train"): "DATA"}
    settings = made_of(data, origins, overrides)
    if settings.training.committee_kind != "last-layers":
        raise settings.refusal("training.committee_kind", "a model that is trained gets last-layers; for seeds, train")
    console = Console(quiet=quiet)

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    folder = Path(settings.output)
    with _folder_for(folder):
        task = _prepare(settings, say, progress=not quiet)
    device = choose_device(settings.run_settings().model_copy(update={"device": settings.training.device}))
    dtype = torch.float64 if settings.training.precision == "float64" else torch.float32
    task.network.to(device, dtype).eval()
    committee = make_committee(settings, task, say)
    assert committee is not None
    potential = load_potential(model)
    potential.short_range = _copy(committee.network)
    card = {**read_card(model), "committee": {**committee.report, "files": task.card["files"]}}
    path = folder / f"{settings.name}.safetensors"
    save_potential(path, potential, card)
    (folder / "report.json").write_text(json.dumps(card, indent=1) + "\n")
    say(describe_report(committee.report))
    say(f"{path} is {Path(model).name} with a committee; report.json in {folder}")
    return path


def _run(settings: TrainingSettings, quiet: bool) -> Path:
    device = choose_device(settings.run_settings().model_copy(update={"device": settings.training.device}))
    with launched(device) as workers:
        device = local_device(device)
        console = Console(quiet=quiet or not workers.first)

        def say(sentence: str) -> None:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)

        torch.manual_seed(settings.training.seed)
        folder = Path(settings.output)
        with _folder_for(folder) if workers.first else nullcontext():
            task = _prepare(settings, say, progress=not console.quiet)
        runs = []
        networks = _networks(settings, task.network)
        for member, network in enumerate(networks):
            if len(networks) > 1:
                say(f"member {member + 1} of {len(networks)}")
            own = folder / f"member-{member + 1}" if len(networks) > 1 else folder
            part = replace(task, network=network)
            runs.append(_train(settings, part, own, member, device, progress=not console.quiet))
        if len(networks) > 1:
            task = replace(task, network=Seeds([network.eval() for network in networks]))
        if task.joint is not None:
            task = _with_trained_charges(settings, task, progress=not console.quiet)
        model = folder / f"{settings.name}.safetensors"
        if workers.first:
            _finish(settings, task, runs, model, console, say)
        workers.barrier()
    return model


def _networks(settings: TrainingSettings, network: NequIP) -> list[NequIP]:
    """What is trained: the network; for a committee of seeds as many as members, drawn anew or copies of the start."""
    networks = [network]
    if settings.training.committee_kind == "seeds":
        if network.latent_readout is not None:
            key = "training.committee_kind"
            raise settings.refusal(
                key, f"{key}: seeds would give each member latent charges of its own; use last-layers"
            )
        for member in range(1, settings.training.committee or 1):
            torch.manual_seed(settings.training.seed + member)
            networks.append(NequIP(**network.config) if settings.start is None else copy.deepcopy(network))
    return networks


def _train(
    settings: TrainingSettings, task: TrainingTask, folder: Path, member: int, device: str, *, progress: bool
) -> TrainedRun:
    """Trains one network to its end, which then has its best weights. Raises VoltPIError where it was interrupted."""
    seed = settings.training.seed + member
    card = {**task.card, "run": {**task.card["run"], "training.seed": seed}}
    _check_same_run(folder, card["run"])
    config = replace(settings.training.build(settings.loss.build(), device), seed=seed)
    trainer = Trainer(
        task.network, task.train, task.validation, config, folder, card=card, progress=progress, charges=task.joint
    )
    result = trainer.fit(resume=True)
    if result.reason == "interrupted":
        raise VoltPIError(
            f"stopped in epoch {result.epoch}; the same command goes on from there (what there is is in {folder})"
        )
    trainer.load_best()
    return TrainedRun(folder, seed, result, trainer.state)


@contextmanager
def _folder_for(folder: Path) -> Iterator[None]:
    """Makes the output folder; input that is refused leaves no empty one behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {folder} cannot be made ({error}); give a folder that can") from None
    try:
        yield
    except InputError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise


def _prepare(settings: TrainingSettings, say: Callable[[str], None], *, progress: bool) -> TrainingTask:
    start = None
    if settings.start is not None:
        start = load_potential(settings.start, precision="double")
        if isinstance(start.short_range, LastLayers):  # they belong to the weights as they were
            start.short_range = start.short_range.network
        if not isinstance(start.short_range, NequIP):
            several = isinstance(start.short_range, Seeds)
            has = "several networks, none to train further" if several else "no network to train further"
            raise settings.refusal("start", f"model {settings.start} has {has}; use another")
        start.short_range.train().requires_grad_(True)
    long_range = _long_range(settings, start)
    known = [] if start is None else [z for z in start.short_range.species if z]
    cutoff = settings.network.r_max if start is None else start.short_range.cutoff
    latent = _latent(settings, start)
    wall = _repulsion(settings, start)
    data = read_training_data(settings, long_range, latent, known, cutoff, say=say, progress=progress)
    left = data.train
    joint = _joint(settings, long_range, data.train)
    if joint is not None:  # what the charges leave as they are at the start
        left, _ = without_long_range(settings, Potential(charges=joint.model), data.train, [], progress=progress)
    references = _references(settings, without_repulsion(left, wall) if start is None else left, start)
    train, validation = (subtract_references(side, references) for side in (data.train, data.validation))
    summary = summarize(train if joint is None else subtract_references(left, references), wall)
    if start is None:
        network = NequIP(
            summary.species,
            **settings.network.model_dump(),
            n_neighbors=max(summary.average_neighbors, 1.0),
            scale=summary.force_rms or 1.0,
            latent=latent is not None,
        )
        if latent is not None:
            begin_charges(network)
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
    card = {"files": data.files, "run": _identity(settings, network, long_range, latent, data)}
    if joint is not None:
        fitted = ", ".join(joint.elements.trained)
        say(f"charges trained along: {fitted} of {', '.join(joint.elements.elements)}")
    return TrainingTask(network, long_range, latent, references, train, validation, card, joint)


def _joint(settings: TrainingSettings, long_range: Potential | None, train: list[Sample]) -> JointCharges | None:
    """Charges that are trained along with the network, or None."""
    options = settings.charges.fit_of("joint")
    if options is None or long_range is None:
        return None
    assert isinstance(long_range.charges, PQEq)
    try:
        return JointCharges(
            long_range.charges,
            train,
            trained=options.train,
            weights=options.weights(),
            prior=options.prior,
            rate=options.rate,
        )
    except InputError as error:
        raise settings.refusal("charges.fit", str(error)) from None


def _with_trained_charges(settings: TrainingSettings, task: TrainingTask, *, progress: bool) -> TrainingTask:
    """The same with the charges as they were trained, and samples without them."""
    assert task.joint is not None
    assert task.long_range is not None
    charges = Potential(charges=task.joint.trained_model)
    train, validation = without_long_range(settings, charges, task.train, task.validation, progress=progress)
    long_range = Potential(charges=charges.charges, dispersion=task.long_range.dispersion)
    return replace(task, long_range=long_range, train=train, validation=validation)


def _long_range(settings: TrainingSettings, start: Potential | None) -> Potential | None:
    """Charges and dispersion that the network does not learn, or None for neither."""
    if start is not None:
        charges = None if isinstance(start.charges, LatentCharges) else start.charges
        if charges is None and start.dispersion is None:
            return None
        return Potential(charges=charges, dispersion=start.dispersion)
    changes: dict[str, Any] = {"device": "cpu"}
    if settings.charges.model == "latent":
        changes |= {"charges": Charges(model="none")}
    if settings.charges.model in ("latent", "none") and settings.dispersion is None:
        return None
    return build_potential(settings.run_settings().model_copy(update=changes))


def _repulsion(settings: TrainingSettings, start: Potential | None) -> ZBL | None:
    """The repulsion that the network does not learn, or None."""
    if start is not None:
        assert isinstance(start.short_range, NequIP)
        return start.short_range.repulsion
    return nuclear_repulsion(settings.network.repulsion, settings.network.r_max)


def _latent(settings: TrainingSettings, start: Potential | None) -> LatentCharges | None:
    """How the charges interact that the network gives, or None where it gives none."""
    if start is not None:
        return start.charges if isinstance(start.charges, LatentCharges) else None
    if settings.charges.model != "latent":
        return None
    c, constant = settings.charges, settings.coulomb.coulomb_constant
    try:
        return LatentCharges(
            conserve=c.conserve,
            sigma=c.sigma,
            epsilon_infinity=c.epsilon_infinity,
            relaxation=c.relaxation,
            parameters=read_charge_parameters(c.parameters),
            accuracy=settings.coulomb.accuracy,
            coulomb_constant=COULOMB_CONSTANT if isinstance(constant, str) else constant,
        )
    except InputError as error:
        raise settings.refusal("charges.model", str(error)) from None


def _references(
    settings: TrainingSettings, train: Sequence[Sample], start: Potential | None
) -> dict[str, dict[int, float]]:
    """Reference energies (eV) by data set and atomic number."""
    names = list(dict.fromkeys(s.dataset for s in train))
    chosen = settings.reference_energies
    if isinstance(chosen, dict):
        return {name: {atomic_numbers[symbol]: e for symbol, e in chosen.items()} for name in names}
    if start is None:
        return reference_energies(train, ridge=settings.ridge)
    if chosen == "keep":
        return {name: dict(start.reference_energies) for name in names}
    # what the network gives is not for the references to explain
    assert isinstance(start.short_range, NequIP)
    answers = evaluate_samples(start.short_range, train)
    left = [replace(a.sample, energy=a.sample.energy - a.energy) for a in answers]
    fitted = reference_energies(left, ridge=settings.ridge, start=start.reference_energies)
    return {name: {**start.reference_energies, **own} for name, own in fitted.items()}


def _identity(
    settings: TrainingSettings,
    network: NequIP,
    long_range: Potential | None,
    latent: LatentCharges | None,
    data: TrainingData,
) -> dict[str, Any]:
    """What must not change from one call to the next for a run to go on exactly."""
    parts: list[Any] = [] if long_range is None else [long_range.charges, long_range.dispersion]
    parts += [] if latent is None else [latent]
    start, joint = settings.start, settings.charges.fit_of("joint")
    identity = {
        "data": [[f["sha256"], f["use"], f["name"], f["frames"], f["labels"], f["units"]] for f in data.files],
        "data.validation": settings.data.validation if isinstance(settings.data.validation, float) else "files",
        "data.split_seed": settings.data.split_seed,
        "network": {key: value for key, value in network.config.items() if key != "repulsion" or value is not None},
        "charges and dispersion": [describe(part) for part in parts],
        "charges.fit": None if joint is None else {"mode": joint.mode, "train": joint.train},
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
    runs: Sequence[TrainedRun],
    path: Path,
    console: Console,
    say: Callable[[str], None],
) -> None:
    """Writes model, report and figures from the best weights, and prints the errors."""
    folder = path.parent
    if settings.reference_energies == "fit":
        task = _refitted(task, settings.ridge)
    if task.latent is not None and set_sign(task.network, task.train):
        say("latent charges turned: electronegative elements are negative (without fields, energies do not know)")
    validated = evaluate_samples(task.network, task.validation)
    errors = errors_by_group(validated)
    charges: Any = None if task.long_range is None else task.long_range.charges
    with_charges = Potential(charges=charges) if charges is not None else None
    if task.latent is not None:
        charges = task.latent
        with_charges = Potential(_copy(task.network), charges, precision="double")
    responses = {} if with_charges is None else report_charges(with_charges, task.validation)
    if task.joint is not None:
        (folder / "charges").mkdir(exist_ok=True)
        write_table(folder / "charges" / "charges.csv", task.joint.elements.table())
        before = report_charges(Potential(charges=task.joint.model), task.validation)
        responses = {**responses, **({"before": before} if before else {})}
    name = next(iter(task.references))
    card = make_card(settings, task, runs, errors, responses, name)
    dispersion = None if task.long_range is None else task.long_range.dispersion

    def save(network: NequIP | Committee) -> None:
        # in single precision, which is what a model file holds
        potential = Potential(_copy(network), charges, dispersion, reference_energies=task.references[name])
        save_potential(path, potential, card)
        (folder / "report.json").write_text(json.dumps(card, indent=1) + "\n")

    if not isinstance(task.network, Committee):
        save(task.network)  # whatever becomes of a committee
    committee = make_committee(settings, task, say)
    if committee is not None:
        card["committee"] = committee.report
        save(committee.network)
    if settings.figures:
        from voltpi.driver.training_figures import draw_learning, draw_parity

        for run in runs:
            draw_learning(run.folder / "log.csv", run.folder / "learning")
        draw_parity(evaluate_samples(task.network, _some(task.train)), validated, folder / "parity")
    print_errors(console, errors, responses)
    if task.joint is not None:
        print_parameters(console, task.joint.elements)
    if committee is not None:
        say(describe_report(committee.report))
    best = ", ".join(str(run.result.best_epoch) for run in runs)
    say(
        f"{_REASONS[runs[0].result.reason]}: {path} (best epoch {best}); "
        f"{'learning and parity figures, ' if settings.figures else ''}log.csv and report.json in {folder}"
    )


def _copy(network: NequIP | Committee) -> Any:
    return copy.deepcopy(network).to("cpu", torch.float32)


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
