"""Where the time of one step goes: the shipped model `water` on 64, 128 and 216 molecules, term by term.

    python tests/benchmarks/step.py [--threads 1] [--repeats 5]

Prints milliseconds (best of the repeats) and the share of each term. "charges, warm" starts from the geometry before,
"charges, followed" from the parabola through three steps of 0.25 fs, as a run does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from ase import Atoms
from rich.console import Console
from rich.table import Table
from scipy.spatial.transform import Rotation

from voltpi.potential.checkpoints import load_potential
from voltpi.potential.systems import Systems


def box(n: int) -> Atoms:
    """n³ molecules at 1 g/cm³ on a grid, turned at random."""
    rng = np.random.default_rng(0)
    molecule = np.array([[0, 0, 0], [0.757, 0.586, 0], [-0.757, 0.586, 0]])
    sites = np.stack(np.meshgrid(*[np.arange(n)] * 3), -1).reshape(-1, 3) * 3.105
    turns = Rotation.random(n**3, random_state=rng).as_matrix()
    positions = np.concatenate([molecule @ turn.T + site for turn, site in zip(turns, sites, strict=True)])
    return Atoms("OH2" * n**3, positions, cell=[3.105 * n] * 3, pbc=True)


def best(call: Callable[[], object], repeats: int) -> float:
    """Shortest time of a call, ms; one call before is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def measure(n: int, repeats: int) -> list[tuple[str, float]]:
    """Times of the terms, ms."""
    potential = load_potential("water")
    network, charges, dispersion = potential._short_range, potential.charges, potential.dispersion
    assert charges is not None
    assert dispersion is not None
    start = potential.prepare(Systems.from_atoms(box(n), field=[0.1, 0.0, 0.0]))
    mass = torch.tensor([15.999, 1.008, 1.008]).repeat(n**3).double()
    velocity = torch.randn(start.positions.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    velocity *= torch.sqrt(0.00083145 * 300 / mass / 1e4)[:, None] * 10  # Å/fs
    path = [start.replace(positions=start.positions + 0.25 * k * velocity) for k in range(4)]
    a, b, c = (charges.solve(s) for s in path[:3])
    followed = (3 * (c.charges - b.charges) + a.charges, 3 * (c.shells - b.shells) + a.shells)
    last = path[3]
    return [
        ("network", best(lambda: network(last), repeats)),
        ("dispersion", best(lambda: dispersion(last), repeats)),
        ("charges, cold", best(lambda: charges.solve(last), repeats)),
        ("charges, warm", best(lambda: charges.solve(last, start=(c.charges, c.shells)), repeats)),
        ("charges, followed", best(lambda: charges.solve(last, start=followed), repeats)),
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("atoms", "term", "ms", "share of a step")
    for n in (4, 5, 6):
        rows = measure(n, options.repeats)
        step = sum(ms for name, ms in rows if name in ("network", "dispersion", "charges, followed"))
        for name, ms in rows:
            table.add_row(str(3 * n**3), name, f"{ms:.0f}", f"{ms / step:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
