"""Files as i-PI writes them, made from arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

BOHR = 0.529177210903


def write_run(
    folder: Path,
    symbols: Sequence[str],
    positions: np.ndarray,
    cells: np.ndarray,
    spacing: float = 1.0,
    temperature: float = 300.0,
    extras: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A run whose frames ``positions`` [f, n, 3] (Å) are ``spacing`` fs apart, in ``cells`` [3] or [f, 3] (Å).

    ``extras`` [f, …], in atomic units, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.broadcast_to(cells, (len(positions), 3))
    rows = "".join(f"{k} {k * spacing!r} {temperature!r}\n" for k in range(len(positions)))
    (folder / "run.out").write_text(
        "# column 1 --> step : \n# column 2 --> time{femtosecond} : \n# column 3 --> temperature{kelvin} : \n" + rows
    )
    write_beads(folder, symbols, [positions], lengths)
    for name, values in (extras or {}).items():
        records = []
        for k, value in enumerate(values):
            matrix = np.atleast_2d(value)
            lines = "\n".join(" ".join(repr(float(x)) for x in row) for row in matrix)
            records.append(f"#EXTRAS({name})# Step:  {k}  Bead:  0\n{lines}\n")
        (folder / f"run.{name}_0").write_text("".join(records))
    return folder


def write_beads(folder: Path, symbols: Sequence[str], beads: Sequence[np.ndarray], lengths: np.ndarray) -> None:
    """One trajectory of positions for each of ``beads`` [f, n, 3]."""
    for bead, positions in enumerate(beads):
        text = []
        for k, (frame, edges) in enumerate(zip(positions, lengths, strict=True)):
            cell = " ".join(f"{x:.10f}" for x in edges)
            text.append(
                f"{len(symbols)}\n# CELL(abcABC): {cell} 90.0 90.0 90.0 Step: {k} Bead: {bead} "
                "positions{angstrom} cell{angstrom}\n"
            )
            text += [f"{s} {r[0]:.10e} {r[1]:.10e} {r[2]:.10e}\n" for s, r in zip(symbols, frame, strict=True)]
        (folder / f"run.pos_{bead}.xyz").write_text("".join(text))
