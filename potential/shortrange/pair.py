"""Classical pair potentials: Born–Mayer–Huggins, Lennard-Jones, ZBL; what is given adds up.

Every pair energy ends at the cutoff through a switch over its last fifth, so that energy, forces and force constants
are continuous. What the cutoff takes away is the tail of the dispersion: in NaCl (``nacl``, 5.64 Å) the energy of an
ion pair is 10 meV above the infinite sum with 8 Å, 5 meV with 10 Å, 2 meV with 14 Å.

The sets of Tosi and Fumi (J. Phys. Chem. Solids 25, 45 (1964)) were made for fixed charges of ±1 e and hold their own
dispersion: with them, leave D3 off.

−C/r⁶ − D/r⁸ wins over any exponential at small r, so that a hot or badly built structure falls into a hole. The
published form is used down to the distance of its largest repulsive force, which no ion reaches (NaCl: 0.87, 1.10 and
1.49 Å for Na–Na, Na–Cl and Cl–Cl, at 23, 31 and 19 eV); from there inwards its dispersion levels off smoothly (C²), and
the energy goes on rising.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple, TypeVar

import torch
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from torch import Tensor, nn

from voltpi.potential.electrostatics.gaussians import smooth_switch
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT
from voltpi.potential.errors import InputError

__all__ = [
    "ZBL",
    "BMHParameters",
    "BornMayerHuggins",
    "LJParameters",
    "LennardJones",
    "PairPotential",
    "list_sets",
    "nuclear_repulsion",
    "read_set",
]

_MIXING_RULES = ("lorentz-berthelot", "geometric")
_SWITCH_START = 0.8  # of the cutoff
_N_ELEMENTS = len(chemical_symbols)
_NUMBERS = {symbol: number for symbol, number in atomic_numbers.items() if number}  # without the dummy X
_LAST_RADIUS = 96  # no covalent radii are known beyond Cm


class BMHParameters(NamedTuple):
    """One pair of A exp((sigma − r)/rho) − C/r⁶ − D/r⁸: A in eV, rho and sigma in Å, C in eV Å⁶, D in eV Å⁸.

    With sigma = D = 0 it is Buckingham's potential, with C = 0 as well Born and Mayer's repulsion.
    """

    A: float
    rho: float
    sigma: float = 0.0
    C: float = 0.0
    D: float = 0.0


class LJParameters(NamedTuple):
    """One element or pair of 4 epsilon ((sigma/r)¹² − (sigma/r)⁶): epsilon in eV, sigma in Å."""

    epsilon: float
    sigma: float


_Row = TypeVar("_Row", BMHParameters, LJParameters, float)


class PairPotential(nn.Module):
    """Sum of pair terms: a short range that keeps float64 whatever the precision of networks.

    Parameters
    ----------
    terms : :class:`BornMayerHuggins`, :class:`LennardJones`, :class:`ZBL`; a pair may belong to several, which add up
    cutoff : Å, where every pair energy has gone to zero, switched off from 0.8 of it on

    Raises InputError where there is nothing to sum or the cutoff makes no sense.
    """

    dtype = torch.float64
    _known: Tensor

    def __init__(self, terms: Sequence[BornMayerHuggins | LennardJones | ZBL], cutoff: float) -> None:
        super().__init__()
        reach = max((float(term.reach.max()) for term in terms), default=0.0)
        if reach == 0:
            raise InputError("the pair potential has no pairs: give at least one term")
        if not (math.isfinite(cutoff) and cutoff > 0):
            raise InputError(f"cutoff is {cutoff} Å: give a positive number")
        self.terms = nn.ModuleList(terms)
        self._end = float(cutoff)
        # no pair further apart than this has an energy: the neighbour list needs no more
        self.cutoff = min(self._end, reach)
        # ZBL knows every pair and says nothing about bonds, so it does not stand in for a pair that was forgotten
        given = [term for term in terms if not isinstance(term, ZBL)] or terms
        self.register_buffer("_known", torch.stack([term.reach > 0 for term in given]).any(0), persistent=False)

    def forward(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """Atomic energies [n] (eV), half of each pair's energy to each of its atoms.

        ``numbers`` [n] atomic numbers; ``edge_index`` [2, e] (centre, neighbour), each pair in both directions;
        ``vectors`` [e, 3] = r_j + shift − r_i in Å. Raises InputError for elements whose pairs have no parameters.
        """
        self._require_known(numbers)
        first, second = numbers[edge_index]
        u = vectors.square().sum(-1)
        pair = torch.zeros_like(u)
        for term in self.terms:
            here = (u < term.reach[first, second].square()).nonzero()[:, 0]
            pair = pair.index_add(0, here, term(first[here], second[here], u[here]).to(u.dtype))
        switch, _, _ = smooth_switch(u, (_SWITCH_START * self._end) ** 2, self._end**2)
        return vectors.new_zeros(len(numbers)).index_add(0, edge_index[0], 0.5 * switch * pair)

    def _require_known(self, numbers: Tensor) -> None:
        present = torch.unique(numbers)
        known = self._known[present[:, None], present]
        if bool(known.all()):
            return
        missing = [_pair_name(*present[k].tolist()) for k in (~known).triu().nonzero()]
        raise InputError(
            f"short_range.pair has no parameters for {', '.join(missing)}: give each pair of elements in the structure "
            "(with A or epsilon 0 where there is no such interaction)"
        )


class BornMayerHuggins(nn.Module):
    """A exp((sigma − r)/rho) − C/r⁶ − D/r⁸ between the pairs of elements that are given.

    ``pairs`` : parameters of pairs named like ``Na-Cl``, in any order of the two.

    Raises InputError for an unknown element, a pair that is there twice, numbers that cannot be, and a dispersion that
    is stronger than the repulsion at every distance.
    """

    reach: Tensor
    table: Tensor

    def __init__(self, pairs: Mapping[str, BMHParameters]) -> None:
        super().__init__()
        reach, table = _empty_tables(len(BMHParameters._fields) + 1)
        for (i, j), (name, p) in _by_numbers(pairs).items():
            if not (all(map(math.isfinite, p)) and min(p.A, p.C, p.D) >= 0 and p.rho > 0):
                raise InputError(
                    f"{name} has {_listed(p)}: give finite numbers, rho positive, A, C and D positive or 0"
                )
            _put(table, i, j, [*p, _largest_force(name, p) ** 2])
            _put(reach, i, j, math.inf)
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("table", table, persistent=False)

    def forward(self, first: Tensor, second: Tensor, u: Tensor) -> Tensor:
        """Energies [e] (eV) of pairs of elements [e] at squared distances ``u`` [e] (Å²)."""
        a, rho, sigma, c, d, inner = self.table[first, second].unbind(-1)
        # t³ − t⁴/2 + 1/2, level at 0, joins t at 1 with the same first and second derivative
        t = (u / inner.clamp(min=1e-12)).clamp(max=1)
        w = 1 / (u + inner * (t**3 * (1 - 0.5 * t) + 0.5 - t))
        return a * torch.exp((sigma - u.sqrt()) / rho) - (c + d * w) * w**3


class LennardJones(nn.Module):
    """4 epsilon ((sigma/r)¹² − (sigma/r)⁶), mixed from the parameters of elements.

    Parameters
    ----------
    parameters : of elements (``O``) and of pairs (``O-Na``, which come before the mixing rule)
    mixing : ``lorentz-berthelot`` (arithmetic mean of sigma, geometric of epsilon) or ``geometric`` (both geometric)

    Raises InputError for an unknown element or rule, a pair that is there twice, and numbers that cannot be.
    """

    reach: Tensor
    table: Tensor

    def __init__(self, parameters: Mapping[str, LJParameters], mixing: str = "lorentz-berthelot") -> None:
        super().__init__()
        if mixing not in _MIXING_RULES:
            raise InputError(f"mixing is '{mixing}': choose {' or '.join(_MIXING_RULES)}")
        elements = {_NUMBERS[key]: p for key, p in parameters.items() if key in _NUMBERS}
        pairs = _by_numbers({key: p for key, p in parameters.items() if key not in _NUMBERS}, "an element or ")
        for key, p in parameters.items():
            if not (all(map(math.isfinite, p)) and p.epsilon >= 0 and p.sigma > 0):
                raise InputError(f"{key} has {_listed(p)}: give finite numbers, sigma positive, epsilon positive or 0")
        reach, table = _empty_tables(2)
        for i, p in elements.items():
            for j, q in elements.items():
                arithmetic, geometric = (p.sigma + q.sigma) / 2, math.sqrt(p.sigma * q.sigma)
                sigma = arithmetic if mixing == "lorentz-berthelot" else geometric
                _put(table, i, j, [math.sqrt(p.epsilon * q.epsilon), sigma])
                _put(reach, i, j, math.inf)
        for (i, j), (_, p) in pairs.items():
            _put(table, i, j, [*p])
            _put(reach, i, j, math.inf)
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("table", table, persistent=False)

    def forward(self, first: Tensor, second: Tensor, u: Tensor) -> Tensor:
        """Energies [e] (eV) of pairs of elements [e] at squared distances ``u`` [e] (Å²)."""
        epsilon, sigma = self.table[first, second].unbind(-1)
        sixth = (sigma * sigma / u) ** 3
        return 4 * epsilon * sixth * (sixth - 1)


class ZBL(nn.Module):
    """Screened nuclear repulsion of any two elements, a wall inside the length of a bond.

    k_e Z_i Z_j/r φ(r/a) with a = 0.8854 a_0/(Z_i^0.23 + Z_j^0.23): the universal potential of Ziegler, Biersack and
    Littmark, The Stopping and Range of Ions in Solids (1985). It is still large where other terms already describe the
    repulsion (Na–Cl at 2.82 Å: 0.3 eV), so it is switched off smoothly (C²) from r = 0 to the sum of the covalent radii
    (Cordero et al., Dalton Trans. 2832 (2008)). Up to Cm, the last element with a radius.

    ``reach`` : where it ends (Å) for pairs named like ``H-H``, and then for these alone; None: all pairs, as above.

    Raises InputError for an unknown element, a pair that is there twice, and a distance that is not positive.
    """

    reach: Tensor
    amplitudes = (0.18175, 0.50986, 0.28022, 0.02817)
    exponents = (3.19980, 0.94229, 0.40290, 0.20162)
    screening = 0.46850  # Å, 0.8854 a_0

    def __init__(self, reach: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if reach is None:
            radii = torch.tensor(covalent_radii[:_N_ELEMENTS], dtype=torch.float64)
            ends = radii[:, None] + radii
            ends[0], ends[:, 0] = 0.0, 0.0
            ends[_LAST_RADIUS + 1 :], ends[:, _LAST_RADIUS + 1 :] = 0.0, 0.0
        else:
            ends = _empty_tables(1)[0]
            for (i, j), (name, end) in _by_numbers(reach).items():
                if not (math.isfinite(end) and end > 0):
                    raise InputError(f"the repulsion of {name} ends at {end} Å: give a positive number")
                _put(ends, i, j, float(end))
        self.register_buffer("reach", ends, persistent=False)

    def atomic(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """Atomic energies [n] (eV), half of each pair's energy to each of its atoms; arguments as of PairPotential."""
        first, second = numbers[edge_index]
        u = vectors.square().sum(-1)
        here = (u < self.reach[first, second].square()).nonzero()[:, 0]
        pair = self(first[here], second[here], u[here])
        return vectors.new_zeros(len(numbers)).index_add(0, edge_index[0, here], 0.5 * pair.to(u.dtype))

    def forward(self, first: Tensor, second: Tensor, u: Tensor) -> Tensor:
        """Energies [e] (eV) of pairs of elements [e] at squared distances ``u`` [e] (Å²) within the reach."""
        r = u.sqrt()
        zi, zj = first.to(u.dtype), second.to(u.dtype)
        x = r * (zi**0.23 + zj**0.23) / self.screening
        screened = sum(
            amplitude * torch.exp(-exponent * x)
            for amplitude, exponent in zip(self.amplitudes, self.exponents, strict=True)
        )
        switch, _, _ = smooth_switch(u / self.reach[first, second].square(), 0.0, 1.0)
        return COULOMB_CONSTANT * zi * zj / r * screened * switch


