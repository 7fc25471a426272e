"""QET, a foundation potential that carries its charges: Ko et al., arXiv:2511.07249 (2025); package ``matgl``.

A TensorNet gives every atom an electronegativity χ_i and a hardness η_i. Its charges minimise Σ_i [(χ_i − ψ_i) q_i +
½ η_i q_i²] under Σ_i q_i = Q, which has a solution in closed form (``charges.model: linear-qeq``):

    q_i = −(χ_i − ψ_i)/η_i + η_i⁻¹ [Q + Σ_j (χ_j − ψ_j)/η_j] / Σ_j 1/η_j

ψ_i (V) is the potential of the electrode that the atom belongs to (0 elsewhere): a higher one makes its atoms more
positive. matgl's ``ext_pot`` is −ψ. The energy is a sum over atoms of a network of (features, q_i, V_i), with V_i a
Coulomb potential that ends at the cutoff. It is not the functional that the charges minimise, and it holds no −Σ ψ q:
forces and virial are its exact derivatives, charges moving along, but −∂E/∂ψ is not the charge of an electrode.

The network's own layers run on our neighbour lists, as a batch, in float32 or float64. Weights are read with PyTorch's
restricted unpickler, which loads tensors and plain values only, and the network is built from these here: matgl's own
loader would import and call whatever class a file names.

Before version 3 (its backend DGL), matgl passed messages otherwise: pairs (neighbour, centre) instead of (centre,
neighbour) in the embedding, and in the interactions and in V_i an atom's own features and charge in the place of its
neighbours'. Weights belong to the rule that they were trained with; ``qet-matgl2`` is that of version 2.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor, nn

from voltpi.potential.electrostatics.functional import open_directions
from voltpi.potential.electrostatics.pqeq import PQEqSolution
from voltpi.potential.errors import InputError
from voltpi.potential.external.electrodes import Electrode
from voltpi.potential.model import pair_derivatives
from voltpi.potential.neighbors import NeighborCache
from voltpi.potential.shortrange.foundation import WholeModel, check_elements, import_package
from voltpi.potential.systems import Systems

__all__ = ["QET", "LinearQEq", "QETAnswer"]

_FILES = ("model.json", "model.pt", "state.pt")


class QETAnswer(NamedTuple):
    """energy [b] (eV), forces [n, 3] (eV/Å), virial [b, 3, 3] (eV), charges [n] (e), softness [n] (1/η, e/V)."""

    energy: Tensor
    forces: Tensor
    virial: Tensor
    charges: Tensor
    softness: Tensor


class QET(nn.Module, WholeModel):
    """A QET of matgl with its scale and its energies of elements; see ``load``.

    Attributes: ``name``, ``cutoff`` (Å), ``dtype`` of its arithmetic, ``elements`` (atomic numbers that it knows).
    """

    scale: Tensor
    shift: Tensor
    references: Tensor
    kinds: Tensor

    def __init__(
        self, name: str, network: Any, scale: Tensor, shift: Tensor, references: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name, self.dtype, self.cutoff = name, dtype, float(network.cutoff)
        numbers = [atomic_numbers[symbol] for symbol in network.element_types]
        self.elements = frozenset(numbers)
        kinds = torch.full((len(chemical_symbols),), -1, dtype=torch.int64)
        kinds[numbers] = torch.arange(len(numbers))
        self.register_buffer("kinds", kinds)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("references", references)
        self.network = network
        self.legacy = False
        self.to(dtype).eval().requires_grad_(False)
        self._pairs = NeighborCache(self.cutoff)

    @classmethod
    def load(cls, name: str, path: str, dtype: torch.dtype) -> QET:
        """The model in a folder that matgl's ``Potential.save`` wrote; ``name``: ``qet:PATH`` or ``qet-matgl2:PATH``.

        Warns where a file of matgl's DGL backend is evaluated by the rule of today's matgl.

        Raises InputError where matgl is missing, or the folder does not hold a potential of one QET.
        """
        models = import_package("matgl.models", "matgl", "qet", name)
        arguments, state = _read(name, Path(path))
        kind, settings = _network_of(name, path, arguments)
        old = name.startswith("qet-matgl2")
        from_dgl = kind.endswith("_dgl")
        if old and not from_dgl:
            raise InputError(f"{path}: this QET was written by matgl 3 or later: use short_range.foundation qet:{path}")
        if from_dgl and not old:
            warnings.warn(
                f"{path}: this QET was trained with matgl's DGL backend and is evaluated as the installed matgl does; "
                "if it was trained before matgl 3 (QET-MatQ-PES of 2025 was), that is wrong for every compound: use "
                f"short_range.foundation qet-matgl2:{path}",
                stacklevel=2,
            )
        network = models.QET(**{**settings, "use_warp": False})
        own = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        missing = set(dict(network.named_parameters())) - own.keys()
        if missing:
            raise InputError(f"{path}: state.pt has no {min(missing)}: it is of another version of QET")
        try:
            network.load_state_dict(own, strict=False)
        except RuntimeError as error:
            raise InputError(f"{path}: state.pt does not fit model.pt: {' '.join(str(error).split())}") from None
        elements = len(network.element_types)
        references = state.get("element_refs.property_offset", torch.zeros(elements))
        if references.shape != (elements,):
            raise InputError(
                f"{path}: element_refs has shape {tuple(references.shape)} for {elements} elements: only one energy an "
                "element is supported"
            )
        one, zero = torch.tensor(1.0), torch.tensor(0.0)
        model = cls(name, network, state.get("data_std", one), state.get("data_mean", zero), references, dtype)
        if old:
            model.pass_messages_as_matgl2()
        return model

    def pass_messages_as_matgl2(self) -> None:
        """From now on messages go as in matgl 2."""
        self.legacy = True
        net = self.network
        weight = net.tensor_embedding.emb2.weight
        weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
        for layer in net.layers:
            layer.message = _own_features(layer.message)
        net.elec_pot = _OwnCharge(net.elec_pot)

    def forward(
        self,
        numbers: Tensor,
        batch: Tensor,
        index: Tensor,
        vectors: Tensor,
        net_charge: Tensor,
        potential: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Atomic energies [n] (eV), charges [n] (e) and softness [n] (1/η, e/V); the shift of a structure is left out.

        Parameters
        ----------
        numbers, batch : [n] int64, atomic numbers and the structure of each atom
        index : [2, e] int64, pairs (centre, neighbour)
        vectors : [e, 3] Å, r_j − r_i
        net_charge : [b], e
        potential : [n] or None, V, ψ

        Raises InputError for an element that the model does not know.
        """
        check_elements(self.name, self.elements, numbers)
        kinds = self.kinds[numbers]
        graph = SimpleNamespace(
            node_type=kinds,
            edge_index=index,
            # bond vectors are positions and offsets of images together: these are the offsets
            pos=vectors.new_zeros(len(numbers), 3),
            pbc_offshift=-vectors if self.legacy else vectors,
            batch=batch,
            num_graphs=len(net_charge),
        )
        outside = None if potential is None else -potential.to(vectors.dtype)
        self.network(g=graph, total_charge=net_charge, ext_pot=outside)
        features = self.network.feature_dict
        self.network.feature_dict = {}  # or its graph would live until the next call
        energies = self.scale * features["atomic_energies"].reshape(-1) + self.references[kinds]
        return energies, features["charge"], features["hardness"].reciprocal()

    def evaluate(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        """Energy, forces and virial; see WholeModel."""
        return self.answer(systems)[:3]

    def answer(self, systems: Systems, potential: Tensor | None = None) -> QETAnswer:
        """Everything for a batch, in float64, with potentials ψ [n] (V) on atoms."""
        pairs = self._pairs(systems)
        vectors = pairs.vectors.to(self.dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            atomic, charges, softness = self(
                systems.numbers, systems.batch, pairs.index, vectors, systems.net_charge, potential
            )
            (gradient,) = torch.autograd.grad(atomic.sum(), vectors, allow_unused=True, materialize_grads=True)
        energy = self.shift.to(torch.float64).repeat(systems.n_systems)
        energy.index_add_(0, systems.batch, atomic.detach().to(torch.float64))
        forces, virial = pair_derivatives(systems, pairs, gradient.to(torch.float64))
        return QETAnswer(
            energy, forces, virial, charges.detach().to(torch.float64), softness.detach().to(torch.float64)
        )


def _own_features(message: Callable[..., Any]) -> Callable[..., Any]:
    """Messages of an interaction that carry the features of the atom that they arrive at (matgl 2)."""

    def own(index: Tensor, *features: Tensor) -> Any:
        return message(index.flip(0), *features)

    return own


class _OwnCharge(nn.Module):
    """V_i = q_i Σ_j k_e erf(…)/r_ij instead of Σ_j q_j k_e erf(…)/r_ij (matgl 2)."""

    def __init__(self, potential: Any) -> None:
        super().__init__()
        self._potential = potential

    def forward(self, graph: Any, charge: Tensor, sigma: Tensor) -> Tensor:
        return charge * self._potential(graph, charge=torch.ones_like(charge), sigma=sigma)


class LinearQEq(nn.Module):
    """``charges.model: linear-qeq``: the charges of a QET, which bring its energy along.

    Takes net charges and electrodes at potentials; a batch is solved at once. Has the attributes and methods that
    :class:`~voltpi.potential.model.Potential` and the driver expect of a charge model.
    """

    conserve = "total"
    carries = False
    finite_field = None

    def __init__(self, qet: QET, electrodes: Sequence[Electrode] = ()) -> None:
        """Raises InputError for an electrode at a charge or with parameters of its own."""
        super().__init__()
        self.qet = qet
        self.electrodes = tuple(electrodes)
        for electrode in self.electrodes:
            if electrode.control == "charge":
                raise InputError(
                    f"electrodes.{electrode.name} has a charge, but linear-qeq charges take potentials only: give it a "
                    "potential, or set charges.model to pqeq"
                )
            if electrode != Electrode(electrode.name, "potential"):
                raise InputError(
                    f"electrodes.{electrode.name} has parameters of its own (eta, thomas_fermi, chi or polarizable), "
                    "but with linear-qeq charges those of its atoms come from the network: remove them, or set "
                    "charges.model to pqeq"
                )

    def check_field(self, system: Systems) -> None:
        """Raises InputError for any field or displacement."""
        kind = "displacement" if system.displacement is not None else "field"
        if kind == "field" and not bool((system.field != 0).any()):
            return
        raise InputError(
            f"{kind} with charges.model linear-qeq: QET's energy has no −ε·M, and a field on its charges alone would "
            "pull no ion; set charges.model to pqeq, or give electrodes potentials"
        )

    def solve(
        self,
        system: Systems,
        *,
        start: tuple[Tensor, Tensor] | None = None,
        born_charges: bool = False,
        polarizability: bool = False,
        smallest_curvature: bool = False,
        capacitance: bool = False,
    ) -> PQEqSolution:
        """Charges, energy, forces and virial of a batch, and ∂Q_a/∂ψ_b of the electrodes as asked.

        The dipole is Σ q_i r_i along open directions and 0 along periodic ones, where charges that move from cell to
        cell leave it undefined. ``start`` is of no use to a closed form.

        Raises InputError for a field, for an unknown element, for electrodes that are not assigned, and for Born
        charges, polarizability and smallest curvature, which belong to a field.
        """
        asked = {
            "born_charges": born_charges,
            "polarizability": polarizability,
            "smallest_curvature": smallest_curvature,
        }
        for key, wanted in asked.items():
            if wanted:
                raise InputError(f"output.{key} is not defined with charges.model linear-qeq: set it to false")
        self.check_field(system)
        potential = self._potentials(system)
        answer = self.qet.answer(system, potential)
        moments = answer.charges[:, None] * system.positions
        dipole = torch.zeros_like(system.field).index_add_(0, system.batch, moments)
        zero = torch.zeros_like(answer.energy)
        return PQEqSolution(
            energy=answer.energy,
            terms={"short_range": answer.energy},
            forces=answer.forces,
            virial=answer.virial,
            charges=answer.charges,
            shells=torch.zeros_like(system.positions),
            dipole=(open_directions(system, None) @ dipole[:, :, None])[:, :, 0],
            field=torch.zeros_like(system.field),
            residual=zero,
            iterations=torch.zeros_like(zero, dtype=torch.int64),
            electrodes=self._electrode_answers(system, answer.charges),
            capacitance=self._capacitance(system, answer.softness) if capacitance else None,
        )

    def _potentials(self, system: Systems) -> Tensor | None:
        """ψ [n] (V), or None without electrodes. Raises InputError where structure and model have other ones."""
        if not self.electrodes and system.electrode is None:
            return None
        held = 0 if system.applied is None else system.applied.shape[1]
        if system.electrode is None or system.applied is None or held != len(self.electrodes):
            raise InputError(
                f"the structure has {held} electrodes but the potential {len(self.electrodes)}: assign them anew"
            )
        values = torch.cat([system.applied, torch.zeros_like(system.applied[:, :1])], dim=1)
        return values[system.batch, system.electrode]

    def _sums(self, system: Systems, values: Tensor) -> Tensor:
        """[n] summed over each electrode and over what belongs to none, [b, electrodes + 1]."""
        assert system.electrode is not None
        count = len(self.electrodes) + 1
        label = torch.where(system.electrode < 0, count - 1, system.electrode)
        out = values.new_zeros(system.n_systems * count).index_add_(0, system.batch * count + label, values)
        return out.reshape(system.n_systems, count)

    def _electrode_answers(self, system: Systems, charges: Tensor) -> dict[str, dict[str, Tensor]]:
        if not self.electrodes:
            return {}
        assert system.applied is not None
        sums = self._sums(system, charges)
        return {
            electrode.name: {
                "charge": sums[:, k],
                "potential": system.applied[:, k].clone(),
                "residual": torch.zeros_like(sums[:, k]),
            }
            for k, electrode in enumerate(self.electrodes)
        }

    def _capacitance(self, system: Systems, softness: Tensor) -> Tensor:
        """∂Q_a/∂ψ_b = δ_ab S_a − S_a S_b/S [b, electrodes, electrodes] (e/V), with S_a = Σ_{i in a} 1/η_i."""
        if not self.electrodes:
            raise InputError("output.capacitance needs electrodes: give them, or set it to false")
        sums = self._sums(system, softness)
        own = sums[:, :-1]
        return torch.diag_embed(own) - own[:, :, None] * own[:, None, :] / sums.sum(1)[:, None, None]


def _read(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and tensors of a saved potential. Raises InputError where they cannot be read."""
    missing = [file for file in _FILES if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{folder}: there is no {missing[0]}; short_range.foundation is {name.partition(':')[0]}:PATH of a folder "
            f"with {', '.join(_FILES)}, such as matgl's QET-MatQ-PES"
        )
    try:
        top = json.loads((folder / "model.json").read_text())
        arguments = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = " ".join(str(error).split())[:160]
        raise InputError(f"{folder}: cannot be read as a model of matgl (restricted to tensors): {first}") from None
    if not (isinstance(top, dict) and isinstance(arguments, dict) and isinstance(state, dict)):
        raise InputError(f"{folder}: this is no model of matgl; save it with matgl's Potential.save")
    if top.get("@class") != "Potential":
        raise InputError(
            f"{folder}: holds matgl's class {top.get('@class')}, not Potential: wrap it in matgl.apps.pes.Potential "
            "and save that"
        )
    return arguments, state


def _network_of(name: str, path: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Module and settings of the network. Raises InputError for what is no QET, or one that needs more than atoms."""
    model = arguments.get("model")
    if not (isinstance(model, dict) and model.get("@class") == "QET" and isinstance(model.get("init_args"), dict)):
        found = model.get("@class") if isinstance(model, dict) else type(model).__name__
        raise InputError(f"{path}: holds a {found}, not a QET; short_range.foundation is {name}")
    settings = model["init_args"]
    for key, what in (("include_state", "features of the state"), ("return_features", "features in place of energies")):
        if settings.get(key):
            raise InputError(f"{path}: this QET has {what} ({key}): use one without")
    if arguments.get("calc_repuls"):
        raise InputError(f"{path}: this QET adds a nuclear repulsion (calc_repuls): use one without")
    return str(model.get("@module")), settings
