"""Structure files in, ``Systems`` out: boundary, field, fragments and carried charges as the settings say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.data import covalent_radii
from ase.geometry import complete_cell
from ase.io import read as read_with_ase
from numpy.typing import NDArray

from voltpi.driver.selection import select
from voltpi.driver.settings import Settings
from voltpi.potential.errors import InputError

if TYPE_CHECKING:
    import torch

    from voltpi.potential.model import Potential
    from voltpi.potential.systems import Systems

__all__ = [
    "array_of",
    "frame_displacement",
    "frame_field",
    "periodic_directions",
    "prepare_frame",
    "read_structures",
    "reference_positions",
    "refuse_ipis_cell",
    "refuse_turned",
]

_IPI_CELL = re.compile(rb"#\s*CELL[\(\[\{]")
_GIVEN_PERIODIC = {
    "open": (False, False, False),
    "periodic": (True, True, True),
    "slab-x": (False, True, True),
    "slab-y": (True, False, True),
    "slab-z": (True, True, False),
    "finite-field-x": (True, True, True),
    "finite-field-y": (True, True, True),
    "finite-field-z": (True, True, True),
}
# cell vectors; atoms that span less were wrapped into the cell, but for a few that have left it since
_WRAPPED = 1.25
# Å; a gap between atoms that is wider than this is vacuum
_VACUUM = 3.5
# Å; i-PI reads no checkpoint whose cell has more than 1e-10 bohr below the diagonal
_BELOW_DIAGONAL = 5e-11


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
        dummies = np.flatnonzero(frame.numbers == 0)
        if len(dummies) and (len(frame) == 1 or dummies[0] != len(frame) - 1):
            raise InputError(
                f"{path}, frame {k}: atom {dummies[0]} is the dummy element X; give real elements only (and the X of a "
                "potentiostat last)"
            )
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


def frame_displacement(settings: Settings) -> NDArray[np.float64] | None:
    """The displacement [3] (V/Å) of settings at one time, nan along axes that have a field, or None."""
    return None if settings.displacement is None else np.array(settings.displacement, dtype=float)


def array_of(atoms: Atoms, name: str) -> np.ndarray | None:
    """A per-atom array of the structure file by its name, or None; ASE takes a column ``charges`` for results."""
    results = {} if atoms.calc is None else atoms.calc.results
    value = atoms.arrays.get(name, results.get(name))
    return None if value is None else np.asarray(value)


def prepare_frame(atoms: Atoms, settings: Settings, potential: Potential, frame: str = "the structure") -> Systems:
    """One structure as the potential takes it, with all that stays constant over a run filled in.

    Raises InputError for a boundary that the structure does not have, a field that is not well defined in it, arrays
    that are missing or do not fit, electrodes without atoms, that share some or that the cell cuts, and what
    ``potential.prepare`` refuses.
    """
    from voltpi.potential.neighbors import check_geometry
    from voltpi.potential.systems import Systems

    if (atoms.numbers == 0).any():
        raise InputError(
            f"{frame}: atom {int(np.argmin(atoms.numbers))} is the dummy element X, which is for runs with a "
            "potentiostat; remove it, or set potentiostat and run it in i-PI"
        )
    bare = _with_boundary(atoms, settings, frame)
    systems = Systems.from_atoms(
        bare,
        field=frame_field(atoms, settings, frame),
        net_charge=settings.charges.net_charge,
        device=potential.device,
    )
    check_geometry(systems)
    if settings.electrodes:
        systems = _with_electrodes(systems, atoms, settings, potential)
    electrode = np.full(len(atoms), -1) if systems.electrode is None else systems.electrode.cpu().numpy()
    _refuse_cut(atoms, bare.pbc, electrode, settings, frame)
    _refuse_cut_electrodes(atoms, electrode, settings, frame)
    if settings.charges.model == "fixed":
        fixed = _fixed_charges(atoms, electrode, settings, frame)
        systems = systems.replace(carried=systems.positions.new_tensor(fixed))
    elif settings.charges.carried != "auto":
        carried = _per_atom(atoms, settings.charges.carried, settings, "charges.carried", frame)
        systems = systems.replace(carried=systems.positions.new_tensor(carried))
    labels = None
    if settings.charges.fragments != "auto":
        labels = systems.numbers.new_tensor(_fragment_labels(atoms, settings, potential, frame))
    charges = atoms.get_initial_charges()
    prepared = potential.prepare(
        _in_field(systems, atoms, settings),
        labels=labels,
        initial_charges=systems.positions.new_tensor(charges) if charges.any() else None,
    )
    if settings.polarization_reference is not None:
        prepared = prepared.replace(origin=_origin(prepared, atoms, settings))
    if potential.charges is not None:
        try:
            potential.charges.check_field(prepared)
        except InputError as error:
            raise settings.refusal("field" if settings.displacement is None else "displacement", str(error)) from None
    return prepared


def _in_field(systems: Systems, atoms: Atoms, settings: Settings) -> Systems:
    """The structure with its displacement, and the cell at which that or a field is what the settings say."""
    held = frame_displacement(settings)
    if held is not None:
        systems = systems.replace(displacement=systems.positions.new_tensor(held)[None])
    if settings.field_under_strain == "reduced":
        systems = systems.replace(field_cell=systems.positions.new_tensor(np.asarray(atoms.cell))[None])
    return systems


def reference_positions(settings: Settings, atoms: Atoms) -> NDArray[np.float64]:
    """Fractional positions [n, 3] of ``polarization_reference``.

    Raises InputError where it has other atoms than ``atoms``, or no cell.
    """
    key, path = "polarization_reference", settings.polarization_reference
    assert path is not None
    reference = read_structures(path)[0]
    if not np.array_equal(reference.numbers, atoms.numbers):
        raise settings.refusal(
            key,
            f"{key}: {path} has {len(reference)} atoms ({reference.symbols}) but the structure has {len(atoms)} "
            f"({atoms.symbols}); give one with the same atoms in the same order",
        )
    cell = np.asarray(reference.cell)
    if abs(np.linalg.det(cell)) < 1e-6 or not periodic_directions(atoms, settings).all():
        raise settings.refusal(
            key, f"{key} counts M within a cell; structure and {path} must be periodic in all three directions"
        )
    return np.asarray(reference.get_scaled_positions(wrap=False))


def _origin(systems: Systems, atoms: Atoms, settings: Settings) -> torch.Tensor:
    """Where M counts from, [1, 3] (e, fractional): the carried charges at their places in the reference.

    Charges that feel the field themselves have the dipole of their fragments anyway; there, the fragments' charges at
    the places of their roots. Raises InputError where there are neither, and as ``reference_positions``.
    """
    from voltpi.potential.fragments import whole_positions

    cell = systems.cell[0]
    places = systems.positions.new_tensor(reference_positions(settings, atoms))
    if systems.carried is not None:
        whole = whole_positions(systems.replace(positions=places @ cell))
        return (systems.carried @ whole @ cell.inverse())[None]
    if systems.fragments is None or systems.fragment_charges is None or systems.parents is None:
        raise settings.refusal(
            "polarization_reference",
            "polarization_reference needs charges that stay: charges.response shells or frozen, charges.model fixed, "
            "or charges.conserve fragments; set one of them or remove it",
        )
    roots = (systems.parents == systems.parents.new_tensor(range(len(places)))).nonzero()[:, 0]
    return (systems.fragment_charges[systems.fragments[roots]] @ places[roots])[None]


def _with_electrodes(systems: Systems, atoms: Atoms, settings: Settings, potential: Potential) -> Systems:
    """The structure with its electrodes. Raises InputError for selections that fail, select nothing, or overlap."""
    from voltpi.potential.external.electrodes import assign_electrodes

    assert potential.charges is not None
    selected = []
    for k, electrode in enumerate(settings.electrodes):
        key = f"electrodes.{k}.atoms"
        try:
            selected.append(select(electrode.atoms, atoms))
        except InputError as error:
            raise settings.refusal(key, f"atoms of electrode {electrode.name}: {error}") from None
        if not len(selected[-1]):
            raise settings.refusal(
                key,
                f"electrodes.{electrode.name} has no atoms: its selection, {electrode.atoms}, is that of no atom of "
                "the start structure; correct it",
            )
    values = [e.value for e in settings.electrodes]
    try:
        return assign_electrodes(systems, potential.charges.electrodes, selected, values)
    except InputError as error:
        raise settings.refusal("electrodes", str(error)) from None


def _fixed_charges(atoms: Atoms, electrode: NDArray[np.int64], settings: Settings, frame: str) -> NDArray[np.float64]:
    """The charges [n] (e) of ``charges.model: fixed``, 0 on electrodes, whose charges are answers.

    Raises InputError where the file has none, gives electrodes some, or they do not add up without electrodes.
    """
    key = "charges.values"
    if (electrode >= 0).all():
        return np.zeros(len(atoms))
    values = _per_atom(atoms, settings.charges.values, settings, key, frame)
    charged = np.flatnonzero((electrode >= 0) & (values != 0))
    if len(charged):
        atom = int(charged[0])
        raise settings.refusal(
            key,
            f"{key} of {frame} give atom {atom} ({atoms.symbols[atom]}) {values[atom]:g} e, but it belongs to "
            f"electrode {settings.electrodes[electrode[atom]].name}, whose charges are solved for; write 0 there",
        )
    total, net = values.sum(), settings.charges.net_charge
    if not settings.electrodes and abs(total - net) > 1e-6:
        raise settings.refusal(
            key, f"{key} of {frame} add up to {total:g} e but charges.net_charge is {net:g} e; make them equal"
        )
    return values


def refuse_turned(own: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> None:
    """Raises InputError where ``cell`` is ``own`` turned ([3, 3], Å, rows): a field does not turn along.

    The vectors of open directions count only where no direction is periodic.
    """
    if pbc.any():
        own, cell = own[pbc], cell[pbc]
    same_shape = np.allclose(cell @ cell.T, own @ own.T, rtol=1e-4, atol=1e-4)
    if same_shape and not np.allclose(cell, own, atol=1e-3):
        raise InputError(
            "i-PI turns the cell of the start structure (a along x, b in the xy plane) but the field is given in the "
            "file's axes: write the structure with its cell in that orientation, and the field with it"
        )


def refuse_ipis_cell(atoms: Atoms, settings: Settings, *, cell_is_given: bool = False, driven: bool = False) -> None:
    """Raises InputError for a start structure in a cell that i-PI would turn, or could not use.

    i-PI turns what is periodic throughout, which is what ``refuse_turned`` would find at the first step of a run in a
    field. Other cells it leaves as they are, and then fails without a volume, or writes checkpoints that it cannot
    read. ``cell_is_given``: the input gives i-PI a cell of its own; ``driven``: and a field.
    """
    cell, throughout = np.asarray(atoms.cell), bool(atoms.pbc.all())
    static = settings.in_field and (not settings.field_from_frame or frame_field(atoms, settings).any())
    if throughout and (static or driven):
        mirror = [1, 1, np.sign(np.linalg.det(cell))]  # it turns, but does not mirror
        refuse_turned(cell, np.asarray(Cell.new(atoms.cell.cellpar())) * mirror, periodic_directions(atoms, settings))
    if cell_is_given:
        return
    wanted = "a along x, b in the xy plane, c out of it"
    if abs(np.linalg.det(cell) if throughout else cell.diagonal().prod()) < 1e-6:
        raise InputError(
            f"i-PI wants a cell with a volume, also where a direction is open, but that of the start structure is "
            f"{np.round(cell, 3).tolist()}: give it three vectors ({wanted}); along an open direction, any length "
            "beyond the atoms"
        )
    if not throughout and np.abs(cell[np.triu_indices(3, 1)]).max() > _BELOW_DIAGONAL:
        raise InputError(
            f"i-PI could not read its own checkpoints with the cell of the start structure, "
            f"{np.round(cell, 3).tolist()}: turn cell and atoms ({wanted}); i-PI does so itself only where the file "
            "is periodic throughout"
        )


def periodic_directions(atoms: Atoms, settings: Settings) -> NDArray[np.bool_]:
    """[3], along which cell vectors the structure is periodic: those of the file, or as ``coulomb.boundary`` says."""
    return np.array(_GIVEN_PERIODIC.get(settings.coulomb.boundary, atoms.pbc), dtype=bool)


def _with_boundary(atoms: Atoms, settings: Settings, frame: str) -> Atoms:
    """The bare structure under the boundary that is asked for; its cell has no vectors along open directions.

    Raises InputError where a cell vector is missing, or ``coulomb.method`` is not for this boundary.
    """
    pbc = periodic_directions(atoms, settings)
    missing = ["abc"[d] for d in range(3) if pbc[d] and atoms.cell.lengths()[d] < 1e-6]
    if missing:
        raise settings.refusal(
            "coulomb.boundary",
            f"{frame} is periodic but has no cell along {', '.join(missing)}; give the file a cell (Lattice=...), or "
            "set coulomb.boundary: open",
        )
    method = settings.coulomb.method
    if method == "direct" and pbc.any():
        raise settings.refusal(
            "coulomb.method", f"coulomb.method: direct is for open boundaries but {frame} is periodic; use auto"
        )
    if method == "direct":
        from voltpi.potential.electrostatics.ewald import DIRECT_BELOW

        if len(atoms) > DIRECT_BELOW:
            raise settings.refusal(
                "coulomb.method",
                f"coulomb.method: direct is for up to {DIRECT_BELOW} atoms but {frame} has {len(atoms)}; use auto, "
                "which sums them on a mesh, to coulomb.accuracy",
            )
    if method in ("ewald", "pme") and not pbc.any():
        raise settings.refusal(
            "coulomb.method",
            f"coulomb.method: {method} needs a periodic boundary but {frame} is open; use auto, which sums large "
            "clusters on a mesh by itself",
        )
    return Atoms(
        numbers=atoms.numbers, positions=atoms.positions, cell=np.where(pbc[:, None], atoms.cell, 0.0), pbc=pbc
    )


def _refuse_cut(
    atoms: Atoms, pbc: NDArray[np.bool_], electrode: NDArray[np.int64], settings: Settings, frame: str
) -> None:
    """Raises InputError where the file's cell cuts a molecule or slab along an open direction.

    That is, two atoms are bonded across an open face of the cell and nowhere else; ions count as bonded to what is no
    ion. Along a direction in which atoms reach far beyond one cell vector they were not wrapped into the cell. Two
    electrodes (``electrode`` [n], −1: none) back to back in a cell without vacuum are not bonded.
    """
    from voltpi.potential.fragments import BOND_TOLERANCE, IONS
    from voltpi.potential.neighbors import neighbor_list
    from voltpi.potential.systems import Systems

    cell = np.asarray(atoms.cell)
    if pbc.all() or not np.isfinite(cell).all():
        return
    full = complete_cell(cell)
    if np.linalg.svd(full, compute_uv=False).min() < 1e-4:  # no cell, whatever it is meant for
        return
    fractional = np.linalg.solve(full.T, atoms.positions.T).T
    closed = ~pbc & cell.any(axis=1) & (np.ptp(fractional, axis=0) < _WRAPPED)
    if not closed.any():
        return
    around = Systems.from_atoms(Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=full, pbc=pbc | closed))
    radii = covalent_radii[atoms.numbers]
    index, shift, vectors = (
        x.numpy() for x in neighbor_list(around, float(2 * BOND_TOLERANCE * radii.max()), half=True)
    )
    i, j = np.sort(index, axis=0)
    length = np.linalg.norm(vectors, axis=1)
    ion = np.isin(atoms.numbers, IONS)
    bonded = (length < BOND_TOLERANCE * (radii[i] + radii[j])) & ~(ion[i] & ion[j]) & (i != j)
    bonded &= (electrode[i] < 0) | (electrode[j] < 0) | (electrode[i] == electrode[j])
    across = (shift[:, closed] != 0).any(axis=1)
    pair = i * len(atoms) + j
    cut = bonded & across & ~np.isin(pair, pair[bonded & ~across])
    if not cut.any():
        return
    k = int(np.flatnonzero(cut)[length[cut].argmin()])
    d = int(np.flatnonzero(closed & (shift[k] != 0))[0])
    names = " and ".join(f"{atom} ({atoms.symbols[atom]})" for atom in (i[k], j[k]))
    raise settings.refusal(
        "coulomb.boundary",
        f"{frame} is cut by its cell: atoms {names} are bonded ({length[k]:.2f} Å) only across the open direction "
        f"{'abc'[d]}; {_mend(full, fractional, d)}, or lengthen that cell vector if the cut is meant",
    )


def _refuse_cut_electrodes(atoms: Atoms, electrode: NDArray[np.int64], settings: Settings, frame: str) -> None:
    """Raises InputError where a face of a finite-field cell is not behind the electrodes.

    The potential jumps at that face: it may cut no electrode, and what lies between the electrodes must lie between
    them in the cell too. Electrodes side by side along that direction are no capacitor across it.
    """
    boundary = settings.coulomb.boundary
    if not boundary.startswith("finite-field"):
        return
    d = "xyz".index(boundary[-1])
    along = np.linalg.solve(np.asarray(atoms.cell).T, atoms.positions.T)[d]
    metal = electrode[np.argsort(along % 1)]
    metal = metal[metal >= 0]
    if (metal != np.roll(metal, 1)).sum() > 2:
        raise settings.refusal(
            "coulomb.boundary",
            f"{frame}: the electrodes lie side by side along {'abc'[d]}, not one behind the other, but the potential "
            "jumps across that direction; use the finite-field direction that leads from one to the other",
        )
    problem = ""
    for k, part in enumerate(settings.electrodes):
        layers = np.sort(along[electrode == k])
        inside = np.diff(layers).max(initial=0.0)
        if inside > 1 - np.ptp(layers):  # it is more compact beyond the face
            problem = f"electrode {part.name} is cut by the face of the cell along {'abc'[d]}"
            break
    else:
        places, others = along[electrode >= 0], along[electrode < 0]
        between = ((others > places.min()) & (others < places.max())).sum()
        if 2 * between < len(others):
            problem = f"most atoms between the electrodes lie across the face of the cell along {'abc'[d]}"
    if not problem:
        return
    order = np.argsort(along % 1)
    label, place = electrode[order], along[order] % 1
    after = np.roll(label, -1)
    gaps = np.where((label >= 0) & (after >= 0) & (label != after), np.diff(place, append=place[0] + 1), 0.0)
    widest = int(gaps.argmax())
    fix = f"put that face behind the electrodes, or use slab-{boundary[-1]}"
    if gaps[widest] > 0:
        shift = _shift_to_face(place, gaps, widest)
        fix = f"shift all atoms along {'abc'[d]} by {shift:.3f} of that cell vector and wrap them into the cell"
    raise settings.refusal("coulomb.boundary", f"{frame}: {problem}, where the potential jumps; {fix}")


def _shift_to_face(along: NDArray[np.float64], gaps: NDArray[np.float64], k: int) -> float:
    """What brings the middle of the k-th gap, which follows ``along[k]``, to the face of the cell (fractional)."""
    return float((1 - along[k] - 0.5 * gaps[k]) % 1)


def _mend(cell: NDArray[np.float64], fractional: NDArray[np.float64], d: int) -> str:
    """What brings the atoms together along cell vector ``d``, in which they are cut."""
    along = np.sort(fractional[:, d] % 1)
    gaps = np.diff(along, append=along[0] + 1)
    widest = int(gaps.argmax())
    if gaps[widest] / np.linalg.norm(np.linalg.inv(cell)[:, d]) < _VACUUM:
        return "put molecules that the cell cuts together, choose a boundary that is periodic there"
    shift = _shift_to_face(along, gaps, widest)
    return f"shift the slab along {'abc'[d]} by {shift:.2f} of that cell vector and wrap it into the cell"


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
        named = array_of(atoms, value)
        if named is None:
            held = ", ".join(atoms.arrays)
            raise settings.refusal(
                key,
                f"{key} is '{value}' but {frame} has no such per-atom array (it has {held}); add it to the file, or "
                f"give {key} the name of another",
            )
        array = named
    else:
        array = np.asarray(value)
    if array.shape != (len(atoms),) or not np.issubdtype(array.dtype, np.number):
        raise settings.refusal(
            key, f"{key} has shape {array.shape} but {frame} has {len(atoms)} atoms; give one number an atom"
        )
    return array.astype(float)
