"""D3 dispersion (Grimme et al., J. Chem. Phys. 132, 154104 (2010); BJ damping: J. Comput. Chem. 32, 1456 (2011)).

The work is done by s-dftd3 through its Python package ``dftd3`` (Ehlert, J. Open Source Softw. 9, 7169 (2024)).

Why this library: of the maintained ones only it has periodic sums, zero *and* BJ damping, a smooth cutoff, the virial
and float64 throughout. tad-dftd3 0.7 has no periodicity and no zero damping; nvalchemi-toolkit-ops 0.5 has no zero
damping and fetches its parameters at run time.

Why these cutoffs, 64 H2O in 12.43 Å, PBE zero damping, energy and gradient, one core (the wheel has no OpenMP):

==========================================  ==========  ========  ===============================
two-body sum                                energy, eV  time, ms  largest force difference, meV/Å
==========================================  ==========  ========  ===============================
particle-mesh Ewald of the library          −6.9103     3800      reference
its default, hard 60 bohr, CN 40 bohr       −6.9066     105       0.004
21 Å, smooth over the last 5 Å, CN 10.5 Å   −6.8919     30        0.037
==========================================  ==========  ========  ===============================

The last line is the default here. The one thing the library cannot smooth is the cutoff of the coordination numbers:
their counting function tends to exp(−16), not to zero, so a pair that crosses ``cn_cutoff`` moves the energy by a few
1e-9 eV. Between such crossings forces and virial are the exact derivatives.

Directions without periodicity get a cell vector so long that no image comes within a cutoff. The library's own one- and
two-dimensional lattices are not used: 1.7 picks images by Cartesian rows of the cell, so that a skewed cell loses some.
"""

from __future__ import annotations

import numpy as np
import torch
from ase.data import chemical_symbols
from ase.geometry import complete_cell
from ase.units import Bohr, Hartree
from dftd3.interface import DampingParam, DispersionModel, RationalDampingParam, ZeroDampingParam
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

__all__ = ["D3"]

_DAMPING: dict[str, type[DampingParam]] = {"zero": ZeroDampingParam, "bj": RationalDampingParam}
_LAST_ELEMENT = 103
_MODELS_KEPT = 8


