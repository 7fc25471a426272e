"""The reciprocal part of the Coulomb operator on a mesh: charges and dipoles of sites -> potential, field, curvature.

Every site belongs to a channel; all sites of a channel share one Gaussian width. One application spreads the charges
of a channel to its mesh with a window, takes a Fourier transform, multiplies by the matrix of kernels between channels,

    K_ab(k) = 4π k_e/(V k²) · T(k) · exp(−k²/4β_ab²),   1/β_ab² = max(1/β², 1/α_a + 1/α_b),

and goes back: a pair of Gaussians wider than the splitting width β is summed here with its own form factor, a
sharper pair leaves [erf(α_ab r) − erf(β r)]/r to real space. T makes the boundary:

    periodic  1 (k ≠ 0)
    slab      1 − (−1)^n exp(−k∥ L/2) for a box of height L along the normal, n the index of k there (Rozzi et al.,
              Phys. Rev. B 73, 205119, 2006): the sum over in-plane images alone, whatever lies above and below; the
              potential of a charged plane is −2π k_e σ|z|
    open      1 − cos(k R): no images (Vico, Greengard & Ferrando, J. Comput. Phys. 323, 191, 2016)

which is exact as long as all charges, tails included, lie within L/2 or R of each other; the box has room for that.

The energy is one smooth function of positions and charges for a given mesh; potentials, fields and the virial are its
derivatives. ``torch-pme`` and ``nvalchemi-toolkit-ops`` have one width for all charges and no second derivatives; the
reciprocal part for 2160 atoms at 1e-6 takes torch-pme 0.5.0 (7 nodes) 104 ms on one core and this, with four widths,
6.6 ms.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor

from voltpi.potential.electrostatics import mesh_kernels as kernels
from voltpi.potential.electrostatics.window import Resolution, cached_window

__all__ = ["Mesh", "MeshBox", "Sites", "make_sites"]


_TOGETHER = 131072  # mesh points of one inverse transform on a CPU


class MeshBox(NamedTuple):
    """Where a mesh lies.

    cell : [3, 3], Å, its edges; along an open direction a box around the atoms
    origin : [3], Å, its corner
    shape : points along each edge
    boundary : ``periodic``, ``slab`` (open along edge 2, which is normal to edges 0 and 1) or ``open``
    reach : Å, how far two charges may lie apart in an open direction (L/2 or R)
    """

    cell: Tensor
    origin: Tensor
    shape: tuple[int, int, int]
    boundary: str
    reach: float


def mesh_shape(lengths: Sequence[float], spacing: float) -> tuple[int, int, int]:
    """Points along edges of these lengths (Å) for a spacing (Å): products of small primes."""
    a, b, c = (next_fast_len(max(4, math.ceil(length / spacing)), real=True) for length in lengths)
    return a, b, c


class Sites(Protocol):
    """Charges at points, with their windows on the mesh."""

    def spread(self, charges: Tensor, grid: Tensor) -> None:
        """Adds charges [s] to the grid."""

    def spread_dipoles(self, dipoles: Tensor, grid: Tensor) -> None:
        """Adds dipoles [s, 3] (along the mesh axes)."""

    def gather(self, grid: Tensor) -> Tensor:
        """Values [s]."""

    def gather_gradient(self, grid: Tensor) -> Tensor:
        """Values and derivatives along the mesh axes [s, 4]."""

    def gather_curvature(self, grid: Tensor) -> Tensor:
        """Second derivatives along the mesh axes [s, 6]: 00, 01, 02, 11, 12, 22."""


class TorchSites:
    """Sites for any device, one plane of the window at a time."""

    def __init__(
        self, points: Tensor, mesh: Tensor, shape: tuple[int, int, int], window: Resolution, dtype: torch.dtype
    ) -> None:
        w = window.support
        self.points, self.mesh, self.shape, self.support = points, mesh, shape, w
        self.coefficients = torch.from_numpy(cached_window(w, window.shape).coefficients).to(points.device, dtype)
        low = points.floor()
        self.fraction = (points - low - 0.5).to(dtype)
        n = torch.tensor(shape, device=points.device)
        along = low.to(torch.int64)[:, :, None] - (w // 2 - 1) + torch.arange(w, device=points.device)
        self.index = along % n[:, None]  # [s, 3, w]
        self.values: list[Tensor] = []

    def _values(self, order: int) -> list[Tensor]:
        """Window and derivatives up to ``order``, each [s, 3, w]."""
        x = self.fraction[..., None]
        while len(self.values) <= order:
            k = len(self.values)
            out = torch.zeros_like(self.index, dtype=x.dtype)
            for power in range(self.coefficients.shape[0] - 1, k - 1, -1):
                out = out * x + math.perm(power, k) * self.coefficients[power]
            self.values.append(out)
        return self.values

    def _plane(self, a: int) -> Tensor:
        """Flat mesh points [s, w, w] of the a-th plane."""
        n1, n2, n3 = self.shape
        first = (self.mesh * n1 + self.index[:, 0, a])[:, None, None]
        return (first * n2 + self.index[:, 1, :, None]) * n3 + self.index[:, 2, None, :]

    def spread(self, charges: Tensor, grid: Tensor) -> None:
        (v,) = self._values(0)[:1]
        for a in range(self.support):
            plane = (charges * v[:, 0, a])[:, None, None] * v[:, 1, :, None] * v[:, 2, None, :]
            grid.view(-1).index_add_(0, self._plane(a).reshape(-1), plane.reshape(-1))

    def spread_dipoles(self, dipoles: Tensor, grid: Tensor) -> None:
        v, d = self._values(1)[:2]
        p = dipoles[:, :, None]
        for a in range(self.support):
            across = (p[:, 0] * d[:, 0, a, None]) * v[:, 1] + (p[:, 1] * v[:, 0, a, None]) * d[:, 1]
            plane = across[:, :, None] * v[:, 2, None, :]
            plane = plane + (p[:, 2] * v[:, 0, a, None] * v[:, 1])[:, :, None] * d[:, 2, None, :]
            grid.view(-1).index_add_(0, self._plane(a).reshape(-1), plane.reshape(-1))

    def _contract(self, grid: Tensor, orders: Sequence[tuple[int, int, int]]) -> Tensor:
        values = self._values(max(max(o) for o in orders))
        out = torch.zeros(len(self.points), len(orders), dtype=torch.float64, device=grid.device)
        for a in range(self.support):
            plane = grid.reshape(-1)[self._plane(a)]
            along = {k: torch.einsum("syz,sz->sy", plane, values[k][:, 2]) for k in {o[2] for o in orders}}
            for column, (i, j, k) in enumerate(orders):
                out[:, column] += values[i][:, 0, a] * (values[j][:, 1] * along[k]).sum(1)
        return out

    def gather(self, grid: Tensor) -> Tensor:
        return self._contract(grid, [(0, 0, 0)])[:, 0]

    def gather_gradient(self, grid: Tensor) -> Tensor:
        return self._contract(grid, [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])

    def gather_curvature(self, grid: Tensor) -> Tensor:
        return self._contract(grid, [(2, 0, 0), (1, 1, 0), (1, 0, 1), (0, 2, 0), (0, 1, 1), (0, 0, 2)])


class CompiledSites:
    """Sites on a CPU: compiled loops, several threads.

    For spreading, the mesh is cut along its first axis into an even number of layers, each at least a window thick:
    those of even number never touch the same point, nor those of odd number.
    """

    def __init__(
        self, points: Tensor, mesh: Tensor, shape: tuple[int, int, int], window: Resolution, dtype: torch.dtype
    ) -> None:
        w, count = window.support, len(points)
        self.dtype = np.float64 if dtype == torch.float64 else np.float32
        self.points, self.shape = points.numpy(), np.array(shape)
        self.mesh = mesh.numpy()
        self.coefficients = cached_window(w, window.shape).coefficients.astype(self.dtype)
        self.first = np.empty((count, 3), dtype=np.int64)
        self.order = -1
        threads = torch.get_num_threads()
        self._fill(1)
        n1, n2, _ = shape
        layers = 2 * min(threads, n1 // (2 * w)) if threads > 1 and count * w**3 > 1_500_000 else 0
        layer = self.first[:, 0] * layers // n1 if layers else np.zeros(count, dtype=np.int64)
        key = ((layer * (int(self.mesh.max(initial=0)) + 1) + self.mesh) * n1 + self.first[:, 0]) * n2 + self.first[
            :, 1
        ]
        self.sequence = np.argsort(key)
        if layers:
            ends = np.searchsorted(layer[self.sequence], np.arange(layers + 1))
            ranges = [(int(a), int(b)) for a, b in pairwise(ends)]
            self.colours = [ranges[0::2], ranges[1::2]]
        else:
            self.colours = [[(0, count)]]
        self.parts = kernels.shares(count, threads if count * w**3 > 1_500_000 else 1)

    def _fill(self, order: int) -> None:
        if order <= self.order:
            return
        self.values = np.empty((order + 1, len(self.points), 3, self.coefficients.shape[1]), dtype=self.dtype)
        self.order = order
        kernels.in_parallel(
            lambda a, b: kernels.window_values(
                a, b, self.points, self.shape, self.coefficients, order, self.first, self.values
            ),
            kernels.shares(len(self.points), torch.get_num_threads() if len(self.points) > 1000 else 1),
        )

    def spread(self, charges: Tensor, grid: Tensor) -> None:
        g, q = grid.numpy(), charges.numpy()
        for colour in self.colours:
            kernels.in_parallel(
                lambda a, b: kernels.spread(a, b, self.sequence, self.mesh, self.first, self.values, q, g), colour
            )

    def spread_dipoles(self, dipoles: Tensor, grid: Tensor) -> None:
        g, p = grid.numpy(), dipoles.contiguous().numpy()
        for colour in self.colours:
            kernels.in_parallel(
                lambda a, b: kernels.spread_dipoles(a, b, self.sequence, self.mesh, self.first, self.values, p, g),
                colour,
            )

    def gather(self, grid: Tensor) -> Tensor:
        return self._gather(grid, kernels.gather, (len(self.points),))

    def gather_gradient(self, grid: Tensor) -> Tensor:
        return self._gather(grid, kernels.gather_gradient, (len(self.points), 4))

    def gather_curvature(self, grid: Tensor) -> Tensor:
        self._fill(2)
        return self._gather(grid, kernels.gather_curvature, (len(self.points), 6))

    def _gather(self, grid: Tensor, loop: kernels.Loop, shape: tuple[int, ...]) -> Tensor:
        g, out = grid.numpy(), np.empty(shape)
        kernels.in_parallel(
            lambda a, b: loop(a, b, self.sequence, self.mesh, self.first, self.values, g, out), self.parts
        )
        return torch.from_numpy(out)


def make_sites(
    points: Tensor, mesh: Tensor, shape: tuple[int, int, int], window: Resolution, dtype: torch.dtype
) -> Sites:
    """Sites at mesh coordinates ``points`` [s, 3] on mesh ``mesh`` [s] of a grid [m, *shape] of ``dtype``."""
    kind = CompiledSites if points.device.type == "cpu" else TorchSites
    return kind(points, mesh, shape, window, dtype)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Re a* b."""
    return a.real * b.real + a.imag * b.imag


