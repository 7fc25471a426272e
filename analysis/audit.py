"""The audit of every capacitor analysis: the potential drop that the written charges make, against the applied one.

What is exact. With the charges stationary in Ω, each atom i of an electrode at the potential ψ has

    ψ = χ_i + h_i q_i + Φ'_i + λ          (Φ': of all other charges, seen by the atom's own Gaussian)

with one λ for all (total charge), so that the *mean over all atoms of an electrode* of χ_i + h_i q_i + Φ'_i, less that
of another, is the applied difference in every single frame, whatever the structure. For an ideal conductor h_i is the
Gaussian's own potential and χ = 0: the sum is the Poisson potential smeared with the electrode's Gaussian. It is
evaluated here by a sum of its own (``site_sum``), from the files alone.

What is not. The planar average of that potential at the height of a layer is not ψ: it lacks the waves along the plane,
which the atoms, sitting where their own charge is, see in phase. A square layer of period a with charges q of width η
lacks (2π k_e q/a²) Σ_{G≠0} erfc(G/(√2 η))/G, which is 6.1 V per e for a = 2.88 Å and η = 1.8 Å⁻¹, or 0.2 V for a layer
at 0.4 e/nm², and the more the narrower its Gaussians. So a drop read off a planar profile at the charged layers is too
small by that on both sides; it is right only in layers without charge, deep in an ideal conductor. The audit reports
both shares. (The electrolyte's share of the waves falls as exp(−G d) with its distance d, to 1e-3 at 3 Å.) Thomas–Fermi
and hardness terms, χ and, with PQEq parameters, what their hardness differs from the Gaussian's own potential count as
the second share.

The error is that of the mean over the audited frames: rounding in the files and the sum that the driver used. Where the
potential itself fluctuates (a potentiostat), each frame is compared with what the driver wrote as
``electrode_potentials``; where it wrote none, the mean with the target, within three standard errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from voltpi.analysis.capacitor import ChargeFrame, Setup, frames_after
from voltpi.analysis.electrode_series import Potentials
from voltpi.analysis.planar import planar_potential
from voltpi.analysis.runs import Run
from voltpi.analysis.site_sum import Sites
from voltpi.analysis.statistics import mean_with_error, plus_minus

__all__ = ["Audit", "Spread", "audit_frames", "audit_of", "audit_sample", "site_potentials"]

Array = NDArray[np.float64]

TOLERANCE = 1e-3
"""V; a recovered drop within this of the stated one agrees with it: positions of six digits, as i-PI's own XYZ has
them, and mesh sums of relative accuracy 1e-6 stay below."""


class Spread:
    """Keeps up to 2 ``n`` of the frames that come along, evenly spread over them; ``frames`` is n or fewer of those."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._stride, self._count = 1, 0
        self._kept: list[Any] = []

    def add(self, frame: Any) -> None:
        """One more."""
        if self._count % self._stride == 0:
            self._kept.append(frame)
            if len(self._kept) > 2 * self.n:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._count += 1

    @property
    def frames(self) -> list[Any]:
        """The last of them is not left out."""
        if len(self._kept) <= self.n:
            return self._kept
        places = np.rint(np.linspace(0, len(self._kept) - 1, self.n)).astype(int)
        return [self._kept[i] for i in places]


