"""A real i-PI for the tests: small argon boxes and a few steps."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TOY = HERE / "toy.py"
TOY_PES = HERE / "toy_pes.py"
LIMIT = 60.0

XML = """<simulation verbosity='low' floatformat='%24.17e' safe_stride='1'>
  <output prefix='run'>
    <properties stride='1' filename='out'> [step, conserved, temperature{{kelvin}}, potential, pressure_cv]
    </properties>
    <trajectory filename='pos' stride='1' format='xyz'> positions </trajectory>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>5</seed></prng>
  {forcefield}
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 100 </velocities>
    </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 100 </temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 4 </timestep>
        <thermostat mode='pile_l'> <tau units='femtosecond'> 100 </tau> </thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""


def unix(options: str = "") -> str:
    return f"<ffsocket name='ff' mode='unix'> <address>argon</address> {options} </ffsocket>"


def direct(parameters: str = "", options: str = "") -> str:
    more = f", {parameters}" if parameters else ""
    return (
        f"<ffdirect name='ff'> <pes>custom</pes> <pes_path>{TOY_PES}</pes_path> {options} "
        f"<parameters>{{settings: settings.yaml, template: start.xyz{more}}}</parameters> </ffdirect>"
    )


def write_input(folder: Path, forcefield: str, *, steps: int = 10, beads: int = 1) -> Path:
    """An i-PI input for eight argon atoms, with its start structure and a settings file."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * 4.0
    grid += np.random.default_rng(1).normal(scale=0.1, size=grid.shape)
    rows = "\n".join(f"Ar {x:.8f} {y:.8f} {z:.8f}" for x, y, z in grid)
    head = 'Lattice="12 0 0 0 13 0 0 0 14" Properties=species:S:1:pos:R:3 pbc="T T T"'
    (folder / "start.xyz").write_text(f"8\n{head}\n{rows}\n")
    (folder / "settings.yaml").write_text("model: none\n")
    (folder / "in.xml").write_text(XML.format(forcefield=forcefield, steps=steps, beads=beads))
    return folder / "in.xml"


def table(folder: Path) -> np.ndarray:
    return np.loadtxt(folder / "run.out", ndmin=2)


def rows(folder: Path) -> int:
    """How many rows i-PI has written so far."""
    path = folder / "run.out"
    return sum(not line.startswith("#") for line in path.read_text().splitlines()) if path.exists() else 0


def trajectory(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("run.pos_*.xyz")))


class Processes:
    """Starts i-PI and toy drivers; stops whatever is left when the test ends."""

    def __init__(self, scratch: Path) -> None:
        self.prefix = str(scratch / "s_")
        self._all: list[subprocess.Popen[bytes]] = []

    def _start(self, command: list[str], folder: Path, log: str) -> subprocess.Popen[bytes]:
        with (folder / log).open("wb") as out:
            popen = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        self._all.append(popen)
        return popen

    def ipi(self, xml: Path, log: str = "ipi.log") -> subprocess.Popen[bytes]:
        script = Path(sys.executable).with_name("i-pi")
        return self._start([sys.executable, "-u", str(script), "-S", self.prefix, xml.name], xml.parent, log)

    def driver(self, folder: Path, *options: str, log: str = "driver.log") -> subprocess.Popen[bytes]:
        where = [] if "--port" in options else ["--unix", "argon", "--socket-prefix", self.prefix]
        return self._start([sys.executable, str(TOY), *where, *options], folder, log)

    def clear(self) -> None:
        for popen in self._all:
            if popen.poll() is None:
                popen.kill()
            popen.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def until(condition, seconds: float = LIMIT) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
