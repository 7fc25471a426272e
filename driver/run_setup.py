"""What the settings of a finished run mean for its start structure, for the analyses, which read files only."""

from __future__ import annotations

from typing import Literal

import numpy as np

from voltpi.analysis.capacitor import Electrode, Setup
from voltpi.analysis.run_inputs import Given
from voltpi.driver.ipi_input import parameter_value
from voltpi.driver.potentiostat import settings_of, without_ghost
from voltpi.driver.schedule import settings_at
from voltpi.driver.settings import Schedule, load_settings
from voltpi.driver.structures import prepare_frame, read_structures
from voltpi.potential.errors import InputError

__all__ = ["describe_run"]


def describe_run(given: Given) -> Setup:
    """Electrodes, charges' widths and boundary of a run, from its settings, parameters and start structure.

    Profiles go across the open direction of a slab or the one in which the potential jumps; in other periodic cells
    across the one along which the electrodes are farthest apart, or c. Raises InputError for files that cannot be read,
    settings without charges or with the tapered sum, and structures that are periodic in fewer than two directions.
    """
    from voltpi.driver.build import build_potential
    from voltpi.potential.electrostatics.pqeq import POINT, PQEq
    from voltpi.potential.model import Potential

    overrides = {key: parameter_value(value) for key, value in given.overrides.items()}
    settings = load_settings(given.settings, overrides, origin="<parameters>", folder=given.folder)
    if given.template is None:
        raise InputError(f"{given.source}: the run's start structure is not known; put it beside as start.xyz")
    atoms = read_structures(given.template)[0]
    potentiostat = settings.potentiostat
    if potentiostat is None:
        plain = settings_at(settings)
    else:
        plain, atoms = settings_of(settings, atoms), without_ghost(atoms, settings)
    if plain.charges.model == "linear-qeq":
        raise settings.refusal("charges.model", "profiles need the charges' Coulomb sum; linear-qeq has none")
    # nothing is evaluated here: what that would need is left out
    unused = {} if settings.has_model else {"short_range": None, "dispersion": None}
    bare = plain.model_copy(update=unused | {"device": "cpu"})
    charges = build_potential(bare).charges
    if not isinstance(charges, PQEq):
        raise settings.refusal("charges.model", "profiles need charges and their whole Coulomb sum; this run had none")
    if charges.carries and settings.charges.model != "fixed":  # the run's own would cost a solution
        even = (settings.charges.net_charge / len(atoms),) * len(atoms)
        bare = bare.model_copy(update={"charges": bare.charges.model_copy(update={"carried": even})})
    systems = prepare_frame(atoms, bare, Potential(charges=charges))
    rows = {name: values.numpy() for name, values in charges.tensors(systems).items()}
    label = np.full(len(atoms), -1) if systems.electrode is None else systems.electrode.numpy()
    names = [e.name for e in settings.electrodes]
    moved = () if potentiostat is None else potentiostat.electrodes
    electrodes = tuple(
        Electrode(
            e.name,
            np.flatnonzero(label == k),
            None if isinstance(e.potential, Schedule) else e.potential,
            None if e.name in moved else e.charge,
        )
        for k, e in enumerate(settings.electrodes)
    )
    target: tuple[int, int, float] | None = None
    if potentiostat is not None:
        voltage = np.nan if isinstance(potentiostat.potential, Schedule) else potentiostat.potential
        target = names.index(moved[0]), names.index(moved[1]), voltage
    free = label < 0
    axis, boundary = _across(
        systems.pbc[0].numpy(), charges.finite_field, atoms.get_scaled_positions(wrap=False), label
    )
    return Setup(
        start=atoms,
        axis=axis,
        boundary=boundary,
        electrodes=electrodes,
        alpha=np.where(rows["alpha"] >= POINT, np.inf, rows["alpha"]),
        shell_charge=rows["Z"],
        chi=rows["chi"],
        hardness=rows["eta"],
        potentiostat=target,
        responding=bool((rows["free"] & free).any() or rows["Z"][free].any()),
        field=systems.field[0].numpy(),
        k_e=charges.coulomb_constant,
    )


def _across(
    pbc: np.ndarray, finite_field: int | None, fractional: np.ndarray, label: np.ndarray
) -> tuple[int, Literal["open", "periodic", "finite-field"]]:
    """The direction of profiles, and what the boundary along it is."""
    if finite_field is not None:
        return finite_field, "finite-field"
    open_directions = np.flatnonzero(~pbc)
    if len(open_directions) > 1:
        raise InputError("profiles need a cell that is periodic in two directions at least; this run's was open")
    if len(open_directions) == 1:
        return int(open_directions[0]), "open"
    centres = [fractional[label == k].mean(axis=0) for k in range(label.max() + 1)]
    return (int(np.ptp(centres, axis=0).argmax()) if len(centres) > 1 else 2), "periodic"
