"""A batch of structures as flat tensors: what every energy term receives.

Replicas of one ring polymer are one batch. Everything that belongs to a structure and is not a result
travels here (positions, cell, field, fragments, carried charges), so no term needs to ask another.

Units: Å, e, V/Å.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from voltpi.potential.errors import InputError

__all__ = ["Systems"]


@dataclass(frozen=True)
class Systems:
    """``b`` structures with ``n`` atoms in all.

    Attributes
    ----------
    positions : [n, 3] float64, Å (not wrapped: they enter the dipole as they are)
    numbers : [n] int64, atomic numbers
    cell : [b, 3, 3] float64, Å, rows are lattice vectors (zeros in directions without a cell)
    pbc : [b, 3] bool
    batch : [n] int64, the structure each atom belongs to, ascending
    field : [b, 3] float64, V/Å, uniform external field
    net_charge : [b] float64, e
    fragments : [n] int64 or None, fragment label of each atom, unique over the whole batch, 0 … n_fragments − 1
    fragment_charges : [n_fragments] float64 or None, e, the charge each fragment keeps
    parents : [n] int64 or None, an atom's bonded neighbour nearer to the root of its fragment (a root: itself);
        following it makes the fragment whole
    carried : [n] float64 or None, e, the charges that enter the dipole when ``response`` is not ``all``
    electrode : [n] int64 or None, the electrode an atom belongs to; −1: none
    applied : [b, electrodes] float64 or None, V of an electrode at a potential, e of one at a charge
    displacement : [b, 3] float64 or None, V/Å, the electric displacement D = ε + 4π k_e M/V that is held; NaN along
        axes where ``field`` is
    field_cell : [b, 3, 3] float64 or None, Å, the cell at which ``field`` and ``displacement`` are what they say: under
        strain the voltages ε·a across the cell and the flux of D through its faces stay; None: ε and D themselves stay
    origin : [b, 3] float64 or None, e, fractional: M counts from ``origin @ cell`` (Σ q̄_i s_i of a reference structure)
    """

    positions: Tensor
    numbers: Tensor
    cell: Tensor
    pbc: Tensor
    batch: Tensor
    field: Tensor
    net_charge: Tensor
    fragments: Tensor | None = None
    fragment_charges: Tensor | None = None
    parents: Tensor | None = None
    carried: Tensor | None = None
    electrode: Tensor | None = None
    applied: Tensor | None = None
    displacement: Tensor | None = None
    field_cell: Tensor | None = None
    origin: Tensor | None = None

    @classmethod
    def from_atoms(
        cls,
        atoms: Atoms | Sequence[Atoms],
        *,
        field: Sequence[float] | np.ndarray | None = None,
        net_charge: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> Systems:
        """Batch of ASE structures; one ``field`` [3] (V/Å) for all, or one per structure [b, 3].

        Raises ValueError where there is no structure, InputError where one has no atoms.
        """
        frames = [atoms] if isinstance(atoms, Atoms) else list(atoms)
        if not frames:
            raise ValueError("no structure given: a batch needs at least one")
        empty = [k for k, a in enumerate(frames) if len(a) == 0]
        if empty:
            raise InputError(f"structure {empty[0]} has no atoms: give at least one, or leave the structure out")
        b = len(frames)
        eps = np.zeros((b, 3)) if field is None else np.broadcast_to(np.asarray(field, dtype=float), (b, 3))
        as_float = {"dtype": torch.float64, "device": device}
        return cls(
            positions=torch.tensor(np.concatenate([a.get_positions() for a in frames]), **as_float),
            numbers=torch.tensor(np.concatenate([a.numbers for a in frames]), dtype=torch.int64, device=device),
            cell=torch.tensor(np.stack([np.asarray(a.cell) for a in frames]), **as_float),
            pbc=torch.tensor(np.stack([a.pbc for a in frames]), dtype=torch.bool, device=device),
            batch=torch.repeat_interleave(
                torch.arange(b, device=device), torch.tensor([len(a) for a in frames], device=device)
            ),
            field=torch.tensor(np.ascontiguousarray(eps), **as_float),
            net_charge=torch.full((b,), float(net_charge), **as_float),
        )

    @property
    def n_systems(self) -> int:
        """Number of structures in the batch."""
        return self.cell.shape[0]

    @property
    def n_atoms(self) -> int:
        """Number of atoms over all structures."""
        return self.positions.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.positions.device

    @property
    def symbols(self) -> list[str]:
        """Chemical symbols [n]."""
        return [chemical_symbols[z] for z in self.numbers.tolist()]

    def counts(self) -> list[int]:
        """Atoms of each structure [b]."""
        return torch.bincount(self.batch, minlength=self.n_systems).tolist()

    def name(self, *atoms: int) -> str:
        """Some atoms of one structure for a message: ``atom 3 (O)``, ``atoms 3 (O) and 4 (H)``.

        Atoms are counted within their structure; a batch of several adds ``of structure 1``.
        """
        b = int(self.batch[atoms[0]])
        first = int((self.batch < b).sum())
        names = " and ".join(f"{k - first} ({chemical_symbols[int(self.numbers[k])]})" for k in atoms)
        where = f" of structure {b}" if self.n_systems > 1 else ""
        return f"{'atom' if len(atoms) == 1 else 'atoms'} {names}{where}"

    def replace(self, **changes: Tensor | None) -> Systems:
        """Copy with some tensors exchanged."""
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Systems:
        """The same batch on another device."""
        tensors = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def take(self, atoms: Tensor) -> Systems:
        """Some atoms [m] (ascending), of the same structures; fragments are left behind."""
        return Systems(
            positions=self.positions[atoms],
            numbers=self.numbers[atoms],
            cell=self.cell,
            pbc=self.pbc,
            batch=self.batch[atoms],
            field=self.field,
            net_charge=self.net_charge,
        )

    def split(self) -> list[Systems]:
        """The structures one by one, in order."""
        parts: list[Systems] = []
        first_atom = 0
        for i, count in enumerate(self.counts()):
            atoms = slice(first_atom, first_atom + count)
            fragments = fragment_charges = None
            if self.fragments is not None and self.fragment_charges is not None:
                labels, fragments = torch.unique(self.fragments[atoms], return_inverse=True)
                fragment_charges = self.fragment_charges[labels]
            parts.append(
                Systems(
                    positions=self.positions[atoms],
                    numbers=self.numbers[atoms],
                    cell=self.cell[i : i + 1],
                    pbc=self.pbc[i : i + 1],
                    batch=torch.zeros(count, dtype=torch.int64, device=self.device),
                    field=self.field[i : i + 1],
                    net_charge=self.net_charge[i : i + 1],
                    fragments=fragments,
                    fragment_charges=fragment_charges,
                    parents=None if self.parents is None else self.parents[atoms] - first_atom,
                    carried=None if self.carried is None else self.carried[atoms],
                    electrode=None if self.electrode is None else self.electrode[atoms],
                    applied=None if self.applied is None else self.applied[i : i + 1],
                    displacement=None if self.displacement is None else self.displacement[i : i + 1],
                    field_cell=None if self.field_cell is None else self.field_cell[i : i + 1],
                    origin=None if self.origin is None else self.origin[i : i + 1],
                )
            )
            first_atom += count
        return parts

    @classmethod
    def join(cls, parts: Sequence[Systems]) -> Systems:
        """One batch of several; what is optional must be present in all or in none, but for displacement and origin.

        Raises ValueError where only some parts have fragments, carried charges, electrodes or the cell of a field.
        """
        for name in ("fragments", "parents", "carried", "electrode", "field_cell"):
            if len({getattr(p, name) is None for p in parts}) > 1:
                raise ValueError(f"cannot join structures of which only some have {name}: give it to all or to none")
        first_atom = np.cumsum([0] + [p.n_atoms for p in parts])
        first_system = np.cumsum([0] + [p.n_systems for p in parts])
        first_fragment = np.cumsum([0] + [0 if p.fragment_charges is None else len(p.fragment_charges) for p in parts])

        def cat(name: str) -> Tensor:
            return torch.cat([getattr(p, name) for p in parts])

        def offset(name: str, first: np.ndarray) -> Tensor | None:
            if getattr(parts[0], name) is None:
                return None
            return torch.cat([getattr(p, name) + int(o) for p, o in zip(parts, first[:-1], strict=True)])

        def filled(name: str, absent: float) -> Tensor | None:
            values = [getattr(p, name) for p in parts]
            if all(v is None for v in values):
                return None
            return torch.cat(
                [torch.full_like(p.field, absent) if v is None else v for v, p in zip(values, parts, strict=True)]
            )

        batch = offset("batch", first_system)
        assert batch is not None
        return cls(
            positions=cat("positions"),
            numbers=cat("numbers"),
            cell=cat("cell"),
            pbc=cat("pbc"),
            batch=batch,
            field=cat("field"),
            net_charge=cat("net_charge"),
            fragments=offset("fragments", first_fragment),
            fragment_charges=cat("fragment_charges") if parts[0].fragments is not None else None,
            parents=offset("parents", first_atom),
            carried=cat("carried") if parts[0].carried is not None else None,
            electrode=cat("electrode") if parts[0].electrode is not None else None,
            applied=cat("applied") if parts[0].applied is not None else None,
            displacement=filled("displacement", torch.nan),
            field_cell=cat("field_cell") if parts[0].field_cell is not None else None,
            origin=filled("origin", 0.0),
        )
