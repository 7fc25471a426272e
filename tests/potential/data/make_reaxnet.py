"""Makes ReaxNet checkpoints with random weights (``reaxnet_even``, ``_odd``, ``_no_sc``) and their answers.

The network of ReaxNet is that of jax-md, which PyPI has: ``pip install jax-md jraph ml_collections pyyaml ase``, then
``python make_reaxnet.py`` in this folder. The files here come from jax 0.10.2, jax-md 0.2.29, e3nn-jax 0.21.0.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import ase
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import yaml
from ase.neighborlist import neighbor_list
from jax_md._nn.nequip import NequIPEnergyModel

jax.config.update("jax_enable_x64", True)

MAPPING = {1: 1, 3: 2, 8: 3}
COMMON = {
    "n_elements": 4,
    "n_neighbors": 4.0,
    "nonlinearities": {"e": "raw_swish", "o": "tanh"},
    "num_basis": 4,
    "r_max": 3.5,
    "radial_net_n_hidden": 6,
    "radial_net_n_layers": 2,
    "radial_net_nonlinearity": "raw_swish",
    "scalar_mlp_std": 4.0,
}
CONFIGS = {
    "reaxnet_even": {
        "graph_net_steps": 3,
        "hidden_irreps": "4x0e + 2x1e + 2x2e",
        "sh_irreps": "1x0e+1x1e+1x2e",
        "shift": -0.35,
        "scale": 1.7,
        "use_sc": True,
    },
    "reaxnet_odd": {
        "graph_net_steps": 3,
        "hidden_irreps": "2x1e + 4x0e + 3x0o + 2x1o",
        "sh_irreps": "1x0e+1x1o",
        "shift": 0.2,
        "scale": 0.9,
        "use_sc": True,
    },
    "reaxnet_no_sc": {
        "graph_net_steps": 2,
        "hidden_irreps": "4x0e + 2x1e",
        "sh_irreps": "1x0e+1x1e",
        "shift": 0.0,
        "scale": 1.0,
        "use_sc": False,
    },
}


def atoms() -> ase.Atoms:
    """Nine atoms, no two closer than 1.3 Å, in a cell that is narrower than twice the cutoff."""
    rng = np.random.default_rng(7)
    cell = np.array([[5.2, 0, 0], [0.7, 4.9, 0], [-0.4, 0.9, 5.5]])
    chosen = ase.Atoms("H3Li3O3", np.zeros((9, 3)), cell=cell, pbc=True)
    while chosen.get_all_distances(mic=True)[np.triu_indices(9, 1)].min() < 1.3:
        chosen.positions = rng.uniform(size=(9, 3)) @ cell
    return chosen


def answer(config: dict, params: dict, structure: ase.Atoms, sign: float) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (eV/Å) in float64; sign +1: edges are sender − receiver, as in training."""
    model = NequIPEnergyModel(**config)
    receivers, senders, shifts = neighbor_list("ijS", structure, config["r_max"])
    species = jax.nn.one_hot(jnp.array([MAPPING[z] for z in structure.numbers]), config["n_elements"])
    double = jax.tree.map(lambda w: w.astype(jnp.float64), params)

    def energy(positions: jnp.ndarray) -> jnp.ndarray:
        edges = sign * (positions[senders] - positions[receivers] + shifts @ structure.cell.array)
        graph = jraph.GraphsTuple(
            species.astype(positions.dtype), edges, receivers, senders, None, np.array([9]), np.array([len(edges)])
        )
        return model.apply(double, graph).sum()

    value, gradient = jax.value_and_grad(energy)(jnp.asarray(structure.positions))
    return float(value), -np.asarray(gradient)


def main() -> None:
    structure = atoms()
    for name, own in CONFIGS.items():
        config = COMMON | own
        graph = jraph.GraphsTuple(
            jnp.ones((2, 4), jnp.float32),
            jnp.ones((1, 3), jnp.float32),
            jnp.array([0]),
            jnp.array([1]),
            None,
            np.array([2]),
            np.array([1]),
        )
        params = NequIPEnergyModel(**config).init(jax.random.key(3), graph)
        params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        for k in range(config["graph_net_steps"]):  # louder radial networks: atoms feel each other
            params["params"][f"NequIPConvolution_{k}"]["MLP_0"]["Dense_2"]["kernel"] *= 5.0
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        (folder / "params.pickle").write_bytes(pickle.dumps(params))
        (folder / "model_config.yaml").write_text(yaml.dump(config))
        (folder / "mapping.yaml").write_text(yaml.dump(MAPPING))
        answers = {
            "symbols": structure.get_chemical_symbols(),
            "positions": structure.positions.tolist(),
            "cell": structure.cell.array.tolist(),
        }
        for key, sign in (("training", 1.0), ("inference", -1.0)):
            energy, forces = answer(config, params, structure, sign)
            answers[key] = {"energy": energy, "forces": forces.tolist()}
        (folder / "answers.json").write_text(json.dumps(answers, indent=None) + "\n")


if __name__ == "__main__":
    main()
