"""Element parameters of the charges from labelled dipoles, polarizabilities and Born charges, before any network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from voltpi.driver.build import build_potential
from voltpi.driver.training_settings import TrainingSettings, load_training
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.model import Potential
from voltpi.potential.training.charge_fit import ChargeFit, errors_of, make_targets, write_table
from voltpi.potential.training.dataset import Sample

__all__ = ["fit_charges", "fitted"]

Say = Callable[[str], None]


def fit_charges(config: Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Path:
    """Fits what ``charges.fit`` of a settings file of ``train`` names, and nothing else; returns the table.

    Raises InputError as ``train`` does, and VoltPIError where the fit was interrupted (the same command goes on).
    """
    from voltpi.driver.training_data import read_samples  # which fits charges itself

    settings = load_training(config, overrides)
    if settings.charges.fit is None:
        raise settings.refusal("charges.fit", "charges.fit is none, so there is nothing to fit; give charges.fit: {}")
    if settings.charges.fit.mode == "joint":
        raise settings.refusal(
            "charges.fit",
            "charges.fit: joint needs the network, which voltpi train trains along; for the charges alone use mode: "
            "before",
        )
    console = Console(quiet=quiet)

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    potential = build_potential(settings.run_settings().model_copy(update={"device": "cpu"}))
    train, validation, _ = read_samples(settings, (), settings.network.r_max, charged=True, say=say)
    fitted(settings, potential, train, validation, say)
    return _folder(settings) / "charges.csv"


def _folder(settings: TrainingSettings) -> Path:
    return Path(settings.output) / "charges"


def fitted(
    settings: TrainingSettings, potential: Potential, train: Sequence[Sample], validation: Sequence[Sample], say: Say
) -> None:
    """Fits the parameters of ``potential``'s charges in place to the labels of ``train``, as ``charges.fit`` says.

    The folder ``charges`` of the output receives ``charges.csv``, ``report.json`` and what a second call goes on from.
    Raises VoltPIError where the fit was interrupted.
    """
    options, charges = settings.charges.fit, potential.charges
    assert options is not None
    assert isinstance(charges, PQEq)
    folder = _folder(settings)
    try:
        fit = ChargeFit(
            charges,
            make_targets(charges, train),
            options.weights(),
            trained=options.train,
            prior=options.prior,
            folder=folder,
        )
    except InputError as error:
        raise settings.refusal("charges.fit", str(error)) from None
    held_out = make_targets(charges, validation)
    before = errors_of(charges, held_out, fit.weights) if held_out else {}
    say(f"fitting {', '.join(fit.elements.trained)} of {', '.join(fit.elements.elements)} to {_kinds(fit.weights)}")

    def report(step: int, loss: float, errors: Mapping[str, float]) -> None:
        say(f"step {step}: loss {loss:.5g}; {_shown(errors)}")

    result = fit.fit(steps=options.steps, report=report)
    if result.reason == "interrupted":
        raise VoltPIError(
            f"stopped after {result.steps} steps of the charges; the same command goes on from there (what there is is "
            f"in {folder})"
        )
    potential.charges = replace(charges, parameters={**charges.parameters, **result.table})
    after = errors_of(potential.charges, held_out, fit.weights) if held_out else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "charges.csv", result.table)
    numbers = {
        "loss": result.loss,
        "steps": result.steps,
        "reason": result.reason,
        "parameters": {symbol: row._asdict() for symbol, row in result.table.items()},
        "relative_errors_of_validation": {"before": before, "after": after},
    }
    (folder / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    validated = f"; validation {_shown(before)} before, {_shown(after)} after" if held_out else ""
    say(f"charges fitted in {result.steps} steps ({result.reason}){validated}; {folder / 'charges.csv'}")


def _kinds(kinds: Mapping[str, float]) -> str:
    return ", ".join(kind.replace("_", " ") for kind in kinds)


def _shown(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{kind.replace('_', ' ')} {100 * error:.2f} %" for kind, error in errors.items())