def nuclear_repulsion(given: str | Mapping[str, float] | None, cutoff: float) -> ZBL | None:
    """The ZBL term that a network's setting names: ``covalent``, where it ends (Å) by pair of elements, or None.

    Covalent radii are cut where the network's ``cutoff`` (Å) is shorter. Raises InputError for another word, and for
    given pairs that reach beyond the cutoff.
    """
    if given is None:
        return None
    if isinstance(given, str) and given != "covalent":
        raise InputError(f"repulsion is '{given}': give covalent, distances by pair of elements, or none")
    term = ZBL(None if isinstance(given, str) else given)
    if isinstance(given, str):
        term.reach.clamp_(max=cutoff)  # large metals, whose bonds are longer than the network sees
    elif float(term.reach.max()) > cutoff:
        raise InputError(f"repulsion ends at {float(term.reach.max()):g} Å, beyond r_max {cutoff:g}: let it end inside")
    return term


def list_sets() -> list[str]:
    """Names of the shipped sets of Born–Mayer–Huggins parameters."""
    return list(dict.fromkeys(row["set"] for row in _shipped_rows()))


def read_set(name: str) -> dict[str, BMHParameters]:
    """Parameters of a shipped set by pair (``Na-Cl``). Raises InputError for a name that does not ship."""
    rows = [row for row in _shipped_rows() if row["set"] == name]
    if not rows:
        raise InputError(f"there is no set '{name}': choose {' or '.join(list_sets())}")
    return {row["pair"]: BMHParameters(**{key: float(row[key]) for key in BMHParameters._fields}) for row in rows}


