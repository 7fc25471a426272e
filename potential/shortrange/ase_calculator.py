"""Any ASE calculator as the short range: ``ase:MODULE:FUNCTION``, where ``FUNCTION()`` of ``MODULE`` returns it.

Structure by structure, through ASE; a calculator without stress serves structures that are open in all directions.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.geometry import complete_cell
from torch import Tensor

from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.shortrange.foundation import WholeModel
from voltpi.potential.systems import Systems

__all__ = ["ASEModel"]


class ASEModel(WholeModel):
    """An ASE calculator; ``name`` is for messages."""

    def __init__(self, name: str, calculator: Any) -> None:
        self.name, self.calculator = name, calculator

    @classmethod
    def load(cls, name: str, target: str) -> ASEModel:
        """The calculator that ``MODULE:FUNCTION`` makes; modules in the working folder are found as well.

        Raises InputError for a module or function that is not there, or that does not return a calculator.
        """
        module_name, _, function = target.rpartition(":")
        if not module_name or not function:
            raise InputError(f"short_range.foundation is '{name}': write ase:module:function")
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)
        try:
            make = getattr(importlib.import_module(module_name), function)
        except (ImportError, AttributeError) as error:
            raise InputError(f"short_range.foundation is {name}: {error}; write ase:module:function") from None
        try:
            calculator = make()
        except Exception as error:  # whatever somebody else's code raises
            raise InputError(
                f"short_range.foundation is {name}, but {function}() raises {type(error).__name__}: {error}; it "
                "must be callable without arguments and return an ASE calculator"
            ) from error
        if not hasattr(calculator, "get_potential_energy"):
            raise InputError(
                f"short_range.foundation is {name}, but {function}() returns {type(calculator).__name__}: it must "
                "return an ASE calculator"
            )
        return cls(name, calculator)

    def evaluate(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        """Energy [b] (eV), forces [n, 3] (eV/Å) and virial [b, 3, 3] (eV).

        Raises InputError where a periodic structure needs a stress that the calculator does not have, VoltPIError where
        it fails.
        """
        energies, forces, virials = [], [], []
        for part in systems.split():
            atoms = Atoms(
                numbers=part.numbers.cpu().numpy(),
                positions=part.positions.cpu().numpy(),
                cell=_whole_cell(part.cell[0].cpu().numpy(), part.positions.cpu().numpy()),
                pbc=part.pbc[0].cpu().numpy(),
            )
            atoms.calc = self.calculator
            try:
                energies.append(float(atoms.get_potential_energy()))
                forces.append(np.asarray(atoms.get_forces(), dtype=float))
            except Exception as error:  # whatever somebody else's code raises
                raise VoltPIError(f"{self.name} failed: {type(error).__name__}: {error}") from error
            virials.append(self._virial(atoms))
        like = {"dtype": torch.float64, "device": systems.device}
        return (
            torch.tensor(energies, **like),
            torch.tensor(np.concatenate(forces), **like),
            torch.tensor(np.array(virials), **like),
        )

    def _virial(self, atoms: Atoms) -> np.ndarray:
        if not atoms.pbc.any():
            return np.zeros((3, 3))
        try:
            stress = np.asarray(atoms.get_stress(voigt=False), dtype=float)
        except (PropertyNotImplementedError, NotImplementedError):
            raise InputError(
                f"{self.name} has no stress, which a periodic structure needs for its virial: use a calculator with one"
            ) from None
        return -stress * atoms.get_volume()


def _whole_cell(cell: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Cell [3, 3] (Å) with a vector along every direction that has none, where there is one at all.

    A slab needs a volume for its stress, although none for its virial, stress × volume.
    """
    missing = ~cell.any(axis=1)
    if missing.all() or not missing.any():
        return cell
    room = float(np.ptp(positions, axis=0).max()) + 10.0
    whole = complete_cell(cell)
    whole[missing] *= room
    return whole
