"""Means of correlated series with honest errors.

Autocorrelation time by summation with automatic windowing: A. Sokal, in Functional Integration (NATO ASI B 361, 1997),
sec. 3. Block averages: H. Flyvbjerg, H. G. Petersen, J. Chem. Phys. 91, 461 (1989).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import correlate

__all__ = [
    "BlockedMean",
    "Blocks",
    "LinearFit",
    "Mean",
    "autocorrelation_time",
    "block_averages",
    "linear_fit",
    "mean_with_error",
    "plus_minus",
]

Array = NDArray[np.float64]

_ENOUGH = 20  # independent samples below which an error is a guess


@dataclass(frozen=True)
class Mean:
    """Mean of a series with its standard error; ``tau`` in samples."""

    value: float
    error: float
    tau: float
    n: int

    @property
    def n_independent(self) -> float:
        """n / 2τ."""
        return self.n / (2.0 * self.tau)

    @property
    def reliable(self) -> bool:
        """Whether the error can be trusted: twenty independent samples or more."""
        return self.n_independent >= _ENOUGH

    @property
    def caution(self) -> str:
        """What to say behind an error that cannot be trusted, else nothing."""
        return "" if self.reliable else f" (a guess: fewer than {_ENOUGH} independent samples)"


@dataclass(frozen=True)
class Blocks:
    """Standard error of the mean from blocks of ``size`` [k] samples, with the error of that error."""

    size: NDArray[np.int64]
    error: Array
    uncertainty: Array


@dataclass(frozen=True)
class LinearFit:
    """y = intercept + slope·x with standard errors."""

    slope: float
    slope_error: float
    intercept: float
    intercept_error: float


class BlockedMean:
    """Mean of arrays of one shape that come one by one, and its standard error from 16 to 31 consecutive blocks.

    Right where blocks are longer than the correlations, as with ``block_averages``; nothing but blocks is kept.
    """

    _MOST = 64

    def __init__(self) -> None:
        self.n = 0
        self._size = 1
        self._blocks: list[Array] = []
        self._filling: Array | None = None
        self._filled = 0

    def add(self, values: ArrayLike) -> None:
        """One more sample."""
        x = np.array(values, dtype=float)
        self._filling = x if self._filling is None else self._filling + x
        self._filled += 1
        self.n += 1
        if self._filled < self._size:
            return
        self._blocks.append(self._filling)
        self._filling, self._filled = None, 0
        if len(self._blocks) == self._MOST:
            self._blocks = _joined(self._blocks)
            self._size *= 2

    @property
    def mean(self) -> Array:
        """Of all samples. Raises ValueError without any."""
        if self.n == 0:
            raise ValueError("a mean needs at least one sample")
        rest = [] if self._filling is None else [self._filling]
        return np.sum([*self._blocks, *rest], axis=0) / self.n

    @property
    def error(self) -> Array:
        """Standard error of the mean, nan from a single block."""
        blocks, size = self._blocks, self._size
        while len(blocks) >= 32:
            blocks, size = _joined(blocks), 2 * size
        if len(blocks) < 2:
            return np.full_like(self.mean, np.nan)
        return np.std(np.array(blocks) / size, axis=0, ddof=1) / np.sqrt(len(blocks))


def _joined(blocks: list[Array]) -> list[Array]:
    """Sums of neighbours; one that is left over is left out."""
    return [a + b for a, b in zip(blocks[0::2], blocks[1::2], strict=False)]


def autocorrelation_time(series: ArrayLike, window: float = 5.0) -> float:
    """Integrated autocorrelation time τ = ½ + Σ_{t≥1} ρ(t) in samples, summed up to the first t ≥ window·τ(t).

    τ = ½ for uncorrelated samples; the mean's variance is 2τ σ²/n. A constant series has τ = ½.
    """
    x = np.asarray(series, dtype=float)
    x = x - x.mean()
    n = len(x)
    if n < 2 or not np.any(np.abs(x) > 1e-14 * np.abs(np.asarray(series)).max()):
        return 0.5
    covariance = correlate(x, x, method="fft" if n > 64 else "direct")[n - 1 :] / n
    tau = np.cumsum(covariance / covariance[0]) - 0.5
    wide_enough = np.flatnonzero(np.arange(n) >= window * tau)
    return max(float(tau[wide_enough[0] if len(wide_enough) else -1]), 0.5)


def mean_with_error(series: ArrayLike) -> Mean:
    """Mean of a stationary series [n] and its standard error sqrt(2τ s²/n), s² freed of the bias of a short series."""
    x = np.asarray(series, dtype=float)
    n = len(x)
    if n == 0:
        raise ValueError("a mean needs at least one sample")
    if n == 1:
        return Mean(float(x[0]), float("nan"), 0.5, 1)
    tau = autocorrelation_time(x)
    # E[s²] = σ²(1 − 2τ/n) for correlated samples
    variance = x.var() / max(1.0 - 2.0 * tau / n, 1.0 / n)
    return Mean(float(x.mean()), float(np.sqrt(2.0 * tau * variance / n)), tau, n)


def block_averages(series: ArrayLike) -> Blocks:
    """Errors of the mean from blocks of 1, 2, 4 … samples, down to four blocks; they rise to a plateau."""
    x = np.asarray(series, dtype=float)
    sizes: list[int] = []
    errors: list[float] = []
    uncertainties: list[float] = []
    size = 1
    while len(x) >= 4 or not sizes:
        n = len(x)
        error = float(np.sqrt(x.var() / (n - 1))) if n > 1 else float("nan")
        sizes.append(size)
        errors.append(error)
        uncertainties.append(error / np.sqrt(2.0 * (n - 1)) if n > 1 else float("nan"))
        x = 0.5 * (x[0 : n - n % 2 : 2] + x[1 : n - n % 2 : 2])
        size *= 2
        if len(x) == 0:
            break
    return Blocks(np.array(sizes), np.array(errors), np.array(uncertainties))


def linear_fit(x: ArrayLike, y: ArrayLike, errors: ArrayLike | None = None, *, correlated: bool = False) -> LinearFit:
    """Straight line through points [n].

    With ``errors`` [n] the points are weighted and the slope's error follows from them. Without, it follows from the
    scatter, times sqrt(2τ) of the residuals where the points are a ``correlated`` time series.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 2 or np.ptp(a) == 0.0:
        raise ValueError("a straight line needs two different abscissae")
    sigma = None if errors is None else np.asarray(errors, dtype=float)
    w = np.ones_like(a) if sigma is None else 1.0 / sigma**2
    centre = np.average(a, weights=w)
    spread = np.sum(w * (a - centre) ** 2)
    slope = float(np.sum(w * (a - centre) * b) / spread)
    intercept = float(np.average(b, weights=w) - slope * centre)
    scale = 1.0
    if sigma is None:
        residuals = b - intercept - slope * a
        free = len(a) - 2
        scale = float(np.sum(residuals**2) / free) if free > 0 else float("nan")
        if correlated:
            scale *= 2.0 * autocorrelation_time(residuals)
    return LinearFit(
        slope,
        float(np.sqrt(scale / spread)),
        intercept,
        float(np.sqrt(scale * (1.0 / w.sum() + centre**2 / spread))),
    )


def plus_minus(value: float, error: float, form: str) -> str:
    """``value ± error`` with one format for both, or the value alone where there is no error (nan)."""
    return f"{value:{form}} ± {error:{form}}" if np.isfinite(error) else f"{value:{form}}"