def _shipped_rows() -> list[dict[str, str]]:
    text = resources.files("voltpi.potential.parameters").joinpath("tosi_fumi.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def _empty_tables(columns: int) -> tuple[Tensor, Tensor]:
    """Reach (0: no such pair) and parameters by atomic number."""
    reach = torch.zeros(_N_ELEMENTS, _N_ELEMENTS, dtype=torch.float64)
    return reach, torch.zeros(_N_ELEMENTS, _N_ELEMENTS, columns, dtype=torch.float64)


def _put(table: Tensor, i: int, j: int, values: float | list[float]) -> None:
    row = torch.tensor(values, dtype=torch.float64)
    table[i, j], table[j, i] = row, row


def _pair_name(i: int, j: int) -> str:
    return f"{chemical_symbols[i]}-{chemical_symbols[j]}"


def _listed(p: BMHParameters | LJParameters) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in p._asdict().items())


def _by_numbers(pairs: Mapping[str, _Row], also: str = "") -> dict[tuple[int, int], tuple[str, _Row]]:
    """(smaller, larger atomic number) -> (name, parameters); ``also``: what else a name could have been."""
    table: dict[tuple[int, int], tuple[str, _Row]] = {}
    for name, p in pairs.items():
        symbols = name.split("-")
        if len(symbols) != 2 or not all(s in _NUMBERS for s in symbols):
            raise InputError(f"'{name}' is not {also}a pair of elements: write it like {'Na or ' if also else ''}Na-Cl")
        i, j = sorted(_NUMBERS[s] for s in symbols)
        if (i, j) in table:
            raise InputError(f"{table[i, j][0]} and {name} are the same pair: keep one")
        table[i, j] = (name, p)
    return table


def _largest_force(name: str, p: BMHParameters) -> float:
    """Distance (Å) of the largest repulsive force, or 0 without dispersion, where the force grows all the way."""
    if not (p.C or p.D):
        return 0.0
    r = torch.logspace(-2, 1, 30001, dtype=torch.float64)
    force = p.A / p.rho * torch.exp((p.sigma - r) / p.rho) - 6 * p.C / r**7 - 8 * p.D / r**9
    largest = int(force.argmax())
    if float(force[largest]) <= 0:
        raise InputError(
            f"{name} attracts at every distance, so that two atoms fall into each other: raise A, or lower C and D"
        )
    return float(r[largest])
