"""ReaxNet checkpoints: the published numbers through the command line, and files that must be refused.

The checkpoints in ``data/reaxnet_*`` have random weights; ``data/make_reaxnet.py`` made them and their answers with the
published network (jax-md).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
import yaml
from ase.io import write

from voltpi.driver.build import build_potential
from voltpi.driver.cli import main
from voltpi.driver.settings import load_settings
from voltpi.potential.array_pickle import read_array_pickle
from voltpi.potential.checkpoints import load_potential, read_card, read_description
from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import InputError
from voltpi.potential.reaxnet import import_reaxnet
from voltpi.potential.systems import Systems

DATA = Path(__file__).parent / "data"
REFERENCE = os.environ.get("VOLTPI_REFERENCE")
NAMES = ["reaxnet_even", "reaxnet_odd", "reaxnet_no_sc"]


def answers(name: str = "reaxnet_even") -> dict[str, Any]:
    return json.loads((DATA / name / "answers.json").read_text())


def structure(name: str = "reaxnet_even") -> ase.Atoms:
    data = answers(name)
    return ase.Atoms(data["symbols"], data["positions"], cell=data["cell"], pbc=True)


def evaluated(path: Path, atoms: ase.Atoms, capsys: pytest.CaptureFixture[str], *settings: str) -> dict[str, Any]:
    """What ``voltpi evaluate`` prints for a model file."""
    file = path.with_suffix(".traj")  # all digits
    write(file, atoms)
    options = [word for s in (f"model={path}", *settings) for word in ("--set", s)]
    status = main(["evaluate", str(file), "--json", *options])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "whole.safetensors"
    assert main(["import-reaxnet", str(DATA / "reaxnet_even"), "--out", str(path)]) == 0
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to be broken."""
    return Path(shutil.copytree(DATA / "reaxnet_even", tmp_path / "broken"))


# -- the published numbers --------------------------------------------------------------------------------------------


def assert_equal(record: dict[str, Any], energy: float, forces: Any, tolerance: float) -> None:
    assert record["energy"] == pytest.approx(energy, rel=tolerance)
    assert np.abs(np.array(record["forces"]) - forces).max() < tolerance * np.abs(forces).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", ["training", "inference"])
