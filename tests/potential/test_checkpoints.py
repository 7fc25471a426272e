"""One file for a whole model."""

from __future__ import annotations

import copy
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from voltpi.potential import checkpoints
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


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "own.safetensors"
    save_potential(path, build(), {"name": "own"})
    return path


def changed(*keys, to):
    """A change of the description at ``keys``; ``to=None`` removes."""

    def change(description):
        place = description
        for key in keys[:-1]:
            place = place[key]
        if to is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to
        return description

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [d], "no JSON object"),
        (lambda d: "text", "no JSON object"),
        (changed("dispersion", to=None), "lacks or should not have: dispersion"),
        (changed("card", to=None), "lacks or should not have: card"),
        (changed("electrodes", to={}), "lacks or should not have: electrodes"),
        (changed("charges", to=[1]), "charges in its description is no JSON object"),
        (changed("short_range", "kind", to="mace"), "short_range of kind 'mace', this version reads nequip"),
        (changed("short_range", "config", to=None), "reads nequip with its config"),
        (changed("short_range", "config", "colour", to=3), "short_range .*colour"),
        (changed("short_range", "config", "species", to=None), "short_range .*species"),
        (changed("short_range", "config", "layers", to=0), "short_range .*at least one layer"),
        (changed("charges", "colour", to=3), "charges .*colour"),
        (changed("charges", "parameters", to=None), "charges .*no 'parameters'"),
        (changed("charges", "parameters", "O", to=[1.0, 2.0]), "charges .*missing"),
        (changed("charges", "parameters", "O", to=[8.0, float("nan"), 1.0, 0.7, 400.0]), "charges .*finite"),
        (changed("charges", "shell_limit", to="wide"), "charges .*real number"),
        (changed("dispersion", "colour", to=3), "dispersion .*colour"),
        (changed("dispersion", "damping", to="none"), "dispersion .*damping is 'none'"),
        (changed("reference_energies", "O", to=-430.0), "reference_energies .*'O'"),
        (changed("reference_energies", "400", to=-430.0), "reference_energies .*400 is no atomic number"),
    ],
)
def test_descriptions_that_cannot_be_used_name_the_file(own, tmp_path, change, message):
    path = tmp_path / "broken.safetensors"
    description = change(copy.deepcopy(read_description(own)))
    save_file(load_file(own), path, metadata={"voltpi": json.dumps(description)})
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + message):
        load_potential(path)


def test_a_model_is_written_whole_or_not_at_all(own, tmp_path, monkeypatch):
    path = tmp_path / "own.safetensors"
    path.write_bytes(own.read_bytes())

    def dies(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", dies)
    with pytest.raises(InputError, match=r"own.safetensors: cannot be written \(disk full\)"):
        save_potential(path, build(), {})
    assert path.read_bytes() == own.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    save_potential(path, build(), {"name": "again"})
    assert read_card(path) == {"name": "again"}
    assert list(tmp_path.iterdir()) == [path]


def test_who_may_read_a_model_is_up_to_the_umask(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            save_potential(tmp_path / "m.safetensors", build(), {})
        finally:
            os.umask(before)
        assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == mode


def test_saving_to_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*absent; create it"):
        save_potential(tmp_path / "absent" / "x.safetensors", build(), {})


def test_an_element_without_reference_energy_is_refused():
    potential = Potential(charges=PQEq(), reference_energies={1: -3.5})
    with pytest.raises(InputError, match="no reference energy for O: it knows H"):
        potential(Systems.from_atoms(water_box()))


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
