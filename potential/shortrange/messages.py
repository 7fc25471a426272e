"""The inner kernel of an equivariant convolution: weighted tensor products summed over neighbours.

Edges are sorted by receiver into blocks of ``BLOCK`` slots. For one irrep of the sender's features x (degree l) and
each path p = (l, l_sh, l_out) the kernel computes, for every block b and channel u,

    message[b, m_out, u] = Σ_{edges e in b} Σ_m A_p[e, m, m_out] · w_p[e, u] · x[sender(e), m, u]
    A_p[e, m, m_out] = Σ_{m_sh} √(2 l_out + 1) CG[m, m_sh, m_out] · Y[e, m_sh]

The sum over neighbours and m is one matrix product a block, so nothing of size edges × channels × m_out is ever stored.
The expression is linear in each of x, Y and w; that makes its first and second derivatives sums of the same products.
They are written out here and evaluated in chunks that stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "Blocks", "Coupling", "make_blocks", "sum_blocks"]

BLOCK = 8  # edges that one matrix product sums over; the edges of a receiver are padded to a multiple
_CHUNK = 128  # blocks treated at a time on a CPU


class Blocks(NamedTuple):
    """Edges sorted into blocks of ``BLOCK`` slots, each block with one receiver."""

    vectors: Tensor  # [slots, 3]; empty slots lie beyond the cutoff, where all radial weights vanish
    sender: Tensor  # [slots]
    receiver: Tensor  # [blocks]


def make_blocks(edge_index: Tensor, vectors: Tensor, n_atoms: int, cutoff: float, block: int = BLOCK) -> Blocks:
    """Edges within the cutoff, padded so that each ``block`` of slots belongs to one receiver.

    ``edge_index`` [2, e] (receiver, sender), ``vectors`` [e, 3]. TorchScript reads this function too.
    """
    near = (vectors.detach().square().sum(1) < cutoff * cutoff).nonzero().squeeze(1)
    if len(near) < len(vectors):
        edge_index, vectors = edge_index[:, near], vectors[near]
    receiver, order = torch.sort(edge_index[0], stable=True)
    count = torch.bincount(receiver, minlength=n_atoms)
    n_blocks = (count + block - 1) // block
    first_edge, first_block = count.cumsum(0) - count, n_blocks.cumsum(0) - n_blocks
    rank = torch.arange(len(receiver), device=receiver.device) - first_edge[receiver]
    slot = torch.empty_like(order)
    slot[order] = first_block[receiver] * block + rank
    block_receiver = torch.repeat_interleave(n_blocks)
    n_slots = len(block_receiver) * block
    beyond = torch.tensor([2.0 * cutoff, 0.0, 0.0], dtype=vectors.dtype, device=vectors.device).repeat(n_slots, 1)
    return Blocks(
        vectors=beyond.index_copy(0, slot, vectors),
        sender=torch.zeros(n_slots, dtype=slot.dtype, device=slot.device).index_copy(0, slot, edge_index[1]),
        receiver=block_receiver,
    )


class Coupling(NamedTuple):
    """All paths of one irrep of the features.

    ``matrices[p]`` [2 l_sh + 1, (2 l + 1)(2 l_out + 1)] holds √(2 l_out + 1) CG; ``harmonics[p]`` and ``rows[p]`` say
    where the harmonics and the messages of path p lie. Where ``scalar[p]``, the harmonic is the constant 1: it is not
    read, A_p is the unit matrix, and no derivative flows to it.
    """

    matrices: list[Tensor]
    harmonics: list[slice]
    rows: list[slice]
    scalar: list[bool]

    @property
    def n_rows(self) -> int:
        """Σ_p (2 l_out + 1)."""
        return self.rows[-1].stop


def sum_blocks(x: Tensor, harmonics: Tensor, weights: Tensor, sender: Tensor, coupling: Coupling) -> Tensor:
    """Messages [blocks, rows, mul].

    ``x`` [n, 2l+1, mul], ``harmonics`` [slots, m_sh], ``weights`` [slots, paths · mul], ``sender`` [slots].
    """
    return _Sum.apply(x, harmonics, weights, sender, coupling)


class _Chunks:
    """Walks over blocks in pieces and gives what the derivatives have in common; b stands for the blocks of a piece."""

    def __init__(self, x: Tensor, sender: Tensor, coupling: Coupling) -> None:
        self.sender, self.coupling = sender.view(-1, BLOCK), coupling
        _, self.m, self.mul = x.shape
        self.n_blocks = len(self.sender)
        self.step = _CHUNK if x.device.type == "cpu" else max(self.n_blocks, 1)

    def pieces(self) -> list[slice]:
        """Slices of blocks."""
        return [slice(a, min(a + self.step, self.n_blocks)) for a in range(0, self.n_blocks, self.step)]

    def by_block(self, edge_values: Tensor) -> Tensor:
        """[slots, k] -> [blocks, BLOCK, k]"""
        return edge_values.view(self.n_blocks, BLOCK, edge_values.shape[1])

    def gather(self, x: Tensor, piece: slice) -> Tensor:
        """[b, BLOCK, 2l+1, mul]"""
        return x.flatten(1).index_select(0, self.sender[piece].flatten()).view(-1, BLOCK, self.m, self.mul)

    def scatter(self, out: Tensor, piece: slice, values: Tensor) -> None:
        """Adds [b, BLOCK, 2l+1, mul] to ``out`` [n, (2l+1)·mul] at the senders."""
        out.index_add_(0, self.sender[piece].flatten(), values.view(-1, self.m * self.mul))

    def weight(self, weights: Tensor, piece: slice, p: int) -> Tensor:
        """w_p [b, BLOCK, 1, mul] as a view of [blocks, BLOCK, paths · mul]."""
        return weights[piece, :, p * self.mul : (p + 1) * self.mul].unsqueeze(2)

    def angular(self, harmonics: Tensor, piece: slice, p: int) -> Tensor | None:
        """A_p [b, BLOCK·(2l+1), 2l_out+1]; None for the unit matrix."""
        c = self.coupling
        if c.scalar[p]:
            return None
        product = harmonics[piece, :, c.harmonics[p]] @ c.matrices[p]
        return product.view(-1, BLOCK * self.m, c.rows[p].stop - c.rows[p].start)

    def total(self, angular: Tensor | None, values: Tensor) -> Tensor:
        """Σ over edges and m of A_p · values, [b, 2l_out+1, mul]."""
        if angular is None:
            return values.sum(1)
        return angular.transpose(1, 2) @ values.view(-1, BLOCK * self.m, self.mul)

    def spread(self, angular: Tensor | None, grad: Tensor) -> Tensor:
        """The transpose of ``total``: [b, 2l_out+1, mul] -> [b, BLOCK, 2l+1, mul] (or broadcasting to it)."""
        if angular is None:
            return grad.unsqueeze(1)
        return (angular @ grad).view(-1, BLOCK, self.m, self.mul)

    def add_harmonics(self, out: Tensor, piece: slice, p: int, values: Tensor, grad: Tensor) -> None:
        """Adds the derivative of Σ grad · total(A_p, values) with respect to the harmonics."""
        c = self.coupling
        d_angular = values.view(-1, BLOCK * self.m, self.mul) @ grad.transpose(1, 2)
        out[piece, :, c.harmonics[p]] += d_angular.view(len(grad), BLOCK, c.matrices[p].shape[1]) @ c.matrices[p].T


class _Sum(torch.autograd.Function):
    """(x, Y, w) -> messages."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, harmonics: Tensor, weights: Tensor, sender: Tensor, coupling: Coupling) -> Tensor:
        ctx.save_for_backward(x, harmonics, weights, sender)
        ctx.coupling = coupling
        k = _Chunks(x, sender, coupling)
        y, w = k.by_block(harmonics), k.by_block(weights)
        out = x.new_empty(k.n_blocks, coupling.n_rows, k.mul)
        for piece in k.pieces():
            gathered = k.gather(x, piece)
            for p, rows in enumerate(coupling.rows):
                out[piece, rows] = k.total(k.angular(y, piece, p), gathered * k.weight(w, piece, p))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, harmonics, weights, sender = ctx.saved_tensors
        need = tuple(ctx.needs_input_grad[:3])
        return (*_Gradient.apply(x, harmonics, weights, grad, sender, ctx.coupling, need), None, None)


