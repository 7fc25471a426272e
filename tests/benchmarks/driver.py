"""Driver and i-PI without the potential, and beads in one batch against beads one by one.

    python tests/benchmarks/driver.py overhead [--atoms 192 2000 10000]
    python tests/benchmarks/driver.py beads [--beads 32] [--repeats 3]

``overhead``: one bead in NVT with a potential that costs nothing: its answer is ready, with charges that are no round
numbers. All else is the shipped code: evaluator, client or PES, i-PI. CPU time of both processes together, in ms a
step, as the difference of a long and a short run, so that the start does not count and other work on the machine counts
little. i-PI's own part is that of the row "i-PI alone": no forces at all come from outside (``<ffdirect>`` with i-PI's
``dummy``). ``beads``: CPU time of a structure, in one batch and one by one, best of the repeats, both warm.

This file is also i-PI's PES for ``<ffdirect>``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import write
from ipi.engine.simulation import Simulation
from ipi.utils.softexit import softexit
from rich.console import Console
from rich.table import Table

import voltpi.driver.pes as shipped
from voltpi.driver.client import UnixAddress, serve
from voltpi.driver.evaluator import Evaluator
from voltpi.driver.settings import Settings, load_settings
from voltpi.driver.structures import read_structures
from voltpi.potential.model import Potential
from voltpi.potential.response import Response
from voltpi.potential.shortrange.pair import ZBL, PairPotential
from voltpi.potential.systems import Systems

__DRIVER_NAME__ = "nothing"
__DRIVER_CLASS__ = "Nothing"

BOHR = 0.529177210903


class Ready(Potential):
    """A potential whose answer is ready."""

    def __init__(self) -> None:
        super().__init__(PairPotential([ZBL()], 1.0))

    def __call__(self, systems: Systems, **_: Any) -> Response:
        n, b = systems.n_atoms, systems.n_systems
        random = torch.Generator().manual_seed(0)
        charges = torch.randn(n, generator=random, dtype=torch.float64)
        zeros = torch.zeros(n, 3, dtype=torch.float64)
        none = torch.zeros(b, dtype=torch.float64)
        return Response(
            energy=none,
            forces=zeros,
            virial=torch.zeros(b, 3, 3, dtype=torch.float64),
            charges=charges,
            shells=zeros,
            dipole=torch.randn(b, 3, generator=random, dtype=torch.float64),
            energy_terms={"short_range": none, "electrostatics": none, "dispersion": none},
            residual=none,
            iterations=torch.zeros(b, dtype=torch.int64),
            electrodes={},
            field=systems.field,
        )


def ready(settings: str | Path, template: str | Path, overrides: dict[str, Any]) -> Evaluator:
    """The shipped evaluator around that potential."""
    torch.set_num_threads(1)
    keys = {key: value for key, value in overrides.items() if key.startswith("output")}
    return Evaluator(Ready(), read_structures(template)[0], load_settings(settings, keys))


class Nothing(shipped.VoltPI):
    """The shipped PES with it."""

    def __init__(self, **parameters: Any) -> None:
        shipped.make_evaluator = ready
        super().__init__(**parameters)


XML = """<simulation verbosity='quiet' safe_stride='1000000'>
  <output prefix='run'> <properties stride='1000000' filename='out'> [step] </properties> {outputs} </output>
  <total_steps> {steps} </total_steps>
  <prng><seed>1</seed></prng>
  {forcefield}
  <system>
    <initialize nbeads='1'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 0.5 </timestep>
        <thermostat mode='svr'><tau units='femtosecond'> 50 </tau></thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""
OUTPUTS = """<trajectory filename='dipole' stride='1' extra_type='dipole'> extras </trajectory>
    <trajectory filename='charges' stride='20' extra_type='charges'> extras </trajectory>"""


