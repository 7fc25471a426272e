"""Loops of mesh and pairs on a CPU, compiled by numba; they release the interpreter lock, so that threads share them.

Against the same sums by torch (:class:`voltpi.potential.electrostatics.mesh.TorchSites`), 2160 atoms, windows of 10
points, one core: spread 1.1 ms against 7.2, gather 0.9 against 9.9, with the gradient 1.2 against 12.8.

Meshes are [m, n1, n2, n3]; a site knows its mesh, the first mesh point of its window on every axis (already in
[0, n)), and the window's values and derivatives [3, w] there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Loop",
    "gather",
    "gather_curvature",
    "gather_gradient",
    "in_parallel",
    "mix_matrix",
    "mix_product",
    "pair_field",
    "rigid_field",
    "shares",
    "spread",
    "spread_dipoles",
    "window_values",
]

Array = NDArray[np.float64]
Loop = Callable[..., None]

_jit: Any = numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy")


@_jit
def window_values(
    begin: int, end: int, points: Array, shape: Any, coefficients: Array, order: int, first: Any, out: Array
) -> None:
    """Window at mesh coordinates ``points`` [s, 3]: first point [s, 3], derivatives 0 … order [order + 1, s, 3, w]."""
    degree, w = coefficients.shape[0] - 1, coefficients.shape[1]
    for s in range(begin, end):
        for d in range(3):
            low = np.floor(points[s, d])
            x = out.dtype.type(points[s, d] - low - 0.5)
            first[s, d] = (int(low) - (w // 2 - 1)) % shape[d]
            for j in range(w):
                out[0, s, d, j] = coefficients[degree, j]
            for k in range(1, order + 1):
                for j in range(w):
                    out[k, s, d, j] = 0
            for power in range(degree - 1, -1, -1):
                if order >= 2:
                    for j in range(w):
                        out[2, s, d, j] = out[2, s, d, j] * x + out[1, s, d, j]
                if order >= 1:
                    for j in range(w):
                        out[1, s, d, j] = out[1, s, d, j] * x + out[0, s, d, j]
                for j in range(w):
                    out[0, s, d, j] = out[0, s, d, j] * x + coefficients[power, j]
            if order >= 2:
                for j in range(w):
                    out[2, s, d, j] *= 2


@_jit
def spread(begin: int, end: int, order: Any, mesh: Any, first: Any, values: Array, charges: Array, grid: Array) -> None:
    """Adds charges [s] of the sites order[begin:end] to their meshes."""
    _, n1, n2, n3 = grid.shape
    w = values.shape[3]
    for t in range(begin, end):
        s = order[t]
        m, z0 = mesh[s], first[s, 2]
        wz = values[0, s, 2]
        x = first[s, 0]
        for a in range(w):
            qx = charges[s] * values[0, s, 0, a]
            y = first[s, 1]
            for b in range(w):
                v = qx * values[0, s, 1, b]
                row = grid[m, x, y]
                if z0 + w <= n3:
                    line = row[z0 : z0 + w]
                    for c in range(w):
                        line[c] += v * wz[c]
                else:
                    z = z0
                    for c in range(w):
                        row[z] += v * wz[c]
                        z = z + 1 if z + 1 < n3 else 0
                y = y + 1 if y + 1 < n2 else 0
            x = x + 1 if x + 1 < n1 else 0


@_jit
def spread_dipoles(
    begin: int, end: int, order: Any, mesh: Any, first: Any, values: Array, dipoles: Array, grid: Array
) -> None:
    """Adds dipoles [s, 3] (charge times mesh spacings) of the sites order[begin:end]."""
    _, n1, n2, n3 = grid.shape
    w = values.shape[3]
    for t in range(begin, end):
        s = order[t]
        m, z0 = mesh[s], first[s, 2]
        wz, dz = values[0, s, 2], values[1, s, 2]
        p0, p1, p2 = dipoles[s, 0], dipoles[s, 1], dipoles[s, 2]
        x = first[s, 0]
        for a in range(w):
            wx, dx = values[0, s, 0, a], values[1, s, 0, a]
            y = first[s, 1]
            for b in range(w):
                wy, dy = values[0, s, 1, b], values[1, s, 1, b]
                v = p0 * dx * wy + p1 * wx * dy
                u = p2 * wx * wy
                row = grid[m, x, y]
                if z0 + w <= n3:
                    line = row[z0 : z0 + w]
                    for c in range(w):
                        line[c] += v * wz[c] + u * dz[c]
                else:
                    z = z0
                    for c in range(w):
                        row[z] += v * wz[c] + u * dz[c]
                        z = z + 1 if z + 1 < n3 else 0
                y = y + 1 if y + 1 < n2 else 0
            x = x + 1 if x + 1 < n1 else 0


@_jit
def gather(begin: int, end: int, order: Any, mesh: Any, first: Any, values: Array, grid: Array, out: Array) -> None:
    """Potential [s] at the sites order[begin:end]."""
    _, n1, n2, n3 = grid.shape
    w = values.shape[3]
    zero = grid.dtype.type(0)
    for t in range(begin, end):
        s = order[t]
        m, z0 = mesh[s], first[s, 2]
        wz = values[0, s, 2]
        total = zero
        x = first[s, 0]
        for a in range(w):
            wx = values[0, s, 0, a]
            y = first[s, 1]
            for b in range(w):
                row = grid[m, x, y]
                along = zero
                if z0 + w <= n3:
                    line = row[z0 : z0 + w]
                    for c in range(w):
                        along += line[c] * wz[c]
                else:
                    z = z0
                    for c in range(w):
                        along += row[z] * wz[c]
                        z = z + 1 if z + 1 < n3 else 0
                total += wx * values[0, s, 1, b] * along
                y = y + 1 if y + 1 < n2 else 0
            x = x + 1 if x + 1 < n1 else 0
        out[s] = total


@_jit
def gather_gradient(
    begin: int, end: int, order: Any, mesh: Any, first: Any, values: Array, grid: Array, out: Array
) -> None:
    """Potential and its gradient along the mesh axes [s, 4] at the sites order[begin:end]."""
    _, n1, n2, n3 = grid.shape
    w = values.shape[3]
    zero = grid.dtype.type(0)
    for t in range(begin, end):
        s = order[t]
        m, z0 = mesh[s], first[s, 2]
        wz, dz = values[0, s, 2], values[1, s, 2]
        t0 = t1 = t2 = t3 = zero
        x = first[s, 0]
        for a in range(w):
            wx, dx = values[0, s, 0, a], values[1, s, 0, a]
            y = first[s, 1]
            for b in range(w):
                row = grid[m, x, y]
                along = slope = zero
                if z0 + w <= n3:
                    line = row[z0 : z0 + w]
                    for c in range(w):
                        along += line[c] * wz[c]
                        slope += line[c] * dz[c]
                else:
                    z = z0
                    for c in range(w):
                        along += row[z] * wz[c]
                        slope += row[z] * dz[c]
                        z = z + 1 if z + 1 < n3 else 0
                wy, dy = values[0, s, 1, b], values[1, s, 1, b]
                t0 += wx * wy * along
                t1 += dx * wy * along
                t2 += wx * dy * along
                t3 += wx * wy * slope
                y = y + 1 if y + 1 < n2 else 0
            x = x + 1 if x + 1 < n1 else 0
        out[s, 0], out[s, 1], out[s, 2], out[s, 3] = t0, t1, t2, t3


@_jit
def gather_curvature(
    begin: int, end: int, order: Any, mesh: Any, first: Any, values: Array, grid: Array, out: Array
) -> None:
    """Second derivatives along the mesh axes [s, 6] (xx, xy, xz, yy, yz, zz) at the sites order[begin:end]."""
    _, n1, n2, n3 = grid.shape
    w = values.shape[3]
    zero = grid.dtype.type(0)
    for t in range(begin, end):
        s = order[t]
        m = mesh[s]
        wz, dz, cz = values[0, s, 2], values[1, s, 2], values[2, s, 2]
        xx = xy = xz = yy = yz = zz = zero
        x = first[s, 0]
        for a in range(w):
            wx, dx, cx = values[0, s, 0, a], values[1, s, 0, a], values[2, s, 0, a]
            y = first[s, 1]
            for b in range(w):
                row = grid[m, x, y]
                along = slope = curve = zero
                z = first[s, 2]
                for c in range(w):
                    along += row[z] * wz[c]
                    slope += row[z] * dz[c]
                    curve += row[z] * cz[c]
                    z = z + 1 if z + 1 < n3 else 0
                wy, dy, cy = values[0, s, 1, b], values[1, s, 1, b], values[2, s, 1, b]
                xx += cx * wy * along
                xy += dx * dy * along
                xz += dx * wy * slope
                yy += wx * cy * along
                yz += wx * dy * slope
                zz += wx * wy * curve
                y = y + 1 if y + 1 < n2 else 0
            x = x + 1 if x + 1 < n1 else 0
        out[s, 0], out[s, 1], out[s, 2], out[s, 3], out[s, 4], out[s, 5] = xx, xy, xz, yy, yz, zz


@_jit
def mix_product(begin: int, end: int, weight: Array, form: Array, structure: Any, out: Any) -> None:
    """out_a = f_a w Σ_b f_b S_b for wave vectors begin … end of [replica, channel, k]."""
    replicas, channels, _ = structure.shape
    for r in range(replicas):
        for k in range(begin, end):
            total = form[0, k] * structure[r, 0, k]
            for a in range(1, channels):
                total += form[a, k] * structure[r, a, k]
            total *= weight[k]
            for a in range(channels):
                out[r, a, k] = form[a, k] * total


@_jit
def mix_matrix(begin: int, end: int, matrix: Array, structure: Any, out: Any) -> None:
    """out_a = Σ_b K_ab S_b for wave vectors begin … end of [replica, channel, k]."""
    replicas, channels, _ = structure.shape
    for r in range(replicas):
        for a in range(channels):
            for k in range(begin, end):
                total = matrix[a, 0, k] * structure[r, 0, k]
                for b in range(1, channels):
                    total += matrix[a, b, k] * structure[r, b, k]
                out[r, a, k] = total


@_jit
def _polynomial(c: Array, v: float) -> tuple[float, float]:
    """Value and derivative at v of a polynomial with 8 coefficients."""
    value = c[7]
    slope = 0.0
    for power in range(6, -1, -1):
        slope = slope * v + value
        value = value * v + c[power]
    return value, slope


@_jit
def _kernel(
    u: float, t: int, fine: Array, ends: Array, steps: Array, coarse: Array, step: float, start: float, cutoff: float
) -> tuple[float, float]:
    """B₀ and its derivative in u = r², pairs of kind t; switched off between ``start`` and ``cutoff`` (Å²).

    Near the origin the table ``fine`` [kinds, intervals, 8], up to ``ends`` [kinds] (Å²); beyond, where erf(a r) = 1,
    the switched 1/r and the table ``coarse`` [intervals, 8] of what is taken from it.
    """
    if u < ends[t]:
        where = u / steps[t]
        k = int(where)
        return _polynomial(fine[t, k], (where - k - 0.5) * steps[t])
    where = u / step
    k = int(where)
    if not k < coarse.shape[0]:
        return 0.0, 0.0
    value, slope = _polynomial(coarse[k], (where - k - 0.5) * step)
    inverse = 1.0 / np.sqrt(u)
    if u <= start:
        return value + inverse, slope - 0.5 * inverse / u
    width = cutoff - start
    x = (u - start) / width
    y = 1.0 - x
    s = y * y * y * (1.0 + 3.0 * x + 6.0 * x * x)
    ds = -30.0 * (x * y) * (x * y) / width
    return value + s * inverse, slope + (ds - 0.5 * s / u) * inverse


@_jit
def pair_field(
    begin: int,
    end: int,
    index: Any,
    vectors: Array,
    kind: Any,
    fine: Array,
    ends: Array,
    steps: Array,
    coarse: Array,
    step: float,
    start: float,
    cutoff: float,
    shells: Array,
    charges: Array,
    out: Array,
    pull: Array,
) -> None:
    """Potential and gradient at cores and shells [n, 8] from pairs begin … end, with tabulated kernels (``_kernel``).

    Beyond ``cutoff`` (Å²) there is no interaction. ``pull`` [p, 3]: Σ Q Q' B₁ d of every pair.
    """
    for p in range(begin, end):
        i, j, t = index[0, p], index[1, p], kind[p]
        px = py = pz = 0.0
        for a in range(2):
            for b in range(2):
                x = vectors[p, 0] + b * shells[j, 0] - a * shells[i, 0]
                y = vectors[p, 1] + b * shells[j, 1] - a * shells[i, 1]
                z = vectors[p, 2] + b * shells[j, 2] - a * shells[i, 2]
                u = x * x + y * y + z * z
                if not u < cutoff:  # nor for what is not a number
                    continue
                b0, slope = _kernel(u, t, fine, ends, steps, coarse, step, start, cutoff)
                b1 = -2.0 * slope
                qi, qj = charges[a, i], charges[b, j]
                out[i, 4 * a] += b0 * qj
                out[i, 4 * a + 1] += b1 * qj * x
                out[i, 4 * a + 2] += b1 * qj * y
                out[i, 4 * a + 3] += b1 * qj * z
                out[j, 4 * b] += b0 * qi
                out[j, 4 * b + 1] -= b1 * qi * x
                out[j, 4 * b + 2] -= b1 * qi * y
                out[j, 4 * b + 3] -= b1 * qi * z
                w = b1 * qi * qj
                px += w * x
                py += w * y
                pz += w * z
        pull[p, 0], pull[p, 1], pull[p, 2] = px, py, pz


@_jit
def rigid_field(
    begin: int,
    end: int,
    index: Any,
    offsets: Array,
    positions: Array,
    kinds: Any,
    count: int,
    fine: Array,
    ends: Array,
    steps: Array,
    coarse: Array,
    step: float,
    start: float,
    cutoff: float,
    charges: Array,
    structure: Any,
    out: Array,
    pull: Array,
) -> None:
    """Potential and gradient [n, 4] of atoms without shells from pairs begin … end of a list.

    The list may reach beyond the cutoff. ``offsets`` [p, 3]: of the image of the second atom (Å); ``kinds`` [n] of
    ``count``: the widths of the atoms. ``pull`` [structures, 3, 3]: Σ Q Q' B₁ d dᵀ (its upper half).
    """
    for p in range(begin, end):
        i, j = index[0, p], index[1, p]
        x = positions[j, 0] - positions[i, 0] + offsets[p, 0]
        y = positions[j, 1] - positions[i, 1] + offsets[p, 1]
        z = positions[j, 2] - positions[i, 2] + offsets[p, 2]
        u = x * x + y * y + z * z
        if not u < cutoff:
            continue
        t = kinds[i] * count + kinds[j]
        b0, slope = _kernel(u, t, fine, ends, steps, coarse, step, start, cutoff)
        qi, qj = charges[i], charges[j]
        b1 = -2.0 * slope
        vi, vj = b1 * qj, b1 * qi
        out[i, 0] += b0 * qj
        out[i, 1] += vi * x
        out[i, 2] += vi * y
        out[i, 3] += vi * z
        out[j, 0] += b0 * qi
        out[j, 1] -= vj * x
        out[j, 2] -= vj * y
        out[j, 3] -= vj * z
        w = vi * qi
        s = structure[i]
        pull[s, 0, 0] += w * x * x
        pull[s, 0, 1] += w * x * y
        pull[s, 0, 2] += w * x * z
        pull[s, 1, 1] += w * y * y
        pull[s, 1, 2] += w * y * z
        pull[s, 2, 2] += w * z * z


@lru_cache(maxsize=1)
def _pool(workers: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="voltpi-mesh")


def in_parallel(work: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
    """Calls ``work(begin, end)`` for every part, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1:
        for part in parts:
            work(*part)
        return
    rest = [_pool(threads - 1, os.getpid()).submit(work, *part) for part in parts[1:]]
    work(*parts[0])
    for done in rest:
        done.result()


def shares(count: int, threads: int) -> list[tuple[int, int]]:
    """``threads`` equal ranges of 0 … count."""
    ends = [count * k // threads for k in range(threads + 1)]
    return list(pairwise(ends))
