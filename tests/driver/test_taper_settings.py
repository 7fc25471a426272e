"""coulomb.method: taper through settings and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from voltpi.driver.build import build_potential
from voltpi.driver.cli import main
from voltpi.driver.settings import load_settings
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import InputError

TAPER = {"coulomb.method": "taper"}
# ReaxNet's published code: water in a 40 Å box, two iterations, eV
PUBLISHED = -0.743365396638886
WATER = [
    [20.075695779203055, 19.59154677792692, 20.22968571806642],
    [19.4615310807888, 19.864776184779434, 19.53235824187267],
    [20.538468919211198, 20.40845322207308, 20.467641758127332],
]


def charges(**settings: Any) -> TaperedPQEq:
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    model = build_potential(load_settings(overrides={**TAPER, **keys})).charges
    assert isinstance(model, TaperedPQEq)
    return model


def test_settings_make_the_model() -> None:
    default = charges()
    assert (default.cutoff, default.iterations, default.clamp) == (12.5, 2, 0.25)
    assert default.coulomb_constant == COULOMB_CONSTANT
    assert default.response == "shells"
    own = charges(
        coulomb__taper={"cutoff": 8, "iterations": 5, "clamp": 0.1},
        coulomb__coulomb_constant=14.399645,
        charges__response="all",
        charges__model="qeq",
    )
    assert (own.cutoff, own.iterations, own.clamp, own.coulomb_constant) == (8, 5, 0.1, 14.399645)
    assert own.response == "all"
    assert all(row.Z == 0 for row in own.parameters.values())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"charges.limiter": "fene"}, "charges.limiter has no meaning with coulomb.method: taper"),
        ({"charges.shell_limit": 0.2}, "charges.shell_limit has no meaning with coulomb.method: taper"),
        ({"coulomb.accuracy": 1e-6}, "coulomb.accuracy has no meaning with coulomb.method: taper"),
        ({"charges.conserve": "fragments"}, "charges.conserve: fragments is not available with coulomb.method: taper"),
        ({"output.born_charges": True}, "output.born_charges needs stationary charges"),
        ({"output.polarizability": True}, "output.polarizability needs stationary charges"),
        ({"model": "water"}, "coulomb.method: taper contradicts model water"),
    ],
)
def test_what_the_tapered_sum_does_not_have_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_potential(load_settings(overrides={**TAPER, **keys}))


def test_evaluate_gives_the_published_energy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.xyz"
    write(path, Atoms("OHH", WATER, cell=[40, 40, 40], pbc=True), format="extxyz", write_results=False)
    constant = "coulomb.coulomb_constant=14.399645"
    assert main(["evaluate", str(path), "--json", "--set", "coulomb.method=taper", "--set", constant]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    answer = json.loads(line)
    assert answer["energy"] == pytest.approx(PUBLISHED, rel=1e-7)
    assert answer["iterations"] == 2
    assert answer["residual"] == pytest.approx(6.15e-3, rel=1e-2)  # not stationary after two iterations, and said so
    assert np.abs(np.sum(answer["forces"], axis=0)).max() < 1e-12
