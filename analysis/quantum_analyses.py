"""``voltpi analyze quantum-kinetic``: kinetic energies and radii of gyration of a path-integral run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voltpi.analysis.kinds import SKIP, TEMPERATURE, Analysis
from voltpi.analysis.output import checked_skip, output_stem, write_results
from voltpi.potential.errors import InputError

__all__ = ["QUANTUM", "analyze_quantum_kinetic"]


def analyze_quantum_kinetic(
    paths: Sequence[Path], out: Path | None = None, *, skip: float = 0.0, temperature: float | None = None
) -> dict[str, Any]:
    """Kinetic energy and radius of gyration by element, with errors and beside the classical value (``quantum.py``).

    ``paths``: one run's folder or files. ``temperature`` (K) where its i-PI input is not there; the first ``skip`` fs
    are left out. Writes quantum-kinetic.csv, .json, .png and .svg.
    """
    from voltpi.analysis.figures_quantum import draw_quantum
    from voltpi.analysis.quantum import quantum_of
    from voltpi.analysis.runs import find_runs

    # the field is no matter here
    runs = find_runs(list(paths), (0.0, 0.0, 0.0))
    if len(runs) != 1:
        raise InputError(
            f"quantum-kinetic takes one run but {len(runs)} were given; give one folder, or the files of one system"
        )
    quantum = quantum_of(runs[0], temperature=temperature, skip=checked_skip(skip))
    stem = output_stem(out, runs[0].folder.resolve(), "quantum-kinetic")
    header = [
        "element", "atoms", "kinetic_energy_meV", "error_meV", "classical_meV", "radius_of_gyration_A", "error_A",
        "free_particle_A",
    ]  # fmt: skip
    rows: list[list[float | str]] = []
    nan = float("nan")
    for s in quantum.species:
        k = (nan, nan) if s.kinetic is None else (1e3 * s.kinetic.mean.value, 1e3 * s.kinetic.mean.error)
        r = (nan, nan) if s.gyration is None else (s.gyration.mean.value, s.gyration.mean.error)
        rows.append([s.element, s.n_atoms, *k, 1e3 * quantum.classical, *r, s.free])
    return write_results(stem, quantum.numbers(), quantum.report(), header, rows, draw_quantum(quantum, stem))


QUANTUM = (
    Analysis(
        "quantum-kinetic",
        "quantum kinetic energy and radius of gyration by element, from a path-integral run",
        analyze_quantum_kinetic,
        (SKIP, TEMPERATURE),
    ),
)
