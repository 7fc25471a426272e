"""Spectra of vibrations from time series: one estimator for infrared, Raman and the density of states.

Everything is made of the *activity* of a quantity X (dipole, polarizability, mass-weighted position),

    G_X(ν̃) = (2c/k_B T) ∫ dt ⟨Ẋ(0) Ẋ(t)⟩ w(t) cos(2π c ν̃ t),

which for harmonic vibrations is Σ_k (∂X/∂Q_k)² δ(ν̃ − ν̃_k) with mass-weighted normal coordinates Q_k, as
⟨Ẋ²⟩ = k_B T Σ_k (∂X/∂Q_k)² and ∫₀^∞ G dν̃ = ⟨Ẋ²⟩/k_B T. ν̃ in cm⁻¹, T in K, time in fs, masses in amu.

The correlation function is estimated up to the lag t_max without bias, ⟨Ẋ(0)Ẋ(t)⟩ ≈ Σ_i Ẋ_i Ẋ_{i+k} / (n − k), and
multiplied by the window w (F. J. Harris, Proc. IEEE 66, 51 (1978)). The resolution is the full width at half maximum
that a sharp line gets. Where X itself is sampled, every Δt, differences over Δt are divided by sin(ωΔt/2)/(ωΔt/2),
their exact response: no error is left below the Nyquist wavenumber 1/(2cΔt). What vibrates faster folds down.

Classical correlations are corrected for quantum ones, ⟨X X⟩_quantum(ω) = Q(ω) ⟨X X⟩_classical(ω), with x = ħω/k_B T
(R. Ramírez, T. López-Ciudad, P. Kumar, D. Marx, J. Chem. Phys. 121, 3973 (2004)):

    none 1 · standard 2/(1 + e⁻ˣ) · harmonic x/(1 − e⁻ˣ) · schofield e^{x/2}

``harmonic`` is exact for harmonic vibrations with linear X, and what Kubo-transformed correlations (centroid and
ring-polymer dynamics) ask for; with it every prefactor is that of classical linear response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import constants
from scipy.optimize import brentq
from scipy.signal import czt, find_peaks, peak_widths

from voltpi.potential.errors import InputError

__all__ = [
    "CORRECTIONS",
    "KT",
    "LIGHT",
    "WINDOWS",
    "Activity",
    "Peak",
    "Plan",
    "Series",
    "activity",
    "correction",
    "find_lines",
    "make_plan",
    "reduced_energy",
]

Array = NDArray[np.float64]

LIGHT = constants.c * 100.0 * constants.femto
"""cm/fs."""
KT = constants.k / constants.atomic_mass * 1e-10
"""k_B in amu Å²/fs²/K."""
CORRECTIONS = ("harmonic", "standard", "schofield", "none")
_WINDOWS = {
    "hann": lambda s: 0.5 + 0.5 * np.cos(np.pi * s),
    "gaussian": lambda s: np.exp(np.log(1e-3) * s**2),
    "blackman": lambda s: 0.42 + 0.5 * np.cos(np.pi * s) + 0.08 * np.cos(2.0 * np.pi * s),
    "triangle": lambda s: 1.0 - s,
    "none": lambda s: np.ones_like(s),
}
WINDOWS = tuple(_WINDOWS)
_MOST_BLOCKS = 16


@dataclass(frozen=True)
class Series:
    """Samples of one run.

    values : [f, k], every ``spacing`` fs
    rates : whether ``values`` are time derivatives (per fs) already
    time_step : of the integrator, fs
    temperature : K
    """

    name: str
    values: Array
    spacing: float
    rates: bool
    time_step: float
    temperature: float

    @property
    def length(self) -> float:
        """fs."""
        return (len(self.values) - 1) * self.spacing

    @property
    def nyquist(self) -> float:
        """cm⁻¹."""
        return 1.0 / (2.0 * LIGHT * self.spacing)


@dataclass(frozen=True)
class Plan:
    """How spectra are taken.

    window, with lags up to ``lag`` fs · resolution cm⁻¹ · grid [g] cm⁻¹, where the spectrum is wanted
    """

    window: str
    lag: float
    resolution: float
    grid: Array


def _width(window: str) -> float:
    """Full width at half maximum of the window's transform, in units of 1/lag."""
    s = (np.arange(2000) + 0.5) / 2000.0
    w = _WINDOWS[window](s)
    return 2.0 * float(brentq(lambda x: np.cos(2.0 * np.pi * x * s) @ w - 0.5 * w.sum(), 0.0, 1.0))


