"""A small QET with weights that depend on their names only, saved as matgl saves potentials."""

from __future__ import annotations

import math
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ELEMENTS = ("H", "Li", "O", "Na", "Mg", "P", "S", "Cl", "Ca", "Zn")


def fill(network: Any) -> None:
    """Sets every parameter, the same in any version of matgl."""
    for name, parameter in network.named_parameters():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = random.normal(size=tuple(parameter.shape)) / math.sqrt(parameter.shape[-1])
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                values = 1 + 0.1 * values
            parameter.copy_(torch.tensor(values))


def random_qet() -> Any:
    """matgl's Potential of it; skips the test where matgl is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that matgl imports
        models = pytest.importorskip("matgl.models", reason="needs voltpi[qet]")
        from matgl.apps.pes import Potential
    network = models.QET(
        element_types=ELEMENTS,
        units=16,
        nblocks=2,
        rbf_type="SphericalBessel",
        use_smooth=True,
        max_n=5,
        max_l=3,
        cutoff=4.0,
        is_hardness_envs=True,
        use_warp=False,
    )
    fill(network)
    references = [-0.5 * k for k in range(len(ELEMENTS))]
    return Potential(network, data_mean=0.3, data_std=20.0, element_refs=references, calc_charge=True)


def save_random_qet(folder: Path, *, dgl: bool = False) -> str:
    """Its folder; ``dgl``: as if the backend DGL had written it."""
    random_qet().save(folder)
    if dgl:
        arguments = torch.load(folder / "model.pt", weights_only=True)
        arguments["model"]["@module"] = "matgl.models._qet_dgl"
        torch.save(arguments, folder / "model.pt")
    return str(folder)
