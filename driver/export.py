"""``voltpi export``: a model file as a file that other programs run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from voltpi.driver.build import build_potential
from voltpi.driver.settings import load_settings
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.errors import InputError

__all__ = ["export_model"]

# settings that become part of an exported model; everything else belongs to a run of VoltPI
_KEPT = ("model", "precision", "charges.net_charge", "coulomb.accuracy")


def export_model(model: str, to: str, output: Path, assignments: Sequence[str]) -> str:
    """Writes the model and gives a sentence about it.

    Raises InputError for another format than metatomic, a package that is missing, a setting or a model that cannot be
    exported, and a file that exists already or cannot be written.
    """
    if to != "metatomic":
        raise InputError(f"--to is {to}: metatomic is the format that models can be exported to")
    if output.exists():
        raise InputError(f"{output} exists already; remove it, or give another file with --output")
    settings = load_settings(None, [f"model={model}", *assignments])
    if not settings.has_model:
        raise InputError("export needs a model: give a shipped name (voltpi models) or a model file")
    for key in settings.given():
        if key not in _KEPT:
            raise settings.refusal(
                key,
                f"{key} cannot be exported: a metatomic engine passes no field, electrodes or other settings, and an "
                f"exported model computes none; remove it ({', '.join(_KEPT[1:])} can be set)",
            )
    potential = build_potential(settings)
    if isinstance(potential.charges, LatentCharges):
        raise InputError(
            f"model {Path(model).name} has latent charges, which cannot be exported yet: export a model whose charges "
            "are PQEq's"
        )
    try:
        from voltpi.potential.export.metatomic import export_metatomic
    except ImportError as error:
        raise InputError(
            f"--to metatomic needs the package metatomic-torch ({error}); install it with: pip install "
            "'voltpi[metatomic]'"
        ) from None
    from voltpi.potential.checkpoints import read_card

    exported = export_metatomic(output, potential, read_card(model), net_charge=settings.charges.net_charge)
    outputs = " and ".join(sorted(exported.capabilities().outputs.keys() & {"energy", "charge"}, reverse=True))
    return (
        f"{output} is ready: {outputs} at zero field, for LAMMPS, ASE, i-PI (-m metatomic) and other programs that run "
        "metatomic models"
    )