@dataclass(frozen=True)
class Audit:
    """Potentials (V) of the audited frames, electrodes from the lowest to the highest.

    names · pair, places in them of the two between which the drop is, the lower one first · recovered [a, e], of the
    written charges · planar [a, e], the planar average's share of it · stated [a, e], applied, or (no potential
    applied) what the driver answered, or nan · target [e], what the settings apply, or nan · unequal [e], the largest
    difference between an atom and its electrode's mean · without_shells: they were not written
    """

    names: tuple[str, ...]
    pair: tuple[int, int]
    recovered: Array
    planar: Array
    stated: Array
    target: Array
    unequal: Array
    without_shells: bool

    def _across(self, potentials: Array) -> Array:
        low, high = self.pair
        return np.asarray(potentials[..., high] - potentials[..., low])

    @property
    def drop(self) -> Array:
        """[a]: upper of the pair less lower, V."""
        return self._across(self.recovered)

    @property
    def stated_drop(self) -> Array:
        """[a]: upper of the pair less lower, V."""
        return self._across(self.stated)

    @property
    def target_drop(self) -> float:
        """Upper of the pair less lower, V."""
        return float(self._across(self.target))

    @property
    def difference(self) -> tuple[float, float]:
        """Recovered less stated drop with its error (nan from one frame), V; nan where none is stated."""
        off = self.drop - self.stated_drop
        known = np.isfinite(off)
        mean = mean_with_error(off[known] if known.any() else off[:1])
        return mean.value, mean.error

    @property
    def agrees(self) -> bool:
        """Whether the recovered drop is the stated one, or (none is) its mean the target, within ``tolerance``."""
        return bool(abs(self._off[0]) <= self.tolerance)

    @property
    def tolerance(self) -> float:
        """V: ``TOLERANCE``, or, where the mean is compared with the target, three errors if they are more."""
        compared, error = np.isfinite(self.difference[0]), self._off[1]
        return TOLERANCE if compared else max(TOLERANCE, 3.0 * float(np.nan_to_num(error)))

    @property
    def _off(self) -> tuple[float, float]:
        """``difference``, or, where none is known, that of the mean drop from the target."""
        if np.isfinite(self.difference[0]):
            return self.difference
        mean = mean_with_error(self.drop)
        return mean.value - self.target_drop, mean.error

    @property
    def _said(self) -> str:
        """What the recovered drop is compared with."""
        if not np.isfinite(self.difference[0]):
            return f"the applied {self.target_drop:.6g} V on average" if np.isfinite(self.target_drop) else ""
        stated = float(np.nanmean(self.stated_drop))
        applied = abs(stated - self.target_drop) <= TOLERANCE
        return f"the {'applied' if applied else 'written'} {stated:.6g} V"

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        value, error = self.difference
        drop = mean_with_error(self.drop)
        return {
            "frames": len(self.recovered),
            "electrodes_low_to_high": list(self.names),
            "drop_between": [self.names[place] for place in self.pair],
            "recovered_drop_V": drop.value,
            "recovered_drop_error_V": drop.error,
            "stated_drop_V": float(np.nanmean(self.stated_drop)) if np.isfinite(value) else float("nan"),
            "target_drop_V": self.target_drop,
            "difference_V": value,
            "difference_error_V": error,
            "planar_share_of_drop_V": float(self._across(self.planar).mean()),
            "recovered_potentials_V": self.recovered.mean(axis=0).tolist(),
            "largest_difference_within_an_electrode_V": float(self.unequal.max()),
            "shells_known": not self.without_shells,
            "agrees": self.agrees,
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        numbers, (value, error) = self.numbers(), self._off
        drop, planar = numbers["recovered_drop_V"], numbers["planar_share_of_drop_V"]
        low, high = (self.names[place] for place in self.pair)
        line = f"audit: recovered drop {high} − {low} {drop:.6f} V"
        if not self._said:
            line += " (none applied, none written)"
        else:
            line += f" {'agrees with' if self.agrees else 'IS NOT'} {self._said}"
            line += f" to {self.tolerance:.1g} V (difference {plus_minus(value, error, '.1e')} V)"
        lines = [line]
        lines.append(
            f"       of it {planar:.4f} V planar average, {drop - planar:+.4f} V along the plane and own; "
            f"{len(self.recovered)} frames"
        )
        lines.append(f"       atoms of one electrode differ by up to {self.unequal.max():.1e} V")
        if np.isfinite(self.target_drop) and not abs(numbers["stated_drop_V"] - self.target_drop) <= TOLERANCE:
            mean = plus_minus(drop, numbers["recovered_drop_error_V"], ".4f")
            lines.append(f"       mean of these frames {mean} V, target {self.target_drop:.6g} V")
        if self.without_shells:
            lines.append("       shells were not written (output.shells): their share is missing, so it cannot agree")
        return lines

    def title(self) -> str:
        """One line for a figure."""
        drop = f"recovered drop {self.drop.mean():.5f} V"
        return f"{drop}: {'agrees with' if self.agrees else 'IS NOT'} {self._said}" if self._said else drop


def site_potentials(setup: Setup, frame: ChargeFrame, potentials: Array) -> tuple[Array, Array]:
    """χ + h q + Φ' (V) of every electrode atom [k], electrodes one after another, and the planar share of it [k].

    ``potentials`` [e] (V) are those that a finite field makes.
    """
    atoms = np.concatenate([electrode.atoms for electrode in setup.electrodes])
    targets = Sites(frame.positions[atoms], setup.alpha[atoms])
    sources, charges = frame.sites(setup)
    geometry = setup.sum_over(frame.cell)
    applied = setup.across(potentials, frame.cell)
    heights = setup.heights(targets.positions, geometry)
    everything = geometry.potentials(targets, sources, charges) - applied * heights
    own = charges[atoms] * setup.k_e * np.sqrt(2.0 * targets.alpha / np.pi)
    if frame.shells is not None:
        own -= setup.shell_charge[atoms] * _seen(frame.shells[atoms], targets.alpha, setup.k_e)
    felt = everything - own + setup.chi[atoms] + setup.hardness[atoms] * frame.charges[atoms]
    planar = np.zeros(len(atoms))
    for alpha in np.unique(targets.alpha):
        mine = targets.alpha == alpha
        z, back = np.unique(np.round(heights[mine], 10), return_inverse=True)
        smeared = 1.0 / (1.0 / alpha + 1.0 / sources.alpha)
        at = planar_potential(
            z, sources.positions @ geometry.normal, charges, smeared, geometry.area, setup.k_e, geometry.period
        )
        planar[mine] = (at - applied * z)[back]
    return felt, planar


def _seen(shells: Array, alpha: Array, k_e: float) -> Array:
    """V/e of an atom's own shell at its core."""
    distance = np.linalg.norm(shells, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = erf(np.sqrt(0.5 * alpha) * distance) / distance
    return k_e * np.where(distance < 1e-9, np.sqrt(2.0 * alpha / np.pi), value)


def audit_frames(
    setup: Setup, frames: Sequence[list[ChargeFrame]], potentials: Array, stated: Array | None = None
) -> Audit | None:
    """The audit of some frames (a list of beads each); None without two electrodes.

    ``potentials`` [a, e] (V) are those that a finite field makes, ``stated`` those to be recovered, nan where they are
    not known (None: the same). A bead obeys the equipotential condition by itself; the means over beads are kept.
    """
    if len(setup.electrodes) < 2 or not frames:
        return None
    sizes = np.cumsum([len(electrode.atoms) for electrode in setup.electrodes])[:-1]
    order, (low, high) = setup.in_order(), setup.pair()
    recovered, planar = np.zeros((2, len(frames), len(setup.electrodes)))
    unequal = np.zeros(len(setup.electrodes))
    for a, beads in enumerate(frames):
        for bead in beads:
            felt, flat = (np.split(x, sizes) for x in site_potentials(setup, bead, potentials[a]))
            recovered[a] += [x.mean() / len(beads) for x in felt]
            planar[a] += [x.mean() / len(beads) for x in flat]
            unequal = np.maximum(unequal, [np.abs(x - x.mean()).max() for x in felt])
    return Audit(
        names=tuple(setup.electrodes[k].name for k in order),
        pair=(order.index(low), order.index(high)),
        recovered=recovered[:, order],
        planar=planar[:, order],
        stated=(potentials if stated is None else stated)[:, order],
        target=setup.targets[order],
        unequal=unequal[order],
        without_shells=bool(setup.shell_charge.any()) and frames[0][0].shells is None,
    )


def audit_of(run: Run, setup: Setup, *, skip: float = 0.0, n: int = 20) -> Audit | None:
    """The audit of up to ``n`` frames, evenly spread over a run without its first ``skip`` fs.

    None without two electrodes.

    Raises InputError when the run did not write what is needed, with the tag to add.
    """
    if len(setup.electrodes) < 2:
        return None
    sample = Spread(n)
    for frame in frames_after(run, setup, skip):
        sample.add(frame)
    return audit_sample(setup, sample, Potentials(run, setup))


def audit_sample(setup: Setup, sample: Spread, potentials: Potentials) -> Audit | None:
    """The audit of a sample of steps with their frames."""
    steps = [step for step, _ in sample.frames]
    return audit_frames(setup, [beads for _, beads in sample.frames], potentials(steps), potentials.stated(steps))
