"""Atomic units in, atomic units and extras out: the only place in VoltPI that converts.

i-PI speaks bohr and hartree and sends its matrix h, whose *columns* are lattice vectors; the potential speaks Å, eV and
*rows*. The virial has one sign on both sides, −∂E/∂strain (i-PI: ``vir``; ASE's stress is −virial/volume).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray

from voltpi.driver.build import build_potential
from voltpi.driver.settings import Settings
from voltpi.driver.structures import prepare_frame, reference_positions, refuse_turned
from voltpi.driver.unwrap import Unwrapper
from voltpi.driver.warm_start import Solutions
from voltpi.potential.committee import Members
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.external.electrodes import check_electrodes
from voltpi.potential.model import Potential
from voltpi.potential.response import Response
from voltpi.potential.systems import Systems

__all__ = ["BOHR", "HARTREE", "Evaluator", "Result", "build_potential"]

BOHR = 0.529177210903
"""Å, CODATA 2018 (i-PI's own table, rounded to eight digits, agrees to 1e-8)."""
HARTREE = 27.211386245988
"""eV, CODATA 2018."""

Array = NDArray[np.float64]

_ATOMS_AT_ONCE = 1600  # 8 of 64 H2O; 32 at once take longer than 32 one by one, see tests/benchmarks/driver.py


class Result(NamedTuple):
    """Answer for one structure, in atomic units.

    energy : hartree
    forces : [n, 3] hartree/bohr
    virial : [3, 3] hartree, −∂E/∂strain
    extras : JSON-able; ``dipole`` [3] (e·bohr), ``residual`` (hartree/e), ``energy_NAME`` (hartree) and, as asked in
        ``output``, ``charges`` [n] (e), ``shells`` [n][3] (bohr, from the core), ``BEC`` [3n][3] (e, row = 3·atom +
        displacement, column = dipole direction), ``polarizability`` [3][3] (bohr³). In a uniform field or at constant
        displacement ``field`` [3] (hartree/(e bohr)), the field that acts. With electrodes, in the order of
        the settings: ``electrode_charges`` [electrodes] (e), ``electrode_potentials`` [electrodes] (hartree/e),
        ``electrode_residual`` (hartree/e, the largest), ``capacitive_energy`` (hartree, ½ Σ ψ Q) and, as asked,
        ``electrode_capacitance`` (e²/hartree, of two electrodes at fixed nuclei). With ``output.uncertainty``
        ``energy_uncertainty`` (hartree, standard deviation) and ``committee_pot`` [k] (hartree), with that of forces
        ``forces_uncertainty`` [n] (hartree/bohr, standard deviation of a component), and with that of members, as
        i-PI's ffcommittee reads them, ``committee_force`` [k][3n] (hartree/bohr) and ``committee_virial`` [k][9]
        (hartree, −∂E/∂strain)
    """

    energy: float
    forces: Array
    virial: Array
    extras: dict[str, Any]


class Evaluator:
    """A potential prepared for one kind of structure, evaluated for as many replicas as asked.

    Fragments, carried charges, electrodes, field and boundary are fixed by the template at the start. Between calls it
    remembers the last charges and shells (a warm start, matched by positions) and, for each replica, the last positions
    (so that wrapped atoms do not make the dipole jump).
    """

    def __init__(self, potential: Potential, template: Atoms, settings: Settings) -> None:
        for key in ["potentiostat"] * (settings.potentiostat is not None) + settings.scheduled:
            raise settings.refusal(key, f"{key} is for a run in i-PI; for single structures give numbers")
        self.potential = potential
        self.settings = settings
        self.prepared: Systems = prepare_frame(template, settings, potential)
        self._numbers = template.numbers.copy()
        self._pbc = self.prepared.pbc[0].cpu().numpy()
        reference = settings.polarization_reference
        self._unwrap = Unwrapper(self._pbc, None if reference is None else reference_positions(settings, template))
        self._solutions = Solutions()
        self._last: Response | None = None
        # i-PI turns the cells of files that are periodic throughout, and a field would not turn along
        self._cell = np.asarray(template.cell)
        self._oriented = not bool(self._pbc.any() or template.pbc.all())
        self._in_field = settings.in_field

    @classmethod
    def from_settings(cls, settings: Settings, template: Atoms) -> Evaluator:
        """Builds the potential that the settings describe and prepares it for the template.

        Raises InputError for settings or a structure that cannot be evaluated, with the fix.
        """
        return cls(build_potential(settings), template, settings)

    @property
    def n_atoms(self) -> int:
        """Atoms of the template."""
        return len(self._numbers)

    def evaluate(
        self,
        cells: Array,
        positions: Array,
        replicas: Sequence[int] | None = None,
        *,
        applied: Array | None = None,
        fields: Array | None = None,
        displacements: Array | None = None,
    ) -> list[Result]:
        """Energy, forces, virial and extras of ``b`` structures as i-PI sends them.

        Parameters
        ----------
        cells : [b, 3, 3] bohr, i-PI's matrix h (lattice vectors are columns), ignored along open directions
        positions : [b, n, 3] bohr
        replicas : b names of replicas, for continuous positions; None: the place in the batch
        applied : [b, electrodes] V or e, what each electrode is held at; None: as in the settings
        fields : [b, 3] V/Å; None: as in the settings
        displacements : [b, 3] V/Å, nan along axes that have a field; None: as in the settings

        Raises InputError when the number of atoms differs from the template's, VoltPIError for positions or an answer
        that are not finite, and what the potential raises.
        """
        cells, positions = np.asarray(cells, dtype=float), np.asarray(positions, dtype=float)
        b = len(positions)
        if positions.shape != (b, self.n_atoms, 3):
            raise InputError(
                f"positions have shape {positions.shape} but the template has {self.n_atoms} atoms: give the structure "
                "file that the run was started from"
            )
        if cells.shape != (b, 3, 3):
            raise InputError(f"cells have shape {cells.shape} for {b} structures: give one 3 x 3 matrix for each")
        rows = np.ascontiguousarray(cells.transpose(0, 2, 1)) * BOHR
        self._in_field = self._in_field or fields is not None or displacements is not None
        if self._in_field and not self._oriented:
            refuse_turned(self._cell, rows[0], self._pbc)
            self._oriented = True
        self._refuse_not_finite(rows, positions)
        keys = list(range(b)) if replicas is None else list(replicas)
        given = {"fields": fields, "applied": applied, "displacements": displacements}
        results: list[Result] = []
        for part in self._parts(b):
            own = {name: None if values is None else values[part] for name, values in given.items()}
            response = self.evaluate_systems(rows[part], positions[part] * BOHR, keys[part], **own)
            results += self._results(response, part, b)
        return results

    def evaluate_systems(
        self,
        cells: Array,
        positions: Array,
        replicas: Sequence[Hashable] | None = None,
        *,
        fields: Array | None = None,
        applied: Array | None = None,
        displacements: Array | None = None,
    ) -> Response:
        """The same in the potential's units: cells [b, 3, 3] (Å, rows), positions [b, n, 3] (Å), fields [b, 3] (V/Å).

        Without ``fields`` the template's field acts, without ``displacements`` (V/Å) and ``applied`` the settings'.
        Raises as ``evaluate`` does.
        """
        b = len(positions)
        keys: Sequence[Hashable] = range(b) if replicas is None else replicas
        self._refuse_not_finite(cells, positions)
        parts = []
        for i, key in enumerate(keys):
            cell = np.where(self._pbc[:, None], cells[i], 0.0)
            r = self._unwrap(positions[i], cell, key)
            changes = {"positions": self._tensor(r), "cell": self._tensor(cell[None])}
            if fields is not None:
                changes["field"] = self._tensor(fields[i : i + 1])
            if applied is not None:
                changes["applied"] = self._tensor(applied[i : i + 1])
            if displacements is not None:
                changes["displacement"] = self._tensor(displacements[i : i + 1])
            parts.append(self.prepared.replace(**changes))
        systems = parts[0] if b == 1 else Systems.join(parts)
        charges = self.potential.charges
        if systems.electrode is not None and charges is not None:  # other images may have come than the template's
            check_electrodes(systems, charges.electrodes, charges.finite_field)
        output = self.settings.output
        response = self.potential(
            systems,
            start=self._start(systems),
            born_charges=output.born_charges,
            polarizability=output.polarizability,
            smallest_curvature=output.smallest_curvature,
            capacitance=output.capacitance,
            uncertainty=output.uncertainty,
        )
        self._remember(systems, response)
        return response

    def _parts(self, b: int) -> list[slice]:
        """Which of ``b`` structures are evaluated at once: all on a GPU, on a CPU as many as its caches take well."""
        size = b if self.prepared.device.type != "cpu" else max(1, _ATOMS_AT_ONCE // self.n_atoms)
        return [slice(i, min(i + size, b)) for i in range(0, b, size)]

    def volume(self, cell: Array) -> float:
        """Å³ of a ``cell`` [3, 3] (Å) under the boundary that is evaluated; 0 where that is not periodic throughout."""
        return abs(float(np.linalg.det(cell))) if self._pbc.all() else 0.0

    def forget_start(self) -> None:
        """The next call is solved from scratch; positions are still followed."""
        self._solutions = Solutions()
        self._last = None

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.float64, device=self.prepared.device)

    def _refuse_not_finite(self, cells: Array, positions: Array) -> None:
        if not np.isfinite(positions).all():
            structure, atom = np.argwhere(~np.isfinite(positions))[0][:2]
            raise VoltPIError(
                f"the position of atom {atom}{_of(structure, len(positions))} is not a finite number: the run has "
                "exploded; restart from an earlier checkpoint with a shorter timestep"
            )
        bad = ~np.isfinite(cells[:, self._pbc]).all(axis=(1, 2))
        if bad.any():
            raise VoltPIError(
                f"the cell{_of(int(bad.argmax()), len(cells))} is not finite: the run has exploded; restart with a "
                "shorter timestep or barostat tau"
            )

    def _start(self, systems: Systems) -> Response | None:
        """A warm start from the solutions whose positions fit best, whichever replica they belong to."""
        if self._last is None:
            return None
        positions = _numpy(systems.positions).reshape(systems.n_systems, -1, 3)
        guess = torch.cat([self._solutions.guess(r) for r in positions])
        return dataclasses.replace(self._last, charges=guess[:, 0], shells=guess[:, 1:])

    def _remember(self, systems: Systems, response: Response) -> None:
        self._last = response
        positions = _numpy(systems.positions).reshape(systems.n_systems, -1, 3)
        answers = torch.cat([response.charges[:, None], response.shells], dim=1).detach()
        for r, answer in zip(positions, answers.split(self.n_atoms), strict=True):
            self._solutions.add(r, answer)

    def _results(self, response: Response, part: slice, all_structures: int) -> list[Result]:
        b = part.stop - part.start
        energy = _numpy(response.energy) / HARTREE
        forces = _numpy(response.forces).reshape(b, -1, 3) / (HARTREE / BOHR)
        virial = _numpy(response.virial) / HARTREE
        for name, value in (("energy", energy), ("forces", forces), ("virial", virial)):
            bad = ~np.isfinite(value.reshape(b, -1)).all(axis=1)
            if bad.any():
                which = _of(part.start + int(bad.argmax()), all_structures)
                raise VoltPIError(f"the {name}{which} came out as not a finite number: restart with a shorter timestep")
        extras = self.extras_of(response, b)
        return [Result(float(energy[i]), forces[i], virial[i], extras[i]) for i in range(b)]

    def extras_of(self, response: Response, b: int) -> list[dict[str, Any]]:
        """What goes to i-PI beside energy, forces and virial, for each of ``b`` structures."""
        columns: dict[str, Any] = {
            "dipole": _numpy(response.dipole) / BOHR,
            "residual": _numpy(response.residual) / HARTREE,
        }
        # one key a term: i-PI can print a flat key with <trajectory extra_type=...>, but not a nested one
        columns |= {f"energy_{name}": _numpy(e) / HARTREE for name, e in response.energy_terms.items()}
        if self._in_field:
            columns["field"] = _numpy(response.field) * BOHR / HARTREE
        if response.electrodes:
            columns |= _electrode_columns(response)
        if self.settings.output.charges:
            columns["charges"] = _numpy(response.charges).reshape(b, -1)
        if self.settings.output.shells:
            columns["shells"] = _numpy(response.shells).reshape(b, -1, 3) / BOHR
        if response.born_charges is not None:
            # [atom, dipole, displacement] -> row 3·atom + displacement, column dipole
            columns["BEC"] = _numpy(response.born_charges.transpose(1, 2)).reshape(b, -1, 3)
        if response.polarizability is not None:
            columns["polarizability"] = _numpy(response.polarizability) / BOHR**3
        if response.capacitance is not None:  # of two electrodes: what a volt moves from one to the other
            two = [k for k, e in enumerate(self.settings.electrodes) if e.potential is not None]
            c = _numpy(response.capacitance)[:, two][:, :, two]
            columns["electrode_capacitance"] = 0.25 * (c[:, 0, 0] - 2 * c[:, 0, 1] + c[:, 1, 1]) * HARTREE
        if response.smallest_curvature is not None:
            columns["smallest_curvature"] = _numpy(response.smallest_curvature) * BOHR**2 / HARTREE
        if response.members is not None:
            columns |= _member_columns(response.members, b, everything=self.settings.output.uncertainty == "members")
        return [{key: value[i].tolist() for key, value in columns.items()} for i in range(b)]


def _member_columns(members: Members, b: int, *, everything: bool) -> dict[str, Array]:
    """Extras of a committee; the members' forces and virials where ``everything`` is asked for."""
    columns = {
        "energy_uncertainty": _numpy(members.energy_uncertainty) / HARTREE,
        "committee_pot": _numpy(members.energies).T / HARTREE,
    }
    if members.forces_uncertainty is not None:
        columns["forces_uncertainty"] = _numpy(members.forces_uncertainty).reshape(b, -1) / (HARTREE / BOHR)
    if everything and members.forces is not None and members.virials is not None:
        k = len(members.energies)
        forces = _numpy(members.forces).reshape(k, b, -1).swapaxes(0, 1)
        columns["committee_force"] = forces / (HARTREE / BOHR)
        columns["committee_virial"] = _numpy(members.virials).reshape(k, b, 9).swapaxes(0, 1) / HARTREE
    return columns


def _electrode_columns(response: Response) -> dict[str, Array]:
    """Extras of the electrodes, [b, electrodes] or [b]."""
    charge, potential, residual = (
        np.stack([_numpy(electrode[key]) for electrode in response.electrodes.values()], axis=1)
        for key in ("charge", "potential", "residual")
    )
    return {
        "electrode_charges": charge,
        "electrode_potentials": potential / HARTREE,
        "electrode_residual": residual.max(axis=1) / HARTREE,
        "capacitive_energy": 0.5 * (charge * potential).sum(axis=1) / HARTREE,
    }


def _of(structure: int, b: int) -> str:
    """Which structure of a batch of ``b`` a message is about."""
    return f" of structure {structure}" if b > 1 else ""


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().numpy().astype(float, copy=False)
