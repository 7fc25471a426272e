"""Profiles across a cell: densities of every species, charge density, field and potential, and their audit.

The charge density is that of the charges as they are: ions and shells, each with its Gaussian or as a point
(``planar``: values at bin edges carry no grid error). ``slab``: E = 4π k_e ∫ρ dz, antisymmetric far outside.
``finite-field``: the periodic field of zero mean plus ε = −(ψ_high − ψ_low)/L (T. Dufils, G. Jeanmairet, B. Rotenberg,
M. Sprik, M. Salanne, Phys. Rev. Lett. 123, 195501 (2019)), so that the potential jumps only where the cell is cut.

Errors are standard errors from consecutive blocks of frames. Beads of a ring polymer are averaged before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voltpi.analysis.audit import Audit, Spread, audit_sample
from voltpi.analysis.capacitor import ChargeFrame, Setup, frames_after
from voltpi.analysis.electrode_series import Potentials
from voltpi.analysis.planar import bin_moments, planar_profile, smeared_potential
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import BlockedMean, mean_with_error, plus_minus
from voltpi.potential.errors import InputError

__all__ = ["Interface", "Profiles", "profiles_of"]

Array = NDArray[np.float64]

_INNER = (1.0 / 3.0, 2.0 / 3.0)  # of the way between the electrodes: the middle, where the electrolyte is bulk


@dataclass(frozen=True)
class Interface:
    """A double layer: the electrode's potential less that of the middle of the electrolyte, V, with its error.

    On an uncharged electrode this is the potential of zero charge, against the electrolyte.
    """

    electrode: str
    value: float
    error: float


@dataclass(frozen=True)
class Profiles:
    """Means over the frames [f] of a run, with standard errors of the same shape.

    z [m] bin centres and edges [m + 1], Å · density: species -> [m] Å⁻³ · charge, ions, electrodes [m] e/Å³ (all;
    electrolyte; electrodes) · field [m + 1] V/Å · potential [m + 1] V
    """

    run: Run
    setup: Setup
    steps: NDArray[np.int64]
    z: Array
    edges: Array
    area: float
    density: dict[str, Array]
    charge: Array
    ions: Array
    electrodes: Array
    field: Array
    potential: Array
    errors: dict[str, Array]
    middle: tuple[float, float] | None
    interfaces: tuple[Interface, ...]
    audit: Audit | None
    without_shells: bool

    def table(self) -> tuple[list[str], Array]:
        """Header and rows; field and potential at bin centres are the means of the edges'."""
        columns: dict[str, Array] = {"z_A": self.z}
        for name, values in self.density.items():
            columns[f"density_{name}_per_A3"] = values
            columns[f"density_{name}_error"] = self.errors[f"density:{name}"]
        for name, title, values in (
            ("charge", "charge_density_e_per_A3", self.charge),
            ("ions", "charge_density_electrolyte_e_per_A3", self.ions),
            ("electrodes", "charge_density_electrodes_e_per_A3", self.electrodes),
            ("field", "field_V_per_A", self.field),
            ("potential", "potential_V", self.potential),
        ):
            error = self.errors[name]
            if len(values) > len(self.z):
                values, error = 0.5 * (values[1:] + values[:-1]), 0.5 * (error[1:] + error[:-1])
            columns[title] = values
            columns[f"{title.rpartition('_e_per')[0] or title.rpartition('_V')[0]}_error"] = error
        return list(columns), np.column_stack(list(columns.values()))

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        out: dict[str, Any] = {
            "run": str(self.run.folder),
            "frames": len(self.steps),
            "boundary": self.setup.boundary,
            "axis": "abc"[self.setup.axis],
            "area_A2": self.area,
            "bin_A": float(self.z[1] - self.z[0]) if len(self.z) > 1 else None,
            "shells_known": not self.without_shells,
            "net_charge_e": float(self.charge.sum() * (self.edges[1] - self.edges[0]) * self.area),
        }
        if self.middle is not None:
            out |= {"middle_potential_V": self.middle[0], "middle_potential_error_V": self.middle[1]}
        out["double_layer_drop_V"] = {i.electrode: i.value for i in self.interfaces}
        out["double_layer_drop_error_V"] = {i.electrode: i.error for i in self.interfaces}
        out["audit"] = None if self.audit is None else self.audit.numbers()
        return out

    def report(self) -> list[str]:
        """Lines for a person."""
        lines = [f"frames                       {len(self.steps)}, profiles along the normal ({self.setup.boundary})"]
        if self.without_shells:
            lines.append("shells                       not written (output.shells): charge density without them")
        for interface in self.interfaces:
            drop = plus_minus(interface.value, interface.error, ".4f")
            lines.append(f"double layer at {interface.electrode:<12} {drop} V from the middle of the electrolyte")
        return lines


