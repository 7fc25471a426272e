"""Settings: what is accepted, and that every mistake is one sentence with place, key, value and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltpi.driver.settings import Settings, load_settings
from voltpi.potential.errors import InputError

# every key of the contract that is valid together with the others
EVERYTHING = """
model: none
short_range:
  pair:
    set: nacl
    born_mayer_huggins: {Li-O: {A: 0.1, rho: 0.3, sigma: 2.5, C: 1, D: 0}}
    buckingham: {Si-O: {A: 18003.8, rho: 0.2052, C: 133.5}}
    born_mayer: {O-O: {A: 1388.8, rho: 0.3623}}
    lennard_jones: {O: {epsilon: 6.7e-3, sigma: 3.17}, O-Na: {epsilon: 0.005, sigma: 2.9}}
    mixing: geometric
    zbl: true
    cutoff: 9
dispersion: {functional: pbe, damping: bj}
charges:
  model: pqeq
  parameters: default
  net_charge: 1
  limiter: fene
  shell_limit: 0.25
  conserve: fragments
  response: shells
  carried: auto
  fragments: [0, 0, 1]
coulomb:
  method: pme
  boundary: slab-z
  accuracy: 1e-6
  coulomb_constant: 14.399645
field: [0, 0.1, 0]
displacement: [null, null, 0.1]
electrodes:
  - {name: left, atoms: "element Au and z < 10", potential: -0.5, eta: 1.8, hardness: 0, thomas_fermi: 0.5,
     atom_volume: 16.9, chi: 0.1}
  - {name: right, atoms: [3, 4], charge: 0.5, polarizable: true}
