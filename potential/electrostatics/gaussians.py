"""Kernels of Gaussian charges: erf(a r)/r, its derivatives, and a smooth end of a sum.

With u = r² every radial kernel is written through B₀(u) and B_{m+1} = −2 dB_m/du, so that for d = r_i − r_j

    f = B₀,   ∇f = −B₁ d,   ∇∇f = B₂ d dᵀ − B₁ 1.

For erf(a r)/r these are Boys functions, B_m = (2a/√π)(2a²)^m F_m(a²r²): finite at r = 0, where a core meets its
own shell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["boys", "erf_kernel", "smooth_switch", "switched"]

_SERIES_BELOW = 1.0
_SERIES_TERMS = 18  # 1/18! < 2e-16


def boys(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boys functions F₀, F₁, F₂ of t ≥ 0: power series below 1, upward recursion above."""
    safe = t.clamp(min=_SERIES_BELOW)
    root = safe.sqrt()
    decay = torch.exp(-safe)
    f0 = (0.5 * math.sqrt(math.pi)) * torch.erf(root) / root
    f1 = (f0 - decay) / (2 * safe)
    f2 = (3 * f1 - decay) / (2 * safe)
    small = t < _SERIES_BELOW
    if t.device.type == "cpu":  # few are small
        if bool(small.any()):
            f0, f1, f2 = f0.clone(), f1.clone(), f2.clone()
            f0[small], f1[small], f2[small] = _series(t[small])
    else:  # nothing may wait for the device
        g0, g1, g2 = _series(t.clamp(max=_SERIES_BELOW))
        f0, f1, f2 = torch.where(small, g0, f0), torch.where(small, g1, f1), torch.where(small, g2, f2)
    return f0, f1, f2


def _series(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F₀, F₁, F₂ of 0 ≤ x ≤ 1: the power series of F₂ and downward recursion."""
    coefficients = [(-1.0) ** k / (math.factorial(k) * (2 * k + 5)) for k in range(_SERIES_TERMS + 1)]
    f2 = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        f2 = f2 * x + c
    e = torch.exp(-x)
    f1 = (2 * x * f2 + e) / 3
    return 2 * x * f1 + e, f1, f2


def erf_kernel(u: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B₀, B₁, B₂ of erf(a r)/r with ``exponent`` a² (Å⁻²) at squared distance ``u`` (Å²)."""
    prefactor = (2 / math.sqrt(math.pi)) * exponent.sqrt()
    f0, f1, f2 = boys(exponent * u)
    twice = 2 * exponent
    return prefactor * f0, prefactor * twice * f1, prefactor * twice * twice * f2


def smooth_switch(u: Tensor, start: float, end: float) -> tuple[Tensor, Tensor, Tensor]:
    """1 below ``start``, 0 above ``end``, C² between; with its first and second derivative in u."""
    width = end - start
    x = ((u - start) / width).clamp(0, 1)
    value = (1 - x) ** 3 * (1 + 3 * x + 6 * x * x)  # this form never rounds below zero
    first = -30 * (x * (1 - x)) ** 2 / width
    second = -60 * x * (1 - x) * (1 - 2 * x) / width**2
    return value, first, second


def switched(
    kernel: tuple[Tensor, Tensor, Tensor], switch: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """B₀, B₁, B₂ of the product of a kernel and a switch (product rule in u)."""
    b0, b1, b2 = kernel
    s, s1, s2 = switch
    return b0 * s, b1 * s - 2 * b0 * s1, b2 * s - 4 * b1 * s1 + 4 * b0 * s2
