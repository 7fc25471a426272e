"""``voltpi run`` with the real i-PI: reads inputs, runs, watches, stops, continues; no way to hang."""

from __future__ import annotations

import fcntl
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from voltpi.driver import launch, pes
from voltpi.driver.ipi_input import SocketForceField, read_input
from voltpi.driver.progress import Progress, checkpoint_state, last_row
from voltpi.driver.settings import load_settings
from voltpi.potential.errors import InputError

from ipi_runs import LIMIT, TOY, TOY_PES, direct, free_port, rows, table, trajectory, unix, until, write_input

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def toys(monkeypatch) -> list[str]:
    """Toy drivers in place of real ones; whatever is put into this list becomes their options."""
    options: list[str] = []
    real = launch.driver_command

    def command(ff: SocketForceField, settings: Path, template: Path, prefix: str) -> list[str]:
        line = real(ff, settings, template, prefix)
        assert Path(settings).is_file()
        assert Path(template).name == "start.xyz"
        where = line[line.index("--wait") + 2 :]
        return [sys.executable, str(TOY), *where, "--wait", "30", *options]

    monkeypatch.setattr(launch, "driver_command", command)
    return options


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = _abandoned()
    children = _children()
    yield
    assert _abandoned() <= before
    assert _children() <= children


def _abandoned() -> set[Path]:
    """Scratch folders whose run is over, or is this process; other people's runs go on."""
    found = set()
    for folder in Path("/tmp").glob("voltpi-*"):
        owner = folder.name.split("-")[1]
        if owner == str(os.getpid()) or not Path(f"/proc/{owner}").exists():
            found.add(folder)
    return found


def _children() -> set[str]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(listed.read_text().split()) if listed.exists() else set()


def same(folder: Path, reference: Path) -> None:
    np.testing.assert_allclose(table(folder), table(reference), rtol=1e-12, atol=1e-12)
    assert trajectory(folder) == trajectory(reference)


# runs that end well ---------------------------------------------------------------------------------------------------


def test_a_run_with_two_drivers(tmp_path, toys, reference, capfd):
    xml = write_input(tmp_path, unix(), beads=4)
    (tmp_path / "EXIT").touch()  # left over from before
    assert launch.run(xml, drivers=2) == 0
    same(tmp_path, reference[4])
    out = capfd.readouterr().out
    assert "in.xml: 10 steps in" in out
    assert re.search(r"done: 10 steps in [0-9.]+ s; last: conserved .*, temperature .* kelvin, potential", out)
    for name in ("run.i-pi.log", "run.run.json", "RESTART"):
        assert (tmp_path / name).stat().st_size > 0
    # on a busy machine one driver may have done all before the other has started
    assert sum((tmp_path / f"run.driver-{k}.log").stat().st_size for k in (1, 2)) > 0


def test_tcp(tmp_path, toys, reference):
    ff = f"<ffsocket name='ff' mode='inet'> <address>localhost</address> <port>{free_port()}</port> </ffsocket>"
    assert launch.run(write_input(tmp_path, ff), quiet=True) == 0
    same(tmp_path, reference[1])


def test_shared_memory(tmp_path, toys, reference):
    assert launch.run(write_input(tmp_path, unix().replace("unix", "shm")), quiet=True) == 0
    same(tmp_path, reference[1])


def test_ffdirect_needs_no_driver(tmp_path, reference, capfd):
    assert launch.run(write_input(tmp_path, direct()), quiet=True) == 0
    same(tmp_path, reference[1])
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.glob("run.driver*"))


def test_a_relative_input_in_another_folder(tmp_path, toys, reference, monkeypatch):
    write_input(tmp_path / "deep", unix())
    monkeypatch.chdir(tmp_path)
    assert launch.run("deep/in.xml", quiet=True) == 0
    same(tmp_path / "deep", reference[1])


