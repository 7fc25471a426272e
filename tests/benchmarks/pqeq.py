"""Polarizable charge equilibration from 500 to 100 000 atoms: time, memory and achieved accuracy, as one table.

    python tests/benchmarks/pqeq.py [--structure FILE] [--sizes 500 1000 …] [--accuracy 1e-6] [--threads 1] [--batch]

Every row is a process of its own (peak memory is the process's, less what it had before the first call). *cold*: no
first guess, checked to be a minimum. *warm*: the next step of molecular dynamics at 300 K and 1 fs, its guess
extrapolated from the last three. *force error*: against accuracy 1e-11 (rms over rms; independent exact sums:
``tests/potential/test_accuracy.py``). *dense*: the published scheme beside it in the same run, two iterations of a
dense matrix with a tapered sum (``coulomb.method: taper``), not converged. ``--batch`` prints replicas of 64 H2O
instead: one call for all against one by one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read
from ase.units import fs, kB

from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.systems import Systems

SIZES = (500, 1000, 2000, 4000, 8000, 16000, 35000, 100000)
DENSE_UP_TO = 2500
EXACT_UP_TO = 9000


class Motion:
    """Atoms on independent sine waves, with the velocities of 300 K."""

    def __init__(self, atoms: Atoms, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shape = (len(atoms), 3)
        speed = np.sqrt(kB * 300 / atoms.get_masses())[:, None] * rng.normal(size=shape) * fs  # Å/fs
        self.frequency = rng.uniform(0.03, 0.12, shape)  # 1/fs
        self.phase = rng.uniform(0, 2 * np.pi, shape)
        self.amplitude = np.clip(np.sqrt(2) * speed / self.frequency, -0.15, 0.15)
        self.atoms = atoms

    def at(self, t: float) -> Systems:
        """The structure at time t (fs)."""
        moved = self.atoms.copy()
        moved.positions += self.amplitude * np.sin(self.frequency * t + self.phase)
        return Systems.from_atoms(moved)


def crystal(size: int) -> Atoms:
    """Rattled Li2O with about this many atoms in a nearly cubic cell."""
    unit = bulk("Li2O", "fluorite", a=4.62, cubic=True)
    edge = max(1, round((size / len(unit)) ** (1 / 3)))
    atoms = unit.repeat((max(1, round(size / len(unit) / edge**2)), edge, edge))
    # the fluorite builder puts the first element on the cation sites
    symbols = np.array(atoms.get_chemical_symbols())
    if (symbols == "Li").sum() < (symbols == "O").sum():
        atoms.set_chemical_symbols(np.where(symbols == "Li", "O", "Li").tolist())
    atoms.rattle(0.05, seed=1)
    return atoms


def replicated(path: str, size: int) -> Atoms:
    """A structure from a file, repeated to about this many atoms."""
    unit = read(path)
    assert isinstance(unit, Atoms)
    repeats = [1, 1, 1]
    while np.prod(repeats) * len(unit) * 1.42 < size:
        repeats[int(np.argmin(np.linalg.norm(unit.cell.array, axis=1) * repeats))] *= 2
    atoms = unit.repeat(repeats)
    atoms.rattle(0.02, seed=1)
    return atoms


def best(call: Callable[[], Any], repeats: int) -> float:
    """Shortest time of a call, s."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def peak() -> float:
    """Peak memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def row(atoms: Atoms, accuracy: float) -> dict[str, Any]:
    """Everything the table says about one structure."""
    model = PQEq(accuracy=accuracy)
    motion = Motion(atoms)
    model.solve(Motion(crystal(12)).at(0.0))  # compiles the kernels
    before = peak()
    repeats = 3 if len(atoms) < 20000 else 1
    path: list[tuple[torch.Tensor, torch.Tensor]] = []
    for t in (0.0, 1.0, 2.0):
        solved = model.solve(motion.at(t), start=path[-1] if path else None)
        path.append((solved.charges, solved.shells))
    a, b, c = path
    guess = tuple(3 * z - 3 * y + x for x, y, z in zip(a, b, c, strict=True))
    last = motion.at(3.0)
    cold = best(lambda: model.solve(last), repeats)
    warm = best(lambda: model.solve(last, start=guess), repeats)
    memory = peak() - before
    answer, followed = model.solve(last), model.solve(last, start=guess)
    out = {
        "atoms": len(atoms),
        "cold": cold,
        "warm": warm,
        "cold products": int(answer.iterations),
        "warm products": int(followed.iterations),
        "memory": memory,
        "residual": float(followed.residual),
    }
    if len(atoms) <= EXACT_UP_TO:
        exact = PQEq(accuracy=1e-11, tolerance=1e-10).solve(last, start=(answer.charges, answer.shells)).forces
        out["force error"] = float((answer.forces - exact).norm() / exact.norm())
    if len(atoms) <= DENSE_UP_TO:
        dense = TaperedPQEq()
        out["dense"] = best(lambda: dense.solve(last), 1)
    return out


def one_by_one(model: PQEq, structures: list[Systems]) -> None:
    """Solves every structure by itself."""
    for structure in structures:
        model.solve(structure)


def batch_rows(accuracy: float) -> None:
    """Replicas of one box of water, all at once and one by one."""
    molecule = Atoms("OH2", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]])
    box = Atoms(cell=np.eye(3) * 12.42, pbc=True)
    rng = np.random.default_rng(0)
    for k in np.ndindex(4, 4, 4):
        one = molecule.copy()
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate(3.105 * np.array(k))
        box += one
    model = PQEq(accuracy=accuracy)
    print(f"{'replicas':>9}{'one by one, ms':>16}{'batch, ms':>11}{'ratio':>7}{'largest difference, e':>23}")
    for count in (1, 4, 8, 16, 32):
        beads = []
        for seed in range(count):
            bead = box.copy()
            bead.rattle(0.03, seed=seed)
            beads.append(Systems.from_atoms(bead))
        joined = Systems.join(beads)
        model.solve(joined)
        single = torch.cat([model.solve(bead).charges for bead in beads])
        difference = (single - model.solve(joined).charges).abs().max()
        alone = best(partial(one_by_one, model, beads), 3)
        batch = best(partial(model.solve, joined), 3)
        print(f"{count:>9}{1e3 * alone:>16.0f}{1e3 * batch:>11.0f}{alone / batch:>7.1f}{float(difference):>23.1e}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structure")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--accuracy", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.batch:
        batch_rows(options.accuracy)
        return
    if options.one:
        atoms = replicated(options.structure, options.one) if options.structure else crystal(options.one)
        print(json.dumps(row(atoms, options.accuracy)))
        return
    print(
        f"{'atoms':>7}{'cold s':>9}{'warm s':>9}{'µs/atom':>9}{'products':>10}{'GB':>7}{'force error':>13}"
        f"{'dense s':>9}{'dense/warm':>11}"
    )
    for size in options.sizes:
        command = [sys.executable, __file__, "--one", str(size), "--accuracy", str(options.accuracy)]
        command += ["--threads", str(options.threads)]
        command += ["--structure", options.structure] if options.structure else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{size:>7}  failed: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
            continue
        r = json.loads(done.stdout)
        products = f"{r['cold products']}/{r['warm products']}"
        error = f"{r['force error']:.1e}" if "force error" in r else "-"
        dense = f"{r['dense']:.2f}" if "dense" in r else "-"
        ratio = f"{r['dense'] / r['warm']:.0f}" if "dense" in r else "-"
        print(
            f"{r['atoms']:>7}{r['cold']:>9.3f}{r['warm']:>9.3f}{1e6 * r['warm'] / r['atoms']:>9.1f}{products:>10}"
            f"{r['memory']:>7.2f}{error:>13}{dense:>9}{ratio:>11}",
            flush=True,
        )


if __name__ == "__main__":
    main()
