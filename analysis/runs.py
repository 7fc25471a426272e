"""The files of one i-PI run, found by what they say, and the field that it ran in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voltpi.analysis.fields import Applied, applied_of
from voltpi.analysis.ipi_files import Properties, file_kind, read_properties
from voltpi.analysis.ipi_xml import output_start
from voltpi.analysis.run_inputs import simulations
from voltpi.potential.errors import InputError

__all__ = ["Run", "find_run", "find_runs"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """Outputs of one run: one file a bead for ``positions``, ``velocities``, ``forces`` and each of the ``extras``.

    ``applied``: the field and displacement that it was done in. ``vectors``: other trajectories of atoms, by name.
    """

    folder: Path
    properties: Properties | None
    positions: tuple[Path, ...]
    extras: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    applied: Applied = field(default_factory=Applied)
    velocities: tuple[Path, ...] = ()
    forces: tuple[Path, ...] = ()
    vectors: dict[str, tuple[Path, ...]] = field(default_factory=dict)

    @property
    def field(self) -> Array:
        """ε [3] in V/Å; 0 where the displacement is held, nan where it changes with time."""
        return self.applied.field

    @property
    def outputs(self) -> list[Path]:
        """All these files."""
        tables = [] if self.properties is None else [self.properties.path]
        vectors = [path for paths in self.vectors.values() for path in paths]
        trajectories = [*self.positions, *self.velocities, *self.forces, *vectors]
        return [*tables, *trajectories, *(path for paths in self.extras.values() for path in paths)]

    def times(self, steps: ArrayLike) -> Array:
        """Times (fs) of steps, from the properties file; outside its rows by the time step of the nearest two.

        Raises InputError without columns ``step`` and ``time``.
        """
        table = self.table()
        step, time = table.get("step"), table.get("time", "time", "femtosecond")
        x = np.asarray(steps, dtype=float)
        if len(step) < 2:
            if (x == step).all():
                return np.full(x.shape, time[0])
            raise InputError(f"{table.path}: only one step; let the run write at least two")
        # a run may end, or be killed, between two rows: the outputs have strides of their own
        before = np.minimum(x - step[0], 0.0) * (time[1] - time[0]) / (step[1] - step[0])
        after = np.maximum(x - step[-1], 0.0) * (time[-1] - time[-2]) / (step[-1] - step[-2])
        return np.interp(x, step, time) + before + after

    def after(self, skip: float) -> Callable[[int], bool]:
        """Whether a step is ``skip`` fs or more later than the first one that is asked about."""
        first: list[float] = []

        def late(step: int) -> bool:
            if skip <= 0.0:
                return True
            first[:] = first or [float(self.times(step))]
            return float(self.times(step)) >= first[0] + skip

        return late

    def table(self) -> Properties:
        """The properties. Raises InputError when the run wrote none."""
        if self.properties is None:
            raise InputError(f"{self.folder}: no properties file; add <properties> [step, time{{femtosecond}}, …]")
        return self.properties


def find_runs(paths: Iterable[Path], field: ArrayLike | None = None) -> list[Run]:
    """One run for each folder among ``paths``, or one for each system of its i-PI input; all files are one more run."""
    folders = [path for path in paths if path.is_dir()]
    files = [path for path in paths if not path.is_dir()]
    runs = [find_run(part, field) for folder in folders for part in _systems(folder)]
    return runs + ([find_run(files, field)] if files else [])


def _systems(folder: Path) -> list[Path] | list[list[Path]]:
    """The outputs of each system, where the i-PI input in a folder has several with prefixes of their own."""
    outputs = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(("#", "."))]
    for _, root in simulations(folder, [path.name for path in outputs]):
        starts = dict.fromkeys(output_start(root, system) for system in root.iterfind("system"))
        if len(starts) > 1:
            groups = [[path for path in outputs if path.name.startswith(start)] for start in starts]
            if any(groups):  # and not of an input beside it that did not run
                return [group for group in groups if group]
    return [folder]


def find_run(where: Path | list[Path], field: ArrayLike | None = None) -> Run:
    """A run from its folder, or from files.

    The field is the one given, or what the run's own files say (``voltpi.analysis.fields``). Raises InputError for a
    path that does not exist, a folder without outputs, several runs in one folder or a field that cannot be known.
    """
    paths = [where] if isinstance(where, Path) else where
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder; give a folder that i-PI ran in")
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    # names that begin with # are i-PI's backups of earlier runs
    candidates = [p for p in folder.iterdir() if not p.name.startswith(("#", "."))] if paths == [folder] else paths
    kinds: dict[str, list[Path]] = {}
    for path in sorted((p for p in candidates if p.is_file()), key=_bead_order):
        kinds.setdefault(file_kind(path), []).append(path)
    kinds.pop("", None)
    if not kinds:
        raise InputError(f"{folder}: no output of i-PI; give a folder that i-PI ran in, or its files")
    tables = [table for table in map(read_properties, kinds.get("properties", ())) if "step" in table.columns]
    for kind in _ONE_EACH:
        _refuse_several(folder, kind, {_BEAD.sub("", path.name) for path in kinds.get(kind, ())})
    _refuse_several(folder, "properties", {table.path.name for table in tables})
    return Run(
        folder=folder,
        properties=tables[0] if tables else None,
        positions=tuple(kinds.get("positions", ())),
        velocities=tuple(kinds.get("velocities", ())),
        forces=tuple(kinds.get("forces", ())),
        vectors={k: tuple(v) for k, v in kinds.items() if k in ("kinetic_cv", "r_gyration")},
        extras={k.removeprefix("extras:"): tuple(v) for k, v in kinds.items() if k.startswith("extras:")},
        applied=applied_of(folder, [path for group in kinds.values() for path in group], field),
    )


_ONE_EACH = (
    "positions",
    "velocities",
    "forces",
    *(f"extras:{name}" for name in ("dipole", "charges", "shells", "electrode_charges", "electrode_potentials")),
)


def _refuse_several(folder: Path, kind: str, outputs: set[str]) -> None:
    if len(outputs) > 1:
        raise InputError(
            f"{folder}: {kind.removeprefix('extras:')} in several outputs ({', '.join(sorted(outputs))}); "
            "give the files of one run instead of the folder"
        )


_BEAD = re.compile(r"_(\d+)(?=\.(?:extxyz|xyz)$|$)")


def _bead_order(path: Path) -> tuple[str, int]:
    match = _BEAD.search(path.name)
    return _BEAD.sub("", path.name), int(match[1]) if match else 0
