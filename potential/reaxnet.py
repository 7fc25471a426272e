"""ReaxNet checkpoints (params.pickle, model_config.yaml, mapping.yaml) as whole models of ours.

A ReaxNet model (Gao et al., Nat. Commun. 16, 10484 (2025)) is NequIP + PQEq + D3. The checkpoint holds the network; the
settings of PQEq and D3 stand in the published code and are the same for every checkpoint. The pickle is parsed, not
unpickled (:mod:`voltpi.potential.array_pickle`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ase.data import chemical_symbols
from e3nn import o3
from numpy.typing import NDArray
from torch import Tensor

from voltpi.potential.array_pickle import read_array_pickle
from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.elements import read_parameters
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.nequip import NequIP

__all__ = ["ReaxNetCheckpoint", "import_reaxnet", "read_reaxnet", "reaxnet_network"]

COULOMB_CONSTANT = 14.399645
"""eV Å/e², in the energy of the published code."""
CUTOFF = 12.5
"""Å, of the published PQEq and D3."""

_FILES = ("params.pickle", "model_config.yaml", "mapping.yaml")
_SCALAR = o3.Irrep("0e")
_SWISH = ("raw_swish", "silu")
_WEIGHT = re.compile(r"w\[(\d+(?:,\d+)*)\] \S*?([^,x]+)")
# The published constructor's own defaults; None: it has none.
_KEYS: dict[str, Any] = {
    "graph_net_steps": None,
    "use_sc": None,
    "nonlinearities": None,
    "n_elements": None,
    "hidden_irreps": None,
    "sh_irreps": None,
    "num_basis": 8,
    "r_max": 4.0,
    "radial_net_nonlinearity": "raw_swish",
    "radial_net_n_hidden": 64,
    "radial_net_n_layers": 2,
    "shift": 0.0,
    "scale": 1.0,
    "n_neighbors": 1.0,
    "scalar_mlp_std": 4.0,  # of the initial weights
}


@dataclass(frozen=True)
class ReaxNetCheckpoint:
    """What the three files say.

    Attributes
    ----------
    folder : where they are
    config : their model_config.yaml, checked, with the published defaults filled in
    species : atomic number of every row of the weights, 0 for the row that no element uses
    weights : ``Module/…/name`` -> array, below their ``params``
    checksums : file -> SHA-256
    """

    folder: Path
    config: dict[str, Any]
    species: list[int]
    weights: dict[str, NDArray[np.floating]]
    checksums: dict[str, str]


def read_reaxnet(folder: str | Path) -> ReaxNetCheckpoint:
    """Reads and checks the files of a checkpoint; nothing in them is executed.

    Raises InputError, one sentence that names file, key, value and fix.
    """
    folder = Path(folder).expanduser()
    for name in _FILES:
        if not (folder / name).is_file():
            raise InputError(
                f"{folder}: there is no file {name}; give the folder of a ReaxNet checkpoint, with {', '.join(_FILES)}"
            )
    path = folder / "params.pickle"
    weights = {}
    for key, values in read_array_pickle(path).items():
        top, _, name = key.partition("/")
        if top != "params" or not name:
            raise InputError(f"{path}: it holds '{key}' beside 'params'; save {{'params': …}} as ReaxNet does")
        if not np.isfinite(values).all():
            raise InputError(
                f"{path}: {name} has values that are not finite; use an earlier checkpoint of the training"
            )
        weights[name] = values
    config = _checked_config(folder / "model_config.yaml")
    return ReaxNetCheckpoint(
        folder=folder,
        config=config,
        species=_species(folder / "mapping.yaml", config["n_elements"]),
        weights=weights,
        checksums={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _FILES},
    )


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as plain YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(data, dict) or not data:
        raise InputError(f"{path}: it is no mapping of keys to values; give the file that ReaxNet's training wrote")
    return data


def _checked_config(path: Path) -> dict[str, Any]:
    given = _read_yaml(path)
    for key in given:
        if key not in _KEYS:
            raise InputError(f"{path}: {key} is no key of a ReaxNet network; remove it ({', '.join(_KEYS)} are known)")
    for key, default in _KEYS.items():
        if default is None and key not in given:
            raise InputError(f"{path}: {key} is missing, and the network has no default for it; add it")
    config = {**_KEYS, **given}

    def refuse(key: str, expected: str) -> InputError:
        return InputError(f"{path}: {key} is {config[key]!r}; give {expected}")

    for key in ("graph_net_steps", "n_elements", "num_basis", "radial_net_n_hidden", "radial_net_n_layers"):
        if type(config[key]) is not int or config[key] < 1:
            raise refuse(key, "a whole number, 1 or more")
    for key in ("r_max", "n_neighbors", "shift", "scale"):
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise refuse(key, "a number")
        if key in ("r_max", "n_neighbors") and value <= 0:
            raise refuse(key, "a positive number")
    if not isinstance(config["use_sc"], bool):
        raise refuse("use_sc", "true or false")
    # the published `swish` has a trained slope, which this network lacks
    if config["radial_net_nonlinearity"] not in _SWISH:
        raise refuse("radial_net_nonlinearity", "raw_swish, the only one that can be imported")
    activations = config["nonlinearities"]
    if not (
        isinstance(activations, dict)
        and activations.keys() == {"e", "o"}
        and activations["e"] in _SWISH
        and activations["o"] == "tanh"
    ):
        raise refuse("nonlinearities", "{e: raw_swish, o: tanh}, the only ones that can be imported")
    for key in ("hidden_irreps", "sh_irreps"):
        try:
            irreps = o3.Irreps(config[key])
        except (ValueError, AssertionError, TypeError, AttributeError):
            raise refuse(key, "irreps such as 32x0e + 16x1e") from None
        if len({ir for _, ir in irreps}) != len(irreps):
            raise refuse(key, "each irrep once, the only form that can be imported")
    return config


def _species(path: Path, n_elements: int) -> list[int]:
    mapping = _read_yaml(path)
    for number, row in mapping.items():
        if type(number) is not int or not 0 < number < len(chemical_symbols):
            raise InputError(f"{path}: {number!r} is no atomic number; write lines such as '8: 4' (element: row)")
        if type(row) is not int:
            raise InputError(f"{path}: {number} has the row {row!r}; give a whole number")
    expected = {number: row for row, number in enumerate(sorted(mapping), 1)}
    for number, row in mapping.items():
        if row != expected[number]:  # the published code reads the keys alone
            raise InputError(
                f"{path}: {chemical_symbols[number]} ({number}) has row {row} but is element {expected[number]} by "
                "rising atomic number, as ReaxNet counts them; correct the file"
            )
    if len(mapping) + 1 != n_elements:
        raise InputError(
            f"{path}: it names {len(mapping)} elements but n_elements in model_config.yaml is {n_elements}, which must "
            "be one more; give the files of one training"
        )
    return [0, *sorted(mapping)]


def reaxnet_network(checkpoint: ReaxNetCheckpoint, edge_sign: int = 1) -> NequIP:
    """Their network, in float64.

    ``edge_sign`` +1: edge vectors as in the published training (neighbour − atom); −1: as in the published inference
    notebook, which with all-even irreps gives the energy of the inverted structure.

    Raises InputError where weights are missing, left over, or of another shape than the configuration asks for.
    """
    return _Weights(checkpoint).network(edge_sign)


class _Weights:
    """Hands out the weights of a checkpoint, and remembers which were asked for."""

    def __init__(self, checkpoint: ReaxNetCheckpoint) -> None:
        self.config, self.species = checkpoint.config, checkpoint.species
        self.weights = checkpoint.weights
        self.path = checkpoint.folder / "params.pickle"
        self.left = set(checkpoint.weights)
        self.hidden, self.harmonics = (o3.Irreps(self.config[key]) for key in ("hidden_irreps", "sh_irreps"))

    def network(self, edge_sign: int) -> NequIP:
        # first what makes the size, so that a wrong file does not build a huge network
        n, scalars = len(self.species), self.hidden.count("0e")
        embedding = self.matrix("Linear_0", "0e", (n, scalars))
        steps = sum(bool(re.fullmatch(r"NequIPConvolution_\d+", m)) for m in {k.split("/")[0] for k in self.weights})
        if steps != self.config["graph_net_steps"]:
            raise InputError(
                f"{self.path}: it holds {steps} convolutions but graph_net_steps in model_config.yaml is "
                f"{self.config['graph_net_steps']}; give the files of one training"
            )
        hidden = self.config["radial_net_n_hidden"]
        self.array("NequIPConvolution_0/MLP_0/Dense_0/kernel", (self.config["num_basis"], hidden))
        net = self.empty(edge_sign)
        state = {
            "embedding": embedding,
            "readout.0": self.matrix("Linear_1", "0e", (scalars, scalars // 2)),
            "readout.1": self.matrix("Linear_2", "0e", (scalars // 2, 1)),
            "basis.frequencies": self.array("BesselEmbedding_0/frequencies", (self.config["num_basis"],)),
            "shift": net.shift,
            "scale": net.scale,
        }
        for k, layer in enumerate(net.convolutions):
            state |= {f"convolutions.{k}.{name}": w for name, w in self.convolution(k, layer).items()}
        net.load_state_dict(state)
        if self.left:
            raise InputError(
                f"{self.path}: it holds {min(self.left)}, which the network of model_config.yaml does not have; give "
                "the files of one training"
            )
        return net

    def empty(self, edge_sign: int) -> NequIP:
        """A network of that size, with shift and scale."""
        c = self.config
        try:
            net = NequIP(
                species=self.species,
                hidden_irreps=c["hidden_irreps"],
                sh_irreps=c["sh_irreps"],
                layers=c["graph_net_steps"],
                r_max=c["r_max"],
                n_basis=c["num_basis"],
                radial_layers=c["radial_net_n_layers"],
                radial_hidden=c["radial_net_n_hidden"],
                n_neighbors=c["n_neighbors"],
                use_sc=c["use_sc"],
                edge_sign=edge_sign,
            ).double()
        except InputError as error:
            raise InputError(f"{self.path.with_name('model_config.yaml')}: {error}") from None
        for name, values in (("shift", net.shift), ("scale", net.scale)):
            values.fill_(c[name])
            net.config[name] = values.tolist()
        return net

    def convolution(self, k: int, layer: Any) -> dict[str, Tensor]:
        """The parameters of layer ``k``, by their names in it.

        Their features have the order of ``hidden_irreps``, after the first gate with scalars in front; ours are sorted
        and without what cannot reach the energy.
        """
        theirs = f"NequIPConvolution_{k}"
        features = list(self.hidden) if k == 0 else sorted(self.hidden, key=lambda chunk: chunk.ir.l > 0)
        place = {ir: i for i, (_, ir) in enumerate(features)}
        kept = [(0, self.hidden.count("0e")), *self.gates(layer.irreps_out)]
        scalars = _indices(kept)
        n_scalars = sum(mul for mul, ir in self.hidden if ir.l > 0 or ir == _SCALAR)
        names = {"before": "Linear_0", "after": "Linear_1"}
        if self.config["use_sc"]:
            names["self_connection"] = "FullyConnectedTensorProductE3nn_0"
        state = {}
        for name, module in names.items():
            for key, parameter in getattr(layer, name).weights.items():
                ir = o3.Irrep(key)
                widened = ir == _SCALAR and name != "before"  # scalars, then a gate for each feature that is none
                shape = (*parameter.shape[:-1], n_scalars if widened else parameter.shape[-1])
                matrix = self.matrix(f"{theirs}/{module}", key, shape)
                if name == "after":
                    ours = [p for _, source in layer.sources for p in layer.paths if p.source == source and p.out == ir]
                    slots = _slots(sorted(ours, key=lambda p: (place[p.source], p.sh)))
                    matrix = matrix[_indices([slots[p] for p in ours])]
                state[f"{name}.weights.{key}"] = matrix[..., scalars] if widened else matrix
            self.leave_out(f"{theirs}/{module}")
        # one radial weight for each coupling among the hidden irreps, in every layer
        couplings = _slots(
            [
                type(layer.paths[0])(a, j, ir, mul)
                for mul, a in features
                for j, (_, b) in enumerate(self.harmonics)
                for ir in a * b
                if ir in place
            ]
        )
        last = self.config["radial_net_n_layers"]
        widths = [self.config["num_basis"], *[self.config["radial_net_n_hidden"]] * last, sum(p.mul for p in couplings)]
        for i in range(last + 1):
            kernel = self.array(f"{theirs}/MLP_0/Dense_{i}/kernel", (widths[i], widths[i + 1]))
            chosen = kernel[:, _indices([couplings[p] for p in layer.paths])] if i == last else kernel
            state[f"radial.kernels.{i}"] = chosen
        return state

    def gates(self, kept: o3.Irreps) -> list[tuple[int, int]]:
        """Start and length of the gates of ``kept`` among their scalars."""
        start, places = self.hidden.count("0e"), {}
        for mul, ir in self.hidden:
            if ir.l > 0:
                places[ir] = (start, mul)
                start += mul
        return [places[ir] for _, ir in kept if ir.l > 0]

    def leave_out(self, module: str) -> None:
        """Accepts the module's weights of irreps that cannot reach the energy."""
        hidden = {str(ir) for _, ir in self.hidden}
        self.left -= {key for key in self.left if (found := self.chunk(module, key)) and found[1] in hidden}

    def chunk(self, module: str, key: str) -> tuple[tuple[int, ...], str] | None:
        """Indices and output irrep of ``module/w[i,…] …``, or None where ``key`` is another."""
        match = _WEIGHT.fullmatch(key.removeprefix(f"{module}/")) if key.startswith(f"{module}/") else None
        return None if match is None else (tuple(int(i) for i in match[1].split(",")), match[2])

    def matrix(self, module: str, irrep: str, shape: tuple[int, ...]) -> Tensor:
        """The module's weights that end in ``irrep``, side by side in the order of their indices."""
        chunks = sorted(
            (found[0], key) for key in self.weights if (found := self.chunk(module, key)) and found[1] == irrep
        )
        keys = [key for _, key in chunks]
        if not keys:
            raise InputError(f"{self.path}: {module} has no weights for {irrep}; give the files of one training")
        self.left -= set(keys)
        arrays = [self.weights[key] for key in keys]
        if len({array.shape[:-1] for array in arrays}) > 1 or arrays[0].ndim != len(shape):
            raise self.misshapen(keys[0], arrays[0].shape, shape)
        return self.tensor(keys[0], np.concatenate(arrays, axis=-1), shape)

    def array(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """One array."""
        if key not in self.weights:
            raise InputError(f"{self.path}: {key} is missing; give the files of one training")
        self.left.discard(key)
        return self.tensor(key, self.weights[key], shape)

    def tensor(self, key: str, values: NDArray[np.floating], shape: tuple[int, ...]) -> Tensor:
        if values.shape != shape:
            raise self.misshapen(key, values.shape, shape)
        return torch.tensor(values, dtype=torch.float64)

    def misshapen(self, key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> InputError:
        return InputError(
            f"{self.path}: {key} has shape {shape} where model_config.yaml asks for {expected}; give the files of one "
            "training"
        )


def _slots(paths: Sequence[Any]) -> dict[Any, tuple[int, int]]:
    """Start and length of the channels of each path, side by side."""
    starts = itertools.accumulate((p.mul for p in paths), initial=0)
    return {p: (start, p.mul) for p, start in zip(paths, starts, strict=False)}


def _indices(parts: Sequence[tuple[int, int]]) -> list[int]:
    """All indices of parts (start, length), in order."""
    return [i for start, length in parts for i in range(start, start + length)]


def import_reaxnet(
    folder: str | Path, *, charges: str = "taper", dispersion: str = "d3", inference_sign: bool = False
) -> tuple[Potential, dict[str, Any]]:
    """The whole model of a checkpoint, in float64, and its card.

    Parameters
    ----------
    folder : with params.pickle, model_config.yaml, mapping.yaml
    charges : ``taper`` (their PQEq: tapered sum to 12.5 Å, two iterations, clamp 0.25 Å), ``pqeq`` (ours: the whole
        sum, stationary charges) or ``none``
    dispersion : ``d3`` (theirs: PBE, zero damping, pairs and coordination numbers to 12.5 Å) or ``none``
    inference_sign : see ``reaxnet_network``

    Raises InputError for files that cannot be used, and options that are not known.
    """
    if charges not in ("taper", "pqeq", "none"):
        raise InputError(f"charges is '{charges}': choose taper | pqeq | none")
    if dispersion not in ("d3", "none"):
        raise InputError(f"dispersion is '{dispersion}': choose d3 | none")
    checkpoint = read_reaxnet(folder)
    network = reaxnet_network(checkpoint, -1 if inference_sign else 1)
    table = read_parameters()
    symbols = [chemical_symbols[z] for z in checkpoint.species if z]
    unknown = [symbol for symbol in symbols if symbol not in table]
    if charges != "none" and unknown:
        raise InputError(
            f"{checkpoint.folder / 'mapping.yaml'}: PQEq has no parameters for {unknown[0]}; import with charges: none"
        )
    model: Any = None
    if charges == "taper":
        model = TaperedPQEq(table, cutoff=CUTOFF, iterations=2, clamp=0.25, coulomb_constant=COULOMB_CONSTANT)
    elif charges == "pqeq":
        model = PQEq(table)
    d3 = D3("pbe", "zero", cutoff=CUTOFF, cn_cutoff=CUTOFF, smoothing_width=0.0) if dispersion == "d3" else None
    return Potential(network, model, d3, precision="double"), _card(checkpoint, symbols, network, model, d3)


def _card(
    checkpoint: ReaxNetCheckpoint, symbols: list[str], network: NequIP, charges: Any, dispersion: D3 | None
) -> dict[str, Any]:
    parts = ["NequIP"]
    if isinstance(charges, TaperedPQEq):
        parts.append("PQEq as published (tapered sum to 12.5 Å, 2 iterations, shells to 0.25 Å)")
    elif charges is not None:
        parts.append("PQEq (whole Coulomb sum, stationary charges)")
    if dispersion is not None:
        parts.append("D3 (PBE, zero damping, to 12.5 Å)")
    doubts = [f"elements other than {', '.join(symbols)}"]
    if not isinstance(charges, TaperedPQEq) or dispersion is None:
        doubts.append("a checkpoint that was trained with other long-range parts than these")
    return {
        "name": checkpoint.folder.resolve().name,
        "summary": f"imported ReaxNet checkpoint: {' + '.join(parts)}",
        "licence": "that of the checkpoint, which its files do not state",
        "data": "not stated in the checkpoint",
        "origin": {
            "method": "ReaxNet, Gao et al., Nat. Commun. 16, 10484 (2025)",
            "sha256": checkpoint.checksums,
            "edge_vectors": "as in training (neighbour - atom)"
            if network.edge_sign == 1
            else "as in the inference notebook (atom - neighbour)",
        },
        "elements": symbols,
        "not_for": "; ".join(doubts),
    }
