"""MACE on our neighbour lists: Batatia et al., Adv. Neural Inf. Process. Syst. 35, 11423 (2022); mace-torch.

The network runs from the vectors of pairs to energies of atoms; its own forces are left out, so a batch is one
evaluation.

A MACE model file is a pickle of Python objects with code in it. Nothing of that is executed here: of the file are kept
tensors, numbers and irreps, every other object is read as an inert record of its state. From these records follow the
arguments of MACE's own constructor, which builds the network anew, and the tensors are copied into it. So a file that
was written with another version of e3nn can be read as well.
"""

from __future__ import annotations

import os
import pickle
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from e3nn.o3 import Irreps
from e3nn.o3._irreps import Irrep, _MulIr
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.foundation import EdgeModel, import_package

__all__ = ["MACE"]

_KINDS = ("MACE", "ScaleShiftMACE")
_RADIAL = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
_TRANSFORMS = {"AgnesiTransform": "Agnesi", "SoftTransform": "Soft"}
_LOADS_ANYTHING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class MACE(EdgeModel):
    """A MACE model of one head, or the head of a model that is called default."""

    def __init__(self, name: str, network: Any, head: int, dtype: torch.dtype) -> None:
        numbers = [int(z) for z in network.atomic_numbers]
        super().__init__(name, float(network.r_max), dtype, frozenset(numbers))
        self.network = network.to(dtype).eval().requires_grad_(False)
        self.head = head
        lookup = torch.full((max(numbers) + 1,), -1, dtype=torch.int64)
        lookup[torch.tensor(numbers)] = torch.arange(len(numbers))
        self.register_buffer("lookup", lookup)

    @classmethod
    def load(cls, name: str, path: str, dtype: torch.dtype) -> MACE:
        """The model in a file. Raises InputError where it cannot be had, is of another kind or has several heads."""
        before = os.environ.get(_LOADS_ANYTHING)
        modules = import_package("mace.modules", "mace", "mace", name)
        if before is None:  # importing mace makes torch.load execute what any file holds
            os.environ.pop(_LOADS_ANYTHING, None)
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such file; short_range.foundation is mace:PATH of a model file")
        record = _read(path)
        if type(record).__name__ not in _KINDS or not isinstance(record, _Record):
            raise InputError(
                f"{path}: holds a {type(record).__name__}; short_range.foundation mace:PATH is a {' or '.join(_KINDS)}"
            )
        heads = [str(head) for head in record.get("heads") or ["default"]]
        default = [k for k, head in enumerate(heads) if head.lower() == "default" or len(heads) == 1]
        if not default:
            raise InputError(f"{path}: has the heads {', '.join(heads)} and none called default; save it with one head")
        standard = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)  # e3nn's constants with all digits
            network = getattr(modules, type(record).__name__)(**_configuration(record, heads, modules))
        except _DAMAGED as error:
            raise InputError(
                f"{path}: this kind of MACE model cannot be built ({type(error).__name__}: {error}); use "
                "ase:module:function with its ASE calculator"
            ) from None
        finally:
            torch.set_default_dtype(standard)
        _fill(path, network, record.tensors())
        return cls(name, network, default[0], dtype)

    def atomic_energies(self, numbers: Tensor, index: Tensor, vectors: Tensor, shift: Tensor) -> Tensor:
        """Atomic energies [n] (eV); see EdgeModel."""
        n = len(numbers)
        data = {
            "positions": vectors.new_zeros(n, 3),  # with the vectors as shifts, its bonds are ours
            "shifts": vectors,
            "unit_shifts": torch.zeros_like(vectors),
            "cell": vectors.new_zeros(3, 3),
            "node_attrs": torch.nn.functional.one_hot(self.lookup[numbers], len(self.elements)).to(vectors.dtype),
            "edge_index": index,
            "batch": torch.zeros_like(numbers),
            "ptr": torch.tensor([0, n], device=numbers.device),
            "head": torch.tensor([self.head], device=numbers.device),
        }
        energies: Tensor = self.network(data, compute_force=False)["node_energy"]
        return energies