def test_a_second_run_in_the_folder_is_refused(tmp_path, toys, reference):
    xml = write_input(tmp_path, unix())
    with (tmp_path / launch.LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # what the first one holds
        with pytest.raises(InputError, match="another `voltpi run` is going on in this folder"):
            launch.run(xml, quiet=True)
        assert not (tmp_path / "run.out").exists()
    assert launch.run(xml, quiet=True) == 0  # the first one has ended; its file may stay
    same(tmp_path, reference[1])


def test_a_run_holds_its_folder(tmp_path, toys, monkeypatch):
    xml, refusals = write_input(tmp_path, unix()), []

    def second(self: object) -> int:
        with pytest.raises(InputError, match="another `voltpi run`") as refusal:
            launch.run(xml, quiet=True)
        refusals.append(refusal)
        return 0

    monkeypatch.setattr(launch._Session, "run", second)
    assert launch.run(xml, quiet=True) == 0
    assert len(refusals) == 1


def test_parameters_of_the_pes_keep_their_kind():
    for text, value in (
        ("0 0 0 1 1 1", [0, 0, 0, 1, 1, 1]),
        ("0 -1.5 1e-2", [0, -1.5, "1e-2"]),
        ("null 0.1 null", [None, 0.1, None]),
    ):
        parsed = pes.parameter_value(text)
        assert parsed == value
        assert [type(x) for x in parsed] == [type(x) for x in value]
    for same in ("element Au and z < 10", "water", 3, "5"):
        assert pes.parameter_value(same) == same
    labels = {"charges.conserve": "fragments", "charges.fragments": pes.parameter_value("0 0 0 1 1 1")}
    assert load_settings(overrides=labels).charges.fragments == (0, 0, 0, 1, 1, 1)
    assert load_settings(overrides={"field": pes.parameter_value("0 0 1e-2")}).field == (0, 0, 0.01)


WATER = """6
Lattice="12 0 0 0 12 0 0 0 12" Properties=species:S:1:pos:R:3 pbc="T T T"
O 0.0 0.0 0.0
H 0.9572 0.0 0.0
H -0.24 0.9266 0.0
O 3.0 0.2 0.4
H 3.7 0.8 0.6
H 2.6 0.1 1.3
"""
PQEQ = """charges: {model: pqeq, conserve: fragments}
field: [0, 0, 0.05]
precision: double
"""


def write_water(folder: Path, forcefield: str, settings: str = PQEQ) -> Path:
    xml = write_input(folder, forcefield, steps=4)
    extras = "<trajectory filename='dipole' extra_type='dipole'> extras </trajectory> </output>"
    xml.write_text(xml.read_text().replace("> 4 </timestep>", "> 0.1 </timestep>").replace("</output>", extras))
    (folder / "start.xyz").write_text(WATER)
    (folder / "settings.yaml").write_text(settings)
    return xml


def test_the_real_evaluator_gives_the_same_through_driver_and_pes(tmp_path):
    """The command `voltpi drive` and the shipped pes.py, with PQEq under a field."""
    shipped = direct().replace(str(TOY_PES), pes.__file__)
    assert launch.run(write_water(tmp_path / "socket", unix()), quiet=True) == 0
    assert launch.run(write_water(tmp_path / "direct", shipped), quiet=True) == 0
    np.testing.assert_allclose(table(tmp_path / "socket"), table(tmp_path / "direct"), rtol=1e-10, atol=1e-12)
    dipoles = [np.loadtxt(tmp_path / way / "run.dipole_0", comments="#") for way in ("socket", "direct")]
    assert dipoles[0].shape == (5, 3)
    np.testing.assert_allclose(*dipoles, rtol=1e-8)


@pytest.mark.parametrize("ff", [unix(), direct().replace(str(TOY_PES), pes.__file__)], ids=["driver", "pes"])
def test_real_settings_that_are_wrong(tmp_path, capfd, ff):
    xml = write_water(tmp_path, ff, settings="charges: {modle: pqeq}\n")
    assert launch.run(xml, quiet=True) == 2
    error = capfd.readouterr().err
    assert re.search(r"settings\.yaml, line 1: unknown key charges\.modle; did you mean charges\.model\?", error)
    assert error.count("\n") == 1


# runs that are stopped or fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_restart_that_continues_exactly(tmp_path, toys, reference, capfd, monkeypatch, how):
    xml = write_input(tmp_path, unix())
    toys += ["--sleep", "0.4"]

    def stop() -> None:
        assert until(lambda: rows(tmp_path) > 2)
        os.kill(os.getpid(), how)

    threading.Thread(target=stop).start()
    monkeypatch.chdir(tmp_path)
    assert launch.run(xml, quiet=True) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    error = capfd.readouterr().err
    found = re.fullmatch(
        r"error: interrupted; the state of step (\d) of 10 is kept, continue with `voltpi run RESTART`\n", error
    )
    assert found, error
    assert int(found[1]) == rows(tmp_path) - 1
    toys.clear()
    assert launch.run(tmp_path / "RESTART", quiet=True) == 0
    same(tmp_path, reference[1])


def test_a_driver_that_dies_ends_the_run(tmp_path, toys, capfd):
    toys += ["--die-at", "5"]
    began = time.monotonic()
    assert launch.run(write_input(tmp_path, unix()), quiet=True) == 1
    assert time.monotonic() - began < 40
    error = capfd.readouterr().err
    assert re.match(r"error: driver 1 of <ffsocket name='ff'> stopped: .* \(log: run\.driver-1\.log\)", error), error
    assert "the state of step 3 of 10 is kept" in error
    assert checkpoint_state(tmp_path / "RESTART") == (3, True)


def test_a_driver_killed_by_the_system_is_named_so(tmp_path, toys, capfd):
    toys += ["--sleep", "0.3"]

    def kill() -> None:
        assert until(lambda: rows(tmp_path) > 1)
        for pid in _children():
            if "toy.py" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(int(pid), signal.SIGKILL)

    threading.Thread(target=kill).start()
    assert launch.run(write_input(tmp_path, unix()), quiet=True) == 1
    assert "it was killed by SIGKILL" in capfd.readouterr().err
    assert (tmp_path / "RESTART").exists()


@pytest.mark.slow
def test_a_driver_that_hangs_can_be_interrupted(tmp_path, toys, capfd):
    toys += ["--hang-at", "5"]

    def stop() -> None:
        assert until(lambda: rows(tmp_path) > 3)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    assert launch.run(write_input(tmp_path, unix()), quiet=True) == 1
    assert "error: interrupted; the state of step 3 of 10 is kept" in capfd.readouterr().err


@pytest.mark.parametrize(("given", "status"), [(2, 2), (1, 1)])
def test_a_driver_that_refuses_its_settings(tmp_path, toys, capfd, given, status):
    toys += ["--fail-at-start", str(given)]
    assert launch.run(write_input(tmp_path, unix()), quiet=True) == status
    error = capfd.readouterr().err
    assert "stopped: settings.yaml, line 3: chrges is no key; did you mean charges? (log: run.driver-1.log)" in error
    assert error.count("\n") == 1


def test_nan_from_the_potential(tmp_path, toys, capfd):
    toys += ["--nan-at", "6"]
    assert launch.run(write_input(tmp_path, unix()), quiet=True) == 1
    error = capfd.readouterr().err
    assert "evaluation 6 failed: the forces of atom 0 (from 0) came out as nan" in error
    assert "the state of step 4 of 10 is kept" in error


def test_a_failure_inside_ipi(tmp_path, capfd):
    assert launch.run(write_input(tmp_path, direct("nan_at: 6")), quiet=True) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: the forces of atom 0 (from 0) came out as nan: nothing was sent to i-PI; ")
    assert "the state of step 4 of 10 is kept" in error


def test_another_number_of_atoms(tmp_path, toys, capfd):
    toys += ["--atoms", "12"]
    assert launch.run(write_input(tmp_path, unix()), quiet=True) == 1
    assert "i-PI moves 8 atoms but the start structure of this driver has 12" in capfd.readouterr().err


def test_ipi_that_dies_shows_the_end_of_its_log(tmp_path, toys, capfd):
    xml = write_input(tmp_path, unix())
    xml.write_text(xml.read_text().replace("mode='nvt'", "mode='nvtt'"))
    assert launch.run(xml, quiet=True) == 1
    error = capfd.readouterr().err
    assert "nvtt" in error
    assert "error: i-PI stopped with status 1; the end of run.i-pi.log is above" in error


def test_a_port_in_use(tmp_path, toys, capfd):
    import socket

    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        ff = f"<ffsocket name='ff' mode='inet'> <address>localhost</address> <port>{port}</port> </ffsocket>"
        assert launch.run(write_input(tmp_path, ff), quiet=True) == 1
    assert "Address already in use" in capfd.readouterr().err


def test_an_exit_file_is_not_taken_for_success(tmp_path, toys, capfd):
    toys += ["--sleep", "0.4"]

    def stop() -> None:
        assert until(lambda: rows(tmp_path) > 1)
        (tmp_path / "EXIT").touch()

    threading.Thread(target=stop).start()
    assert launch.run(write_input(tmp_path, unix()), quiet=True) == 1
    assert re.search(r"i-PI stopped at step \d of 10 \(an EXIT file", capfd.readouterr().err)


def test_an_exploding_run_is_not_taken_for_success(tmp_path, capfd):
    # i-PI's own harmonic potential with an absurd timestep: positions overflow, i-PI itself would end with status 0
    ff = "<ffdirect name='ff'> <pes>harmonic</pes> <parameters>{k1: 1e12}</parameters> </ffdirect>"
    xml = write_input(tmp_path, ff, steps=400)
    xml.write_text(xml.read_text().replace("> 4 </timestep>", "> 4000 </timestep>"))
    assert launch.run(xml, quiet=True) == 1
    assert re.search(r"not (a number|numbers)", capfd.readouterr().err)


# what is known before -------------------------------------------------------------------------------------------------


def test_read_input(tmp_path):
    ff = unix("<batch_size>4</batch_size> <latency>2e-3</latency>")
    plan = read_input(write_input(tmp_path, ff, steps=25, beads=8))
    assert plan.sockets == (SocketForceField("ff", "unix", "argon", 65535, 4, 2e-3),)
    assert (plan.steps, plan.first_step, plan.n_beads, plan.prefix) == (25, 0, 8, "run")
    assert plan.timestep == pytest.approx(4.0)
    assert plan.template == tmp_path / "start.xyz"
    assert plan.folder == tmp_path
    assert plan.properties == (tmp_path / "run.out",)
    assert not plan.is_checkpoint
    assert plan.advice() == []
    (tmp_path / "in.xml").write_text((tmp_path / "in.xml").read_text().replace("2e-3", "1e-4"))
    assert "<latency> 0.0001" in read_input(tmp_path / "in.xml").advice()[0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("</system>", "", r"in\.xml: not well-formed XML \(mismatched tag: line \d+"),
        ("simulation", "run", r"in\.xml: the outermost tag is <run> and not <simulation>"),
        ("ffsocket", "socket", r"in\.xml: no forcefield; add <ffsocket> or <ffdirect>"),
        ("mode='unix'", "mode='unux'", r"in\.xml: <ffsocket name='ff'> has mode='unux'; use unix, inet or shm"),
        ("> 10 <", "> ten <", r"in\.xml: <total_steps> is 'ten'; give a number"),
        ("nbeads='1'", "nbeads='x'", r"in\.xml: <initialize> has nbeads='x'; give a whole number"),
        (" start.xyz ", " end.xyz ", r"in\.xml: <file> names the start structure end\.xyz, which is no file in"),
        ("mode='ase'", "mode='xyz'", r"in\.xml: <file> reads start\.xyz with mode='xyz', i-PI's own dialect"),
        ("mode='ase'", "mode='chk'", r"in\.xml: <file> has mode='chk'; start from a structure"),
    ],
)
def test_inputs_that_cannot_be(tmp_path, old, new, words):
    xml = write_input(tmp_path, unix())
    text = xml.read_text().replace("<total_steps>10<", "<total_steps> 10 <")
    assert old in text
    xml.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=words):
        read_input(xml)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("settings: settings.yaml, ", ""), r"<ffdirect name='ff'> gives no settings in <parameters>; write"),
        (("template: start.xyz", "template: no.xyz"), r"names the template no\.xyz in <parameters>, which is no file"),
        (("template: start.xyz", "field: [0, 0, 1]"), r"has <parameters> that i-PI cannot read .*field: 0 0 0\.05"),
        (("pes.py </pes_path>", "pess.py </pes_path>"), r"the <pes_path> .*pess\.py, which is no file; VoltPI's is"),
        (("<parameters>", "<batch_size>3</batch_size> <parameters>"), r"<batch_size> 3, which does not divide 1 beads"),
    ],
)
def test_ffdirect_that_cannot_be(tmp_path, change, words):
    ff = direct().replace(re.search(r"<pes_path>(.*?)</pes_path>", direct())[1], f" {pes.__file__} ")
    xml = write_input(tmp_path, ff)
    assert read_input(xml).direct[0].ours
    text = xml.read_text()
    assert change[0] in text
    xml.write_text(text.replace(*change))
    with pytest.raises(InputError, match=words):
        read_input(xml)


