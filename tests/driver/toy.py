"""A small potential with the interface of Evaluator, and a driver program around it: protocol tests need no model.

``python toy.py --unix NAME --socket-prefix P [--die-at N] …`` serves it; ``--help`` lists the ways to go wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from voltpi.driver.client import TcpAddress, UnixAddress, serve
from voltpi.driver.protocol import Array


class Result(NamedTuple):
    energy: float
    forces: Array
    virial: Array
    extras: dict[str, Any]


class ToyEvaluator:
    """Lennard-Jones argon under the minimum image (bohr, hartree), failing on request at the N-th structure."""

    EPSILON, SIGMA = 3.7935e-4, 6.43452

    def __init__(
        self,
        n_atoms: int,
        *,
        die_at: int = -1,
        nan_at: int = -1,
        raise_at: int = -1,
        hang_at: int = -1,
        sleep: float = 0.0,
    ) -> None:
        self.n_atoms = n_atoms
        self.die_at, self.nan_at, self.raise_at, self.hang_at, self.sleep = die_at, nan_at, raise_at, hang_at, sleep
        self.structures = 0
        self.batches: list[int] = []

    def evaluate(self, cells: Array, positions: Array, replicas: list[int] | None = None) -> list[Result]:
        assert cells.shape == (len(positions), 3, 3)
        assert replicas is None or len(replicas) == len(positions)
        self.batches.append(len(positions))
        return [self._one(h, r) for h, r in zip(cells, positions, strict=True)]

    def _one(self, h: Array, r: Array) -> Result:
        self.structures += 1
        time.sleep(self.sleep)
        if self.structures == self.die_at:
            os._exit(9)
        if self.structures == self.raise_at:
            raise RuntimeError("injected failure")
        if self.structures == self.hang_at:
            time.sleep(3600)
        result = lennard_jones(h, r, self.EPSILON, self.SIGMA)
        return result._replace(forces=result.forces * np.nan) if self.structures == self.nan_at else result


def lennard_jones(h: Array, r: Array, epsilon: float, sigma: float) -> Result:
    """All pairs under the minimum image; h has lattice vectors as columns, as i-PI sends it."""
    n = len(r)
    d = r[:, None] - r[None, :]
    d -= np.round(d @ np.linalg.inv(h).T) @ h.T
    r2 = (d**2).sum(-1) + np.diag(np.full(n, np.inf))
    s6 = (sigma**2 / r2) ** 3
    pair = 24 * epsilon * ((2 * s6**2 - s6) / r2)[..., None] * d
    forces = pair.sum(1)
    energy = float(2 * epsilon * (s6**2 - s6).sum())
    virial = 0.5 * np.einsum("ijk,ijl->kl", d, pair)
    dipole = (np.arange(n) - (n - 1) / 2) @ r
    return Result(energy, forces, virial, {"dipole": dipole.tolist(), "note": "e·bohr"})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--unix")
    parser.add_argument("--socket-prefix", default="/tmp/ipi_")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int)
    parser.add_argument("--shm", action="store_true")
    parser.add_argument("--atoms", type=int, default=8)
    parser.add_argument("--wait", type=float, default=20.0)
    parser.add_argument("--reconnects", type=int, default=0)
    for name in ("die", "nan", "raise", "hang"):
        parser.add_argument(f"--{name}-at", type=int, default=-1)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--fail-at-start", type=int, default=0)
    a = parser.parse_args()
    if a.fail_at_start:
        print("error: settings.yaml, line 3: chrges is no key; did you mean charges?", file=sys.stderr)
        return a.fail_at_start
    evaluator = ToyEvaluator(
        a.atoms, die_at=a.die_at, nan_at=a.nan_at, raise_at=a.raise_at, hang_at=a.hang_at, sleep=a.sleep
    )
    address = UnixAddress(a.unix, a.socket_prefix) if a.unix else TcpAddress(a.host, a.port)
    status = serve(evaluator, address, wait=a.wait, reconnects=a.reconnects, use_shared_memory=a.shm)
    if status == 0:
        print(f"batches {evaluator.batches}")
    return status


if __name__ == "__main__":
    sys.exit(main())