def make_plan(
    series: Sequence[Series], window: str = "hann", resolution: float | None = None, top: float = 4500.0
) -> Plan:
    """A plan that all runs allow, up to ``top`` cm⁻¹ or their Nyquist wavenumber.

    Without a ``resolution`` (cm⁻¹) it is 20, or the one of lags of half the shortest run where that is too short.
    Raises InputError for a window that is not known, and for a resolution that the runs are too short for.
    """
    if window not in _WINDOWS:
        raise InputError(f"window is {window}: give one of {', '.join(WINDOWS)}")
    if not top > 0.0:
        raise InputError(f"max-wavenumber is {top:g}: give a positive number in cm⁻¹")
    width = _width(window) / LIGHT  # cm⁻¹·fs
    shortest = min(series, key=lambda one: one.length)
    longest_lag = shortest.length - 4.0 * shortest.spacing
    if longest_lag <= 0.0:
        raise InputError(f"{shortest.name}: {len(shortest.values)} records are no time series; let it run longer")
    if resolution is None:
        resolution = max(20.0, width / min(0.5 * shortest.length, longest_lag))
    if not resolution >= width / longest_lag:
        raise InputError(
            f"resolution is {resolution:g} cm⁻¹, but {shortest.name} has {shortest.length:g} fs: with the window "
            f"{window} give {width / longest_lag:.3g} or more, or run longer"
        )
    lag = width / resolution
    end = min(top, *(one.nyquist for one in series))
    return Plan(window, lag, resolution, np.linspace(0.0, end, max(int(np.ceil(8.0 * end / resolution)), 16) + 1))


