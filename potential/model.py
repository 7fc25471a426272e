"""A whole potential: short range + stationary charges + dispersion, one energy with exact derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from ase.data import chemical_symbols
from torch import Tensor

from voltpi.potential.committee import Committee, LastLayers, Uncertainty
from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.latent import LatentCharges, add_charge_motion
from voltpi.potential.electrostatics.pqeq import PQEq, PQEqSolution
from voltpi.potential.errors import InputError
from voltpi.potential.external.electrodes import check_electrodes
from voltpi.potential.fragments import assign_fragments
from voltpi.potential.neighbors import NeighborCache, Neighbors, check_geometry
from voltpi.potential.response import Response
from voltpi.potential.shortrange.foundation import WholeModel
from voltpi.potential.shortrange.latent import LatentPass
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems

__all__ = ["Potential", "ShortRange", "pair_derivatives", "root_derivatives"]

# deviations of a committee's members: energies [k, b], forces [k, n, 3], virials [k, b, 3, 3]
Spread = tuple[Tensor, Tensor | None, Tensor | None]


class ShortRange(Protocol):
    """A local energy model: energies of atoms from their neighbours."""

    cutoff: float

    def __call__(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """Atomic energies [n] (eV) from numbers [n], pairs [2, e] (centre, neighbour) and r_j − r_i [e, 3] (Å)."""


def pair_derivatives(systems: Systems, pairs: Neighbors, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Forces [n, 3] and virial [b, 3, 3] from ∂E/∂(r_j − r_i) of every pair."""
    i, j = pairs.index
    forces = torch.zeros_like(systems.positions)
    forces.index_add_(0, i, gradient)
    forces.index_add_(0, j, -gradient)
    virial = torch.zeros_like(systems.cell)
    virial.index_add_(0, systems.batch[i], -gradient[:, :, None] * pairs.vectors[:, None, :])
    return forces, 0.5 * (virial + virial.transpose(1, 2))


