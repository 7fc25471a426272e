"""Drift of the conserved quantity of all runs: tables (Markdown) and a figure.

python figure.py [--runs runs] [--out energy-conservation.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from ase.io import read
from matplotlib.figure import Figure

from voltpi.analysis.ipi_files import read_extras, read_properties
from voltpi.analysis.statistics import LinearFit, linear_fit

SYSTEMS = {"nacl": "NaCl", "batio3": "BaTiO₃", "cspbi3": "CsPbI₃", "water": "water", "lipon": "LiPON"}
SCHEMES = {
    "published": ("ReaxNet's: two iterations, charges and shells held fixed", "#d55e00"),
    "taper": ("the same energy, exact gradient", "#009e73"),
    "default": ("VoltPI's default: stationary charges", "#0072b2"),
}
HARTREE = 27.211386245988  # eV
SKIP = 0.1  # of a run is left out of the fit: the start has random velocities that its positions do not know


class Run(NamedTuple):
    """One run: ps, eV/atom since the start, the fitted line, the scatter about it (eV/atom), largest residual (V)."""

    n_atoms: int
    time: np.ndarray
    energy: np.ndarray
    fit: LinearFit
    scatter: float
    residual: float


def load(folder: Path) -> Run:
    """Reads a run's folder."""
    n_atoms = len(read(folder / "start.xyz"))
    properties = read_properties(folder / "run.out")
    time = properties.get("time", "time", "picosecond")
    energy = properties.get("conserved", "energy", "electronvolt") / n_atoms
    energy -= energy[0]
    kept = time > SKIP * time[-1]
    fit = linear_fit(time[kept], energy[kept], correlated=True)
    left = energy[kept] - fit.intercept - fit.slope * time[kept]
    residual = float(read_extras(folder / "run.residual_0").values.max()) * HARTREE
    return Run(n_atoms, time, energy, fit, float(left.std()), residual)


def table(runs: dict[tuple[str, str], Run]) -> str:
    """Markdown, a line for each run."""
    lines = [
        "| system | atoms | scheme | ps | drift (eV/atom/ps) | rms (eV/atom) | largest residual (V) |",
        "|---|---|---|---|---|---|---|",
    ]
    for (system, scheme), r in runs.items():
        lines.append(
            f"| {SYSTEMS[system]} | {r.n_atoms} | {scheme} | {r.time[-1]:.3g} "
            f"| {r.fit.slope:.1e} ± {r.fit.slope_error:.0e} | {r.scatter:.0e} | {r.residual:.0e} |"
        )
    return "\n".join(lines)


def against_default(runs: dict[tuple[str, str], Run]) -> str:
    """Markdown: drift of the difference to the default run of the same start, without the noise of the time step."""
    lines = ["| system | scheme | drift beyond the default's (eV/atom/ps) |", "|---|---|---|"]
    for (system, scheme), r in runs.items():
        if scheme not in SCHEMES:
            base = runs[system, "default"].energy
            n = min(len(base), len(r.energy))
            fit = linear_fit(r.time[:n], r.energy[:n] - base[:n], correlated=True)
            lines.append(f"| {SYSTEMS[system]} | {scheme} | {fit.slope:.1e} ± {fit.slope_error:.0e} |")
    return "\n".join(lines)


def draw(runs: dict[tuple[str, str], Run], out: Path) -> None:
    """Above, all schemes; below, enlarged, those that conserve energy."""
    shown = [s for s in SYSTEMS if any(system == s for system, _ in runs)]
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(2.1 * len(shown), 4.2), layout="constrained")
        rows = figure.subplots(2, len(shown), squeeze=False)
        for k, system in enumerate(shown):
            for scheme, (label, color) in SCHEMES.items():
                if (system, scheme) not in runs:
                    continue
                r = runs[system, scheme]
                rows[0, k].plot(r.time, 1e3 * r.energy, color=color, lw=0.8, label=label)
                if scheme != "published":
                    rows[1, k].plot(r.time, 1e6 * (r.energy - r.fit.intercept), color=color, lw=0.8)
            rows[0, k].set_title(f"{SYSTEMS[system]}, {runs[system, 'default'].n_atoms} atoms", fontsize=8)
            rows[1, k].set_xlabel("time (ps)")
            end = min(r.time[-1] for (s, scheme), r in runs.items() if s == system and scheme in SCHEMES)
            rows[0, k].set_xlim(0, end)
            allowed = np.linspace(0, runs[system, "default"].time[-1], 2)
            rows[1, k].fill_between(allowed, -10 * allowed, 10 * allowed, color="0.85", lw=0, zorder=0)
        rows[0, 0].set_ylabel("ΔE (meV/atom)")
        rows[1, 0].set_ylabel("enlarged (µeV/atom)")
        handles, labels = rows[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(out, dpi=110)


def main() -> None:
    """Prints the tables, writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("energy-conservation.png"))
    options = parser.parse_args()
    done = sorted(options.runs.glob("*/*/done"), key=str)
    found = {(p.parent.parent.name, p.parent.name): load(p.parent) for p in done}
    runs = {key: found[key] for key in sorted(found, key=lambda k: (list(SYSTEMS).index(k[0]), k[1]))}
    print(table({key: r for key, r in runs.items() if key[1] in SCHEMES}))
    if any(scheme not in SCHEMES for _, scheme in runs):
        print("\n" + against_default(runs))
    draw(runs, options.out)


if __name__ == "__main__":
    main()