device: cuda:1
precision: double
output: {charges: true, shells: true, born_charges: true, polarizability: true, smallest_curvature: true}
"""
# and the others
OTHERS = """
charges: {model: fixed, net_charge: 1, values: q, width: {O: 1.2}}
coulomb: {boundary: auto}
"""
TAPER = "coulomb: {method: taper, taper: {cutoff: 12.5, iterations: 2, clamp: 0.25, cut: sites}}"


def write(folder: Path, text: str) -> Path:
    path = folder / "s.yaml"
    path.write_text(text)
    return path


def test_every_key_of_the_contract_is_read(tmp_path: Path) -> None:
    s = load_settings(write(tmp_path, EVERYTHING))
    assert s.coulomb.accuracy == 1e-6  # YAML 1.1 reads 1e-6 as text
    assert s.displacement == (None, None, 0.1)
    assert s.electrodes[1].atoms == (3, 4)
    assert s.electrodes[0].potential == -0.5
    assert s.charges.fragments == (0, 0, 1)
    assert (s.electrodes[0].atom_volume, s.electrodes[1].polarizable, s.output.shells) == (16.9, True, True)
    taper = load_settings(write(tmp_path, TAPER)).coulomb.taper
    assert taper is not None
    assert (taper.cutoff, taper.cut) == (12.5, "sites")
    fixed = load_settings(write(tmp_path, OTHERS)).charges
    assert (fixed.model, fixed.values, fixed.width) == ("fixed", "q", {"O": 1.2})
    assert s.short_range is not None
    pair = s.short_range.pair
    assert pair is not None
    assert (pair.set, pair.mixing, pair.zbl, pair.cutoff) == ("nacl", "geometric", True, 9.0)
    assert pair.lennard_jones["O"].epsilon == 6.7e-3
    assert pair.buckingham["Si-O"].C == 133.5


def test_defaults_are_those_of_the_contract() -> None:
    s = Settings()
    assert (s.model, s.short_range, s.dispersion, s.field) == ("none", None, None, (0.0, 0.0, 0.0))
    assert (s.charges.model, s.charges.conserve, s.charges.response) == ("pqeq", "total", "shells")
    assert (s.charges.limiter, s.charges.shell_limit) == ("fene", 0.25)
    assert (s.coulomb.method, s.coulomb.boundary, s.coulomb.accuracy) == ("auto", "auto", 1e-6)
    assert (s.device, s.precision) == ("auto", "mixed")
    assert (s.output.charges, s.output.shells, s.output.born_charges) == (True, False, False)
    assert (s.output.polarizability, s.output.smallest_curvature) == (False, False)
    assert s.given() == {}


def test_only_what_was_given_counts_as_given(tmp_path: Path) -> None:
    s = load_settings(write(tmp_path, "model: water\ncharges: {conserve: total}\n"), ["coulomb.accuracy=1e-5"])
    assert s.given() == {"model": "water", "charges.conserve": "total", "coulomb.accuracy": 1e-5}
    assert s.where("charges.conserve").endswith("s.yaml, line 2")
    assert s.where("coulomb.accuracy") == "--set coulomb.accuracy=1e-5"


def test_none_written_out_is_the_same_as_absent(tmp_path: Path) -> None:
    s = load_settings(write(tmp_path, "short_range: none\ndispersion: none\ndisplacement: null\nelectrodes: []\n"))
    assert (s.short_range, s.dispersion, s.displacement, s.electrodes) == (None, None, None, ())


def test_assignments_override_and_open_what_was_off(tmp_path: Path) -> None:
    path = write(tmp_path, "field: [0, 0, 1]\ndispersion: none\nelectrodes: [{name: a, atoms: [0], potential: 1}]\n")
    s = load_settings(path, ["field=[0,0,0.2]", "dispersion.damping=bj", "electrodes.0.potential=2"])
    assert s.field == (0, 0, 0.2)
    assert s.dispersion is not None
    assert s.dispersion.damping == "bj"
    assert s.electrodes[0].potential == 2
    same = load_settings(path, {"field": "[0, 0, 0.2]", "dispersion": {"damping": "bj"}, "electrodes.0.potential": 2.0})
    assert same.model_dump() == s.model_dump()


def test_a_mapping_of_overrides_is_not_changed() -> None:
    overrides = {"charges": {"model": "pqeq"}, "charges.model": "qeq"}
    assert load_settings(overrides=overrides).charges.model == "qeq"
    assert overrides == {"charges": {"model": "pqeq"}, "charges.model": "qeq"}


def test_paths_in_a_file_are_relative_to_the_file(tmp_path: Path) -> None:
    s = load_settings(write(tmp_path, "model: ./mine.safetensors\ncharges: {parameters: table.csv}\n"))
    assert Path(s.model) == tmp_path / "mine.safetensors"
    assert Path(s.charges.parameters) == tmp_path / "table.csv"
    assert load_settings(write(tmp_path, "model: water\n")).model == "water"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("modle: water\n", 1, ["unknown key modle", "did you mean model?"]),
        ("model: water\ncharges:\n  conserv: total\n", 3, ["unknown key charges.conserv", "charges.conserve?"]),
        ("accuracy: 1.0e-6\n", 1, ["unknown key accuracy", "did you mean coulomb.accuracy?"]),
        ("zzz: 1\n", 1, ["unknown key zzz", "the keys here are model, short_range"]),
        ("charges:\n  model: pqe\n", 2, ["charges.model is 'pqe'", "did you mean pqeq?"]),
        ("charges: {limiter: hard}\n", 1, ["charges.limiter is 'hard'", "fene | none"]),
        ("charges: pqeq\n", 1, ["charges is 'pqeq'", "keys and values"]),
        ("coulomb:\n  accuracy: -1.0e-6\n", 2, ["coulomb.accuracy", "greater than"]),
        ("coulomb:\n  accuracy: high\n", 2, ["coulomb.accuracy is 'high'", "expected a number"]),
        ("charges: {net_charge: true}\n", 1, ["charges.net_charge is True", "expected a number"]),
        ("charges: {net_charge: .nan}\n", 1, ["finite"]),
        ("charges: {shell_limit: 0}\n", 1, ["charges.shell_limit is 0", "greater than 0"]),
        ("charges: {carried: [0.1, x]}\n", 1, ["charges.carried", "expected a number"]),
        ("charges: {fragments: [0.5, 1]}\n", 1, ["charges.fragments", "integers"]),
        ("field: [0, 0]\n", 1, ["field is [0, 0]", "three numbers (V/Å)"]),
        ("field: 0.1 V/A\n", 1, ["field is '0.1 V/A'", "three numbers"]),
        ("device: gpu\n", 1, ["device is 'gpu'", "cuda:n"]),
        ("output: {charges: maybe}\n", 1, ["output.charges is 'maybe'", "boolean"]),
        ("short_range: foo\n", 1, ["short_range is 'foo'", "pair, foundation"]),
        ("model: water\nshort_range: none\n", 2, ["short_range cannot be combined with model water"]),
        ("charges:\n  model: none\n  net_charge: 1\n", 3, ["charges.net_charge has no meaning with", "remove"]),
        ("charges: {model: none}\ncoulomb: {accuracy: 1.0e-5}\n", 2, ["coulomb.accuracy has no meaning with"]),
        ("short_range: {pair: {zbl: true}, foundation: qet:x}\n", 1, ["exactly one of pair and foundation"]),
        ("short_range: {pair: {}}\n", 1, ["short_range.pair: give at least one of set, born_mayer_huggins"]),
        ("short_range:\n  pair: {set: nafl}\n", 2, ["short_range.pair.set is 'nafl'", "nacl | licl | kcl"]),
        ("short_range:\n  pair: {zbl: true, cutof: 8}\n", 2, ["unknown key", "short_range.pair.cutoff?"]),
        ("short_range:\n  pair: {zbl: true, cutoff: 0}\n", 2, ["short_range.pair.cutoff is 0", "greater than 0"]),
        ("short_range:\n  pair: {zbl: true, mixing: geometric}\n", 2, ["mixing belongs to lennard_jones"]),
        (
            "short_range:\n  pair:\n    buckingham:\n      O-O: {A: 1, rho: 1}\n",
            4,
            ["short_range.pair.buckingham.O-O.C is missing"],
        ),
        (
            "short_range:\n  pair:\n    born_mayer:\n      O-O: {A: 1, Rho: 1}\n",
            4,
            ["short_range.pair.born_mayer.O-O is", "unknown key Rho; the keys here are A, rho"],
        ),
        (
            "short_range:\n  pair:\n    lennard_jones:\n      O:\n        epsilon: x\n        sigma: 1\n",
            5,
            ["short_range.pair.lennard_jones.O.epsilon is 'x'", "expected a number"],
        ),
        ("dispersion: {dampin: bj}\n", 1, ["unknown key dispersion.dampin", "dispersion.damping?"]),
        (
            "electrodes:\n- {name: a, atoms: [0], potental: 1}\n",
            2,
            ["did you mean electrodes.0.potential?"],
        ),
        ("electrodes:\n- {name: a, atoms: [0], potential: 1, charge: 1}\n", 2, ["exactly one of potential"]),
        ("electrodes:\n- {atoms: [0], potential: 1}\n", 2, ["electrodes.0.name is missing"]),
        ("electrodes:\n- {name: a, atoms: [-1], potential: 1}\n", 2, ["electrodes.0.atoms", "indices from 0"]),
        ("field: [0, 0, 0]\nfield: [0, 0, 1]\n", 2, ["field is given twice"]),
        ("charges:\n model: [\n", 3, ["not valid YAML"]),
        ("- model\n", 1, ["expected 'key: value' pairs"]),
    ],
)
def test_mistakes_are_one_sentence_with_the_line(tmp_path: Path, text: str, line: int, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as raised:
        load_settings(path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: water\nshort_range: {foundation: chgnet}\n", ["short_range cannot be combined with model water"]),
        ("field: [0, 0, 1]\ndisplacement: [null, null, 0.1]\n", ["displacement and field are both set along z"]),
        ("field: from-frame\ndisplacement: [null, null, 0.1]\n", ["excludes field: from-frame"]),
        ("charges: {width: {O: 1}}\n", ["charges.width belongs to charges.model: fixed"]),
        ("charges: {limiter: none, shell_limit: 0.3}\n", ["charges.shell_limit has no meaning"]),
        ("charges: {response: all, carried: q}\n", ["charges.carried belongs to"]),
        ("coulomb: {taper: {cutoff: 10}}\n", ["coulomb.taper needs coulomb.method: taper"]),
        ("coulomb: {method: direct, boundary: periodic}\n", ["direct is for open boundaries"]),
        ("coulomb: {method: ewald, boundary: open}\n", ["needs a periodic boundary"]),
        ("charges: {model: none}\nfield: [0, 0, 0.1]\n", ["a field needs charges"]),
        ("charges: {model: none}\noutput: {born_charges: true}\n", ["output.born_charges needs charges"]),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        load_settings(write(tmp_path, text))
    message = str(raised.value)
    assert "s.yaml, line" in message
    for word in words:
        assert word in message


def test_displacement_and_field_in_different_directions_are_allowed(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, "field: [0.1, 0, 0]\ndisplacement: [null, null, 0.1]\n"))
    assert settings.displacement is not None
    assert list(settings.displacement) == [None, None, 0.1]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("charges.modl=qeq", "unknown key charges.modl; did you mean charges.model?"),
        ("charges", "expected key=value"),
        ("field=[0,", "is not a value"),
        ("=3", "is not a key"),
        ("charges.model.x=1", "there is no x in charges.model"),
        ("electrodes.0.name=a", "electrodes"),
    ],
)
def test_wrong_assignments_name_themselves(tmp_path: Path, assignment: str, words: str) -> None:
    path = write(tmp_path, "charges: {model: pqeq}\n")
    with pytest.raises(InputError, match="--set") as raised:
        load_settings(path, [assignment])
    assert words in str(raised.value)


def test_the_number_of_further_mistakes_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(and 1 more mistake\)"):
        load_settings(write(tmp_path, "foo: 1\nbar: 2\n"))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such settings file"):
        load_settings(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="cannot be read as text"):
        load_settings(tmp_path / "binary.yaml")
    with pytest.raises(InputError, match="cannot be read as text"):
        load_settings(tmp_path)
