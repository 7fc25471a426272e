"""Structure files in, ``Systems`` out: boundary, field, fragments and carried charges as the settings say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.io import read as read_with_ase
from numpy.typing import NDArray

from voltpi.driver.settings import Settings
from voltpi.potential.errors import InputError

if TYPE_CHECKING:
    from voltpi.potential.model import Potential
    from voltpi.potential.systems import Systems

__all__ = ["frame_field", "prepare_frame", "read_structures", "refuse_ipis_orientation", "refuse_turned"]

_IPI_CELL = re.compile(rb"#\s*CELL[\(\[\{]")


def read_structures(path: str | Path) -> list[Atoms]:
    """Every frame of a structure file: anything ASE reads, and i-PI's own XYZ (``# CELL(abcABC): …``).

    Raises InputError where the file is missing, is not a structure, is empty or names an unknown element.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a structure file")
    try:
        with path.open("rb") as handle:
            head = handle.read(4096)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such structure file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from None
    try:
        frames = _read_ipi(path) if _IPI_CELL.search(head) else read_with_ase(path, index=":")
    except KeyError as error:
        raise InputError(f"{path}: {error} is not a known element or column; check the structure") from None
    except Exception as error:  # each of ASE's readers raises its own kind
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as a structure ({text}); give extended XYZ or another ASE format"
        ) from None
    frames = frames if isinstance(frames, list) else [frames]
    if not frames or any(len(frame) == 0 for frame in frames):
        raise InputError(f"{path}: holds no atoms; give a structure file with at least one frame")
    for k, frame in enumerate(frames):
        if (frame.numbers == 0).any():
            atom = int(np.argmax(frame.numbers == 0))
            raise InputError(f"{path}, frame {k}: atom {atom} is the dummy element X; give real elements only")
    return frames


def _read_ipi(path: Path) -> list[Atoms]:
    """i-PI's dialect with its own reader and units: bohr unless the comment says otherwise, always with a cell."""
    from ipi.utils.io import iter_file  # slow to import, and few files need it
    from ipi.utils.units import unit_to_user

    frames = []
    with path.open() as handle:
        for content in iter_file("xyz", handle):
            atoms, h = content["atoms"], np.array(content["cell"].h, dtype=float)
            positions = unit_to_user("length", "angstrom", np.array(atoms.q, dtype=float)).reshape(-1, 3)
            cell = unit_to_user("length", "angstrom", h).T
            frames.append(Atoms([str(name) for name in atoms.names], positions=positions, cell=cell, pbc=True))
    return frames


def frame_field(atoms: Atoms, settings: Settings, frame: str = "the structure") -> NDArray[np.float64]:
    """The uniform field [3] (V/Å) that this frame feels.

    Raises InputError with ``field: from-frame`` where the frame brings no ``electric_field`` of three finite numbers.
    """
    if not settings.field_from_frame:
        return np.asarray(settings.field, dtype=float)
    value = atoms.info.get("electric_field")
    if value is None:
        raise settings.refusal(
            "field",
            f"field is from-frame but {frame} has no electric_field in its info; add it (V/Å) or give field: [x, y, z]",
        )
    try:
        field = np.asarray(value, dtype=float).reshape(-1)
    except (TypeError, ValueError):
        field = np.full(0, np.nan)
    if field.shape != (3,) or not np.isfinite(field).all():
        raise InputError(f"electric_field of {frame} is {value!r}; give three finite numbers (V/Å)")
    return field


def prepare_frame(atoms: Atoms, settings: Settings, potential: Potential, frame: str = "the structure") -> Systems:
    """One structure as the potential takes it, with all that stays constant over a run filled in.

    Raises InputError for a boundary that the structure does not have, a field that is not well defined in it, arrays
    that are missing or do not fit, and what ``potential.prepare`` refuses.
    """
    from voltpi.potential.systems import Systems

    systems = Systems.from_atoms(
        _with_boundary(atoms, settings, frame),
        field=frame_field(atoms, settings, frame),
        net_charge=settings.charges.net_charge,
        device=potential.device,
    )
    if settings.charges.carried != "auto":
        carried = _per_atom(atoms, settings.charges.carried, settings, "charges.carried", frame)
        systems = systems.replace(carried=systems.positions.new_tensor(carried))
    labels = None
    if settings.charges.fragments != "auto":
        labels = systems.numbers.new_tensor(_fragment_labels(atoms, settings, potential, frame))
    charges = atoms.get_initial_charges()
    prepared = potential.prepare(
        systems, labels=labels, initial_charges=systems.positions.new_tensor(charges) if charges.any() else None
    )
    if potential.charges is not None:
        try:
            potential.charges.check_field(prepared)
        except InputError as error:
            raise settings.refusal("field", str(error)) from None
    return prepared


