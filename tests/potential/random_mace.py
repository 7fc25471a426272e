"""A small MACE with random weights, saved as mace-torch saves models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ELEMENTS = [1, 6, 8, 11, 12, 14, 17, 26, 29, 30, 31, 33, 55]


def random_mace(*, interaction: str = "RealAgnosticResidualInteractionBlock", **options: Any) -> Any:
    """The network, float64; skips the test where mace is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that mace imports
        modules = pytest.importorskip("mace.modules", reason="needs voltpi[mace]")
        from e3nn.o3 import Irreps
    settings: dict[str, Any] = {
        "r_max": 4.0,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": modules.interaction_classes[interaction],
        "interaction_cls_first": modules.interaction_classes[interaction],
        "num_interactions": 2,
        "num_elements": len(ELEMENTS),
        "hidden_irreps": Irreps("4x0e+4x1o"),
        "MLP_irreps": Irreps("4x0e"),
        "atomic_energies": -10.0 - np.arange(len(ELEMENTS)),
        "avg_num_neighbors": 8.0,
        "atomic_numbers": ELEMENTS,
        "correlation": 2,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [8, 8],
        "atomic_inter_scale": 50.0,
        "atomic_inter_shift": 0.2,
    }
    standard = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return modules.ScaleShiftMACE(**settings | options)
    finally:
        torch.set_default_dtype(standard)


def save_random_mace(file: Path, **options: Any) -> Path:
    """The file."""
    torch.save(random_mace(**options), file)
    return file