@dataclass(frozen=True)
class Activity:
    """G [c, g] of a quantity with its standard error (nan where one block is all there is), and its sum rule.

    total : [c], ∫ G dν̃ over all wavenumbers up to the Nyquist one, which is ⟨Ẋ²⟩/k_B T
    aliased : share of the first quantity's activity in the last tenth below the Nyquist wavenumber
    """

    plan: Plan
    values: Array
    errors: Array
    total: Array
    blocks: int
    aliased: float
    nyquist: float
    spacing: float
    time_step: float
    length: float
    temperature: float
    cautions: tuple[str, ...] = field(default=())

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        return {
            "window": self.plan.window,
            "correlations_up_to_fs": self.plan.lag,
            "resolution_cm-1": self.plan.resolution,
            "temperature_K": self.temperature,
            "spacing_fs": self.spacing,
            "nyquist_cm-1": self.nyquist,
            "time_step_fs": self.time_step,
            "length_ps": self.length / 1000.0,
            "blocks": self.blocks,
            "cautions": list(self.cautions),
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        plan = self.plan
        band = f"bands from {self.blocks} blocks" if self.blocks > 1 else "no error bands: too short for two blocks"
        return [
            f"window {plan.window}, resolution {plan.resolution:.3g} cm⁻¹ (correlations up to {plan.lag:.4g} fs), "
            f"{self.temperature:.4g} K, {self.length / 1000.0:.4g} ps, {band}",
            f"sampled every {self.spacing:.4g} fs: Nyquist wavenumber {self.nyquist:.4g} cm⁻¹",
            *(f"caution: {line}" for line in self.cautions),
        ]


def activity(series: Sequence[Series], weights: Array, plan: Plan) -> Activity:
    """G of Σ_k weights[c, k] ⟨Ẋ_k Ẋ_k⟩ over all runs, each as its length and its own temperature say.

    Errors: standard errors over consecutive blocks, each at least twice the longest lag; at most sixteen.
    """
    parts, totals, lengths, blocks = [], [], [], []
    most = max(1, _MOST_BLOCKS // len(series))
    aliased = 0.0
    for one in series:
        scale = 2.0 * LIGHT / (KT * one.temperature)
        correlations = _correlations(one, weights, plan)
        parts.append(scale * _transform(one, correlations, plan, plan.grid))
        everywhere = np.linspace(0.0, one.nyquist, max(int(8.0 * one.nyquist / plan.resolution), 200) + 1)
        high = scale * _transform(one, correlations, plan, everywhere)
        totals.append(np.trapezoid(high, everywhere, axis=1))
        last = np.abs(high[0, everywhere > 0.9 * one.nyquist]).sum()
        aliased = max(aliased, float(last / max(np.abs(high[0]).sum(), 1e-300)))
        lengths.append(one.length)
        count = min(int(one.length // (2.0 * plan.lag)), most)
        if count * len(series) < 2:
            continue
        for part in np.array_split(one.values, max(count, 1)):
            block = Series(one.name, part, one.spacing, one.rates, one.time_step, one.temperature)
            blocks.append(scale * _transform(block, _correlations(block, weights, plan), plan, plan.grid))
    share = np.array(lengths) / np.sum(lengths)
    values = np.einsum("r,rcg->cg", share, np.array(parts))
    errors = np.full_like(values, np.nan)
    if len(blocks) > 1:
        errors = np.std(blocks, axis=0, ddof=1) / np.sqrt(len(blocks))
    slowest = max(series, key=lambda one: one.spacing)
    cautions = []
    if aliased > 0.01:
        cautions.append(
            f"{100.0 * aliased:.1f} % of the spectrum lies within a tenth of the Nyquist wavenumber "
            f"{slowest.nyquist:.4g} cm⁻¹: faster vibrations fold down; print at every {0.5 * slowest.spacing:.3g} fs"
        )
    return Activity(
        plan=plan,
        values=values,
        errors=errors,
        total=share @ np.array(totals),
        blocks=max(len(blocks), 1),
        aliased=aliased,
        nyquist=slowest.nyquist,
        spacing=slowest.spacing,
        time_step=max(one.time_step for one in series),
        length=float(np.sum(lengths)),
        temperature=float(share @ np.array([one.temperature for one in series])),
        cautions=tuple(cautions),
    )


def _correlations(series: Series, weights: Array, plan: Plan) -> Array:
    """⟨Ẋ(0)Ẋ(t)⟩ [c, lags + 1], per fs², without bias."""
    x = series.values if series.rates else np.diff(series.values, axis=0) / series.spacing
    n = len(x)
    lags = min(round(plan.lag / series.spacing), n - 1)
    padded = 1 << int(n + lags).bit_length()
    out = np.zeros((len(weights), lags + 1))
    for k in range(0, x.shape[1], 64):  # so many columns at once: a density of states has thousands
        power = np.abs(np.fft.rfft(x[:, k : k + 64], padded, axis=0)) ** 2
        out += weights[:, k : k + 64] @ np.fft.irfft(power, padded, axis=0)[: lags + 1].T
    return out / (n - np.arange(lags + 1))


def _transform(series: Series, correlations: Array, plan: Plan, grid: Array) -> Array:
    """∫ dt ⟨Ẋ(0)Ẋ(t)⟩ w(t) cos ωt [c, g] at the wavenumbers ``grid`` (equally spaced from 0), per fs."""
    n = correlations.shape[1]
    s = np.arange(n) * series.spacing / plan.lag
    weighted = correlations * np.where(s <= 1.0, _WINDOWS[plan.window](np.minimum(s, 1.0)), 0.0)
    turn = 2.0 * np.pi * LIGHT * series.spacing * grid  # ωΔt
    sums = czt(weighted, len(grid), w=np.exp(-1j * (turn[1] - turn[0])), axis=1).real
    spectrum = series.spacing * (2.0 * sums - weighted[:, :1])
    return spectrum if series.rates else spectrum / np.sinc(turn / (2.0 * np.pi)) ** 2


def reduced_energy(wavenumber: Array, temperature: float) -> Array:
    """x = ħω/k_B T."""
    return np.asarray(wavenumber) * (constants.h * constants.c * 100.0 / (constants.k * temperature))


def correction(name: str, wavenumber: Array, temperature: float) -> Array:
    """Q(ω) over that of ``harmonic``: what multiplies the spectrum of linear response. Raises InputError."""
    x = np.maximum(reduced_energy(wavenumber, temperature), 1e-12)
    if name == "harmonic":
        return np.ones_like(x)
    if name == "standard":
        return np.tanh(0.5 * x) / (0.5 * x)
    if name == "schofield":
        half = np.minimum(0.5 * x, 300.0)  # beyond it a number of float64, but no spectrum
        return np.sinh(half) / half
    if name == "none":
        return -np.expm1(-x) / x
    raise InputError(f"quantum-correction is {name}: give one of {', '.join(CORRECTIONS)}")


@dataclass(frozen=True)
class Peak:
    """A maximum: ``place`` and ``width`` (full, at half prominence) in cm⁻¹, ``height``, and ``area`` between minima.

    ``corrected``: the place (cm⁻¹) without the error of velocity Verlet's time step Δt, which makes a harmonic
    vibration of frequency ω run at Ω with sin(ΩΔt/2) = ωΔt/2.
    """

    place: float
    corrected: float
    height: float
    width: float
    area: float

    def numbers(self, unit: str) -> dict[str, float]:
        """JSON-able; ``unit`` that of the height."""
        return {
            "wavenumber_cm-1": self.place,
            "without_time_step_error_cm-1": self.corrected,
            f"height_{unit}": self.height,
            "width_cm-1": self.width,
            f"area_{unit}_cm-1": self.area,
        }


def find_lines(grid: Array, values: Array, time_step: float, least: float = 0.02) -> list[Peak]:
    """Maxima of a spectrum that rise by ``least`` of the highest value above their surroundings."""
    prominence = max(least * float(values.max(initial=0.0)), 1e-300)
    places, _ = find_peaks(values, prominence=prominence)
    step = grid[1] - grid[0]
    widths = peak_widths(values, places, rel_height=0.5)[0] * step if len(places) else []
    ends = [0, *(a + int(np.argmin(values[a:b])) for a, b in pairwise(places)), len(grid) - 1]
    out = []
    for i, k in enumerate(places):
        left, middle, right = values[k - 1 : k + 2]
        shift = 0.5 * (left - right) / (left - 2.0 * middle + right)
        place = float(grid[k] + shift * step)
        half = np.pi * LIGHT * time_step  # ωΔt/2 of 1 cm⁻¹
        out.append(
            Peak(
                place,
                float(np.sin(half * place) / half) if half > 0.0 else place,
                float(middle - 0.25 * (left - right) * shift),
                float(widths[i]),
                float(np.trapezoid(values[ends[i] : ends[i + 1] + 1], dx=step)),
            )
        )
    return out