def test_runs_that_cannot_be(tmp_path, toys):
    xml = write_input(tmp_path, unix())
    with pytest.raises(InputError, match="no such file"):
        launch.run(tmp_path / "no.xml")
    with pytest.raises(InputError, match="--drivers is 0"):
        launch.run(xml, drivers=0)
    with pytest.raises(InputError, match=r"other\.yaml: there is no such settings file"):
        launch.run(xml, settings=tmp_path / "other.yaml")
    (tmp_path / "settings.yaml").unlink()
    with pytest.raises(InputError, match=r"in\.xml: <ffsocket name='ff'> needs settings .* put settings\.yaml into"):
        launch.run(xml)
    xml.write_text(xml.read_text().replace("argon", "argon" * 30))
    (tmp_path / "settings-ff.yaml").write_text("model: none\n")
    with pytest.raises(InputError, match="bytes and the system allows 107"):
        launch.run(xml, quiet=True)


def test_a_checkpoint_without_its_record(tmp_path, toys, reference, capfd):
    write_input(tmp_path, unix())
    assert launch.run(tmp_path / "in.xml", quiet=True) == 0
    (tmp_path / "run.run.json").unlink()
    longer = (tmp_path / "RESTART").read_text().replace("<total_steps>10<", "<total_steps>12<")
    (tmp_path / "again.xml").write_text(longer)
    plan = read_input(tmp_path / "again.xml")
    assert plan.is_checkpoint
    assert (plan.first_step, plan.steps, plan.n_beads) == (10, 12, 1)
    with pytest.raises(InputError, match=r"give it with --template START\.xyz"):
        launch.run(tmp_path / "again.xml")
    assert launch.run(tmp_path / "again.xml", template=tmp_path / "start.xyz", quiet=True) == 0
    assert len(table(tmp_path)) == 13