def box(n: int) -> Atoms:
    """n atoms at the density of water, not on a lattice."""
    side = int(np.ceil(n ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:n] * 2.15
    grid = grid + np.random.default_rng(0).normal(scale=0.1, size=grid.shape)
    return Atoms("OHH" * (n // 3) + "O" * (n % 3), grid, cell=[2.15 * side] * 3, pbc=True)


def cpu_seconds(folder: Path, way: str, charges: bool, steps: int) -> float:
    """CPU time of i-PI and driver for so many steps."""
    prefix = str(folder / "s_")
    if way == "i-PI alone":
        forcefield = "<ffdirect name='ff'> <pes>dummy</pes> </ffdirect>"
    elif way == "ffdirect":
        forcefield = (
            f"<ffdirect name='ff'> <pes>custom</pes> <pes_path>{Path(__file__).resolve()}</pes_path> <parameters>"
            f"{{settings: settings.yaml, template: start.xyz, output.charges: {charges}}}</parameters> </ffdirect>"
        )
    else:
        forcefield = f"<ffsocket name='ff' mode='{way}'> <address>ff</address> <latency>1e-4</latency> </ffsocket>"
    outputs = OUTPUTS if charges else OUTPUTS.splitlines()[0] if way != "i-PI alone" else ""
    (folder / "in.xml").write_text(XML.format(outputs=outputs, steps=steps, forcefield=forcefield))
    # forked from here, where everything is imported already: starting to run would take seconds
    started = [_fork(lambda: _run_ipi(folder, prefix))]
    if way in ("unix", "shm"):
        started.append(_fork(lambda: _serve(folder, way, prefix, charges)))
    total, failed = 0.0, False
    for pid in reversed(started):  # a driver that fails ends i-PI, which would wait for another
        if failed:
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        failed = failed or status != 0
        total += usage.ru_utime + usage.ru_stime
    if failed:
        raise SystemExit(f"{way}: {(folder / 'log').read_text()[-500:]}")
    return total


def _fork(call: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = call()
    finally:
        os._exit(status)


def _log(folder: Path) -> None:
    """What this process says goes to a file there from now on."""
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _run_ipi(folder: Path, prefix: str) -> int:
    _log(folder)
    with open("in.xml") as file:
        simulation = Simulation.load_from_xml(file, custom_verbosity="quiet", sockets_prefix=prefix)
    softexit.hard_exit = True  # as the command i-pi does: the goodbye to the driver, and exit
    simulation.run()
    softexit.trigger(status=simulation.exit_status, message=simulation.exit_message)
    return 0


def _serve(folder: Path, way: str, prefix: str, charges: bool) -> int:
    _log(folder)
    evaluator = ready("settings.yaml", "start.xyz", {"output.charges": charges})
    return serve(evaluator, UnixAddress("ff", prefix), use_shared_memory=way == "shm")


def overhead(atoms: list[int], work: int) -> None:
    """Prints the table of the overhead."""
    table = Table("atoms", "way", "charges", "CPU ms a step", "without i-PI's own", "share of 0.1 s")
    for n in atoms:
        steps = max(40, work // n)
        with tempfile.TemporaryDirectory(prefix="vp-", dir="/tmp") as scratch:
            folder = Path(scratch)
            write(folder / "start.xyz", box(n), format="extxyz")
            (folder / "settings.yaml").write_text("model: none\ncharges: {model: none}\n")
            alone = 0.0
            for way, charges in [
                ("i-PI alone", False),
                *((w, c) for w in ("unix", "shm", "ffdirect") for c in (False, True)),
            ]:
                long, short = (cpu_seconds(folder, way, charges, k) for k in (steps + 5, 5))
                ms = 1e3 * (long - short) / steps
                alone = ms if way == "i-PI alone" else alone
                table.add_row(
                    str(n), way, "yes" if charges else "no", f"{ms:.2f}", f"{ms - alone:.2f}", f"{ms / 100:.1%}"
                )
                print(n, way, charges, f"{ms:.2f}", file=sys.stderr, flush=True)
    Console().print(table)


def salt(n: int) -> Atoms:
    """n³ cubic cells of NaCl, shaken."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(n)
    atoms.rattle(0.05, seed=1)
    return atoms


def one_by_one_and_together(settings: Settings, atoms: Atoms, beads: int, repeats: int) -> tuple[float, float]:
    """CPU seconds a structure, one by one and in a batch, along a path of steps of 0.25 fs at room temperature."""
    rng = np.random.default_rng(2)
    cells = np.repeat(np.asarray(atoms.cell).T[None] / BOHR, beads, axis=0)
    spread = rng.normal(size=(beads, len(atoms), 3))
    velocity = rng.normal(size=(beads, len(atoms), 3)) / np.sqrt(atoms.get_masses())[:, None]
    path = [atoms.positions / BOHR + 0.05 * spread + 0.007 * k * velocity for k in range(repeats + 1)]

    def alone(evaluator: Evaluator, positions: np.ndarray) -> None:
        for bead in range(beads):
            evaluator.evaluate(cells[bead : bead + 1], positions[bead : bead + 1], [bead])

    def together(evaluator: Evaluator, positions: np.ndarray) -> None:
        evaluator.evaluate(cells, positions, list(range(beads)))

    evaluators = [Evaluator.from_settings(settings, atoms) for _ in range(2)]
    times: list[list[float]] = [[], []]
    for positions in path:  # taken in turns, so that other work on the machine meets both
        for evaluator, call, taken in zip(evaluators, (alone, together), times, strict=True):
            began = time.process_time()
            call(evaluator, positions)
            taken.append((time.process_time() - began) / beads)
    return min(times[0][1:]), min(times[1][1:])


def beads(n_beads: int, repeats: int) -> None:
    """Prints the table of the beads."""
    water = Path(__file__).parents[2] / "inputs" / "water-field" / "start.xyz"
    pair = {"short_range": {"pair": {"set": "nacl"}}}
    cases: list[tuple[str, Callable[[], tuple[Settings, Atoms]]]] = [
        ("water, 64 H2O", lambda: (load_settings(None, {"model": "water"}), read_structures(water)[0])),
        ("NaCl, 64 ions, PQEq", lambda: (load_settings(None, pair), salt(2))),
        ("NaCl, 512 ions, PQEq", lambda: (load_settings(None, pair), salt(4))),
    ]
    table = Table("system", "beads", "one by one, ms", "one batch, ms", "gain")
    for name, make in cases:
        alone, together = one_by_one_and_together(*make(), n_beads, repeats)
        table.add_row(name, str(n_beads), f"{1e3 * alone:.1f}", f"{1e3 * together:.1f}", f"{alone / together:.2f}")
        print(name, f"{alone / together:.2f}", file=sys.stderr, flush=True)
    Console().print(table)


def main() -> int:
    """One of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("overhead")
    first.add_argument("--atoms", type=int, nargs="+", default=[192, 2000, 10000])
    first.add_argument("--work", type=int, default=40_000, help="Atoms times steps of each run.")
    second = commands.add_parser("beads")
    second.add_argument("--beads", type=int, default=32)
    second.add_argument("--repeats", type=int, default=3)
    second.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.command == "overhead":
        overhead(options.atoms, options.work)
    else:
        torch.set_num_threads(options.threads)
        beads(options.beads, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
