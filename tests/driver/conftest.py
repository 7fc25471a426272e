"""A real i-PI for the tests: short socket paths, nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipi_runs import LIMIT, Processes, direct, table, write_input


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short name, for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vp-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def processes(scratch: Path) -> Iterator[Processes]:
    started = Processes(scratch)
    yield started
    started.clear()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Finished ffdirect runs of ten steps with 1 and 4 beads: what every other way has to reproduce."""
    folders = {}
    script = Path(sys.executable).with_name("i-pi")
    for beads in (1, 4):
        folder = tmp_path_factory.mktemp(f"reference{beads}")
        write_input(folder, direct(), beads=beads)
        done = subprocess.run([sys.executable, str(script), "in.xml"], cwd=folder, capture_output=True, timeout=LIMIT)
        assert done.returncode == 0, done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:]
        assert len(table(folder)) == 11
        folders[beads] = folder
    return folders