def test_a_finished_run_says_how_to_go_on(tmp_path, toys, reference):
    write_input(tmp_path, unix())
    assert launch.run(tmp_path / "in.xml", quiet=True) == 0
    before = (tmp_path / "run.i-pi.log").read_text()
    with pytest.raises(InputError, match=r"RESTART: the run is finished: <step> is 10 and <total_steps> 10; raise"):
        launch.run(tmp_path / "RESTART", quiet=True)
    assert (tmp_path / "run.i-pi.log").read_text() == before  # i-PI was not started
    (tmp_path / "RESTART").write_text((tmp_path / "RESTART").read_text().replace("_steps>10<", "_steps>12<"))
    assert launch.run(tmp_path / "RESTART", quiet=True) == 0
    assert len(table(tmp_path)) == 13


# small parts ----------------------------------------------------------------------------------------------------------


def test_last_row(reference, tmp_path):
    row = last_row(reference[1] / "run.out")
    assert row.step == 10
    assert list(row.values) == ["conserved", "temperature{kelvin}", "potential", "pressure_cv"]
    assert row.values["potential"] == table(reference[1])[-1, 3]
    shutil.copy(reference[1] / "run.out", tmp_path / "out")
    with (tmp_path / "out").open("a") as file:
        file.write("  1.1e+01  -5.0e-0")  # not complete yet
    assert last_row(tmp_path / "out") == row
    with (tmp_path / "out").open("a") as file:
        file.write("3 1.0 1.0 nan\n")
    assert last_row(tmp_path / "out").finite  # a pressure may not apply
    with (tmp_path / "out").open("a") as file:
        file.write("12 nan 1.0 1.0 1.0\n")
    assert not last_row(tmp_path / "out").finite
    assert last_row(tmp_path / "none") is None