class _Gradient(torch.autograd.Function):
    """(x, Y, w, g) -> derivatives of Σ g·message with respect to x, Y and w, those that are needed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        harmonics: Tensor,
        weights: Tensor,
        grad: Tensor,
        sender: Tensor,
        coupling: Coupling,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, harmonics, weights, grad, sender)
        ctx.coupling = coupling
        k = _Chunks(x, sender, coupling)
        y, w = k.by_block(harmonics), k.by_block(weights)
        dx, dy, dw = x.new_zeros(x.shape[0], k.m * k.mul), torch.zeros_like(y), torch.empty_like(w)
        for piece in k.pieces():
            gathered = k.gather(x, piece)
            dx_edge = torch.zeros_like(gathered)
            for p, rows in enumerate(coupling.rows):
                a, wp, gp = k.angular(y, piece, p), k.weight(w, piece, p), grad[piece, rows].contiguous()
                back = k.spread(a, gp)
                if need[0]:
                    dx_edge.addcmul_(back, wp)
                if need[1] and a is not None:
                    k.add_harmonics(dy, piece, p, gathered * wp, gp)
                if need[2]:
                    _sum_m(back * gathered, k.weight(dw, piece, p))
            if need[0]:
                k.scatter(dx, piece, dx_edge)
        derivatives = (dx.view_as(x), dy.view_as(harmonics), dw.view_as(weights))
        return tuple(d if is_needed else None for d, is_needed in zip(derivatives, need, strict=True))

    @staticmethod
    def backward(ctx: Any, cx: Tensor | None, cy: Tensor | None, cw: Tensor | None) -> tuple[Tensor | None, ...]:
        x, harmonics, weights, grad, sender = ctx.saved_tensors
        second = _second_derivative if torch.is_grad_enabled() else _second_derivative_fused
        return (*second(x, harmonics, weights, grad, cx, cy, cw, sender, ctx.coupling), None, None, None)


def _sum_m(values: Tensor, out: Tensor) -> None:
    """Σ over m of [b, BLOCK, 2l+1, mul] into ``out`` [b, BLOCK, 1, mul]."""
    out.copy_(values if values.shape[2] == 1 else values.sum(2, keepdim=True))


def _second_derivative(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    g: Tensor,
    cx: Tensor | None,
    cy: Tensor | None,
    cw: Tensor | None,
    sender: Tensor,
    c: Coupling,
) -> tuple[Tensor | None, ...]:
    """Derivatives of c_x·S_x + c_y·S_y + c_w·S_w with respect to x, Y, w, g, themselves differentiable.

    S(x, Y, w, g) = Σ g·message is linear in each slot, so c_x·S_x = S(c_x, Y, w, g), and so on. Scalar paths do not
    see Y, so they drop out of the term with c_y.
    """
    total: list[Tensor | None] = [None] * 4
    for i, cotangent in enumerate((cx, cy, cw)):
        if cotangent is None:
            continue
        slots = [x, y, w]
        slots[i] = cotangent
        coupling = c
        if i == 1:
            coupling = c._replace(scalar=[False] * len(c.scalar), matrices=_without(c.matrices, c.scalar))
        parts = list(_Gradient.apply(*slots, g, sender, coupling, tuple(k != i for k in range(3))))
        for k, part in enumerate([*parts, _Sum.apply(*slots, sender, coupling)]):
            if k != i:
                previous = total[k]
                total[k] = part if previous is None else previous + part
    return tuple(total)


def _without(matrices: list[Tensor], scalar: list[bool]) -> list[Tensor]:
    return [torch.zeros_like(m) if is_scalar else m for m, is_scalar in zip(matrices, scalar, strict=True)]


def _second_derivative_fused(
    x: Tensor,
    harmonics: Tensor,
    weights: Tensor,
    g: Tensor,
    cx: Tensor | None,
    c_harmonics: Tensor | None,
    c_weights: Tensor | None,
    sender: Tensor,
    coupling: Coupling,
) -> tuple[Tensor, ...]:
    """The same numbers in one pass, without a graph."""
    k = _Chunks(x, sender, coupling)
    cx = torch.zeros_like(x) if cx is None else cx
    y, w = k.by_block(harmonics), k.by_block(weights)
    cy = torch.zeros_like(y) if c_harmonics is None else k.by_block(c_harmonics.contiguous())
    cw = torch.zeros_like(w) if c_weights is None else k.by_block(c_weights.contiguous())
    gx, gy = x.new_zeros(x.shape[0], k.m * k.mul), torch.zeros_like(y)
    gw, gg = torch.empty_like(w), torch.empty_like(g)
    for piece in k.pieces():
        xe, cxe = k.gather(x, piece), k.gather(cx, piece)
        gx_edge = torch.zeros_like(xe)
        for p, rows in enumerate(coupling.rows):
            gp, wp, cwp = g[piece, rows].contiguous(), k.weight(w, piece, p), k.weight(cw, piece, p)
            a, ca = k.angular(y, piece, p), k.angular(cy, piece, p)
            change = (cxe * wp).addcmul_(xe, cwp)
            back = k.spread(a, gp)
            gx_edge.addcmul_(back, cwp)
            gw_edge = back * cxe
            message = k.total(a, change)
            if a is not None:
                cback = k.spread(ca, gp)
                gx_edge.addcmul_(cback, wp)
                gw_edge.addcmul_(cback, xe)
                message += k.total(ca, xe * wp)
                k.add_harmonics(gy, piece, p, change, gp)
            gg[piece, rows] = message
            _sum_m(gw_edge, k.weight(gw, piece, p))
        k.scatter(gx, piece, gx_edge)
    return gx.view_as(x), gy.view_as(harmonics), gw.view_as(weights), gg
