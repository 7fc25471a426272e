"""What ``voltpi analyze`` does with dipoles of molecules and Born charges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from voltpi.analysis.kinds import BIN, CHARGES, FIELD, SKIP, Analysis, Option
from voltpi.analysis.output import checked_skip, output_stem, write_results, write_table
from voltpi.potential.errors import InputError

if TYPE_CHECKING:
    from voltpi.analysis.capacitor import Describe
    from voltpi.analysis.runs import Run

__all__ = ["DIPOLES", "analyze_born_charges", "analyze_molecular_dipoles"]

# matplotlib, SciPy and ASE are imported inside the functions: listing the analyses costs nothing


def analyze_molecular_dipoles(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    describe: Describe,
    field: Sequence[float] | None = None,
    skip: float = 0.0,
    charges: str | None = None,
    shell_charge: float | None = None,
    origin: str = "mass",
) -> dict[str, Any]:
    """Dipoles of the molecules of one run (``voltpi.analysis.molecular_dipoles``).

    ``field`` (V/Å): the direction that angles are counted from, instead of that of the run; ``shell_charge`` (e): Z,
    where the run's settings do not say it. Writes molecular-dipoles.csv, .json, .png and .svg, and the tables
    molecular-dipoles-angles.csv (in a field) and molecular-dipoles-kirkwood.csv.
    """
    from voltpi.analysis.dipole_figures import draw_molecular_dipoles
    from voltpi.analysis.molecular_dipoles import molecular_dipoles
    from voltpi.analysis.trajectory import one_run

    run = one_run(paths, "molecular-dipoles", field)
    z = 1.0 if charges is not None or not run.extras.get("shells") else _shell_charge(run, describe, shell_charge)
    found = molecular_dipoles(run, skip=checked_skip(skip), charges=charges, shell_charge=z, origin=origin)
    stem = output_stem(out, run.folder, "molecular-dipoles")
    tables = []
    if found.direction is not None:
        tables.append(write_table(stem.with_name(f"{stem.name}-angles"), *found.angles()))
    if any(len(kind.radii) for kind in found.kinds):
        tables.append(write_table(stem.with_name(f"{stem.name}-kirkwood"), *found.correlations()))
    figures = draw_molecular_dipoles(found, stem)
    answer = write_results(stem, found.numbers(), found.report(), *found.table(), figures)
    return answer | {"files": [*answer["files"], *map(str, tables)]}


def _shell_charge(run: Run, describe: Describe, given: float | None) -> Any:
    """Z of every atom."""
    from voltpi.analysis.capacitor import setup_of

    if given is not None:
        return given
    try:
        return setup_of(run, describe).shell_charge
    except InputError as error:
        raise InputError(f"the charge of the shells is not known ({error}); give --shell-charge Z (e)") from None


def analyze_born_charges(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    skip: float = 0.0,
    axis: str = "c",
    bin: float = 0.5,
) -> dict[str, Any]:
    """Born charges of one run by element, by atom and across the cell (``voltpi.analysis.born_charges``).

    ``axis``: the cell vector of the profile, ``bin`` (Å) its bins. Writes born-charges.csv (by atom), .json, .png and
    .svg, born-charges-profile.csv and born-charges.xyz (the first frame with the means as arrays).
    """
    from voltpi.analysis.born_charges import born_charges
    from voltpi.analysis.dipole_figures import draw_born_charges
    from voltpi.analysis.trajectory import one_run

    run = one_run(paths, "born-charges", np.zeros(3))
    found = born_charges(run, skip=checked_skip(skip), axis="abc".index(axis), bin_width=bin)
    stem = output_stem(out, run.folder, "born-charges")
    profile = write_table(stem.with_name(f"{stem.name}-profile"), *found.profile_table())
    structure = stem.with_suffix(".xyz")
    found.structure().write(structure, format="extxyz")
    figures = draw_born_charges(found, stem)
    answer = write_results(stem, found.numbers(), found.report(), *found.table(), figures)
    return answer | {"files": [*answer["files"], str(profile), str(structure)]}


DIPOLES = (
    Analysis(
        "molecular-dipoles",
        "dipoles of molecules: size, direction in the field, Kirkwood factor",
        analyze_molecular_dipoles,
        (
            FIELD,
            SKIP,
            CHARGES,
            Option("shell-charge", "Z of the shells (e), where the run's settings do not say it"),
            Option(
                "origin",
                "of the dipole of charged molecules: their centre of mass, or of geometry",
                default="mass",
                kind=str,
                choices=("mass", "geometry"),
            ),
        ),
        needs_setup=True,
    ),
    Analysis(
        "born-charges",
        "Born charges by element, by atom and across the cell",
        analyze_born_charges,
        (
            SKIP,
            Option("axis", "the cell vector of the profile", default="c", kind=str, choices=("a", "b", "c")),
            Option(BIN.name, BIN.help, default=0.5),
        ),
    ),
)
