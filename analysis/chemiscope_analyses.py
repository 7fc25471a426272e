"""What ``voltpi analyze chemiscope`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voltpi.analysis.kinds import CHARGES, SKIP, Analysis, Option
from voltpi.analysis.output import checked_skip, output_stem

__all__ = ["CHEMISCOPE", "analyze_chemiscope"]


def analyze_chemiscope(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    frames: int = 200,
    skip: float = 0.0,
    bead: int = 0,
    charges: str | None = None,
) -> dict[str, Any]:
    """One run as a file for chemiscope (``voltpi.analysis.chemiscope_file``), which is the figure.

    ``frames``: the greatest number of frames; ``bead``: of a ring polymer; ``charges``: a file. Writes
    chemiscope.json.gz.
    """
    from voltpi.analysis.chemiscope_file import collect, write_chemiscope
    from voltpi.analysis.trajectory import one_run

    run = one_run(paths, "chemiscope", np.zeros(3))
    done = collect(run, frames=frames, skip=checked_skip(skip), bead=bead, charges=charges)
    target = output_stem(out, run.folder, "chemiscope").with_suffix(".json.gz")
    atoms = done.frames[0].get_chemical_formula("hill")
    write_chemiscope(done, target, run.folder.resolve().name, f"{atoms}, written by voltpi analyze chemiscope")
    report = [
        f"{len(done.frames)} frames of {atoms}",
        f"of structures: {', '.join(done.structures)}",
        f"of atoms: {', '.join(done.atoms) or 'nothing was written'}",
        f"arrows: {', '.join(done.arrows) or 'none'}",
        f"open {target.name} on chemiscope.org, or with chemiscope.show_input in a notebook",
    ]
    return {
        "frames": len(done.frames),
        "structure_properties": list(done.structures),
        "atom_properties": list(done.atoms),
        "arrows": list(done.arrows),
        "report": report,
        "figure": str(target),
        "files": [str(target)],
    }


CHEMISCOPE = (
    Analysis(
        "chemiscope",
        "a run as a file for chemiscope: structures, charges, shells, forces, dipole, properties",
        analyze_chemiscope,
        (
            Option("frames", "greatest number of frames", default=200, kind=int),
            SKIP,
            Option("bead", "of a ring polymer, counted from 0", default=0, kind=int),
            CHARGES,
        ),
    ),
)
