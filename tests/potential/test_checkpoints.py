"""One file for a whole model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from voltpi.potential.checkpoints import list_models, load_potential, read_card, read_description, save_potential
from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems

from structures import water_box


def build():
    torch.manual_seed(0)
    network = NequIP([1, 8], hidden_irreps="4x0e+2x1o", sh_irreps="1x0e+1x1o", layers=2, r_max=3.0, scale=1.3)
    charges = PQEq(conserve="fragments", response="all")
    return Potential(network, charges, D3("pbe", "bj"), reference_energies={1: -3.5, 8: -430.0}, precision="double")


def test_round_trip(tmp_path):
    potential = build()
    path = tmp_path / "own.safetensors"
    save_potential(path, potential, {"name": "own"})
    assert read_card(path) == {"name": "own"}
    again = load_potential(path, precision="double")
    systems = potential.prepare(Systems.from_atoms(water_box(), field=[0.1, 0, 0]))
    one, two = potential(systems), again(systems)
    assert torch.equal(one.energy, two.energy)
    assert torch.equal(one.forces, two.forces)
    assert load_potential(path).precision == "mixed"


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(InputError, match=r"'nowhere' is neither a shipped model \(.*water.*\) nor an existing file"):
        load_potential("nowhere")
    path = tmp_path / "text.safetensors"
    path.write_text("hello")
    with pytest.raises(InputError, match="not a VoltPI model"):
        load_potential(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"voltpi": json.dumps({"format": 99})})
    with pytest.raises(InputError, match="model format 99, this version reads 1"):
        load_potential(path)
    description = {
        "format": 1,
        "short_range": {"kind": "nequip", "config": build().short_range.config},
        "charges": None,
    }
    description |= {"dispersion": None, "reference_energies": {}, "card": {}}
    save_file({"x": torch.zeros(1)}, path, metadata={"voltpi": json.dumps(description)})
    with pytest.raises(InputError, match="do not fit its own description"):
        load_potential(path)


def test_only_networks_are_saved(tmp_path):
    with pytest.raises(InputError, match="hold a NequIP"):
        save_potential(tmp_path / "x.safetensors", Potential(short_range=_NoNetwork()), {})


class _NoNetwork:
    cutoff = 3.0


def test_the_shipped_model_says_what_it_is():
    assert "water" in list_models()
    card = read_card("water")
    assert card["errors"]["efield-water_force_rmse"] < 0.115  # eV/Å, FIREANN's own on the same frames
    assert {"data", "validation", "errors", "errors_of_charges_alone", "not_for"} <= set(card)
    description = read_description("water")
    assert description["charges"]["conserve"] == "fragments"
    assert description["dispersion"]["damping"] == "zero"
