"""The Coulomb sum of Gaussian cores and shells in TorchScript: on a mesh in a cell, pair by pair in a cluster.

The same sums as :mod:`voltpi.potential.electrostatics.ewald`; window, deconvolution and kernels are those of
:mod:`voltpi.potential.electrostatics.mesh`. Two things differ: all of a periodic sum is on the mesh, whatever the
widths, so that no pairs are needed; and :meth:`MeshSum.potential_energy` is differentiable by autograd in positions and
cell, from which an engine takes forces and stress.

Sites are cores (first half) and shells (second half); a core and the shell of the same atom do not interact.
"""

# No `from __future__ import annotations` here: TorchScript reads the annotations of these classes.
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor, nn

from voltpi.potential.electrostatics.window import Resolution, cached_window

__all__ = ["Grid", "MeshSum", "PairSum", "Windows", "boys"]


def boys(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boys functions F₀, F₁, F₂ of t ≥ 0 (``gaussians.boys`` for TorchScript)."""
    safe = t.clamp(min=1.0)
    root = safe.sqrt()
    decay = torch.exp(-safe)
    f0 = 0.5 * math.sqrt(math.pi) * torch.erf(root) / root
    f1 = (f0 - decay) / (2.0 * safe)
    f2 = (3.0 * f1 - decay) / (2.0 * safe)
    x = t.clamp(max=1.0)
    terms = 18  # 1/18! < 2e-16
    g2 = torch.full_like(x, 1.0 / (2.0 * terms + 5.0))
    for n in range(terms):  # Σ_k (−x)^k / (k! (2k + 5)) from its end
        k = terms - 1 - n
        g2 = 1.0 / (2.0 * k + 5.0) - x / (k + 1.0) * g2
    e = torch.exp(-x)
    g1 = (2.0 * x * g2 + e) / 3.0
    small = t < 1.0
    return torch.where(small, 2.0 * x * g1 + e, f0), torch.where(small, g1, f1), torch.where(small, g2, f2)


def erf_kernel(u: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B₀, B₁, B₂ of erf(a r)/r (``gaussians.erf_kernel``)."""
    prefactor = (2.0 / math.sqrt(math.pi)) * exponent.sqrt()
    f0, f1, f2 = boys(exponent * u)
    twice = 2.0 * exponent
    return prefactor * f0, prefactor * twice * f1, prefactor * twice * twice * f2


class Grid(NamedTuple):
    """Kernels of one cell: points along the edges, mesh coordinates = x @ to_mesh, and kernels on the half mesh."""

    shape: list[int]
    to_mesh: Tensor  # [3, 3]
    weight: Tensor  # [n1, n2, n3/2 + 1]; 0 at k = 0
    form: Tensor  # [c, n1, n2, n3/2 + 1]


class Windows(NamedTuple):
    """Sites on a mesh: flat mesh points and the window's values there, [s, w³]; its slopes along the mesh axes."""

    points: Tensor
    values: Tensor
    slopes: list[Tensor]  # 3, where asked for
    curvatures: list[Tensor]  # 6 (00, 01, 02, 11, 12, 22), where asked for


def _product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """[s, w] each -> [s, w³]."""
    return ((a.unsqueeze(2) * b.unsqueeze(1)).unsqueeze(3) * c.unsqueeze(1).unsqueeze(2)).flatten(1)


def _fast_length(n: int) -> int:
    """The next product of 2, 3 and 5."""
    rest = 0
    while rest != 1:
        rest = n
        for p in [2, 3, 5]:
            while rest % p == 0:
                rest = rest // p
        n += 1
    return n - 1


class MeshSum(nn.Module):
    """Gaussians on a mesh, one channel for each width.

    Parameters
    ----------
    inverse : [c], Å², 1/α of every channel
    k_e : Coulomb constant, eV Å/e²
    resolution : window and spacing in units of the sharpest kernel
    """

    def __init__(self, inverse: Tensor, k_e: float, resolution: Resolution) -> None:
        super().__init__()
        window = cached_window(resolution.support, resolution.shape)
        self.register_buffer("inverse", inverse.clone())
        self.register_buffer("coefficients", torch.from_numpy(window.coefficients.copy()))
        self.k_e, self.support = k_e, resolution.support
        self.spacing = resolution.spacing * math.sqrt(2.0 * float(inverse.min()))
        # window at the nodes of a quadrature [node, mesh point], and its overlaps with itself moved by whole points
        nodes, weights = leggauss(24)
        powers = np.vander(0.5 * nodes, len(window.coefficients), increasing=True)
        values = powers @ window.coefficients
        weighted = 0.5 * weights[:, None] * values
        w = resolution.support
        overlaps = [(weighted[:, : w - k] * values[:, k:]).sum() for k in range(w)]
        self.register_buffer("nodes", torch.from_numpy(0.5 * nodes[:, None] - 0.5 + 0.5 * w - np.arange(w)).flatten())
        self.register_buffer("weighted", torch.from_numpy(weighted).flatten())
        self.register_buffer("overlaps", torch.from_numpy(np.array(overlaps) * np.where(np.arange(w) == 0, 1.0, 2.0)))

    def _undone(self, index: Tensor, n: int) -> Tensor:
        """The factor φ̂²/(Σ_m φ̂(θ + m)²)² of ``Window.deconvolution`` at θ = index/n; its sum is a cosine series."""
        theta = (2.0 * math.pi / n) * index.unsqueeze(1)
        transform = torch.cos(theta * self.nodes) @ self.weighted
        shifts = torch.arange(self.overlaps.size(0), dtype=index.dtype, device=index.device)
        return (transform / (torch.cos(theta * shifts) @ self.overlaps)) ** 2

    def grid(self, cell: Tensor) -> Grid:
        """Kernels of a cell [3, 3] (Å); differentiable in it."""
        edges: list[float] = torch.linalg.vector_norm(cell.detach(), dim=1).tolist()
        shape: list[int] = []
        for length in edges:
            shape.append(_fast_length(max(self.support, math.ceil(length / self.spacing))))
        n1, n2, n3 = shape[0], shape[1], shape[2]
        inverse = torch.linalg.inv(cell)
        points = torch.tensor([n1, n2, n3], dtype=cell.dtype, device=cell.device)
        m1 = torch.fft.fftfreq(n1, 1.0 / n1, dtype=cell.dtype, device=cell.device)
        m2 = torch.fft.fftfreq(n2, 1.0 / n2, dtype=cell.dtype, device=cell.device)
        m3 = torch.fft.rfftfreq(n3, 1.0 / n3, dtype=cell.dtype, device=cell.device)
        basis = 2.0 * math.pi * inverse.t()
        k = (
            (m1.unsqueeze(1) * basis[0]).unsqueeze(1).unsqueeze(2)
            + (m2.unsqueeze(1) * basis[1]).unsqueeze(0).unsqueeze(2)
            + (m3.unsqueeze(1) * basis[2]).unsqueeze(0).unsqueeze(1)
        )
        k2 = k.square().sum(-1)
        nought = torch.zeros_like(k2)
        nought[0, 0, 0] = 1.0
        bare = (1.0 - nought) / (k2 + nought)
        undone = self._undone(m1, n1).unsqueeze(1).unsqueeze(2) * self._undone(m2, n2).unsqueeze(1)
        volume = torch.linalg.det(cell).abs()
        # inverse transforms divide by the number of mesh points
        weight = (4.0 * math.pi * self.k_e * n1 * n2 * n3) / volume * bare * (undone * self._undone(m3, n3))
        form = torch.exp(-0.25 * self.inverse.to(cell.dtype).view(-1, 1, 1, 1) * k2)
        return Grid(shape, inverse * points, weight, form)

    def windows(self, positions: Tensor, channel: Tensor, grid: Grid, order: int) -> Windows:
        """Sites at ``positions`` [s, 3] (Å) in their channels [s], with derivatives up to ``order``."""
        w = self.support
        x = positions @ grid.to_mesh
        low = x.detach().floor()
        fraction = (x - low - 0.5).unsqueeze(2)
        values: list[Tensor] = []
        last = self.coefficients.size(0) - 1
        for derivative in range(order + 1):
            out = torch.zeros([x.size(0), 3, w], dtype=x.dtype, device=x.device)
            for n in range(last + 1 - derivative):
                power = last - n
                factor = 1.0
                for j in range(derivative):
                    factor = factor * (power - j)
                out = out * fraction + factor * self.coefficients[power].to(x.dtype)
            values.append(out)
        n1, n2, n3 = grid.shape[0], grid.shape[1], grid.shape[2]
        size = torch.tensor([n1, n2, n3], device=x.device).unsqueeze(1)
        along = low.to(torch.int64).unsqueeze(2) - (w // 2 - 1) + torch.arange(w, device=x.device)
        along = torch.remainder(along, size)
        first = channel.unsqueeze(1) * n1 + along[:, 0]
        plane = first.unsqueeze(2) * n2 + along[:, 1].unsqueeze(1)
        points = plane.unsqueeze(3) * n3 + along[:, 2].unsqueeze(1).unsqueeze(2)
        v = values[0]
        slopes: list[Tensor] = []
        curvatures: list[Tensor] = []
        if order > 0:
            d = values[1]
            slopes = [
                _product(d[:, 0], v[:, 1], v[:, 2]),
                _product(v[:, 0], d[:, 1], v[:, 2]),
                _product(v[:, 0], v[:, 1], d[:, 2]),
            ]
            if order > 1:
                c = values[2]
                curvatures = [
                    _product(c[:, 0], v[:, 1], v[:, 2]),
                    _product(d[:, 0], d[:, 1], v[:, 2]),
                    _product(d[:, 0], v[:, 1], d[:, 2]),
                    _product(v[:, 0], c[:, 1], v[:, 2]),
                    _product(v[:, 0], d[:, 1], d[:, 2]),
                    _product(v[:, 0], v[:, 1], c[:, 2]),
                ]
        return Windows(points.flatten(1), _product(v[:, 0], v[:, 1], v[:, 2]), slopes, curvatures)

    def empty(self, grid: Grid) -> Tensor:
        """A flat mesh of all channels, without charges."""
        points = grid.shape[0] * grid.shape[1] * grid.shape[2] * self.inverse.size(0)
        return torch.zeros(points, dtype=grid.weight.dtype, device=grid.weight.device)

    def felt(self, charges: Tensor, grid: Grid) -> Tensor:
        """Flat mesh of the potential (V) that each channel feels of a flat mesh of charges."""
        shape = [self.inverse.size(0), grid.shape[0], grid.shape[1], grid.shape[2]]
        # real products of real and imaginary parts: TorchScript does not differentiate real times complex
        structure = torch.view_as_real(torch.fft.rfftn(charges.view(shape), dim=[1, 2, 3]))
        form = grid.form.unsqueeze(-1)
        total = grid.weight.unsqueeze(-1) * (form * structure).sum(0)
        return torch.fft.irfftn(torch.view_as_complex(form * total), s=grid.shape, dim=[1, 2, 3]).flatten()

    def potential_energy(self, positions: Tensor, charges: Tensor, channel: Tensor, cell: Tensor) -> Tensor:
        """½ Q φ [s] (eV) of every site in the potential of all, its own and its images included; differentiable."""
        grid = self.grid(cell)
        sites = self.windows(positions, channel, grid, 0)
        spread = (charges.unsqueeze(1) * sites.values).flatten()
        felt = self.felt(self.empty(grid).index_add(0, sites.points.flatten(), spread), grid)
        return 0.5 * charges * (felt[sites.points] * sites.values).sum(1)


class PairSum(nn.Module):
    """Gaussians of a cluster, pair by pair.

    Parameters
    ----------
    k_e : Coulomb constant, eV Å/e²
    """

    def __init__(self, k_e: float) -> None:
        super().__init__()
        self.k_e = k_e

    def distances(self, positions: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_s − x_t [s, s, 3], its square, and α_st, of all sites; α is 0 where two do not interact."""
        d = positions.unsqueeze(1) - positions.unsqueeze(0)
        exponent = alpha.unsqueeze(1) * alpha / (alpha.unsqueeze(1) + alpha)
        n = alpha.size(0) // 2
        atom = torch.arange(n, device=alpha.device).repeat(2)
        exponent = exponent * (atom.unsqueeze(1) != atom).to(alpha.dtype)
        return d, d.square().sum(-1), exponent

    def potential_energy(self, positions: Tensor, charges: Tensor, alpha: Tensor) -> Tensor:
        """½ Q φ [s] (eV) of every site; differentiable."""
        _, square, exponent = self.distances(positions, alpha)
        return 0.5 * self.k_e * charges * (erf_kernel(square, exponent)[0] @ charges)