_DAMAGED = (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class _Record:
    """An object of a file: what it was made of and its state, without its code."""

    def __new__(cls, *arguments: Any) -> _Record:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *arguments: Any) -> None:
        pass

    state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state.update(state)

    def get(self, name: str) -> Any:
        """An attribute, parameter, buffer or submodule; None where there is none of that name."""
        for place in (self.state, *(self.state.get(key) or {} for key in ("_parameters", "_buffers", "_modules"))):
            if name in place:
                return place[name]
        return None

    def at(self, path: str) -> Any:
        """What is at a path as ``interactions.0.avg_num_neighbors``. Raises KeyError; −1 is the last of a list."""
        found: Any = self
        for name in path.split("."):
            if name == "-1":
                name = str(len(found.state["_modules"]) - 1)
            found = found.get(name) if isinstance(found, _Record) else None
            if found is None:
                raise KeyError(path)
        return found

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers of a module and those in it, named as in a state dict."""
        found = {}
        for key in ("_parameters", "_buffers"):
            for name, value in (self.state.get(key) or {}).items():
                if isinstance(value, Tensor) and value.numel():
                    found[prefix + name] = value.detach()
        for name, module in (self.state.get("_modules") or {}).items():
            if isinstance(module, _Record):
                found.update(module.tensors(f"{prefix}{name}."))
        return found


_REAL: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("e3nn.o3._irreps", "Irreps"): Irreps,
    ("e3nn.o3._irreps", "Irrep"): Irrep,
    ("e3nn.o3._irreps", "_MulIr"): _MulIr,
    ("torch.nn.functional", "silu"): torch.nn.functional.silu,
    ("torch", "tanh"): torch.tanh,
    ("torch", "abs"): torch.abs,
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in (("slice", slice), ("set", set))
    },
}


class _Unpickler(pickle.Unpickler):
    """Makes of a pickle the objects of ``_REAL``, and records of all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REAL:
            return _REAL[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (_Record,), {})


def _read(path: str) -> Any:
    """The object in a file, without its code. Raises InputError for what is no torch file of objects."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: is no model file as torch.save writes it; give a MACE model that mace-torch saved")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise InputError(f"{path}: is compiled (TorchScript); give the model file from which it was compiled")
    try:
        reader = types.SimpleNamespace(Unpickler=_Unpickler, __name__=__name__)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a MACE model ({type(error).__name__}: {error})") from None


def _configuration(record: _Record, heads: list[str], modules: Any) -> dict[str, Any]:
    """Arguments of MACE's constructor, as ``mace.tools.scripts_utils.extract_config_mace_model`` finds them.

    Raises KeyError, ValueError and the like for what this version of it does not read.
    """
    if record.get("joint_embedding") is not None:
        raise ValueError("it needs more than positions")
    interactions, readout = record.at("interactions").state["_modules"], record.at("readouts.-1")
    hidden = readout.get("hidden_irreps")
    scalars = 1 if hidden is None else max(1, hidden.count(Irrep("0e")) // len(heads))
    gate = readout.get("non_linearity") and readout.at("non_linearity.acts.0.f")
    if isinstance(gate, type | _Record):
        raise ValueError(f"unknown gate {gate}")
    first = record.at("products.0.symmetric_contractions.contractions.0")
    basis = type(record.at("radial_embedding.bessel_fn")).__name__
    transform = record.at("radial_embedding").get("distance_transform")
    kinds = [modules.interaction_classes[type(x).__name__] for x in interactions.values()]
    found = {
        "r_max": float(record.at("r_max")),
        "num_bessel": len(record.at("radial_embedding.bessel_fn.bessel_weights")),
        "num_polynomial_cutoff": int(record.at("radial_embedding.cutoff_fn.p")),
        "max_ell": int(record.at("spherical_harmonics._lmax")),
        "interaction_cls": kinds[-1],
        "interaction_cls_first": kinds[0],
        "num_interactions": len(kinds),
        "num_elements": len(record.at("atomic_numbers")),
        "hidden_irreps": record.at("products.0.linear.irreps_out"),
        "edge_irreps": record.get("edge_irreps"),
        "MLP_irreps": Irreps(f"{scalars}x0e"),
        "gate": gate,
        "readout_cls": modules.readout_classes[type(readout).__name__],
        "atomic_energies": record.at("atomic_energies_fn.atomic_energies").numpy(),
        "avg_num_neighbors": float(record.at("interactions.0.avg_num_neighbors")),
        "atomic_numbers": record.at("atomic_numbers").tolist(),
        "correlation": len(first.at("weights").state["_parameters"]) + 1,
        "radial_type": _RADIAL[basis],
        "radial_MLP": list(record.at("interactions.0.conv_tp_weights.hs"))[1:-1],
        "pair_repulsion": record.get("pair_repulsion_fn") is not None,
        "distance_transform": "None" if transform is None else _TRANSFORMS[type(transform).__name__],
        "heads": heads,
    }
    for key in ("use_reduced_cg", "use_so3", "use_edge_irreps_first", "use_agnostic_product", "use_last_readout_only"):
        found[key] = bool(record.get(key))
    found["apply_cutoff"] = record.get("apply_cutoff") is not False
    if record.get("scale_shift") is not None:
        for key in ("scale", "shift"):
            found[f"atomic_inter_{key}"] = record.at(f"scale_shift.{key}").numpy()
    return found


def _fill(path: str, network: Any, tensors: dict[str, Tensor]) -> None:
    """Copies a file's tensors into a network. Raises InputError where the two differ."""
    own = network.state_dict()
    wrong = [key for key, value in tensors.items() if key not in own or own[key].shape != value.shape]
    wrong += [key for key, value in network.named_parameters() if value.numel() and key not in tensors]
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} of its tensors, as {wrong[0]}, are not those of the network that mace-torch builds "
            "from its settings; use ase:module:function with its ASE calculator"
        )
    network.load_state_dict(own | tensors)
