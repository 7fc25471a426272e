"""The linear operator of Gaussian cores and shells: charges -> potential, field and their derivatives.

Every atom i has a core of charge Q_c at r_i and a shell of charge Q_s at r_i + Δ_i, both with density
∝ exp(−α_i r²). Two Gaussians interact through k_e erf(α_ij r)/r, α_ij² = α_i α_j/(α_i + α_j); the core and the shell
of one atom in the same image do not interact, their periodic images do.

Boundaries follow from the periodic directions of the structure: all (the sum over k ≠ 0 of the true densities:
tin-foil, uniform background where the cell is charged), two (a slab: the sum over in-plane images alone, whatever the
cell is along the third direction), none (a cluster). Clusters up to ``DIRECT_BELOW`` atoms are summed pair by pair;
everything else is particle-mesh Ewald (:mod:`voltpi.potential.electrostatics.mesh`) at a cost that grows like the
number of atoms, with pairs in real space only where two Gaussians are both too sharp for the mesh. PQEq's Gaussians
are wide: LiPON, oxides and salts need no real space at all. Splitting, mesh and cutoff follow from the requested
relative force error and from measured costs (:mod:`voltpi.potential.electrostatics.splitting`).

Structures of a batch that share cell and boundary (ring-polymer beads) share kernels and transforms.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from ase.geometry import minkowski_reduce
from torch import Tensor

from voltpi.potential.electrostatics.gaussians import erf_kernel
from voltpi.potential.electrostatics.kernel_cache import KernelCache
from voltpi.potential.electrostatics.mesh import MeshBox, Sites, make_sites, mesh_shape
from voltpi.potential.electrostatics.pairs import Pairs, PairState, RigidPairs, RigidPairState
from voltpi.potential.electrostatics.splitting import (
    COST_PAIR,
    COST_RIGID_PAIR,
    Box,
    box_edges,
    split_pairs,
)
from voltpi.potential.errors import InputError
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.systems import Systems

__all__ = [
    "DIRECT_BELOW",
    "CoulombOperator",
    "CoulombState",
    "MeshSum",
]

DIRECT_BELOW = 1000
"""Atoms; a larger cluster is summed on a mesh."""


class CoulombOperator:
    """Interaction of the cores and shells of a batch of structures, built once per geometry.

    Parameters
    ----------
    system : structures periodic in all, two or none of their directions
    alpha : [n], Å⁻², Gaussian exponents
    shell_charge : [n], e, charge of the shell (−Z)
    accuracy : relative force error of a sum that is not direct
    k_e : Coulomb constant, eV Å/e²
    cache : kernels to use again
    rough : float32 on the mesh, and with shells no pairs in real space, for second derivatives that only steer a solver
    many_products : for a matrix: pairs are summed once and the mesh once for every atom

    Raises InputError for a structure that is periodic in one direction only.
    """

    def __init__(
        self,
        system: Systems,
        alpha: Tensor,
        shell_charge: Tensor,
        *,
        accuracy: float,
        k_e: float,
        cache: KernelCache | None = None,
        rough: bool = False,
        many_products: bool = False,
    ) -> None:
        shelled = bool((shell_charge != 0).any())
        pair = COST_PAIR if shelled else COST_RIGID_PAIR
        self.cost_pair = pair / (system.n_atoms if many_products else 1)
        self.dtype = torch.float32 if rough else torch.float64
        self.mesh_only = rough and shelled  # pairs are cheap without shells, and spare metals a fine mesh
        self.system = system
        self.alpha = alpha
        self.shell_charge = shell_charge
        self.k_e = k_e
        cache = cache or KernelCache()
        direct: list[int] = []
        groups: dict[bytes, list[int]] = {}
        counts, periodic = system.counts(), system.pbc.sum(1).tolist()
        rows = torch.cat([system.cell.reshape(-1, 9), system.pbc.to(torch.float64)], dim=1).cpu().numpy()
        for b, directions in enumerate(periodic):
            if directions == 1:
                raise InputError(
                    "the structure is periodic in one direction only: coulomb.boundary open, slab-x/y/z and periodic "
                    "are available; set pbc to two or three directions (with vacuum), or to F F F"
                )
            if directions == 0 and counts[b] <= DIRECT_BELOW:
                direct.append(b)
            else:
                groups.setdefault(rows[b].tobytes() if directions else b"%d" % b, []).append(b)
        self.meshes = [MeshSum(self, members, accuracy, cache) for members in groups.values()]
        self._direct = self._direct_pairs(direct, counts) if direct else []
        self._reach = 0.0
        self._pairs: list[Pairs] = []
        self.rigid = [(mesh, pairs) for mesh in self.meshes if (pairs := mesh.rigid_pairs()) is not None]

    @property
    def n_atoms(self) -> int:
        """Atoms of the batch."""
        return self.system.n_atoms

    def _direct_pairs(self, members: list[int], counts: list[int]) -> list[Pairs]:
        device = self.alpha.device
        first = np.concatenate([[0], np.cumsum(counts)])
        found = [torch.triu_indices(counts[b], counts[b], offset=1, device=device) + int(first[b]) for b in members]
        index = torch.cat(found, dim=1)
        vectors = self.system.positions[index[1]] - self.system.positions[index[0]]
        exponent = self._exponent(index)
        kinds = (exponent[:0], torch.zeros_like(index[0]))  # the kernel is not tabulated
        return [Pairs(index, vectors, exponent, self.system.batch[index[0]], 0.0, math.inf, kinds)]

    def _exponent(self, index: Tensor) -> Tensor:
        a, b = self.alpha[index[0]], self.alpha[index[1]]
        return a * b / (a + b)

    def pairs(self, shells: Tensor) -> list[Pairs]:
        """Pairs of which one has a shell that interact in real space when shells are displaced by ``shells`` [n, 3]."""
        sharp = [mesh for mesh in self.meshes if mesh.has_pairs and mesh.has_shells]
        if sharp:
            farthest = float(shells.norm(dim=-1).max())
            if not self._pairs or farthest > self._reach:
                self._reach = max(0.1, 1.5 * farthest)
                self._pairs = [mesh.pairs(self._reach) for mesh in sharp]
        return self._direct + self._pairs

    def charge_matrix(self) -> Tensor:
        """∂²E/∂q∂q [n, n] (V/e) of one structure without shells, column by column."""
        n, device = self.n_atoms, self.alpha.device
        out = torch.zeros(n, n, dtype=torch.float64, device=device)
        for pairs in self._direct:
            out[pairs.index[0], pairs.index[1]] = (
                self.k_e * erf_kernel(pairs.vectors.square().sum(-1), pairs.exponent)[0]
            )
        for _, rigid in self.rigid:
            i, j = rigid.index
            out.index_put_((i, j), self.k_e * rigid.radial()[1], accumulate=True)
        out = out + out.T
        for mesh in self.meshes:
            own = -self.k_e * (2 / math.sqrt(math.pi)) * mesh.own_exponent.sqrt()
            out.diagonal().add_(own)
            one = torch.zeros(n, dtype=torch.float64, device=device)
            for k in range(n):
                one[k] = 1.0
                grid = mesh.mesh.grid(mesh.channels)
                mesh.core.spread(one, grid)
                column = mesh.core.gather(mesh.mesh.potential(mesh.mesh.transform(grid)))
                if mesh.has_pairs and mesh.boundary == "periodic":
                    column = column + mesh.background(one)
                out[:, k] += column
                one[k] = 0.0
        return 0.5 * (out + out.T)

    def at(self, charges: Tensor, shells: Tensor) -> CoulombState:
        """The operator at charges q [n] (core + shell) and shell displacements [n, 3]."""
        return CoulombState(self, charges, shells)


class MeshSum:
    """The mesh of structures that share cell and boundary, and their place in the batch."""

    def __init__(self, operator: CoulombOperator, members: list[int], accuracy: float, cache: KernelCache) -> None:
        self.operator, self.members = operator, members
        system, device = operator.system, operator.alpha.device
        order = torch.full((system.n_systems,), -1, dtype=torch.int64, device=device)
        order[members] = torch.arange(len(members), device=device)
        everything = len(members) == system.n_systems
        self.atoms = (
            torch.arange(system.n_atoms, device=device) if everything else (order[system.batch] >= 0).nonzero()[:, 0]
        )
        self.replica = order[system.batch[self.atoms]]
        self.positions = system.positions[self.atoms]
        alpha = operator.alpha[self.atoms]
        inverse, self.kind = torch.unique(1 / alpha, return_inverse=True)
        box = self._box(system.cell[members[0]], system.pbc[members[0]].tolist())
        counts = torch.bincount(self.kind, minlength=len(inverse)).cpu() / len(members)
        self.splitting = s = cache.splitting(
            box, inverse.cpu(), counts, accuracy, mesh_only=operator.mesh_only, cost_pair=operator.cost_pair
        )
        self.split = split_pairs(inverse.cpu(), s.beta).to(device)
        self.inverse = inverse
        self.has_pairs = bool(self.split.any())
        # 1/(own pair's β)², with which the mesh counts an atom's charge with itself
        diagonal = torch.where(self.split.diagonal(), 1 / s.beta**2, 2 * inverse)
        self.own_exponent = 1 / diagonal[self.kind]
        # widths that only ever meet the splitting width share a channel
        merged = self.split.all(1)
        rest = (~merged).nonzero()[:, 0]
        with_merged = bool(merged.any())
        channel = torch.zeros(len(inverse), dtype=torch.int64, device=device)
        channel[rest] = torch.arange(len(rest), device=device) + with_merged
        chosen = torch.cat([merged.nonzero()[:1, 0], rest])
        widths, split = inverse[chosen], self.split[chosen][:, chosen]
        if with_merged and len(chosen) == 1:  # the plain Ewald sum: one channel with the splitting's width
            widths, split = torch.full_like(widths, 0.5 / s.beta**2), torch.zeros_like(split)
        elif with_merged:
            widths = torch.cat([torch.zeros_like(widths[:1]), widths[1:]])
        self.channels = len(chosen)
        self.mesh = cache(
            self._mesh_box(box, accuracy, s.spacing), widths, split, s.beta, operator.k_e, s.window, operator.dtype
        )
        self.boundary = box.boundary
        self._where, self._accuracy = box, accuracy
        self.volume = float(torch.linalg.det(system.cell[members[0]]).abs()) if box.boundary == "periodic" else math.inf
        self.slot = self.replica * self.channels + channel[self.kind]
        self.core = self.sites(self.positions, self.slot)
        shelled = operator.shell_charge[self.atoms] != 0
        self.has_shells = bool(shelled.any())
        self.shelled: Tensor | slice = slice(None) if bool(shelled.all()) else shelled.nonzero()[:, 0]
        self._cache = cache

    def _box(self, cell: Tensor, pbc: list[bool]) -> Box:
        rows, directions = cell.cpu().numpy(), [d for d in range(3) if pbc[d]]
        margin = 0.5  # Å, room for shells
        if len(directions) == 3:
            return Box(torch.from_numpy(np.array(minkowski_reduce(rows)[0])).to(cell), "periodic", (0.0, 0.0, 0.0))
        if len(directions) == 2:
            flat = rows[directions]
            normal = np.cross(*flat)
            normal /= np.linalg.norm(normal)
            full = np.array(minkowski_reduce(np.stack([*flat, normal]), pbc=(True, True, False))[0])
            normal_t = torch.from_numpy(normal).to(cell)
            height = self._spans((self.positions @ normal_t)[:, None])[0]
            edges = torch.from_numpy(np.stack([full[0], full[1], normal * (height + margin)])).to(cell)
            return Box(edges, "slab", (0.0, 0.0, height + margin))
        spans = [e + margin for e in self._spans(self.positions)]
        return Box(
            torch.diag(torch.tensor(spans, dtype=torch.float64)).to(cell), "open", (spans[0], spans[1], spans[2])
        )

    def _spans(self, points: Tensor) -> list[float]:
        """Largest extent of a replica along every column."""
        out = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device)
        for r in range(len(self.members)):
            own = points[self.replica == r]
            out = torch.maximum(out, own.amax(0) - own.amin(0))
        return [float(v) for v in out]

    def _mesh_box(self, box: Box, accuracy: float, spacing: float) -> MeshBox:
        s = self.splitting
        decay = math.sqrt(-math.log(0.2 * accuracy))
        together = (self.inverse[:, None] + self.inverse)[~self.split]
        widest = min(1 / math.sqrt(float(together.max())) if len(together) else math.inf, s.beta)
        edges = box_edges(box, [float(v) for v in box.cell.norm(dim=1)], decay / widest)
        shape = mesh_shape(edges, spacing)
        directions = box.cell / box.cell.norm(dim=1, keepdim=True)
        origin = torch.zeros(3, dtype=torch.float64, device=box.cell.device)
        if box.boundary == "periodic":
            return MeshBox(box.cell, origin, shape, box.boundary, 0.0)
        # whole spacings along open directions: the box then stays the same while the atoms move a little
        lengths = [
            e if box.boundary == "slab" and d < 2 else n * spacing
            for d, (e, n) in enumerate(zip(edges, shape, strict=True))
        ]
        reach = 0.5 * lengths[2]
        if box.boundary == "open":
            reach = min(n - e for n, e in zip(lengths, box.extent, strict=True)) - decay / widest
        cell = directions * torch.tensor(lengths, dtype=torch.float64, device=box.cell.device)[:, None]
        return MeshBox(cell, origin, shape, box.boundary, reach)

    def coarse_box(self, spacing: float) -> MeshBox:
        """The same box with another spacing (Å)."""
        return self._mesh_box(self._where, self._accuracy, spacing)

    def sites(self, positions: Tensor, slot: Tensor) -> Sites:
        """Sites at positions [s, 3] (Å) on the meshes ``slot`` [s]."""
        return make_sites(
            self.mesh.points(positions), slot, self.mesh.box.shape, self.splitting.window, self.mesh.dtype
        )

    def _subset(self) -> Systems:
        """Its atoms as a batch of their own."""
        parts = self.operator.system
        return Systems(
            positions=self.positions,
            numbers=parts.numbers[self.atoms],
            cell=parts.cell[self.members],
            pbc=parts.pbc[self.members],
            batch=self.replica,
            field=parts.field[self.members],
            net_charge=parts.net_charge[self.members],
        )

    @property
    def _together(self) -> Tensor:
        """α_ij² of all pairs of widths, [kinds²]; something in range for those that are not summed in real space."""
        together = 1 / (self.inverse[:, None] + self.inverse)
        return torch.where(self.split, together, together[self.split].max()).reshape(-1)

    def _interacting(self, i: Tensor, j: Tensor) -> Tensor:
        """[p] bool, pairs that are sharper together than the splitting."""
        return self.split[self.kind[i], self.kind[j]]

    def rigid_pairs(self) -> RigidPairs | None:
        """Pairs in real space neither of which has a shell; None where there is none."""
        shelled = self.operator.shell_charge[self.atoms] != 0
        if not self.has_pairs or bool(shelled.all()):
            return None
        subset, s = self._subset(), self.splitting
        key = (tuple(self.members), shelled.cpu().numpy().tobytes())
        index, offsets = self._cache.pairs(subset, s.cutoff, ~shelled, key)
        if not bool(self.split.all()):
            kept = self._interacting(*index).nonzero()[:, 0]
            index, offsets = index[:, kept].contiguous(), offsets[kept]
        return RigidPairs(
            index=index,
            offsets=offsets,
            positions=self.positions,
            kinds=self.kind,
            exponents=self._together,
            structure=self.replica,
            beta=s.beta,
            cutoff=s.cutoff,
        )

    def pairs(self, reach: float) -> Pairs:
        """Pairs in real space of which one has a shell, for shells up to ``reach`` (Å) from their cores."""
        found = neighbor_list(self._subset(), self.splitting.cutoff + 2 * reach, half=True)
        i, j = found.index
        kept = self._interacting(i, j)
        if not isinstance(self.shelled, slice):
            shelled = self.operator.shell_charge[self.atoms] != 0
            kept &= shelled[i] | shelled[j]
        vectors = found.vectors
        if not bool(kept.all()):
            i, j, vectors = i[kept], j[kept], vectors[kept]
        index = torch.stack([self.atoms[i], self.atoms[j]])
        together, kind = self._together, self.kind[i] * len(self.inverse) + self.kind[j]
        return Pairs(
            index=index,
            vectors=vectors,
            exponent=together[kind],
            structure=self.operator.system.batch[index[0]],
            beta=self.splitting.beta,
            cutoff=self.splitting.cutoff,
            kinds=(together, kind),
        )

    def background(self, charges: Tensor) -> Tensor:
        """Potential of the uniform background that k = 0 of the real-space part leaves behind, [n] (V)."""
        kinds, replicas = len(self.inverse), len(self.members)
        missing = torch.where(self.split, 1 / self.splitting.beta**2 - (self.inverse[:, None] + self.inverse), 0.0)
        totals = torch.zeros(replicas * kinds, dtype=torch.float64, device=charges.device)
        totals.index_add_(0, self.replica * kinds + self.kind, charges)
        felt = -(math.pi * self.operator.k_e / self.volume) * totals.reshape(replicas, kinds) @ missing
        return felt[self.replica, self.kind]


class _MeshState:
    """What the mesh adds at given charges and shells."""

    def __init__(self, mesh: MeshSum, site_charges: Tensor, shells: Tensor) -> None:
        self.sum, self.mesh = mesh, mesh.mesh
        self.shells = shells[mesh.atoms]
        self.charges = site_charges[:, mesh.atoms]
        self.shell_charge = self.charges[1]
        grid = self._empty()
        mesh.core.spread(self.charges[0].to(self.mesh.dtype).contiguous(), grid)
        if mesh.has_shells:
            own = mesh.shelled
            self.shell_sites = mesh.sites((mesh.positions + self.shells)[own], mesh.slot[own])
            self.shell_sites.spread(self.shell_charge[own].to(self.mesh.dtype).contiguous(), grid)
        self.structure = self.mesh.transform(grid)
        self.field = self.mesh.potential(self.structure)
        at_shell = self._at_shells(self.field)
        self.potential = torch.stack([mesh.core.gather(self.field), at_shell[:, 0]])
        self.shell_gradient = at_shell[:, 1:]
        self._own()
        if mesh.has_pairs and mesh.boundary == "periodic":
            background = mesh.background(self.charges.sum(0))
            self.background_energy = 0.5 * self.charges.sum(0) * background
            self.potential = self.potential + background

    def _empty(self) -> Tensor:
        return self.mesh.grid(len(self.sum.members) * self.sum.channels)

    def _at_shells(self, field: Tensor) -> Tensor:
        """Potential and gradient (V/Å) of a mesh at the shells, [n, 4]; 0 where there is none."""
        out = torch.zeros(len(self.shells), 4, dtype=self.shells.dtype, device=self.shells.device)
        if self.sum.has_shells:
            found = self.shell_sites.gather_gradient(field)
            out[self.sum.shelled] = torch.cat([found[:, :1], found[:, 1:] @ self.mesh.to_mesh.T], dim=1).to(out.dtype)
        return out

    def _own(self) -> None:
        """Takes a core's and a shell's own atom, same image, out of the sum again."""
        op, exponent = self.sum.operator, self.sum.own_exponent
        b0, self.own_b1, self.own_b2 = (-op.k_e * b for b in erf_kernel(self.shells.square().sum(-1), exponent))
        self.at_zero = -op.k_e * (2 / math.sqrt(math.pi)) * exponent.sqrt()
        qc, qs = self.charges
        self.potential = self.potential + torch.stack([b0 * qs + self.at_zero * qc, b0 * qc + self.at_zero * qs])
        # from core to shell: Δ
        self.own_core_gradient = (self.own_b1 * qs)[:, None] * self.shells
        self.own_shell_gradient = -(self.own_b1 * qc)[:, None] * self.shells

    def core_mesh_gradient(self) -> Tensor:
        """Gradient of the mesh potential at the cores, [n, 3]."""
        return self.sum.core.gather_gradient(self.field)[:, 1:] @ self.mesh.to_mesh.T

    def _curvature(self) -> Tensor:
        out = torch.zeros(len(self.shells), 3, 3, dtype=self.shells.dtype, device=self.shells.device)
        if self.sum.has_shells:
            found = self.shell_sites.gather_curvature(self.field)[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)
            out[self.sum.shelled] = (self.mesh.to_mesh @ found @ self.mesh.to_mesh.T).to(out.dtype)
        return out

    def linearize(self) -> Tensor:
        """∇∇φ at the shells, [n, 3, 3]; prepares ``product``."""
        eye = torch.eye(3, dtype=self.shells.dtype, device=self.shells.device)
        outer = self.own_b2[:, None, None] * self.shells[:, :, None] * self.shells[:, None, :]
        self.curvature = self._curvature()
        # ∂φ_core/∂Δ = Q_s ∇_shell B₀(Δ)
        self.own_core = -(self.shell_charge * self.own_b1)[:, None] * self.shells
        return self.curvature + self.charges[0][:, None, None] * (outer - self.own_b1[:, None, None] * eye)

    def _change(self, direction: Tensor) -> Tensor:
        """Change of the potential on the mesh with a direction [n, 4] in (q, Δ)."""
        grid = self._empty()
        self.sum.core.spread(direction[:, 0].to(self.mesh.dtype).contiguous(), grid)
        if self.sum.has_shells:
            moved = (self.shell_charge[:, None] * direction[:, 1:])[self.sum.shelled] @ self.mesh.to_mesh
            self.shell_sites.spread_dipoles(moved.to(self.mesh.dtype), grid)
        return self.mesh.potential(self.mesh.transform(grid))

    def product(self, direction: Tensor) -> Tensor:
        """Second derivatives in (q, Δ) times a direction [n, 4], without the curvature at the shells."""
        dq, dshells = direction[:, 0], direction[:, 1:]
        change = self._change(direction)
        out_q = self.sum.core.gather(change) + self.at_zero * dq + (self.own_core * dshells).sum(-1)
        if self.sum.has_pairs and self.sum.boundary == "periodic":
            out_q = out_q + self.sum.background(dq)
        out_shell = self.shell_charge[:, None] * self._at_shells(change)[:, 1:] + self.own_core * dq[:, None]
        return torch.cat([out_q[:, None], out_shell], dim=1)

    def core_gradient_change(self, direction: Tensor) -> Tensor:
        """Change of Σ_sites Q ∇φ of every whole atom; its own core–shell term moves along and drops out."""
        change = self._change(direction)
        at_core = self.sum.core.gather_gradient(change)[:, 1:] @ self.mesh.to_mesh.T
        at_shell = self._at_shells(change)[:, 1:]
        out = self.charges[0][:, None] * at_core + self.shell_charge[:, None] * at_shell
        out = out + direction[:, :1] * self.core_mesh_gradient()
        return out + self.shell_charge[:, None] * torch.einsum("nxy,ny->nx", self.curvature, direction[:, 1:])

    def virial(self) -> Tensor:
        """−∂E/∂strain [replica, 3, 3] at fixed charges and Δ."""
        out = self.mesh.strain(self.structure)
        replica = self.sum.replica
        if self.sum.has_pairs and self.sum.boundary == "periodic":
            eye = torch.eye(3, dtype=out.dtype, device=out.device)
            out = out.index_add(0, replica, self.background_energy[:, None, None] * eye)
        # the mesh strains the shells along with their atoms: take out what that would have done
        pull = self.shell_charge[:, None] * self.shell_gradient
        return out.index_add(0, replica, pull[:, :, None] * self.shells[:, None, :])


class CoulombState:
    """Energy, potential, field and second derivatives at given charges and shells.

    Attributes
    ----------
    energy : [b], eV
    site_charges : [2, n], e, cores and shells
    potential : [2, n], V, at cores and shells (the site's own terms left out as described above)
    shell_gradient, core_gradient : [n, 3], V/Å, its gradient; the force on a site is −Q·gradient
    """

    def __init__(self, operator: CoulombOperator, charges: Tensor, shells: Tensor) -> None:
        self.op = operator
        self.shells = shells
        self.site_charges = torch.stack([charges - operator.shell_charge, operator.shell_charge])
        self.potential = torch.zeros_like(self.site_charges)
        self.shell_gradient = torch.zeros_like(shells)
        self._core_gradient: Tensor | None = None
        self._pairs = [PairState(p, self.site_charges, shells, operator.k_e) for p in operator.pairs(shells)]
        self._meshes = [_MeshState(m, self.site_charges, shells) for m in operator.meshes]
        self._rigid = [
            (m, RigidPairState(p, self.site_charges[0, m.atoms], len(m.members), operator.k_e))
            for m, p in operator.rigid
        ]
        for pairs in self._pairs:
            self.potential += pairs.potential
            self.shell_gradient += pairs.gradient[1]
        for part, rigid in self._rigid:
            self.potential[0, part.atoms] += rigid.potential
        for mesh in self._meshes:
            self.potential[:, mesh.sum.atoms] += mesh.potential
            self.shell_gradient[mesh.sum.atoms] += mesh.shell_gradient + mesh.own_shell_gradient
        energies = 0.5 * (self.site_charges * self.potential).sum(0)
        system = operator.system
        self.energy = torch.zeros_like(system.net_charge).index_add_(0, system.batch, energies)

    @property
    def core_gradient(self) -> Tensor:
        """[n, 3], V/Å, gradient of the potential at the cores."""
        if self._core_gradient is None:
            out = torch.zeros_like(self.shells)
            for pairs in self._pairs:
                out += pairs.gradient[0]
            for mesh in self._meshes:
                out[mesh.sum.atoms] += mesh.core_mesh_gradient() + mesh.own_core_gradient
            for part, rigid in self._rigid:
                out[part.atoms] += rigid.gradient
            self._core_gradient = out
        return self._core_gradient

    @property
    def gradient(self) -> Tensor:
        """[2, n, 3], V/Å, gradient of the potential at cores and shells."""
        return torch.stack([self.core_gradient, self.shell_gradient])

    def linearize(self) -> None:
        """Prepares ``product`` and ``core_gradient_change``."""
        own = torch.zeros(len(self.shells), 3, 3, dtype=self.shells.dtype, device=self.shells.device)
        for pairs in self._pairs:
            own += pairs.linearize(self.op.shell_charge)
        for mesh in self._meshes:
            own[mesh.sum.atoms] += mesh.linearize()
        self.own_shell = self.op.shell_charge[:, None, None] * own

    def product(self, direction: Tensor) -> Tensor:
        """Second derivative of the energy in (q, Δ) times a direction [n, 4]: V, V/Å·e."""
        out = torch.zeros_like(direction)
        out[:, 1:] = torch.bmm(self.own_shell, direction[:, 1:, None])[..., 0]
        for pairs in self._pairs:
            out += pairs.product(direction)
        for mesh in self._meshes:
            out[mesh.sum.atoms] += mesh.product(direction[mesh.sum.atoms])
        for part, rigid in self._rigid:
            out[part.atoms, 0] += rigid.product(direction[part.atoms, 0])
        return out

    def matrix(self) -> Tensor | None:
        """The second derivatives themselves, [n, n, 4, 4], of structures without a mesh; None otherwise."""
        if self._meshes:
            return None
        n = len(self.shells)
        out = torch.zeros(n, n, 4, 4, dtype=self.shells.dtype, device=self.shells.device)
        for pairs in self._pairs:
            pairs.add_matrix(out)
        atom = torch.arange(n, device=out.device)
        out[atom, atom, 1:, 1:] = self.own_shell
        return out

    def core_gradient_change(self, direction: Tensor) -> Tensor:
        """Change of the force on (core + shell) of every atom, at fixed cores, times −1, with (q, Δ): [n, 3].

        With g_i = Q_c ∇φ(core) + Q_s ∇φ(shell), the derivative of the Coulomb energy in the position of the whole atom.
        """
        out = torch.zeros_like(direction[:, 1:])
        for pairs in self._pairs:
            out += pairs.core_gradient_change(direction)
        for mesh in self._meshes:
            out[mesh.sum.atoms] += mesh.core_gradient_change(direction[mesh.sum.atoms])
        for part, rigid in self._rigid:
            out[part.atoms] += rigid.core_gradient_change(direction[part.atoms, 0])
        return out

    def virial(self) -> Tensor:
        """−∂E/∂strain with charges and shell displacements Δ (Å, not scaled) held fixed, [b, 3, 3] eV.

        Not symmetric: shells that do not turn along are turned against their atoms.
        """
        out = torch.zeros_like(self.op.system.cell)
        for pairs in self._pairs:
            out += pairs.virial(len(out))
        for mesh in self._meshes:
            out[mesh.sum.members] += mesh.virial()
        for part, rigid in self._rigid:
            out[part.members] += rigid.virial()
        return out