def test_evaluate_gives_the_published_numbers(
    name: str, sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.safetensors"
    options = ["--charges", "none", "--dispersion", "none", *(["--inference-sign"] if sign == "inference" else [])]
    assert main(["import-reaxnet", str(DATA / name), "--out", str(path), *options]) == 0
    assert f"{path} is ready: imported ReaxNet checkpoint: NequIP, for H, Li, O" in capsys.readouterr().out
    expected = answers(name)[sign]
    for precision, tolerance in (("double", 1e-10), ("mixed", 1e-5), ("single", 1e-5)):
        record = evaluated(path, structure(name), capsys, f"precision={precision}")
        assert_equal(record, expected["energy"], expected["forces"], tolerance)
        assert list(record["energy_terms"]) == ["short_range"]


def test_the_sign_of_edge_vectors_shows_in_the_answers() -> None:
    """Otherwise the tests above could not tell the two apart."""
    even, odd = answers("reaxnet_even"), answers("reaxnet_odd")
    assert abs(even["training"]["energy"] - even["inference"]["energy"]) > 1e-4
    assert odd["training"]["energy"] == pytest.approx(odd["inference"]["energy"], rel=1e-12)


@pytest.mark.skipif(REFERENCE is None, reason="VOLTPI_REFERENCE names no folder with reaxnet_nequip/")
@pytest.mark.parametrize("model", ["nequip_small", "nequip_l2"])
@pytest.mark.parametrize("parameters", ["params", "params_amp"])
def test_the_reference_checkpoints(
    model: str, parameters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert REFERENCE is not None
    reference = Path(REFERENCE) / "reaxnet_nequip"
    source = tmp_path / "checkpoint"
    source.mkdir()
    shutil.copyfile(reference / model / f"{parameters}.pickle", source / "params.pickle")
    for file in ("mapping.yaml", "model_config.yaml"):
        shutil.copyfile(reference / model / file, source / file)
    path = tmp_path / "net.safetensors"
    assert main(["import-reaxnet", str(source), "--out", str(path), "--charges", "none", "--dispersion", "none"]) == 0
    capsys.readouterr()
    for name in ("lipon24", "v4zn4o8"):
        data = json.loads((reference / f"nequip_structures_{name}.json").read_text())
        atoms = ase.Atoms(data["numbers"], data["positions"], cell=data["cell"], pbc=data["pbc"])
        amplified = "amp_" if parameters == "params_amp" else ""
        with np.load(reference / model / f"ref_f64_{amplified}{name}.npz") as numbers:
            energy, forces = float(numbers["energy"].sum()), numbers["forces"]
        for precision, tolerance in (("double", 1e-10), ("mixed", 1e-5)):
            assert_equal(evaluated(path, atoms, capsys, f"precision={precision}"), energy, forces, tolerance)


# -- the whole model --------------------------------------------------------------------------------------------------


def test_the_whole_model_is_the_sum_of_its_parts(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atoms = structure()
    record = evaluated(whole, atoms, capsys, "precision=double")
    systems = Systems.from_atoms(atoms)
    net, _ = import_reaxnet(DATA / "reaxnet_even", charges="none", dispersion="none")
    alone = net(systems)
    charged = TaperedPQEq(coulomb_constant=14.399645).solve(systems)
    d3, d3_forces, d3_virial = D3("pbe", "zero", cutoff=12.5, cn_cutoff=12.5, smoothing_width=0.0)(systems)
    assert abs(float(d3)) > 1e-2
    assert abs(float(charged.energy)) > 1e-2
    assert record["energy"] == pytest.approx(float(alone.energy + charged.energy + d3), rel=1e-12)
    forces = (alone.forces + charged.forces + d3_forces).numpy()
    np.testing.assert_allclose(record["forces"], forces, rtol=0, atol=1e-11)
    virial = (alone.virial + charged.virial + d3_virial)[0].numpy()
    np.testing.assert_allclose(record["stress"], -virial / atoms.get_volume(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(record["charges"], charged.charges.numpy(), rtol=0, atol=1e-12)
    assert record["iterations"] == 2


def test_forces_of_the_whole_model_are_the_finite_differences_of_its_energy(whole: Path) -> None:
    potential = load_potential(whole, precision="double")
    systems = potential.prepare(Systems.from_atoms(structure()))
    direction = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def energy(step: float) -> float:
        return float(potential(systems.replace(positions=systems.positions + step * direction)).energy)

    h = 1e-5  # so short that no pair crosses the hard cutoff of D3
    slope = (8 * (energy(h) - energy(-h)) - (energy(2 * h) - energy(-2 * h))) / (12 * h)
    assert slope == pytest.approx(-float((potential(systems).forces * direction).sum()), rel=1e-7)


def test_parts_by_choice(tmp_path: Path) -> None:
    potential, card = import_reaxnet(DATA / "reaxnet_even", charges="pqeq", dispersion="none")
    assert isinstance(potential.charges, PQEq)
    assert potential.dispersion is None
    assert "PQEq (whole Coulomb sum, stationary charges)" in card["summary"]
    with pytest.raises(InputError, match=r"charges is 'exact': choose taper \| pqeq \| none"):
        import_reaxnet(DATA / "reaxnet_even", charges="exact")
    with pytest.raises(InputError, match=r"dispersion is 'bj': choose d3 \| none"):
        import_reaxnet(DATA / "reaxnet_even", dispersion="bj")


def test_the_file_says_what_it_is(whole: Path) -> None:
    card, charges = read_card(whole), read_description(whole)["charges"]
    assert card["name"] == "reaxnet_even"
    assert card["origin"]["edge_vectors"] == "as in training (neighbour - atom)"
    assert len(card["origin"]["sha256"]["params.pickle"]) == 64
    settings = {"kind": "taper", "cutoff": 12.5, "iterations": 2, "clamp": 0.25, "coulomb_constant": 14.399645}
    assert settings.items() <= charges.items()
    assert whole.stat().st_size < 40_000  # float32 weights stay that, beside a shift in float64
    network = read_description(whole)["short_range"]["config"]
    assert network["shift"] == [-0.35] * 4


def test_an_existing_file_is_not_overwritten(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = whole.read_bytes()
    assert main(["import-reaxnet", str(DATA / "reaxnet_odd"), "--out", str(whole)]) == 2
    assert "exists already; remove it, or give another file with --out" in capsys.readouterr().err
    assert whole.read_bytes() == before


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"coulomb.method": "pme"}, "coulomb.method: pme contradicts model whole.safetensors"),
        (
            {"coulomb.method": "taper", "coulomb.taper": {"iterations": 3}},
            "coulomb.taper.iterations: 3 contradicts model whole.safetensors, which was trained with 2",
        ),
        ({"coulomb.coulomb_constant": "codata"}, "coulomb.coulomb_constant: codata contradicts"),
        ({"charges.model": "none"}, "charges.model: none contradicts"),
        ({"charges.response": "all"}, "charges.response: all contradicts"),
        ({"charges.conserve": "fragments"}, "is tapered: charges.conserve: fragments is not available.*--charges pqeq"),
        ({"charges.shell_limit": 0.2}, "is tapered: charges.shell_limit has no meaning"),
        ({"coulomb.accuracy": 1e-5}, "is tapered: coulomb.accuracy has no meaning"),
        ({"output.born_charges": True}, "is tapered: output.born_charges needs stationary charges.*--charges pqeq"),
        ({"dispersion": "none"}, "dispersion: None contradicts"),
        ({"dispersion": {"damping": "bj"}}, "dispersion.damping: bj contradicts"),
        (
            {"electrodes": [{"name": "left", "atoms": "element Li", "potential": 0.5, "eta": 1.0}]},
            "electrodes need the whole Coulomb sum",
        ),
    ],
)
def test_settings_against_the_model_are_refused(whole: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_potential(load_settings(overrides={"model": str(whole), **keys}))


def test_settings_that_agree_with_the_model_are_accepted(whole: Path) -> None:
    agreeing = {"coulomb.method": "taper", "coulomb.taper": {"cutoff": 12.5}, "charges.model": "pqeq"}
    charges = build_potential(load_settings(overrides={"model": str(whole), **agreeing})).charges
    assert isinstance(charges, TaperedPQEq)


# -- files that cannot be used ----------------------------------------------------------------------------------------


def refused(folder: Path, *parts: str) -> str:
    """The one sentence with which a checkpoint is refused; it contains ``parts``."""
    with pytest.raises(InputError) as caught:
        import_reaxnet(folder)
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence
    return sentence


@pytest.mark.parametrize("name", ["params.pickle", "model_config.yaml", "mapping.yaml"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"there is no file {name}; give the folder of a ReaxNet checkpoint")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"nonlinearities": {"e": "swish", "o": "tanh"}},
            "nonlinearities is {'e': 'swish', 'o': 'tanh'}; give {e: raw_swish",
        ),
        ({"nonlinearities": "raw_swish"}, "nonlinearities is 'raw_swish'"),
        ({"radial_net_nonlinearity": "swish"}, "radial_net_nonlinearity is 'swish'; give raw_swish"),
        ({"graph_net_steps": 4}, "holds 3 convolutions but graph_net_steps in model_config.yaml is 4"),
        ({"graph_net_steps": 2.5}, "graph_net_steps is 2.5; give a whole number"),
        ({"n_elements": 5}, "names 3 elements but n_elements in model_config.yaml is 5"),
        ({"r_max": "wide"}, "r_max is 'wide'; give a number"),
        ({"r_max": 0.3}, "a cutoff above"),
        ({"n_neighbors": -1}, "n_neighbors is -1; give a positive number"),
        ({"shift": float("nan")}, "shift is nan; give a number"),
        ({"use_sc": "yes"}, "use_sc is 'yes'; give true or false"),
        ({"use_sc": False}, "FullyConnectedTensorProductE3nn_0/w[0,0,0] 4x0e,4x0e,8x0e, which the network"),
        ({"hidden_irreps": "8x0e + 2x1e + 2x2e"}, "Linear_0/w[0,0] 4x0e,4x0e has shape (4, 4) where model_config.yaml"),
        ({"hidden_irreps": "4x0e + 3x1e + 2x2e"}, "has shape"),
        ({"hidden_irreps": "2x0e + 2x0e"}, "hidden_irreps is '2x0e + 2x0e'; give each irrep once"),
        ({"hidden_irreps": "wide"}, "hidden_irreps is 'wide'; give irreps such as"),
        ({"sh_irreps": "1x0e+1x1e"}, "has shape"),
        ({"num_basis": 5}, "NequIPConvolution_0/MLP_0/Dense_0/kernel has shape (4, 6)"),
        ({"radial_net_n_layers": 1}, "NequIPConvolution_0/MLP_0/Dense_1/kernel has shape"),
        ({"radial_net_n_layers": 3}, "Dense_2/kernel has shape"),
        ({"dropout": 0.1}, "dropout is no key of a ReaxNet network; remove it"),
        ({"use_sc": None}, "use_sc is None"),
        ({"hidden_irreps": ...}, "hidden_irreps is missing"),
    ],
)
def test_wrong_configurations_are_named(folder: Path, changes: dict[str, Any], words: str) -> None:
    path = folder / "model_config.yaml"
    config = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.dump({key: value for key, value in config.items() if value is not ...}))
    refused(folder, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1: 1\n3: 2\n", "names 2 elements but n_elements in model_config.yaml is 4"),
        ("1: 1\n3: 3\n8: 2\n", "Li (3) has row 3 but is element 2 by rising atomic number"),
        ("H: 1\n3: 2\n8: 3\n", "'H' is no atomic number"),
        ("1: one\n3: 2\n8: 3\n", "1 has the row 'one'"),
        ("1: 1\n3: 2\n900: 3\n", "900 is no atomic number"),
        ("1: [1\n", "not readable as plain YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not readable as plain YAML"),
        ("", "it is no mapping"),
    ],
)
def test_wrong_mappings_are_named(folder: Path, text: str, words: str) -> None:
    (folder / "mapping.yaml").write_text(text)
    refused(folder, "mapping.yaml", words)


