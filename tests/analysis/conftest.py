"""Real i-PI runs, short, made once for all tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INPUTS = HERE.parents[1] / "inputs"


def run_use(use: str, folder: Path, steps: int, **replacements: str) -> Path:
    """Runs a shipped input in ``folder`` with the toy potential inside i-PI instead of the driver."""
    shutil.copytree(INPUTS / use, folder)
    xml = (folder / "input.xml").read_text()
    direct = f"<ffdirect name='voltpi'><pes>custom</pes><pes_path>{HERE / 'toy_pes.py'}</pes_path></ffdirect>"
    xml, n = re.subn(r"<ffsocket.*</ffsocket>", direct, xml, flags=re.DOTALL)
    assert n == 1
    xml, n = re.subn(r"<total_steps>.*</total_steps>", f"<total_steps>{steps}</total_steps>", xml)
    assert n == 1
    for old, new in replacements.items():
        assert old in xml
        xml = xml.replace(old, new)
    (folder / "input.xml").write_text(xml)
    command = [str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def nvt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """inputs/water-field for 200 steps."""
    return run_use("water-field", tmp_path_factory.mktemp("analysis") / "nvt", 200)


@pytest.fixture(scope="session")
def nve_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """inputs/water-field-nve for 400 steps."""
    return run_use("water-field-nve", tmp_path_factory.mktemp("analysis") / "nve", 400)


@pytest.fixture(scope="session")
def bead_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """inputs/water-field with four beads, positions in i-PI's own XYZ and a cell in a named unit."""
    return run_use(
        "water-field",
        tmp_path_factory.mktemp("analysis") / "beads",
        40,
        **{
            "nbeads='1'": "nbeads='4'",
            "mode='svr'": "mode='pile_g'",
            "format='ase'> positions": "format='xyz' cell_units='angstrom'> positions",
        },
    )
