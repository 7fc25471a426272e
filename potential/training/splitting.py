"""Which structures are validated: decided by what they are, not by where they stand in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems
from voltpi.potential.training.dataset import Sample

__all__ = ["check_disjoint", "check_repeats", "split", "structure_hash"]


def structure_hash(systems: Systems, *, field: bool = True) -> str:
    """SHA-256 of numbers, positions, cell, periodicity (rounded to 1e-6 Å) and, with ``field``, field and charge."""
    digest = hashlib.sha256(systems.numbers.cpu().numpy().astype("<i8").tobytes())
    digest.update(systems.pbc.cpu().numpy().tobytes())
    for tensor in (systems.positions, systems.cell, *((systems.field, systems.net_charge) if field else ())):
        # + 0.0 turns −0.0 into 0.0
        digest.update((np.round(tensor.cpu().numpy().astype("<f8"), 6) + 0.0).tobytes())
    return digest.hexdigest()


def split(samples: Sequence[Sample], fraction: float, *, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(training, validation), decided for each structure by its hash, so that added data move nothing.

    The hash leaves out the field: one geometry under several fields stays on one side. Raises InputError where one
    side would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation fraction is {fraction}: give a number between 0 and 1")
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        digest = hashlib.sha256(f"{seed} {structure_hash(sample.systems, field=False)}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(sample)
    if not all(sides):
        raise InputError(
            f"validation fraction {fraction} of {len(samples)} frames leaves one side empty: "
            "change it or give a validation file"
        )
    return sides


def check_disjoint(train: Sequence[Sample], validation: Sequence[Sample]) -> None:
    """Raise InputError where a structure (with its field) is in both sets."""
    seen = {structure_hash(s.systems): s for s in train}
    for sample in validation:
        twin = seen.get(structure_hash(sample.systems))
        if twin is not None:
            raise InputError(
                f"{sample.path}, frame {sample.frame} is also in training ({twin.path}, frame {twin.frame}): "
                "remove it from one of them"
            )


def check_repeats(samples: Sequence[Sample], *, tolerance: float = 1e-3) -> int:
    """How many samples repeat another one, in the same field.

    Raises InputError where two of the same data set disagree in their energy by more than ``tolerance`` (eV/atom).
    """
    seen: dict[tuple[str, str], Sample] = {}
    repeats = 0
    for sample in samples:
        first = seen.setdefault((sample.dataset, structure_hash(sample.systems)), sample)
        repeats += first is not sample
        apart = abs(sample.energy - first.energy)
        if apart > tolerance * sample.systems.n_atoms:
            raise InputError(
                f"{sample.path}, frame {sample.frame}: is the structure of {first.path}, frame {first.frame}, but its "
                f"energy differs by {apart:.4g} eV: remove the wrong one, or give levels of theory different names"
            )
    return repeats