def test_an_element_without_pqeq_parameters_is_named(folder: Path) -> None:
    (folder / "mapping.yaml").write_text("1: 1\n3: 2\n103: 3\n")
    refused(folder, "PQEq has no parameters for Lr; import with charges: none")
    import_reaxnet(folder, charges="none")


def short_text(text: str) -> bytes:
    return b"\x8c" + struct.pack("<B", len(text)) + text.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Opcodes that call ``module.name`` with arguments that are opcodes themselves."""
    return short_text(module) + short_text(name) + b"\x93(" + b"".join(arguments) + b"tR"


def as_pickle(value: bytes) -> bytes:
    """A checkpoint whose one weight is made by these opcodes."""
    return b"\x80\x04}" + short_text("params") + b"}" + short_text("w") + value + b"ss."


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_arrays_of_numpy_are_read(tmp_path: Path, protocol: int, order: Any, dtype: str) -> None:
    array = np.arange(6.0).reshape(2, 3).astype(dtype, order=order)
    path = tmp_path / "params.pickle"
    path.write_bytes(pickle.dumps({"params": {"a": {"w": array, "v": array[0]}}}, protocol=protocol))
    read = read_array_pickle(path)
    assert list(read) == ["params/a/w", "params/a/v"]
    np.testing.assert_array_equal(read["params/a/w"], array)
    np.testing.assert_array_equal(read["params/a/v"], array[0])


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_both_names_of_numpys_core_are_known(folder: Path, core: str) -> None:
    """Pickles of numpy 1 and 2."""
    path = folder / "params.pickle"
    before = read_array_pickle(path)
    theirs, ours = short_text("numpy._core.multiarray"), short_text(f"{core}.multiarray")
    data = path.read_bytes()
    assert theirs in data
    # the frame's length is not checked, as nothing is read through it
    path.write_bytes(data.replace(theirs, ours))
    after = read_array_pickle(path)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


TOUCH = short_text("touch PROOF")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (call("os", "system", TOUCH), "asks for 'os.system'"),
        (call("posix", "system", TOUCH), "asks for 'posix.system'"),
        (call("builtins", "eval", short_text("open('PROOF', 'w')")), "asks for 'builtins.eval'"),
        (call("builtins", "getattr", TOUCH, TOUCH), "asks for 'builtins.getattr'"),
        (call("numpy", "save", TOUCH, b"K\x00"), "asks for 'numpy.save'"),
        (call("numpy", "ndarray.tofile", TOUCH), "asks for 'numpy.ndarray.tofile'"),
        (call("numpy", "load", TOUCH), "asks for 'numpy.load'"),
        (call("numpy.core.multiarray", "_reconstruct.__globals__"), "asks for"),
        (call("jax._src.array", "_reconstruct_array.__class__"), "asks for"),
        (call("numpy", "ndarray", b"K\x03"), "calls numpy.ndarray"),
        (call("numpy", "dtype", short_text("O8"), b"\x89", b"\x88"), "dtype 'O8'"),
        (call("ml_dtypes", "bfloat16"), "asks for 'ml_dtypes.bfloat16'"),
        (call("flax.core.frozen_dict", "FrozenDict", b"}"), "asks for 'flax.core.frozen_dict.FrozenDict'"),
        (b"cos\nsystem\n(" + TOUCH + b"tR", "asks for 'os.system'"),
        (b"(" + TOUCH + b"ios\nsystem\n", "uses the opcode INST"),
        (short_text("os") + short_text("system") + b"\x93(" + TOUCH + b"t\x81", "asks for 'os.system'"),
        (short_text("numpy") + short_text("ndarray") + b"\x93(K\x03t\x81", "uses the opcode NEWOBJ"),
        (short_text("numpy") + short_text("ndarray") + b"\x93}b", "sets the state of a _Global"),
        (short_text("numpy") + short_text("ndarray") + b"\x93", "holds a Global"),
        (b"Pfile\n", "uses the opcode PERSID"),
        (TOUCH + b"Q", "uses the opcode BINPERSID"),
        (b"\x82\x01", "uses the opcode EXT1"),
        (b"]", "uses the opcode EMPTY_LIST"),
        (b"K\x03", "holds a int that is no array at 'params/w'"),
        (b"}\x94" + short_text("x") + b"h\x00s", "uses a dictionary twice"),
        (call("numpy._core.multiarray", "_reconstruct", call("os", "getcwd"), b")", b"C\x01b"), "asks for 'os.getcwd'"),
    ],
)
def test_what_is_no_array_is_refused_and_nothing_is_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: bytes, words: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "params.pickle").write_bytes(as_pickle(value))
    refused(folder, "params.pickle: refused, because it", words, "nothing of it was carried out")
    assert not Path("PROOF").exists()


def test_the_refused_pickles_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself obeys the first of them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(as_pickle(call("os", "system", TOUCH)))
    assert Path("PROOF").exists()


def test_a_truncated_pickle_is_refused_wherever_it_ends(folder: Path) -> None:
    path = folder / "params.pickle"
    data = path.read_bytes()
    for end in (*range(0, 400, 7), len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        refused(folder, "params.pickle: cut short, damaged or no pickle")


def is_refused(path: Path) -> bool:
    """Whether the pickle is refused, which is always done in a sentence that names it."""
    try:
        read_array_pickle(path)
    except InputError as error:
        return str(error).startswith((f"{path}: refused", f"{path}: cut short")) or pytest.fail(str(error))
    return False


def test_damaged_pickles_are_refused_or_still_arrays(folder: Path) -> None:
    """No change of a byte makes anything else than a sentence."""
    path = folder / "params.pickle"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for place in rng.choice(800, 300, replace=False):
        changed = bytearray(data)
        changed[place] = rng.integers(256)
        path.write_bytes(changed)
        refusals += is_refused(path)
    assert refusals > 50


def test_text_is_no_pickle(folder: Path) -> None:
    (folder / "params.pickle").write_text("hello")
    refused(folder, "cut short, damaged or no pickle")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("Linear_0"), "Linear_0 has no weights for 0e"),
        (lambda p: p["NequIPConvolution_1"].pop("MLP_0"), "NequIPConvolution_1/MLP_0/Dense_0/kernel is missing"),
        (lambda p: p.pop("NequIPConvolution_2"), "it holds 2 convolutions but graph_net_steps"),
        (
            lambda p: p.update(Linear_3={"w[0,0] 1x0e,1x0e": np.ones((1, 1), "f4")}),
            "it holds Linear_3/w[0,0] 1x0e,1x0e",
        ),
        (
            lambda p: p["NequIPConvolution_1"]["MLP_0"]["Dense_0"].update(bias=np.ones(6, "f4")),
            "it holds NequIPConvolution_1/MLP_0/Dense_0/bias, which the network",
        ),
        (
            lambda p: p["BesselEmbedding_0"].update(frequencies=np.ones(5, "f4")),
            "BesselEmbedding_0/frequencies has shape (5,) where model_config.yaml asks for (4,)",
        ),
        (
            lambda p: p["BesselEmbedding_0"].update(frequencies=np.full(4, np.nan, "f4")),
            "BesselEmbedding_0/frequencies has values that are not finite",
        ),
    ],
)
def test_wrong_weights_are_named(folder: Path, change: Any, words: str) -> None:
    path = folder / "params.pickle"
    tree: dict[str, Any] = {}
    for key, values in read_array_pickle(path).items():
        *modules, name = key.split("/")
        place = tree
        for module in modules:
            place = place.setdefault(module, {})
        place[name] = values
    path.write_bytes(pickle.dumps(tree))
    import_reaxnet(folder)
    path.write_bytes(pickle.dumps({**tree, "step": np.ones(1)}))
    refused(folder, "it holds 'step' beside 'params'")
    change(tree["params"])
    path.write_bytes(pickle.dumps(tree))
    refused(folder, "params.pickle", words)