def test_a_bar_on_a_terminal(tmp_path, reference):
    write_input(tmp_path, unix())
    text = io.StringIO()
    progress = Progress(read_input(tmp_path / "in.xml"), console=Console(file=text, force_terminal=True, width=160))
    with progress:
        shutil.copy(reference[1] / "run.out", tmp_path / "run.out")
        assert progress.update() is False
    progress.done()
    assert "10/10" in text.getvalue()
    assert "temperature" in text.getvalue()


def test_outputs_of_an_earlier_run_are_not_progress(tmp_path, reference):
    write_input(tmp_path, unix())
    shutil.copy(reference[1] / "run.out", tmp_path / "run.out")
    progress = Progress(read_input(tmp_path / "in.xml"), quiet=True)
    assert progress.update() is False
    assert progress.step == 0


def test_cores_are_shared(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch._environment(3)["OMP_NUM_THREADS"] == "3"
    assert launch._environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch._environment(3)["OMP_NUM_THREADS"] == "7"


def test_the_commands_name_this_environment(tmp_path):
    line = launch.ipi_command("in.xml", "/tmp/x/s_")
    assert line[0] == sys.executable
    assert subprocess.run([*line[:2], "--help"], capture_output=True, timeout=LIMIT).returncode == 0
    ff = SocketForceField("ff", "inet", "0.0.0.0", 31415, 1, 1e-4)
    assert launch.driver_command(ff, tmp_path / "s.yaml", tmp_path / "t.xyz", "")[-4:] == [
        "--host", "localhost", "--port", "31415",
    ]  # fmt: skip
