"""D3 in TorchScript: the pair terms of s-dftd3 with zero or Becke–Johnson damping and its smooth cutoff.

Energies are differentiable in the pair vectors, coordination numbers included. Reference C6 coefficients, coordination
numbers and radii are those that ``metatomic-torch`` ships (Grimme's, float32); the van der Waals radii of zero damping
are read off s-dftd3 itself, whose damped and undamped energies of a pair give them to all digits; damping parameters
are those of s-dftd3's own table.
"""

# No `from __future__ import annotations` here: TorchScript reads the annotations of these classes.
import itertools
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from ase.units import Bohr, Hartree
from dftd3.interface import DispersionModel, RationalDampingParam, ZeroDampingParam
from torch import Tensor, nn

from voltpi.potential.dispersion import D3
from voltpi.potential.errors import InputError

__all__ = ["ScriptedD3"]

_STEEPNESS = 16.0  # of the counting function of coordination numbers
_NARROWNESS = 4.0  # of the Gaussian weights of references
_DAMPING_POWER = 14.0


class ScriptedD3(nn.Module):
    """D3 energies of atoms.

    Parameters
    ----------
    model : the dispersion to export
    elements : atomic numbers that may occur

    Raises InputError for three-body terms, an element beyond Lr, and a functional whose parameters are not in s-dftd3's
    table.
    """

    def __init__(self, model: D3, elements: Sequence[int]) -> None:
        super().__init__()
        if model.three_body:
            raise InputError("dispersion.three_body cannot be exported to metatomic: use a model without it")
        damping = _damping(model)
        self.zero = model.damping == "zero"
        self.cutoff, self.width, self.cn_cutoff = model.cutoff, model.smoothing_width, model.cn_cutoff
        self.s6, self.s8 = float(damping["s6"]), float(damping["s8"])
        if self.zero and float(damping["alp"]) != _DAMPING_POWER:
            raise InputError(
                f"dispersion.functional {model.functional!r}: zero damping with another power than 14 "
                "cannot be exported to metatomic"
            )
        present = sorted({int(z) for z in elements})
        tables = _tables(present)
        lookup = torch.full((120,), -1, dtype=torch.int64)
        lookup[torch.tensor(present)] = torch.arange(len(present))
        self.register_buffer("lookup", lookup)
        known = tables["cn_ref"] >= 0
        self.register_buffer("known", known)
        self.register_buffer("cn_ref", tables["cn_ref"])
        self.register_buffer("c6", tables["c6"])
        radius = tables["rcov"]
        self.register_buffer("covalent", radius[:, None] + radius)
        ratio = 3.0 * tables["r4r2"][:, None] * tables["r4r2"]  # C8/C6
        if self.zero:  # R² of the damping of r⁻⁶ and r⁻⁸
            vdw = _van_der_waals(present)
            sizes = [(float(damping["rs6"]) * vdw) ** 2, (float(damping["rs8"]) * vdw) ** 2]
        else:  # R⁶ and R⁸
            radius = float(damping["a1"]) * ratio.sqrt() + float(damping["a2"])
            sizes = [radius**6, radius**8]
        self.register_buffer("pairs", torch.stack([ratio, *sizes], dim=2).flatten(0, 1))  # [kinds², 3]
        self.bohr, self.hartree = Bohr, Hartree
        self.steepness, self.narrowness = _STEEPNESS, _NARROWNESS

    def forward(self, numbers: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        """Energies of atoms [n] (eV); ``index`` [2, e] each pair within ``cutoff`` once, ``vectors`` [e, 3] (Å)."""
        kind = self.lookup[numbers]
        i, j = index[0], index[1]
        r = torch.linalg.vector_norm(vectors, dim=1)
        near = (r.detach() < self.cn_cutoff).nonzero().squeeze(1)
        a, b = i[near], j[near]
        count = torch.sigmoid(self.steepness * (self.covalent[kind[a], kind[b]] * self.bohr / r[near] - 1.0))
        cn = torch.zeros([numbers.size(0)], dtype=r.dtype, device=r.device)
        cn = cn.index_add(0, a, count).index_add(0, b, count)
        exponent = -self.narrowness * (cn.unsqueeze(1) - self.cn_ref[kind]).square()
        weight = torch.softmax(exponent.masked_fill(~self.known[kind], -float("inf")), dim=1)  # [n, references]
        mixed = torch.einsum("na,nkab->nkb", weight, self.c6[kind])  # [n, kinds, references]
        n, kinds = numbers.size(0), self.c6.size(0)
        if n * n < i.size(0):  # most pairs of atoms meet in several images
            c6 = (mixed[:, kind] * weight).sum(2).flatten()[i * n + j]
        else:
            c6 = (mixed.flatten(0, 1)[i * kinds + kind[j]] * weight[j]).sum(1)
        table = self.pairs[kind[i] * kinds + kind[j]]
        ratio, size6, size8 = table[:, 0], table[:, 1], table[:, 2]
        u = vectors.square().sum(1) / self.bohr**2
        over = 1.0 / u
        if self.zero:
            y = size6 * over
            y2 = y * y
            z = size8 * over
            z2 = z * z
            over6 = over * over * over
            f6 = over6 / (1.0 + 6.0 * (y2 * y2 * y2 * y))
            f8 = over6 * over / (1.0 + 6.0 * (z2 * z2) * (z2 * z2))
        else:
            u3 = u * u * u
            f6 = 1.0 / (u3 + size6)
            f8 = 1.0 / (u3 * u + size8)
        energy = -self.hartree * c6 * (self.s6 * f6 + self.s8 * ratio * f8)
        if self.width > 0.0:
            x = ((r - (self.cutoff - self.width)) / self.width).clamp(0.0, 1.0)
            x2 = x * x
            energy = energy * (1.0 - x2 * x * (10.0 - 15.0 * x + 6.0 * x2))
        half = 0.5 * energy
        return torch.zeros_like(cn).index_add(0, i, half).index_add(0, j, half)


def _damping(model: D3) -> dict[str, float]:
    """Damping parameters of the model's functional."""
    table: dict[str, Any] = tomllib.loads(resources.files("dftd3").joinpath("parameters.toml").read_text())
    own = table["parameter"].get(model.functional.lower().replace("-", ""), {}).get("d3", {}).get(model.damping)
    if own is None:
        raise InputError(
            f"dispersion.functional {model.functional!r} cannot be exported to metatomic: s-dftd3's table of "
            f"parameters has no {model.damping} damping of that name"
        )
    return {**table["default"]["parameter"]["d3"][model.damping], **own}


def _tables(elements: list[int]) -> dict[str, Tensor]:
    """Reference tables of some elements, float64, atomic units; absent references have a coordination number of −1."""
    with resources.files("metatomic.torch").joinpath("data", "dftd3_parameters.npz").open("rb") as file:
        stored = np.load(file)
        data = {key: torch.from_numpy(stored[key]) for key in ("rcov", "r4r2", "c6", "cn_ref")}
    if elements[-1] >= len(data["rcov"]):
        raise InputError(f"D3 has no parameters for atomic number {elements[-1]}: export a model without dispersion")
    kept = torch.tensor(elements)
    references = int((data["cn_ref"][kept] >= 0).sum(1).max())
    return {
        "rcov": data["rcov"][kept].double(),
        "r4r2": data["r4r2"][kept].double(),
        "cn_ref": data["cn_ref"][kept][:, :references].double(),
        "c6": data["c6"][kept][:, kept][:, :, :references, :references].double(),
    }


def _van_der_waals(elements: list[int]) -> Tensor:
    """R₀ (Bohr) of all pairs of elements: a damped over an undamped pair energy is 1/(1 + 6 (R₀/r)¹⁴)."""
    damped = ZeroDampingParam(s6=1.0, s8=0.0, rs6=1.0, rs8=1.0, alp=14.0, s9=0.0)
    bare = RationalDampingParam(s6=1.0, s8=0.0, a1=0.0, a2=0.0, alp=14.0, s9=0.0)
    out = torch.zeros(len(elements), len(elements), dtype=torch.float64)
    r = 6.0
    for a, b in itertools.combinations_with_replacement(range(len(elements)), 2):
        pair = DispersionModel(np.array([elements[a], elements[b]]), np.array([[0.0, 0.0, 0.0], [r, 0.0, 0.0]]))
        full, less = (pair.get_dispersion(p, grad=False)["energy"] for p in (bare, damped))
        out[a, b] = out[b, a] = r * ((full / less - 1.0) / 6.0) ** (1.0 / 14.0)
    return out