class D3:
    """D3 dispersion of a functional, on the CPU in float64.

    Parameters
    ----------
    functional : name of the functional whose damping parameters are used, as s-dftd3 spells it (``pbe``, ``revpbe`` …)
    damping : ``zero`` or ``bj``
    three_body : adds the Axilrod–Teller–Muto term
    cutoff, smoothing_width : Å, pairs further apart than ``cutoff`` do not count; switched off over the last
        ``smoothing_width``
    cn_cutoff : Å, for the coordination numbers
    three_body_cutoff : Å, for the sides of a triple, switched off over the last ``smoothing_width``

    Raises
    ------
    InputError
        for a damping, functional or cutoff that is not known or makes no sense.
    """

    def __init__(
        self,
        functional: str = "pbe",
        damping: str = "zero",
        *,
        three_body: bool = False,
        cutoff: float = 21.0,
        smoothing_width: float = 5.0,
        cn_cutoff: float = 10.5,
        three_body_cutoff: float = 10.0,
    ) -> None:
        if damping not in _DAMPING:
            raise InputError(f"dispersion.damping is {damping!r}: choose one of {', '.join(_DAMPING)}")
        if min(cutoff, cn_cutoff, three_body_cutoff) <= 0.0:
            raise InputError("a D3 cutoff is not positive: give cutoff, cn_cutoff and three_body_cutoff in Å")
        if not 0.0 <= smoothing_width <= min(cutoff, three_body_cutoff):
            raise InputError(f"dispersion smoothing_width is {smoothing_width} Å: give one between 0 and the cutoff")
        self.functional = functional
        self.damping = damping
        self.three_body = three_body
        self.cutoff = cutoff
        self.smoothing_width = smoothing_width
        self.cn_cutoff = cn_cutoff
        self.three_body_cutoff = three_body_cutoff
        try:
            self._parameters = _DAMPING[damping](method=functional, atm=three_body)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise InputError(
                f"dispersion.functional is {functional!r}, for which s-dftd3 has no {damping} damping: "
                "use a functional it knows, such as pbe, revpbe, rpbe, blyp or b3-lyp"
            ) from error
        # Reference C6 tables depend on elements only, so a model is kept and its positions updated.
        self._models: dict[tuple[bytes, bytes], DispersionModel] = {}

    @property
    def config(self) -> dict[str, str | bool | float]:
        """JSON-able arguments that rebuild this object: ``D3(**config)``."""
        return {
            "functional": self.functional,
            "damping": self.damping,
            "three_body": self.three_body,
            "cutoff": self.cutoff,
            "smoothing_width": self.smoothing_width,
            "cn_cutoff": self.cn_cutoff,
            "three_body_cutoff": self.three_body_cutoff,
        }

    def __call__(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        """Energies [b] (eV), forces [n, 3] (eV/Å), virials [b, 3, 3] (eV, −∂E/∂strain) on the systems' device.

        Raises InputError for an element without D3 parameters (beyond Lr).
        """
        counts = systems.counts()
        numbers, positions = systems.numbers.cpu().numpy(), systems.positions.detach().cpu().numpy()
        cells, pbc = systems.cell.detach().cpu().numpy(), systems.pbc.cpu().numpy()
        _require_known(numbers)
        energy, virial, forces = np.zeros(len(counts)), np.zeros((len(counts), 3, 3)), np.zeros_like(positions)
        last = np.cumsum(counts)
        for i, (start, stop) in enumerate(zip(last - counts, last, strict=True)):
            atoms = slice(start, stop)
            model = self._model(numbers[atoms], positions[atoms], cells[i], pbc[i])
            result = model.get_dispersion(self._parameters, grad=True)
            energy[i] = result["energy"] * Hartree
            forces[atoms] = -result["gradient"] * (Hartree / Bohr)
            virial[i] = -result["virial"] * Hartree
        device = systems.device
        return (
            torch.tensor(energy, device=device),
            torch.tensor(forces, device=device),
            torch.tensor(virial, device=device),
        )

    def _model(self, numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> DispersionModel:
        """The library's model of one structure, at these positions."""
        x = positions / Bohr
        lattice = self._lattice(positions, cell, pbc) / Bohr if pbc.any() else None
        key = (numbers.tobytes(), pbc.tobytes())
        model = self._models.get(key)
        if model is not None:
            model.update(x, lattice)
            return model
        model = DispersionModel(numbers, x, lattice, np.full(3, pbc.any()))
        width = self.smoothing_width / Bohr
        model.set_realspace_cutoff(
            self.cutoff / Bohr, self.three_body_cutoff / Bohr, self.cn_cutoff / Bohr, width, width
        )
        if len(self._models) >= _MODELS_KEPT:
            del self._models[next(iter(self._models))]
        self._models[key] = model
        return model

    def _lattice(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
        """Cell [3, 3] (Å), periodic in all directions, that is as good as open in those that are not in ``pbc``."""
        if pbc.all():
            return cell
        lattice = complete_cell(np.where(pbc[:, None], cell, 0.0))
        reach = max(self.cutoff, self.cn_cutoff, self.three_body_cutoff)
        extent = np.ptp(positions @ lattice[~pbc].T, axis=0)
        lattice[~pbc] *= (extent + reach + 1.0)[:, None]
        return lattice


def _require_known(numbers: np.ndarray) -> None:
    unknown = sorted({int(z) for z in numbers if not 1 <= z <= _LAST_ELEMENT})
    if unknown:
        names = ", ".join(chemical_symbols[z] if 0 <= z < len(chemical_symbols) else str(z) for z in unknown)
        raise InputError(f"D3 has no parameters for {names}: set dispersion to none or change the element")
