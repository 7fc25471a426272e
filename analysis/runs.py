"""The files of one i-PI run, found by what they say, and the field that it ran in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from voltpi.analysis.ipi_files import Properties, file_kind, read_properties
from voltpi.potential.errors import InputError

__all__ = ["Run", "find_run", "find_runs"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """Outputs of one run: one file a bead for ``positions`` and each of the ``extras``; ``field`` [3] in V/Å."""

    folder: Path
    properties: Properties | None
    positions: tuple[Path, ...]
    extras: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    field: Array = field(default_factory=lambda: np.zeros(3))

    def times(self, steps: ArrayLike) -> Array:
        """Times (fs) of steps, from the properties file. Raises InputError without columns ``step`` and ``time``."""
        table = self.table()
        step, time = table.get("step"), table.get("time", "time", "femtosecond")
        if len(step) < 2:
            raise InputError(f"{table.path}: only one step; let the run write at least two")
        return np.interp(np.asarray(steps, dtype=float), step, time)

    def table(self) -> Properties:
        """The properties. Raises InputError when the run wrote none."""
        if self.properties is None:
            raise InputError(f"{self.folder}: no properties file; add <properties> [step, time{{femtosecond}}, …]")
        return self.properties


def find_runs(paths: Iterable[Path], field: ArrayLike | None = None) -> list[Run]:
    """One run for each folder among ``paths``; all files together are one more run."""
    folders = [path for path in paths if path.is_dir()]
    files = [path for path in paths if not path.is_dir()]
    runs = [find_run(folder, field) for folder in folders]
    return runs + ([find_run(files, field)] if files else [])


def find_run(where: Path | list[Path], field: ArrayLike | None = None) -> Run:
    """A run from its folder, or from files.

    The field is the one given, or ``field`` of settings.yaml in the folder. Raises InputError for a path that does not
    exist, a folder without outputs, several runs in one folder or a field that cannot be known.
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
    for kind in ("positions", "extras:dipole", "extras:charges"):
        _refuse_several(folder, kind, {_BEAD.sub("", path.name) for path in kinds.get(kind, ())})
    _refuse_several(folder, "properties", {table.path.name for table in tables})
    return Run(
        folder=folder,
        properties=tables[0] if tables else None,
        positions=tuple(kinds.get("positions", ())),
        extras={k.removeprefix("extras:"): tuple(v) for k, v in kinds.items() if k.startswith("extras:")},
        field=_field_of(folder, field),
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


def _field_of(folder: Path, given: ArrayLike | None) -> Array:
    settings = folder / "settings.yaml"
    value: Any = given
    source = "--field"
    if value is None:
        if not settings.is_file():
            raise InputError(f"{folder}: no settings.yaml that says the field; give --field X Y Z in V/Å")
        source = str(settings)
        try:
            content = yaml.safe_load(settings.read_text())
        except yaml.YAMLError as error:
            raise InputError(f"{settings}: not valid YAML ({' '.join(str(error).split())}); correct it") from None
        value = (content or {}).get("field", [0.0, 0.0, 0.0]) if isinstance(content, dict | None) else content
    try:
        vector = np.array([float(x) for x in value])
    except (TypeError, ValueError):
        vector = np.zeros(0)
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise InputError(f"{source}: field is {value!r}; give three numbers in V/Å, such as [0.1, 0, 0]")
    return vector
