"""Files as i-PI writes them, from structures and extras that a test makes up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

BOHR = 0.529177210903


def write_run(
    folder: Path,
    frames: Sequence[Atoms],
    extras: Mapping[str, Sequence[np.ndarray]],
    *,
    field: Sequence[float] | None = None,
    stride: int = 4,
) -> Path:
    """run.out, run.pos_0.extxyz and one file for each of the ``extras`` (in atomic units), at 0.5 fs a step."""
    folder.mkdir(parents=True)
    steps = [stride * k for k in range(len(frames))]
    rows = [f"{step} {0.5 * step} 300.0" for step in steps]
    header = [
        "# column 1 --> step : step",
        "# column 2 --> time{femtosecond} : time",
        "# column 3 --> temperature{kelvin} : T",
    ]
    (folder / "run.out").write_text("\n".join([*header, *rows]) + "\n")
    for step, atoms in zip(steps, frames, strict=True):
        copy = atoms.copy()
        copy.info = {"ipi_comment": f"Step: {step:11d}  Bead:       0 positions{{ase}}  cell{{ase}}"}
        copy.write(folder / "run.pos_0.extxyz", format="extxyz", append=True)
    for name, values in extras.items():
        text = ""
        for step, value in zip(steps, values, strict=True):
            text += f" #EXTRAS({name})# Step: {step:11d}\n"
            text += "".join(" ".join(f"{x:.15e}" for x in row) + "\n" for row in np.atleast_2d(value))
        (folder / f"run.{name}_0").write_text(text)
    if field is not None:
        (folder / "settings.yaml").write_text(f"model: none\nfield: {list(field)}\n")
    return folder