def refuse_turned(own: NDArray[np.float64], cell: NDArray[np.float64]) -> None:
    """Raises InputError where ``cell`` [3, 3] (Å, rows) is ``own`` turned: a field does not turn along."""
    same_shape = np.allclose(cell @ cell.T, own @ own.T, rtol=1e-4, atol=1e-4)
    if same_shape and not np.allclose(cell, own, atol=1e-3):
        raise InputError(
            "i-PI turns the cell of the start structure (a along x, b in the xy plane) but the field is given in the "
            "file's axes: write the structure with its cell in that orientation, and the field with it"
        )


def refuse_ipis_orientation(atoms: Atoms, settings: Settings) -> None:
    """What ``refuse_turned`` would find at the first step of a run: i-PI turns the cell of a periodic file on reading.

    Raises InputError for a start structure that is periodic throughout and in a field, in a cell that i-PI would turn.
    """
    bare = _with_boundary(atoms, settings, "the structure")
    if atoms.pbc.all() and bare.pbc.all() and frame_field(atoms, settings).any():
        own = np.asarray(bare.cell)
        turned = np.asarray(Cell.new(bare.cell.cellpar())) * [1, 1, np.sign(np.linalg.det(own))]  # it does not mirror
        refuse_turned(own, turned)


def _with_boundary(atoms: Atoms, settings: Settings, frame: str) -> Atoms:
    """The structure with the periodicity that ``coulomb.boundary`` and ``coulomb.method`` ask for."""
    bare = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    boundary, method = settings.coulomb.boundary, settings.coulomb.method
    if boundary == "open":
        bare.set_pbc(False)
    elif boundary == "periodic":
        bare.set_pbc(True)
    if bare.pbc.any() and (bare.cell.lengths()[bare.pbc] < 1e-6).any():
        fix = "give the file a cell (Lattice=...), or set coulomb.boundary: open"
        raise settings.refusal("coulomb.boundary", f"{frame} is periodic but has no cell; {fix}")
    if bare.pbc.any() and method == "direct":
        raise settings.refusal(
            "coulomb.method", f"coulomb.method: direct is for open boundaries but {frame} is periodic; use auto"
        )
    if not bare.pbc.all() and method == "ewald":
        raise settings.refusal(
            "coulomb.method", f"coulomb.method: ewald needs a periodic boundary but {frame} is open; use auto"
        )
    if not bare.pbc.any():
        bare.set_cell(None)
    return bare


def _fragment_labels(atoms: Atoms, settings: Settings, potential: Potential, frame: str) -> NDArray[np.int64]:
    if getattr(potential.charges, "conserve", None) != "fragments":
        raise settings.refusal(
            "charges.fragments",
            "charges.fragments needs charges.conserve: fragments; set it or remove charges.fragments",
        )
    values = _per_atom(atoms, settings.charges.fragments, settings, "charges.fragments", frame)
    if (values != np.rint(values)).any():
        raise settings.refusal(
            "charges.fragments", f"charges.fragments of {frame} are not whole numbers; give integer labels"
        )
    return values.astype(np.int64)


def _per_atom(
    atoms: Atoms, value: str | tuple[float, ...], settings: Settings, key: str, frame: str
) -> NDArray[np.float64]:
    """A per-atom array [n] from the settings or, by name, from the structure file."""
    if isinstance(value, str):
        if value not in atoms.arrays:
            held = ", ".join(atoms.arrays)
            raise settings.refusal(key, f"{key} is '{value}' but {frame} has no such per-atom array (it has {held})")
        array = np.asarray(atoms.arrays[value])
    else:
        array = np.asarray(value)
    if array.shape != (len(atoms),) or not np.issubdtype(array.dtype, np.number):
        raise settings.refusal(
            key, f"{key} has shape {array.shape} but {frame} has {len(atoms)} atoms; give one number an atom"
        )
    return array.astype(float)
