"""SevenNet on our neighbour lists: Park, Kim, Hwang, Han, J. Chem. Theory Comput. 20, 4857 (2024); package ``sevenn``.

The network's own modules run, from the vectors of pairs to energies of atoms; its graph construction and its forces are
left out, so a batch is one evaluation and float64 is possible. Its wheel carries the weights of ``sevennet-0`` and
``sevennet-l3i5``. A checkpoint is a pickle, which can execute code: give ``sevennet:PATH`` only files that you trust.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.foundation import EdgeModel, import_package

__all__ = ["SevenNet"]

_KEYWORDS = {"sevennet-0": "7net-0", "sevennet-l3i5": "7net-l3i5"}


class SevenNet(EdgeModel):
    """A SevenNet model without modalities."""

    def __init__(self, name: str, network: Any, dtype: torch.dtype) -> None:
        super().__init__(name, float(network.cutoff), dtype, frozenset(network.type_map))
        network.set_is_batch_data(False)
        network.requires_grad_(False)
        network.delete_module_by_key("force_output")
        network.delete_module_by_key("reduce_total_enegy")  # spelt so
        self.network = network

    @classmethod
    def load(cls, name: str, path: str, dtype: torch.dtype) -> SevenNet:
        """The model from the wheel or a checkpoint. Raises InputError where it cannot be had or has modalities."""
        util = import_package("sevenn.util", "sevenn", "sevennet", name)
        build = import_package("sevenn.model_build", "sevenn", "sevennet", name)
        if path and not Path(path).is_file():
            raise InputError(f"{path}: there is no such file; short_range.foundation is sevennet:PATH of a checkpoint")
        checkpoint = util.load_checkpoint(path or _KEYWORDS[name])
        network = checkpoint.build_model()
        if network.modal_map:
            raise InputError(
                f"{path}: a SevenNet model of several modalities ({', '.join(network.modal_map)}) is not "
                "available; use one without"
            )
        if dtype == torch.float64:
            # e3nn compiles its constants in the type that it is built in; those of the file have float32's digits
            weights = {key: value for key, value in network.state_dict().items() if "w3j" not in key}
            before = torch.get_default_dtype()
            try:
                torch.set_default_dtype(dtype)
                network = build.build_E3_equivariant_model(checkpoint.config)
            finally:
                torch.set_default_dtype(before)
            network.load_state_dict(weights, strict=False)
            network.to(dtype)
        return cls(name, network, dtype)

    def atomic_energies(self, numbers: Tensor, index: Tensor, vectors: Tensor, shift: Tensor) -> Tensor:
        """Atomic energies [n] (eV); see EdgeModel."""
        data: dict[str, Any] = {
            "atomic_numbers": numbers,
            "edge_index": index,
            "edge_vec": vectors,
            "batch": torch.zeros_like(numbers),
            "num_atoms": torch.tensor(len(numbers), device=numbers.device),
        }
        data = self.network._preprocess(data)
        for name, module in self.network._modules.items():
            data = module(data)
            if name == "onehot_idx_to_onehot":  # always float32
                data["node_attr"] = data["node_attr"].to(self.dtype)
                data["x"] = data["x"].to(self.dtype)
        return data["atomic_energy"].reshape(-1)
