"""Other people's models as the short range: ``short_range: {foundation: NAME}``.

    sevennet-0 | sevennet-l3i5 | sevennet:PATH   SevenNet: Park et al., J. Chem. Theory Comput. 20, 4857 (2024)
    chgnet | chgnet-r2scan                       CHGNet: Deng et al., Nat. Mach. Intell. 5, 1031 (2023)
    mace:PATH                                    MACE: Batatia et al., Adv. Neural Inf. Process. Syst. 35, 11423 (2022)
    qet:PATH | qet-matgl2:PATH                   QET: Ko et al., arXiv:2511.07249 (2025), as matgl 4 or 2 evaluates it
    ase:MODULE:FUNCTION                          any ASE calculator: FUNCTION() of MODULE returns it

A model of the first kind (:class:`EdgeModel`) is given the neighbours that the rest of VoltPI uses and answers with
energies of atoms, for a whole batch at once; forces and virial are the derivative by the vectors of its pairs. One of
the second kind (:class:`WholeModel`) answers energy, forces and virial itself.

These models hold the electrostatics of zero field in themselves. Charges beside them are therefore *response only*
(``voltpi.potential.model.Potential``).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

__all__ = ["EdgeModel", "WholeModel", "import_package", "load_foundation", "missing_package"]


class EdgeModel(nn.Module):
    """A foundation model that is a function of pairs; see ``forward``.

    Attributes: ``name``, ``cutoff`` (Å), ``dtype`` of its arithmetic, ``elements`` (atomic numbers that it knows).
    """

    takes_shifts: ClassVar[bool] = True

    def __init__(self, name: str, cutoff: float, dtype: torch.dtype, elements: frozenset[int]) -> None:
        super().__init__()
        self.name, self.cutoff, self.dtype, self.elements = name, cutoff, dtype, elements

    def forward(self, numbers: Tensor, index: Tensor, vectors: Tensor, shift: Tensor) -> Tensor:
        """Atomic energies [n] (eV) from numbers [n] and pairs: index [2, e] (centre, neighbour), vectors r_j − r_i
        [e, 3] (Å) and the image of each neighbour, shift [e, 3].

        Raises InputError for an element that the model does not know.
        """
        check_elements(self.name, self.elements, numbers)
        return self.atomic_energies(numbers, index, vectors, shift)

    def atomic_energies(self, numbers: Tensor, index: Tensor, vectors: Tensor, shift: Tensor) -> Tensor:
        """As ``forward``, for elements that are known."""
        raise NotImplementedError


class WholeModel:
    """A model that answers with energy, forces and virial."""

    name: str
    dtype: torch.dtype = torch.float64

    def evaluate(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        """Energy [b] (eV), forces [n, 3] (eV/Å) and virial [b, 3, 3] (eV, −∂E/∂strain)."""
        raise NotImplementedError


def check_elements(name: str, known: frozenset[int], numbers: Tensor) -> None:
    """Raises InputError for an element that a model does not know."""
    missing = sorted(set(numbers.unique().tolist()) - known)
    if missing:
        symbols = ", ".join(chemical_symbols[z] for z in missing)
        raise InputError(f"{name} does not know {symbols}: use another short_range.foundation for this structure")


def import_package(module: str, package: str, extra: str, name: str) -> Any:
    """A module of an optional package. Raises InputError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(_not_installed(name, package, extra, str(error))) from None


def missing_package(name: str) -> str:
    """Why the package of the model that ``short_range.foundation`` names cannot be imported, or an empty string.

    Imports nothing; also empty for a name that :func:`load_foundation` refuses.
    """
    package, extra = _PACKAGES.get(name.partition(":")[0].partition("-")[0], ("", ""))
    if not package or importlib.util.find_spec(package) is not None:
        return ""
    return _not_installed(name, package, extra, f"No module named '{package}'")


def _not_installed(name: str, package: str, extra: str, why: str) -> str:
    # mace-torch itself asks for a version of e3nn that VoltPI cannot use (pyproject.toml)
    install = f"pip install 'voltpi[{extra}]'" + (" && pip install --no-deps mace-torch" if extra == "mace" else "")
    return f"short_range.foundation is {name}, which needs the package {package} ({why}): {install}"


def load_foundation(name: str, *, precision: str = "mixed") -> EdgeModel | WholeModel:
    """The model that ``short_range.foundation`` names; ``precision: double`` makes its arithmetic float64.

    Raises InputError for an unknown name, a package that is not installed, and a file that is missing.
    """
    kind, _, rest = name.partition(":")
    dtype = torch.float64 if precision == "double" else torch.float32
    if kind not in _LOADERS or (kind in _NEED_MORE) != bool(rest):
        forms = (
            "sevennet-0 | sevennet-l3i5 | sevennet:PATH | chgnet | chgnet-r2scan | mace:PATH | qet:PATH | "
            "qet-matgl2:PATH | ase:module:function"
        )
        raise InputError(f"short_range.foundation is '{name}': choose {forms}")
    return _LOADERS[kind](name, rest, dtype)


def _sevennet(name: str, rest: str, dtype: torch.dtype) -> EdgeModel:
    from voltpi.potential.shortrange.sevennet import SevenNet

    return SevenNet.load(name, rest, dtype)


def _chgnet(name: str, rest: str, dtype: torch.dtype) -> EdgeModel:
    from voltpi.potential.shortrange.chgnet import CHGNet

    return CHGNet.load(name, dtype)


def _mace(name: str, rest: str, dtype: torch.dtype) -> EdgeModel:
    from voltpi.potential.shortrange.mace import MACE

    return MACE.load(name, rest, dtype)


def _qet(name: str, rest: str, dtype: torch.dtype) -> WholeModel:
    from voltpi.potential.shortrange.qet import QET

    return QET.load(name, rest, dtype)


def _ase(name: str, rest: str, dtype: torch.dtype) -> WholeModel:
    from voltpi.potential.shortrange.ase_calculator import ASEModel

    return ASEModel.load(name, rest)


_LOADERS: dict[str, Callable[[str, str, torch.dtype], EdgeModel | WholeModel]] = {
    "sevennet-0": _sevennet,
    "sevennet-l3i5": _sevennet,
    "sevennet": _sevennet,
    "chgnet": _chgnet,
    "chgnet-r2scan": _chgnet,
    "mace": _mace,
    "qet": _qet,
    "qet-matgl2": _qet,
    "ase": _ase,
}
# by the first word of the name: the package and the extra of VoltPI that installs it
_PACKAGES = {
    "sevennet": ("sevenn", "sevennet"),
    "chgnet": ("chgnet", "chgnet"),
    "mace": ("mace", "mace"),
    "qet": ("matgl", "qet"),
}
_NEED_MORE = ("sevennet", "mace", "qet", "qet-matgl2", "ase")