class Mesh:
    """Kernels between the channels for one box.

    Parameters
    ----------
    box : where the mesh lies
    inverse : [c], Å², 1/α of every channel; 0 for one that only meets what is split, 1/(2β²) where it is the only one
    split : [c, c] bool, pairs of channels whose sharp part is summed in real space
    beta : splitting, 1/Å (irrelevant without split pairs)
    k_e : Coulomb constant, eV Å/e²
    window : the window and its spacing
    dtype : of the mesh; float32 serves an accuracy of 1e-4
    """

    def __init__(
        self,
        box: MeshBox,
        inverse: Tensor,
        split: Tensor,
        beta: float,
        k_e: float,
        window: Resolution,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.dtype = dtype
        self.box, self.inverse, self.split, self.beta, self.window = box, inverse, split, beta, window
        device = inverse.device
        n1, n2, n3 = box.shape
        # mesh coordinates = (x − origin) @ to_mesh
        self.to_mesh = torch.linalg.inv(box.cell) * torch.tensor(box.shape, dtype=torch.float64, device=device)
        k = self.wave_vectors()
        k2 = k.square().sum(-1)
        safe = k2.clone()
        safe[0] = 1
        smooth = cached_window(window.support, window.shape)
        factors = [torch.from_numpy(smooth.deconvolution(n)).to(device) for n in box.shape]
        window_factor = factors[0][:, None, None] * factors[1][None, :, None] * factors[2][: n3 // 2 + 1]
        volume = float(torch.linalg.det(box.cell).abs())
        truncation, at_zero = self._truncation(k, safe)
        bare = (4 * math.pi * k_e / volume) * truncation / safe
        bare[0] = 4 * math.pi * k_e / volume * at_zero
        # inverse transforms divide by the number of mesh points
        weight = bare * (window_factor.reshape(-1) * (n1 * n2 * n3))
        self.waves = len(k2)
        self.any_split = bool(split.any())
        if self.any_split:
            self.pair_inverse = torch.maximum(inverse[:, None] + inverse, split.to(torch.float64) / beta**2)
            self.matrix = (weight * torch.exp(-0.25 * self.pair_inverse[..., None] * k2)).to(dtype)  # [c, c, k]
        else:
            self.weight, self.bare = weight.to(dtype), bare.to(dtype)
            self.form = torch.exp(-0.25 * inverse[:, None] * k2).to(dtype)  # [c, k]
        self._grids: dict[tuple[int, int], Tensor] = {}

    def _indices(self) -> list[Tensor]:
        n1, n2, n3 = self.box.shape
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.inverse.device}
        return [
            torch.fft.fftfreq(n1, 1 / n1, **options),
            torch.fft.fftfreq(n2, 1 / n2, **options),
            torch.fft.rfftfreq(n3, 1 / n3, **options),
        ]

    def wave_vectors(self) -> Tensor:
        """Wave vectors of the half mesh, [k, 3], 1/Å."""
        basis = 2 * math.pi * torch.linalg.inv(self.box.cell).T
        k = [m[:, None] * b for m, b in zip(self._indices(), basis, strict=True)]
        return (k[0][:, None, None] + k[1][None, :, None] + k[2][None, None]).reshape(-1, 3)

    def _truncation(self, k: Tensor, k2: Tensor) -> tuple[Tensor | float, float]:
        """T(k), and lim T/k² at k = 0."""
        reach = self.box.reach
        if self.box.boundary == "periodic":
            return 1.0, 0.0
        if self.box.boundary == "open":
            return 1 - torch.cos(reach * k2.sqrt()), 0.5 * reach**2
        return 1 - self._fade(k)[0], -0.5 * reach**2

    def _fade(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """(−1)^n exp(−k∥ L/2) of a slab, and the part of k in its plane, [k], [k, 3]."""
        n1, n2, _ = self.box.shape
        in_plane = k - (k @ self._normal)[:, None] * self._normal
        sign = 1 - 2 * (self._indices()[2].to(torch.int64) % 2).to(torch.float64)
        return sign.expand(n1, n2, -1).reshape(-1) * torch.exp(-in_plane.norm(dim=-1) * self.box.reach), in_plane

    @property
    def _normal(self) -> Tensor:
        edge = self.box.cell[2]
        return edge / edge.norm()

    @property
    def size(self) -> int:
        """Numbers that the kernels hold."""
        return 12 * self.waves + (self.matrix.numel() if self.any_split else self.form.numel() + 2 * self.waves)

    def points(self, positions: Tensor) -> Tensor:
        """Mesh coordinates [n, 3] of positions (Å)."""
        return (positions - self.box.origin) @ self.to_mesh

    def grid(self, meshes: int) -> Tensor:
        """An empty grid [meshes, n1, n2, n3] (one buffer a thread: the last one is overwritten)."""
        key = meshes, threading.get_ident()
        if key not in self._grids:
            self._grids[key] = torch.empty(meshes, *self.box.shape, dtype=self.dtype, device=self.inverse.device)
        return self._grids[key].zero_()

    def transform(self, grid: Tensor) -> Tensor:
        """Structure factors [replica, channel, k] of a grid [replica · channel, …]."""
        return torch.fft.rfftn(grid, dim=(1, 2, 3)).reshape(-1, len(self.inverse), self.waves)

    def potential(self, structure: Tensor) -> Tensor:
        """Grid [replica · channel, n1, n2, n3] of the potential that each channel feels."""
        n1, n2, n3 = self.box.shape
        felt = self.felt(structure).reshape(-1, n1, n2, n3 // 2 + 1)
        return self.back(felt)

    def back(self, felt: Tensor) -> Tensor:
        """Inverse transforms [m, n1, n2, n3] of [m, n1, n2, n3/2 + 1]."""
        shape = self.box.shape
        share = len(felt)
        if felt.device.type == "cpu":  # a few at a time stay in the cache: 1.4 times faster for 64 of 25³
            share = max(1, _TOGETHER // math.prod(shape))
        if share >= len(felt):
            return torch.fft.irfftn(felt, s=shape, dim=(1, 2, 3))
        out = torch.empty(len(felt), *shape, dtype=self.dtype)
        for first in range(0, len(felt), share):
            out[first : first + share] = torch.fft.irfftn(felt[first : first + share], s=shape, dim=(1, 2, 3))
        return out

    def felt(self, structure: Tensor) -> Tensor:
        """Kernel matrix times structure factors [replica, channel, k]."""
        if structure.device.type == "cpu":
            out = torch.empty_like(structure)
            s, o = structure.numpy(), out.numpy()
            arrays = (self.matrix,) if self.any_split else (self.weight, self.form)
            loop = kernels.mix_matrix if self.any_split else kernels.mix_product
            numbers = [a.numpy() for a in arrays]
            threads = torch.get_num_threads() if s.size > 50_000 else 1
            kernels.in_parallel(lambda a, b: loop(a, b, *numbers, s, o), kernels.shares(self.waves, threads))
            return out
        if self.any_split:
            return torch.stack(
                [sum(k * structure[:, b] for b, k in enumerate(row)) for row in self.matrix.unbind(0)], dim=1
            )
        return self.form * (self.weight * (self.form * structure).sum(1))[:, None]

    def strain(self, structure: Tensor) -> Tensor:
        """−∂E/∂strain [replica, 3, 3] of E = ½ Σ_k S* K S at fixed mesh coordinates (box strained with the cell)."""
        if self.any_split:
            power = torch.zeros(structure.shape[0], self.waves, dtype=self.dtype, device=structure.device)
            slope = torch.zeros_like(power)
            for a, row in enumerate(self.matrix):
                for b, kernel in enumerate(row):
                    part = kernel * _overlap(structure[:, a], structure[:, b])
                    power += part
                    slope += self.pair_inverse[a, b] * part
        elif len(self.inverse) == 1:
            power = (self.weight * self.form[0].square()) * _overlap(structure[:, 0], structure[:, 0])
            slope = 2 * self.inverse[0] * power
        else:
            total = (self.form * structure).sum(1)
            power = self.weight * _overlap(total, total)
            wide = (self.inverse[:, None] * self.form * structure).sum(1)
            slope = 2 * self.weight * _overlap(total, wide)
        through_kernel, through_width = self._strain_weights
        found = power.to(torch.float64) @ through_kernel - slope.to(torch.float64) @ through_width
        return found[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)

    @cached_property
    def _strain_weights(self) -> tuple[Tensor, Tensor]:
        """What a unit of power adds to the strain derivative through G T, and through a width 1/α: [k, 6] each."""
        # a wave vector on the half mesh stands for its opposite as well
        n1, n2, n3 = self.box.shape
        count = torch.full((n3 // 2 + 1,), 2.0, dtype=torch.float64, device=self.inverse.device)
        count[0] = 1
        if n3 % 2 == 0:
            count[-1] = 1
        scale = count.expand(n1, n2, -1).reshape(-1) / math.prod(self.box.shape)
        k = self.wave_vectors()
        k2 = k.square().sum(-1)
        log_slope = -1 / k2.clamp(min=1e-300)  # d ln(T/k²)/dk²
        log_slope[0] = 0
        if self.box.boundary == "open":
            length = k2.sqrt().clamp(min=1e-150)
            truncation = (1 - torch.cos(self.box.reach * length)).clamp(min=1e-300)
            rise = self.box.reach * torch.sin(self.box.reach * length) / (2 * length * truncation)
            rise[0] = 0
            log_slope = log_slope + rise
        rows, columns = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]
        squares = k[:, rows] * k[:, columns]
        through_kernel = log_slope[:, None] * squares
        through_kernel[:, [0, 3, 5]] += 0.5
        if self.box.boundary == "slab":
            through_kernel -= self._slab_strain(k)[:, rows, columns]
        return scale[:, None] * through_kernel, 0.25 * scale[:, None] * squares

    def _slab_strain(self, k: Tensor) -> Tensor:
        """∂ ln T/∂strain of every wave, [k, 3, 3]: its box is strained along; k∥ L changes, the index n does not."""
        fade, in_plane = self._fade(k)
        across = torch.outer(self._normal, self._normal)
        length = in_plane.norm(dim=-1)
        amount = 0.5 * fade * length * self.box.reach / torch.where(fade == 1, 1.0, 1 - fade)
        direction = in_plane / length.clamp(min=1e-300)[:, None]
        out = amount[:, None, None] * (across - direction[:, :, None] * direction[:, None, :])
        out[0] += across  # −2π(L/2)² at k = 0 grows with L²
        return out