class _Sums:
    """Running means of everything in a profile."""

    def __init__(self, setup: Setup, width: float) -> None:
        self.setup, self.width = setup, width
        self.means: dict[str, BlockedMean] = {}
        self._labels = setup.labels
        self.pair = setup.pair() if len(setup.electrodes) > 1 else None

    def add(self, beads: Sequence[ChargeFrame], potentials: Array) -> None:
        """One step: a frame for every bead, and the potentials [e] (V) that a finite field makes."""
        parts = [self._of(bead, potentials) for bead in beads]
        for name in parts[0]:
            self.means.setdefault(name, BlockedMean()).add(np.mean([part[name] for part in parts], axis=0))

    def _of(self, frame: ChargeFrame, potentials: Array) -> dict[str, Array]:
        setup = self.setup
        geometry, grid = setup.sum_over(frame.cell), setup.grid(self.width, frame.cell)
        sites, charges = frame.sites(setup)
        z = setup.heights(sites.positions, geometry)
        applied = setup.across(potentials, frame.cell)
        profile = planar_profile(grid, z, charges, sites.alpha, geometry.area, setup.k_e, applied)
        shelled = np.flatnonzero(setup.shell_charge)[: len(charges) - len(self._labels)]
        metal = np.concatenate([self._labels, self._labels[shelled]]) >= 0
        own = bin_moments(grid, z[metal], charges[metal], sites.alpha[metal])[0] / geometry.area
        out = {
            "area": np.asarray(geometry.area),
            "h": np.asarray(grid.h),
            "charge": profile.charge / grid.h,
            "electrodes": own / grid.h,
            "ions": (profile.charge - own) / grid.h,
            "field": profile.field,
            "potential": profile.potential,
        }
        heights = z[: len(self._labels)]
        for name, atoms in setup.species:
            counts, _ = np.histogram(heights[atoms], grid.edges)
            out[f"density:{name}"] = counts / (geometry.area * grid.h)
        if self.pair is None:
            return out
        low, high = (setup.electrodes[k].atoms for k in self.pair)
        faces = float(heights[low].max()), float(heights[high].min())
        inner = faces[0] + np.linspace(*_INNER, 200) * (faces[1] - faces[0])
        middle = np.interp(inner, grid.edges, profile.potential).mean()
        out["middle"] = middle
        for k, atoms in zip(self.pair, (low, high), strict=True):
            seen = smeared_potential(grid, profile, heights[atoms], setup.alpha[atoms], applied)
            out[f"planar:{k}"] = np.asarray(seen.mean() - middle)
        return out


def profiles_of(run: Run, setup: Setup, *, skip: float = 0.0, bin_width: float = 0.1, n_audit: int = 20) -> Profiles:
    """Profiles of a run without its first ``skip`` fs, in bins of ``bin_width`` (Å), audited in ``n_audit`` frames.

    Raises InputError for options that cannot be, and when the run did not write what is needed, with the tag to add.
    """
    if not 0.0 < bin_width <= 5.0:
        raise InputError(f"bin is {bin_width:g}: give the width of a bin in Å, such as 0.1")
    sums, sample, potentials = _Sums(setup, bin_width), Spread(n_audit), Potentials(run, setup)
    steps = []
    for step, beads in frames_after(run, setup, skip):
        sums.add(beads, potentials(step))
        sample.add((step, beads))
        steps.append(step)
    audit = audit_sample(setup, sample, potentials)
    mean = {name: values.mean for name, values in sums.means.items()}
    grid = setup.grid(bin_width)
    h = float(mean["h"])
    edges: Array = grid.start + h * np.arange(grid.n + 1, dtype=float)
    return Profiles(
        run=run,
        setup=setup,
        steps=np.array(steps),
        z=0.5 * (edges[1:] + edges[:-1]),
        edges=edges,
        area=float(mean["area"]),
        density={n.removeprefix("density:"): v for n, v in mean.items() if n.startswith("density:")},
        **{name: mean[name] for name in ("charge", "ions", "electrodes", "field", "potential")},
        errors={name: values.error for name, values in sums.means.items()},
        middle=(float(mean["middle"]), float(sums.means["middle"].error)) if "middle" in mean else None,
        interfaces=_interfaces(sums, audit),
        audit=audit,
        without_shells=bool(setup.shell_charge.any()) and not run.extras.get("shells"),
    )


def _interfaces(sums: _Sums, audit: Audit | None) -> tuple[Interface, ...]:
    """Double layers at the pair of electrodes: planar share from all frames, the rest from the audited ones."""
    if sums.pair is None or audit is None:
        return ()
    out = []
    for k, place in zip(sums.pair, audit.pair, strict=True):
        planar = sums.means[f"planar:{k}"]
        rest = mean_with_error(audit.recovered[:, place] - audit.planar[:, place])
        error = float(np.hypot(planar.error, rest.error))
        out.append(Interface(audit.names[place], float(planar.mean) + rest.value, error))
    return tuple(out)
