"""What ``voltpi analyze`` does with capacitors: profiles, charge of the electrodes, layers, and all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from voltpi.analysis.output import checked_skip, output_stem, write_results, write_table
from voltpi.potential.errors import InputError

if TYPE_CHECKING:
    from voltpi.analysis.audit import Audit
    from voltpi.analysis.capacitance import ChargeSummary
    from voltpi.analysis.capacitor import Describe, Setup
    from voltpi.analysis.runs import Run

__all__ = ["analyze_capacitor", "analyze_electrode_charge", "analyze_layers", "analyze_profiles"]

# matplotlib, SciPy and ASE are imported inside the functions: listing the analyses costs nothing


def analyze_profiles(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    describe: Describe,
    skip: float = 0.0,
    bin: float = 0.1,
    audit: float = 20,
) -> dict[str, Any]:
    """Densities, charge density, field and potential across the cell of one run; its drop against the applied one.

    ``bin`` (Å): width of bins; ``audit``: frames in which the potential is summed over all charges. Writes
    profiles.csv, .json, .png and .svg.
    """
    from voltpi.analysis.figures_capacitor import draw_profiles
    from voltpi.analysis.profiles import profiles_of

    run, setup = _one_run(paths, describe, "profiles")
    profiles = profiles_of(run, setup, skip=checked_skip(skip), bin_width=bin, n_audit=_frames(audit))
    stem = output_stem(out, run.folder, "profiles")
    figures = draw_profiles(profiles, stem)
    return write_results(
        stem, profiles.numbers(), [*profiles.report(), *_lines(profiles.audit)], *profiles.table(), figures
    )


def analyze_electrode_charge(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    describe: Describe,
    skip: float = 0.0,
    temperature: float | None = None,
    empty: float | None = None,
    audit: float = 20,
) -> dict[str, Any]:
    """Charge of the electrodes of one run, or of several at different voltages, and what capacitance it says.

    ``temperature`` (K) and ``empty`` (e/V, ⟨∂Q/∂Ψ⟩ at fixed nuclei) replace what the run's files say. Writes
    electrode-charge.csv, .json, .png and .svg.
    """
    from voltpi.analysis.capacitance import charge_summary
    from voltpi.analysis.capacitor import setup_of
    from voltpi.analysis.figures_capacitor import draw_electrode_charge, draw_voltage_response
    from voltpi.analysis.runs import find_runs
    from voltpi.analysis.voltage_response import voltage_response

    summaries: list[ChargeSummary] = []
    report: list[str] = []
    audits: list[dict[str, Any]] = []
    runs = find_runs(list(paths))
    for run, setup in ((run, setup_of(run, describe)) for run in runs):
        summary = charge_summary(run, setup, skip=checked_skip(skip), temperature=temperature, empty=empty)
        numbers, lines, title = _audited(run, setup, skip, audit)
        report += [*([f"run {run.folder}"] if len(runs) > 1 else []), *summary.report(), *lines]
        summaries.append(summary)
        audits.append(summary.numbers() | {"audit": numbers})
    if len(summaries) == 1:
        s = summaries[0]
        stem = output_stem(out, s.run.folder, "electrode-charge")
        return write_results(stem, audits[0], report, *s.table(), draw_electrode_charge(s, stem, title))
    response = voltage_response(summaries)
    stem = output_stem(out, paths[0].resolve().parent, "electrode-charge")
    table = np.column_stack([response.voltages, response.charges, response.errors])
    agree = sum(bool(entry["audit"] and entry["audit"].get("agrees")) for entry in audits)
    title = f"recovered drop agrees with the applied one in {agree} of {len(audits)} runs"
    numbers = response.numbers() | {"runs": audits}
    figures = draw_voltage_response(response, stem, title)
    return write_results(
        stem, numbers, [*report, *response.report()], ["voltage_V", "charge_e", "charge_error_e"], table, figures
    )


def analyze_layers(
    paths: Sequence[Path], out: Path | None = None, *, describe: Describe, skip: float = 0.0, audit: float = 20
) -> dict[str, Any]:
    """Charge of the electrodes of one run layer by layer and atom by atom.

    Writes layers.csv, .json, .png and .svg.
    """
    from voltpi.analysis.figures_capacitor import draw_layers
    from voltpi.analysis.layers import layer_map

    run, setup = _one_run(paths, describe, "layers")
    layers = layer_map(run, setup, skip=checked_skip(skip))
    numbers, lines, title = _audited(run, setup, skip, audit)
    stem = output_stem(out, run.folder, "layers")
    figures = draw_layers(layers, stem, title)
    return write_results(
        stem, layers.numbers() | {"audit": numbers}, [*layers.report(), *lines], *layers.table(), figures
    )


def analyze_capacitor(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    describe: Describe,
    skip: float = 0.0,
    bin: float = 0.1,
    temperature: float | None = None,
    empty: float | None = None,
    audit: float = 20,
) -> dict[str, Any]:
    """Profiles, charge of the electrodes and layers of one run, and one page of figures with the audit as its title.

    Writes capacitor.csv (the profiles), .json (all numbers), .png and .svg, and the tables electrode-charge.csv and
    layers.csv.
    """
    from voltpi.analysis.capacitance import charge_summary
    from voltpi.analysis.figures_capacitor import draw_capacitor
    from voltpi.analysis.layers import layer_map
    from voltpi.analysis.profiles import profiles_of

    run, setup = _one_run(paths, describe, "capacitor")
    charge = charge_summary(run, setup, skip=checked_skip(skip), temperature=temperature, empty=empty)
    layers = layer_map(run, setup, skip=skip)
    profiles = profiles_of(run, setup, skip=skip, bin_width=bin, n_audit=_frames(audit))
    numbers = profiles.numbers() | {"electrode_charge": charge.numbers(), "layers": layers.numbers()["layers"]}
    report = [*charge.report(), *layers.report(), *profiles.report(), *_lines(profiles.audit)]
    stem = output_stem(out, run.folder, "capacitor")
    tables = [
        write_table(output_stem(out, run.folder, name), *table)
        for name, table in (("electrode-charge", charge.table()), ("layers", layers.table()))
    ]
    figures = draw_capacitor(profiles, charge, layers, stem)
    answer = write_results(stem, numbers, report, *profiles.table(), figures)
    return answer | {"files": [*answer["files"], *map(str, tables)]}


def _one_run(paths: Sequence[Path], describe: Describe, what: str) -> tuple[Run, Setup]:
    from voltpi.analysis.capacitor import setup_of
    from voltpi.analysis.runs import find_runs

    runs = find_runs(list(paths))
    if len(runs) != 1:
        raise InputError(f"{what} is of one run, but {len(runs)} were given: call it for each")
    return runs[0], setup_of(runs[0], describe)


def _frames(audit: float) -> int:
    if not (audit >= 1 and audit == int(audit)):
        raise InputError(f"audit is {audit:g}: give the number of frames to audit, one or more")
    return int(audit)


def _lines(audit: Audit | None) -> list[str]:
    return ["audit: none, as there are fewer than two electrodes"] if audit is None else audit.report()


def _audited(run: Run, setup: Setup, skip: float, audit: float) -> tuple[dict[str, Any] | None, list[str], str]:
    """Numbers, lines and a title; where the files do not allow an audit, the lines say what lacks."""
    from voltpi.analysis.audit import audit_of

    try:
        done = audit_of(run, setup, skip=skip, n=_frames(audit))
    except InputError as error:
        return None, [f"audit: not possible: {error}"], "not audited"
    return (None if done is None else done.numbers()), _lines(done), "" if done is None else done.title()
