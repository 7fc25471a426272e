"""What ``voltpi analyze WHAT FILES…`` knows: every analysis by name, with its options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voltpi.analysis.absorption_analyses import ABSORPTION
from voltpi.analysis.capacitor_analyses import (
    analyze_capacitor,
    analyze_electrode_charge,
    analyze_layers,
    analyze_profiles,
)
from voltpi.analysis.chemiscope_analyses import CHEMISCOPE
from voltpi.analysis.dielectric_analyses import DIELECTRIC
from voltpi.analysis.dipole_analyses import DIPOLES
from voltpi.analysis.kinds import AUDIT, BIN, CHARGES, EMPTY, FIELD, SKIP, TEMPERATURE, Analysis, Option
from voltpi.analysis.output import beside, checked_skip, output_stem, write_results
from voltpi.analysis.quantum_analyses import QUANTUM
from voltpi.analysis.spectra_analyses import SPECTRA
from voltpi.analysis.transport_analyses import TRANSPORT
from voltpi.potential.errors import InputError

__all__ = ["ANALYSES", "Analysis", "Option", "analyze_field_response", "analyze_polarization"]

# matplotlib, SciPy and ASE are imported inside the functions: listing the analyses costs nothing


def analyze_polarization(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    field: Sequence[float] | None = None,
    skip: float = 0.0,
    charges: str | None = None,
) -> dict[str, Any]:
    """Dipole and polarization along one run, its mean induced dipole per molecule, temperature and drift.

    ``paths``: one run's folder or files. ``field`` (V/Å) replaces that of the run's files, ``charges`` (a file) the
    driver's dipole; the first ``skip`` fs are left out of everything. Writes polarization.csv, .json, .png and .svg.
    """
    from voltpi.analysis.field_response import summarize
    from voltpi.analysis.figures import draw_polarization
    from voltpi.analysis.runs import find_runs

    runs = find_runs(list(paths), field)
    if len(runs) != 1:
        raise InputError(f"polarization is of one run, but {len(runs)} were given: call it for each")
    summary = summarize(runs[0], checked_skip(skip), charges)
    p = summary.polarization
    stem = output_stem(out, runs[0].folder, "polarization")
    table = np.column_stack([p.steps, p.time, p.dipole, p.density, p.volume])
    header = ["step", "time_fs", *(f"M{c}_eA" for c in "xyz"), *(f"P{c}_C_per_m2" for c in "xyz"), "volume_A3"]
    return write_results(stem, summary.numbers(), summary.report(), header, table, draw_polarization(summary, stem))


def analyze_field_response(paths: Sequence[Path], out: Path | None = None, *, skip: float = 0.0) -> dict[str, Any]:
    """Mean dipole per molecule against field over several runs, and the dielectric constant from the slope.

    ``paths``: two or more folders, each with the settings of its run. Writes field-response.csv, .json, .png and .svg.
    """
    from voltpi.analysis.field_response import field_response, summarize
    from voltpi.analysis.figures import draw_field_response
    from voltpi.analysis.runs import find_runs

    files = [path for path in paths if not path.is_dir()]
    runs = [] if files else find_runs(list(paths))
    if len(runs) < 2:
        wrong = f"{files[0]} is no folder" if files else "only one was given"
        raise InputError(f"field-response takes two or more folders of runs at different fields, but {wrong}")
    summaries = [summarize(run, checked_skip(skip)) for run in runs]
    response = field_response(summaries)
    stem = output_stem(out, beside(paths), "field-response")
    numbers = response.numbers() | {"runs": [summary.numbers() for summary in summaries]}
    table = np.column_stack([response.fields, response.dipoles, response.errors])
    header = ["field_V_per_A", "dipole_per_molecule_eA", "error_eA"]
    return write_results(stem, numbers, response.report(), header, table, draw_field_response(response, stem))


ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        Analysis(
            "polarization",
            "dipole and polarization along a run; induced dipole per molecule, temperature, drift",
            analyze_polarization,
            (FIELD, SKIP, CHARGES),
        ),
        Analysis(
            "field-response",
            "mean dipole against field over several runs; dielectric constant",
            analyze_field_response,
            (SKIP,),
        ),
        Analysis(
            "profiles",
            "densities, charge density, field and potential across a cell; potential drop against the applied one",
            analyze_profiles,
            (SKIP, BIN, AUDIT),
            needs_setup=True,
        ),
        Analysis(
            "electrode-charge",
            "charge of electrodes; capacitance from its fluctuations, or from several runs at different voltages",
            analyze_electrode_charge,
            (SKIP, TEMPERATURE, EMPTY, AUDIT),
            needs_setup=True,
        ),
        Analysis(
            "layers",
            "charge of electrodes layer by layer and atom by atom",
            analyze_layers,
            (SKIP, AUDIT),
            needs_setup=True,
        ),
        Analysis(
            "capacitor",
            "all three of a run at once, with one page of figures",
            analyze_capacitor,
            (SKIP, BIN, TEMPERATURE, EMPTY, AUDIT),
            needs_setup=True,
        ),
        *SPECTRA,
        *DIPOLES,
        *QUANTUM,
        *ABSORPTION,
        *DIELECTRIC,
        *TRANSPORT,
        *CHEMISCOPE,
    )
}