def root_derivatives(
    systems: Systems, pairs: Neighbors, vectors: Tensor, roots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies [k, b], forces [k, n, 3] and virials [k, b, 3, 3] of k sets of atomic energies ``roots`` [k, n].

    ``vectors`` [e, 3] : the leaf from which the roots were computed, in the order of ``pairs``.
    """
    forces, virials = [], []
    for k, root in enumerate(roots):
        (gradient,) = torch.autograd.grad(
            root.sum(), vectors, retain_graph=k + 1 < len(roots), allow_unused=True, materialize_grads=True
        )
        f, w = pair_derivatives(systems, pairs, gradient.to(torch.float64))
        forces.append(f)
        virials.append(w)
    return _by_structure(systems, roots), torch.stack(forces), torch.stack(virials)


def _by_structure(systems: Systems, atomic: Tensor) -> Tensor:
    """[..., n] summed over the atoms of each structure, [..., b], in float64."""
    energy = torch.zeros(*atomic.shape[:-1], systems.n_systems, dtype=torch.float64, device=atomic.device)
    return energy.index_add_(-1, systems.batch, atomic.detach().to(torch.float64))


class Potential:
    """Adds the terms, finds the stationary charges, returns a :class:`~voltpi.potential.response.Response`.

    Parameters
    ----------
    short_range : network or pair potential, or None
    charges : charge equilibration, or None
    dispersion : D3, or None
    reference_energies : atomic number -> eV, the energies of atoms from which the short range counts (added in float64)
    walls : pair potential between electrodes and the rest, or None. With it, short range, dispersion and reference
        energies are those of the electrolyte alone: a model that knows no metal runs between electrodes
    response_only : the short range holds the electrostatics of zero field (a foundation model), so the charges give
        E(R; ε, D, ψ) − E(R; 0, 0 V) and the dipole of E(R; ε, D, ψ): nothing is counted twice, zero changes nothing
    precision : ``double`` (all float64), ``mixed`` (float32 network, float64 electrostatics) or ``single`` (as mixed:
        the electrostatics keep float64, where float32 would not converge)
    """

    def __init__(
        self,
        short_range: Any = None,
        charges: PQEq | None = None,
        dispersion: D3 | None = None,
        *,
        reference_energies: Mapping[int, float] | None = None,
        walls: Any = None,
        response_only: bool = False,
        precision: str = "mixed",
    ) -> None:
        if short_range is None and charges is None and dispersion is None:
            raise InputError("the potential has no terms: set model, short_range, charges.model or dispersion")
        if precision not in ("double", "mixed", "single"):
            raise InputError(f"precision is '{precision}': choose double | mixed | single")
        self.short_range = short_range
        self.charges = charges
        self.dispersion = dispersion
        self.reference_energies = dict(reference_energies or {})
        self.walls = walls
        self.response_only = response_only
        self.precision = precision
        self.device = torch.device("cpu")
        # a pair potential keeps float64 at any precision
        self._dtype = getattr(short_range, "dtype", torch.float64 if precision == "double" else torch.float32)
        if isinstance(short_range, torch.nn.Module):
            short_range.to(self._dtype).eval()
            short_range.requires_grad_(False)
        local = short_range is not None and not isinstance(short_range, WholeModel)
        self._pairs = NeighborCache(short_range.cutoff) if local else None
        if isinstance(charges, LatentCharges) and getattr(_one(short_range), "latent_readout", None) is None:
            raise InputError(
                "charges.model latent needs a network that gives latent charges: set model to one that was trained so"
            )
        self._wall_pairs = None if walls is None else NeighborCache(walls.cutoff)

    def to(self, device: torch.device | str) -> Potential:
        """Moves the network to a device; structures are moved there when they come."""
        self.device = torch.device(device)
        for part in (self.short_range, self.walls, self.charges):
            if isinstance(part, torch.nn.Module):
                part.to(self.device)
        return self

    def prepare(
        self, systems: Systems, *, labels: Tensor | None = None, initial_charges: Tensor | None = None
    ) -> Systems:
        """Fills in what stays constant over a run: fragments with their charges, and the carried charges.

        Carried charges are those at zero field in this geometry (physics: ``response: shells | frozen``); they are left
        alone where the systems bring them.

        Raises InputError where fragments do not add up to the net charge, or an element or geometry is impossible.
        """
        check_geometry(systems)
        if self.charges is None:
            return systems
        if self.charges.conserve == "fragments" and systems.fragments is None:
            systems = assign_fragments(systems, labels=labels, initial_charges=initial_charges)
        if self.charges.carries and systems.carried is None:
            at_rest = systems.applied
            if at_rest is not None:  # no field, and no potential on electrodes
                held = [e.control == "charge" for e in self.charges.electrodes]
                at_rest = at_rest * torch.tensor(held, device=at_rest.device)
            free = systems.replace(field=torch.zeros_like(systems.field), displacement=None, applied=at_rest)
            carried = self.charges.solve(free).charges
            systems = systems.replace(carried=carried)
        if systems.carried is not None:
            _check_carried(systems)
        if systems.electrode is not None:
            if not hasattr(self.charges, "electrodes"):
                raise InputError("electrodes need the whole Coulomb sum: set coulomb.method to auto")
            check_electrodes(systems, self.charges.electrodes, self.charges.finite_field)
        return systems

    def __call__(
        self,
        systems: Systems,
        *,
        start: Response | None = None,
        born_charges: bool = False,
        polarizability: bool = False,
        smallest_curvature: bool = False,
        capacitance: bool = False,
        uncertainty: Uncertainty = "none",
    ) -> Response:
        """Energy and everything that follows from it; ``start`` is an earlier Response of the same atoms (warm start).

        ``uncertainty`` : of a committee, that of the energy (which costs next to nothing), of the forces too (one
        backward pass a member), or with the members' answers; ``none`` is all that other short ranges have.
        Raises InputError, NoStablePointError or NotConvergedError, each a sentence that names atom and fix.
        """
        systems = systems.to(self.device)
        check_geometry(systems)
        held = systems.displacement is not None and bool((~systems.displacement.isnan()).any())
        if self.charges is None and (held or bool((systems.field != 0).any())):
            raise InputError(
                "a field or displacement is set but the potential has no charges to feel it: set charges.model, or "
                "remove it"
            )
        terms: dict[str, Tensor] = {}
        forces = torch.zeros_like(systems.positions)
        virial = torch.zeros_like(systems.cell)
        inner, atoms = self._modelled(systems)
        spread: Spread | None = None
        read = self._read_charges(inner) if isinstance(self.charges, LatentCharges) else None
        if read is not None:
            terms["short_range"] = read.energy
            systems = systems.replace(carried=self._latent_charges(systems, read, atoms))
            if uncertainty != "none":
                spread = self._committee(inner, forces=uncertainty != "energy")[1]
        elif uncertainty != "none":
            (energy, f, w), spread = self._committee(inner, forces=uncertainty != "energy")
            terms["short_range"], forces, virial = energy, forces.index_add(0, atoms, f), virial + w
        elif self.short_range is not None:
            energy, f, w = self._short_range(inner)
            terms["short_range"], forces, virial = energy, forces.index_add(0, atoms, f), virial + w
        if self.reference_energies:
            terms["atoms"] = self._references(inner)
        if self.dispersion is not None:
            energy, f, w = self.dispersion(inner)
            terms["dispersion"], forces, virial = energy, forces.index_add(0, atoms, f), virial + w
        if self.walls is not None:
            energy, f, w = self._walls(systems)
            terms["walls"], forces, virial = energy, forces + f, virial + w
        solved = self._solve(
            systems,
            start,
            born_charges=born_charges,
            polarizability=polarizability,
            smallest_curvature=smallest_curvature,
            capacitance=capacitance,
        )
        if read is not None:
            assert solved is not None
            solved, (f, w) = self._with_motion(systems, solved, read, atoms)
            forces, virial = forces.index_add(0, atoms, f), virial + w
        n, b = systems.n_atoms, systems.n_systems
        charges, shells = forces.new_zeros(n), forces.new_zeros(n, 3)
        dipole, field, residual = forces.new_zeros(b, 3), forces.new_zeros(b, 3), forces.new_zeros(b)
        iterations = torch.zeros(b, dtype=torch.int64, device=self.device)
        electrodes: dict[str, dict[str, Tensor]] = {}
        if solved is not None:
            terms.update(solved.terms)
            forces, virial = forces + solved.forces, virial + solved.virial
            charges, shells, dipole, field = solved.charges, solved.shells, solved.dipole, solved.field
            residual, iterations = solved.residual, solved.iterations
            electrodes = solved.electrodes
        total = torch.stack(list(terms.values())).sum(0)
        members = None
        if spread is not None and isinstance(self.short_range, Committee):
            energies, f, w = spread
            f = None if f is None else f.new_zeros(len(f), n, 3).index_copy(1, atoms, f)  # electrodes have none
            members = self.short_range.members((energies, f, w), (total, forces, virial))
        return Response(
            energy=total,
            forces=forces,
            virial=virial,
            charges=charges,
            shells=shells,
            dipole=dipole,
            field=field,
            energy_terms=terms,
            residual=residual,
            iterations=iterations,
            electrodes=electrodes,
            born_charges=None if solved is None else solved.born_charges,
            polarizability=None if solved is None else solved.polarizability,
            smallest_curvature=None if solved is None else solved.smallest_curvature,
            capacitance=None if solved is None else solved.capacitance,
            members=members,
        )

    def _modelled(self, systems: Systems) -> tuple[Systems, Tensor]:
        """What short range and dispersion see, and which atoms [m] of the batch that is."""
        every = torch.arange(systems.n_atoms, device=self.device)
        if self.walls is None:
            return systems, every
        if systems.electrode is None:
            raise InputError("a pair potential of walls is set but the structure has no electrodes: assign them")
        atoms = every[systems.electrode < 0]
        if bool((torch.bincount(systems.batch[atoms], minlength=systems.n_systems) == 0).any()):
            raise InputError("there is no electrolyte: every atom of the structure belongs to an electrode")
        return systems.take(atoms), atoms

    def _walls(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        assert self._wall_pairs is not None
        assert systems.electrode is not None
        pairs = self._wall_pairs(systems)
        metal = systems.electrode >= 0
        across = metal[pairs.index[0]] != metal[pairs.index[1]]
        kept = Neighbors(pairs.index[:, across], pairs.shift[across], pairs.vectors[across])
        return self._local(self.walls, systems, kept, torch.float64)

    def _references(self, systems: Systems) -> Tensor:
        atomic = torch.full((len(chemical_symbols),), torch.nan, dtype=torch.float64)
        for number, energy in self.reference_energies.items():
            atomic[number] = energy
        atomic = atomic.to(self.device)[systems.numbers]
        unknown = systems.numbers[atomic.isnan()]
        if len(unknown):
            raise InputError(
                f"the model has no reference energy for {chemical_symbols[int(unknown[0])]}: it knows "
                f"{', '.join(chemical_symbols[z] for z in self.reference_energies)}; use a model of these elements"
            )
        energy = torch.zeros(systems.n_systems, dtype=torch.float64, device=self.device)
        return energy.index_add_(0, systems.batch, atomic)

    def _solve(self, systems: Systems, start: Response | None, **wanted: bool) -> PQEqSolution | None:
        if self.charges is None:
            for name, asked in wanted.items():
                if asked:
                    raise InputError(f"output.{name} needs charges: set charges.model")
            return None
        guess = None
        if start is not None and len(start.charges) == systems.n_atoms:
            guess = (start.charges, start.shells)
        rigid = isinstance(self.charges, LatentCharges) and not self.charges.relaxation and systems.electrode is None
        if wanted.get("polarizability") and rigid:
            raise InputError(
                "output.polarizability: latent charges do not answer to a field while the nuclei stay; set it to false"
            )
        solution = self.charges.solve(systems, start=guess, **wanted)
        return self._response_of(systems, solution) if self.response_only else solution

    def _read_charges(self, systems: Systems) -> LatentPass:
        """The network's energy and latent charges of what it models."""
        network = _one(self.short_range)
        assert isinstance(network, NequIP)
        assert self._pairs is not None
        assert isinstance(self.charges, LatentCharges)
        return LatentPass(network, systems, self._pairs(systems), self._dtype, exchange=self.charges.exchanges)

    def _latent_charges(self, systems: Systems, read: LatentPass, atoms: Tensor) -> Tensor:
        """Charges [n] (e) of the batch; 0 on electrodes."""
        assert isinstance(self.charges, LatentCharges)
        given = torch.zeros_like(systems.positions[:, 0]).index_copy(0, atoms, read.charges)
        return self.charges.constrained(systems, given)

    def _with_motion(
        self, systems: Systems, solved: PQEqSolution, read: LatentPass, atoms: Tensor
    ) -> tuple[PQEqSolution, tuple[Tensor, Tensor]]:
        """The solution with Born charges of charges that change with the positions; forces and virial of the network.

        Both include what the change of the charges costs, (∂q/∂r)ᵀ ∂Ω/∂q.
        """
        model = self.charges
        assert isinstance(model, LatentCharges)
        assert solved.charge_gradient is not None
        potential = model.unconstrained(systems, solved.charge_gradient)[atoms]
        derivatives = pair_derivatives(read.systems, read.pairs, read.gradient(potential))
        if solved.born_charges is not None:

            def moved(factors: Tensor) -> Tensor:
                change = read.moved(model.unconstrained(systems, factors)[atoms])
                return torch.zeros_like(systems.positions).index_copy(0, atoms, change)

            born = add_charge_motion(model, systems, solved, moved)
            solved = dataclasses.replace(solved, born_charges=born)
        if read.moment is None:
            return solved, derivatives
        assert systems.carried is not None
        net = systems.carried[atoms] - read.charges  # what is not exchanged
        return self._with_moment(solved, read, atoms, net, derivatives)

    def _with_moment(
        self, solved: PQEqSolution, read: LatentPass, atoms: Tensor, net: Tensor, derivatives: tuple[Tensor, Tensor]
    ) -> tuple[PQEqSolution, tuple[Tensor, Tensor]]:
        """The same with what a field does to the moment of exchanged charges, which the network gives.

        ``net`` [m] (e) : what every atom has of the net charge.
        """
        model = self.charges
        assert isinstance(model, LatentCharges)
        assert read.moment is not None
        systems, scale = read.systems, model.screening
        spread = torch.zeros_like(systems.field).index_add_(0, systems.batch, net[:, None] * systems.positions)
        moment = scale * (read.moment + spread)
        field = -(solved.field * moment).sum(1)
        gradient = read.pulled_moment(-scale * solved.field)
        own = scale * net[:, None] * solved.field[systems.batch]
        forces = derivatives[0] - read.on_atoms(gradient) + own
        virial = derivatives[1].index_add(
            0, systems.batch[read.pairs.index[0]], -gradient[:, :, None] * read.pairs.vectors[:, None, :]
        )
        virial = virial.index_add(0, systems.batch, own[:, :, None] * systems.positions[:, None, :])
        born = solved.born_charges
        if born is not None:
            for a in range(3):
                axis = torch.zeros_like(systems.field)
                axis[:, a] = scale
                change = read.on_atoms(read.pulled_moment(axis))
                change[:, a] += scale * net
                born[:, a] = born[:, a].index_add(0, atoms, change)
        return (
            dataclasses.replace(
                solved,
                energy=solved.energy + field,
                terms={**solved.terms, "field": solved.terms["field"] + field},
                dipole=solved.dipole + moment,
                born_charges=born,
            ),
            (forces, virial),
        )

    def _response_of(self, systems: Systems, solution: PQEqSolution) -> PQEqSolution:
        """The same with energy, forces and virial counted from zero field, electrodes at 0 V (or without charge)."""
        assert self.charges is not None
        applied = systems.applied
        voltage = applied is not None and bool((applied != 0).any())
        if not voltage and systems.displacement is None and not bool((systems.field != 0).any()):
            energy, forces = torch.zeros_like(solution.energy), torch.zeros_like(solution.forces)
            virial = torch.zeros_like(solution.virial)
        else:
            at_rest = systems.replace(
                field=torch.zeros_like(systems.field),
                displacement=None,
                applied=None if applied is None else torch.zeros_like(applied),
            )
            rest = self.charges.solve(at_rest, start=(solution.charges, solution.shells))
            energy = solution.energy - rest.energy
            forces, virial = solution.forces - rest.forces, solution.virial - rest.virial
        return dataclasses.replace(solution, energy=energy, forces=forces, virial=virial, terms={"response": energy})

    def _short_range(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.short_range, WholeModel):
            return self.short_range.evaluate(systems)
        assert self._pairs is not None
        return self._local(self.short_range, systems, self._pairs(systems), self._dtype)

    def _committee(self, systems: Systems, *, forces: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Spread]:
        """Energy [b], forces and virial of the committee's mean, and the deviations of its members from them."""
        model = self.short_range
        if not isinstance(model, Committee):
            raise InputError(
                "output.uncertainty needs a model with a committee, which this potential has not: train one with "
                "training.committee, or give one to a model with `voltpi committee`"
            )
        assert self._pairs is not None
        pairs = self._pairs(systems)
        vectors = pairs.vectors.to(self._dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            roots = model.roots(systems.numbers, pairs.index, vectors)
            asked = roots if forces else model.combine(roots)[0][None]
            answers = root_derivatives(systems, pairs, vectors, asked)
        if not forces:
            energy, deviations = model.combine(_by_structure(systems, roots))
            return (energy, answers[1][0], answers[2][0]), (deviations, None, None)
        (energy, de), (f, df), (w, dw) = (model.combine(values) for values in answers)
        return (energy, f, w), (de, df, dw)

    def _local(
        self, model: Any, systems: Systems, pairs: Neighbors, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Energy [b], forces and virial of a local model."""
        vectors = pairs.vectors.to(dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            shifts = (pairs.shift,) if getattr(model, "takes_shifts", False) else ()
            atomic = model(systems.numbers, pairs.index, vectors, *shifts)
            (gradient,) = torch.autograd.grad(atomic.sum(), vectors, allow_unused=True)
        if gradient is None:
            gradient = torch.zeros_like(vectors)
        return (_by_structure(systems, atomic), *pair_derivatives(systems, pairs, gradient.to(torch.float64)))


def _one(short_range: Any) -> Any:
    """The network that gives latent charges, which last layers share."""
    return short_range.network if isinstance(short_range, LastLayers) else short_range


def _check_carried(systems: Systems) -> None:
    """Carried charges must add up to the net charge, or a field would push the centre of mass."""
    carried = systems.carried
    assert carried is not None
    if carried.shape != systems.numbers.shape or not bool(torch.isfinite(carried).all()):
        raise InputError(
            f"charges.carried has shape {tuple(carried.shape)} for {systems.n_atoms} atoms, or is not finite: give one "
            "charge (e) for every atom"
        )
    if systems.electrode is not None:  # electrodes take up the rest
        return
    sums = torch.zeros_like(systems.net_charge).index_add_(0, systems.batch, carried)
    wrong = (sums - systems.net_charge).abs() > 1e-6
    if bool(wrong.any()):
        b = int(wrong.nonzero()[0])
        raise InputError(
            f"charges.carried add up to {float(sums[b]):g} e but charges.net_charge is "
            f"{float(systems.net_charge[b]):g} e: make them equal"
        )
