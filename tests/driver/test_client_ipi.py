"""The driver and the PES against the real i-PI: same trajectory on every way, and no way to hang."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from voltpi.driver import pes
from voltpi.driver.client import TcpAddress, UnixAddress, connect, evaluate_batch, serve
from voltpi.driver.protocol import Structures
from voltpi.potential.errors import InputError, VoltPIError

from ipi_runs import LIMIT, TOY, TOY_PES, direct, free_port, rows, table, trajectory, unix, until, write_input
from toy import ToyEvaluator

pytestmark = pytest.mark.timeout(120)


def same(folder: Path, reference: Path) -> None:
    np.testing.assert_allclose(table(folder), table(reference), rtol=1e-12, atol=1e-12)
    assert trajectory(folder) == trajectory(reference)


# every way gives the same trajectory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beads", "options"),
    [
        (1, ""),
        (1, "<consolidate_messages>False</consolidate_messages>"),
        (4, ""),
        (4, "<batch_size>4</batch_size> <latency>1e-2</latency>"),
        (4, "<batch_size>3</batch_size>"),
    ],
)
def test_unix_socket(tmp_path, processes, reference, beads, options):
    xml = write_input(tmp_path, unix(options), beads=beads)
    ipi, driver = processes.ipi(xml), processes.driver(tmp_path)
    assert ipi.wait(LIMIT) == 0
    assert driver.wait(LIMIT) == 0, (tmp_path / "driver.log").read_text()
    same(tmp_path, reference[beads])
    log = (tmp_path / "driver.log").read_text()
    assert "i-PI said goodbye after" in log
    batches = eval(re.search(r"batches (\[.*\])", log)[1])
    # padding is not evaluated: eleven times every bead, where the equal beads of the start may count as padding
    assert 11 * beads - (beads - 1) <= sum(batches) <= 11 * beads
    if options.startswith("<batch"):
        assert max(batches) > 1


def test_tcp_socket(tmp_path, processes, reference):
    port = free_port()
    ff = f"<ffsocket name='ff' mode='inet'> <address>localhost</address> <port>{port}</port> </ffsocket>"
    xml = write_input(tmp_path, ff)
    ipi, driver = processes.ipi(xml), processes.driver(tmp_path, "--port", str(port))
    assert ipi.wait(LIMIT) == 0
    assert driver.wait(LIMIT) == 0
    same(tmp_path, reference[1])


@pytest.mark.parametrize(("beads", "options"), [(1, ""), (4, "<batch_size>4</batch_size> <latency>1e-2</latency>")])
def test_shared_memory(tmp_path, processes, reference, beads, options):
    xml = write_input(tmp_path, unix(options).replace("unix", "shm"), beads=beads)
    ipi, driver = processes.ipi(xml), processes.driver(tmp_path, "--shm")
    assert ipi.wait(LIMIT) == 0
    assert driver.wait(LIMIT) == 0, (tmp_path / "driver.log").read_text()
    same(tmp_path, reference[beads])
    assert "resource_tracker" not in (tmp_path / "driver.log").read_text()


def test_ffdirect_in_one_batch(tmp_path, processes, reference):
    xml = write_input(tmp_path, direct(options="<batch_size>4</batch_size>"), beads=4)
    assert processes.ipi(xml).wait(LIMIT) == 0
    same(tmp_path, reference[4])


def test_ipis_own_driver_with_our_pes(tmp_path, processes, reference):
    xml = write_input(tmp_path, unix())
    ipi = processes.ipi(xml)
    assert until(Path(processes.prefix + "argon").exists)
    script = Path(sys.executable).with_name("i-pi-py_driver")
    options = ["-m", "custom", "-P", str(TOY_PES), "-u", "-a", "argon", "-S", processes.prefix]
    options += ["-o", "settings=settings.yaml,template=start.xyz"]
    command = [sys.executable, str(script), *options]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=LIMIT, capture_output=True)
    assert ipi.wait(LIMIT) == 0
    same(tmp_path, reference[1])


# survive --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beads", "options", "die_at"), [(1, "", 5), (4, "<batch_size>4</batch_size>", 18)])
def test_a_killed_driver_can_be_replaced(tmp_path, processes, reference, beads, options, die_at):
    xml = write_input(tmp_path, unix(options), beads=beads)
    ipi, driver = processes.ipi(xml), processes.driver(tmp_path, "--die-at", str(die_at))
    assert driver.wait(LIMIT) == 9
    assert ipi.poll() is None
    second = processes.driver(tmp_path, log="second.log")
    assert ipi.wait(LIMIT) == 0
    assert second.wait(LIMIT) == 0
    same(tmp_path, reference[beads])


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("--nan-at", r"evaluation 5 failed: the forces of atom 0 \(from 0\) came out as nan"),
        ("--raise-at", "evaluation 5 failed: RuntimeError: injected failure"),
    ],
)
def test_a_failed_evaluation_ends_the_driver_and_not_ipi(tmp_path, processes, reference, failure, words):
    xml = write_input(tmp_path, unix())
    ipi, driver = processes.ipi(xml), processes.driver(tmp_path, failure, "5")
    assert driver.wait(LIMIT) == 1
    assert re.search(words, (tmp_path / "driver.log").read_text())
    assert ipi.poll() is None
    processes.driver(tmp_path, log="second.log")
    assert ipi.wait(LIMIT) == 0
    same(tmp_path, reference[1])


def test_a_driver_may_connect_again(tmp_path, processes, reference):
    xml = write_input(tmp_path, unix())
    ipi, driver = processes.ipi(xml), processes.driver(tmp_path, "--nan-at", "5", "--reconnects", "1")
    assert ipi.wait(LIMIT) == 0
    assert driver.wait(LIMIT) == 0
    same(tmp_path, reference[1])


def test_another_number_of_atoms(tmp_path, processes):
    xml = write_input(tmp_path, unix())
    ipi, driver = processes.ipi(xml), processes.driver(tmp_path, "--atoms", "12")
    assert driver.wait(LIMIT) == 1
    log = (tmp_path / "driver.log").read_text()
    assert "i-PI moves 8 atoms but the start structure of this driver has 12: give" in log
    assert ipi.poll() is None


def test_ipi_killed(tmp_path, processes):
    xml = write_input(tmp_path, unix(), steps=10000)
    ipi, driver = processes.ipi(xml), processes.driver(tmp_path, "--sleep", "0.01")
    assert until(lambda: rows(tmp_path) > 1)
    ipi.kill()
    assert driver.wait(10) == 1
    last = (tmp_path / "driver.log").read_text().splitlines()[-1]
    assert "without a goodbye" in last
    assert "continue from RESTART" in last


@pytest.mark.parametrize("ff", [unix(), direct()])
def test_a_soft_stop_leaves_a_restart_that_continues_exactly(tmp_path, processes, reference, ff):
    # the EXIT file ends i-PI somewhere; the rest of the ten steps is done from RESTART
    slow = ff.replace("start.xyz", "start.xyz, sleep: 0.3") if "ffdirect" in ff else ff
    xml = write_input(tmp_path, slow)
    ipi = processes.ipi(xml)
    driver = processes.driver(tmp_path, "--sleep", "0.3") if ff == unix() else None
    assert until(lambda: rows(tmp_path) > 2)
    (tmp_path / "EXIT").touch()
    assert ipi.wait(LIMIT) == 0
    assert driver is None or driver.wait(LIMIT) == 0
    (tmp_path / "EXIT").unlink()
    assert len(table(tmp_path)) < 11
    (tmp_path / "RESTART").write_text((tmp_path / "RESTART").read_text().replace("sleep: 0.3", "sleep: 0"))
    (tmp_path / "RESTART").rename(tmp_path / "again.xml")
    ipi = processes.ipi(tmp_path / "again.xml", "again.log")
    driver = processes.driver(tmp_path, log="again-driver.log") if ff == unix() else None
    assert ipi.wait(LIMIT) == 0
    same(tmp_path, reference[1])


@pytest.mark.parametrize("failure", ["nan_at: 5", "raise_at: 5"])
@pytest.mark.parametrize("threaded", ["False", "True"])
def test_a_failure_inside_ipi_leaves_a_restart(tmp_path, processes, failure, threaded):
    xml = write_input(tmp_path, direct(failure).replace("name='ff'", f"name='ff' threaded='{threaded}'", 1))
    ipi = processes.ipi(xml)
    assert ipi.wait(LIMIT) == 0
    log = (tmp_path / "ipi.log").read_text()
    assert pes.STOPPED + ("the forces" if "nan" in failure else "RuntimeError: injected failure") in log
    assert len(table(tmp_path)) == 4  # step 0 to 3
    restart = (tmp_path / "RESTART").read_text()
    assert "<step>3</step>" in restart
    assert "nan" not in restart.replace("nan_at", "")


def test_a_failure_at_the_first_structure(tmp_path, processes):
    xml = write_input(tmp_path, direct("raise_at: 1"))
    assert processes.ipi(xml).wait(LIMIT) == 0
    assert pes.STOPPED + "RuntimeError: injected failure" in (tmp_path / "ipi.log").read_text()
    assert (tmp_path / "RESTART").exists()


# connect and leave ----------------------------------------------------------------------------------------------------


def test_nobody_listens(scratch):
    said: list[str] = []
    began = time.monotonic()
    assert serve(ToyEvaluator(8), UnixAddress("argon", f"{scratch}/s_"), wait=0.5, report=said.append) == 1
    assert 0.4 < time.monotonic() - began < 5
    assert len(said) == 1
    where = f"unix socket {scratch}/s_argon"
    assert re.fullmatch(rf"nobody listens at {where} after 0\.5 s \(.*\): start i-PI .* --wait SECONDS", said[0])


def test_nobody_listens_on_tcp():
    said: list[str] = []
    port = free_port()
    assert serve(ToyEvaluator(8), TcpAddress("localhost", port), wait=0.3, report=said.append) == 1
    assert f"nobody listens at localhost port {port} after 0.3 s" in said[0]


def test_a_server_that_comes_late_is_found(scratch):
    address = UnixAddress("late", f"{scratch}/s_")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def listen() -> None:
        server.bind(address.path)
        server.listen()

    timer = threading.Timer(0.4, listen)
    timer.start()
    with connect(address, wait=10) as connected:
        assert connected.getpeername() == address.path
    timer.join()
    server.close()


def test_addresses_that_cannot_be():
    with pytest.raises(InputError, match=r"has 1\d\d bytes and the system allows 107"):
        UnixAddress("x" * 100)
    with pytest.raises(InputError, match="outside 1…65535"):
        TcpAddress("localhost", 0)
    with pytest.raises(InputError, match="no address"):
        connect(TcpAddress("no.such.host.invalid", 31415), wait=0.1)
    with pytest.raises(InputError, match="give --unix NAME with --shm"):
        serve(ToyEvaluator(8), TcpAddress("localhost", 31415), use_shared_memory=True)


def test_an_idle_driver_rests_and_ctrl_c_ends_it(scratch):
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(f"{scratch}/s_idle")
    server.listen()
    server.settimeout(LIMIT)
    driver = subprocess.Popen(
        [sys.executable, str(TOY), "--unix", "idle", "--socket-prefix", f"{scratch}/s_"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    connection, _ = server.accept()
    ticks = lambda: sum(map(int, Path(f"/proc/{driver.pid}/stat").read_text().split()[13:15]))  # noqa: E731
    before = ticks()
    time.sleep(1.0)
    assert ticks() - before <= 5  # of 100: it waits and does not spin
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=10)
    assert driver.returncode == 1
    assert "interrupted after 0 evaluations" in out
    assert "Traceback" not in out
    connection.close()
    server.close()


def test_padding_is_evaluated_once():
    toy = ToyEvaluator(2)
    r = np.random.default_rng(0).normal(scale=8.0, size=(2, 2, 3))
    cells = np.repeat(50 * np.eye(3)[None], 4, 0)
    results = evaluate_batch(toy, Structures(cells, r[[0, 1, 1, 1]]))
    assert toy.batches == [2]
    assert len(results) == 4
    assert results[1].energy == results[3].energy != results[0].energy


def test_positions_that_are_not_numbers():
    r = np.full((1, 2, 3), np.nan)
    with pytest.raises(VoltPIError, match="the run has exploded"):
        evaluate_batch(ToyEvaluator(2), Structures(np.eye(3)[None], r))


# the PES file ---------------------------------------------------------------------------------------------------------


def test_the_pes_prints_its_path():
    done = subprocess.run([sys.executable, "-m", "voltpi.driver.pes"], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0
    assert done.stderr == ""
    assert Path(done.stdout.strip()).samefile(pes.__file__)


def test_ipi_finds_the_class_without_running_the_file():
    from ipi.pes import load_pes, scan_pes_file

    assert scan_pes_file(pes.__file__) == ("VoltPI", "voltpi")
    saved = sys.modules.get("pes")
    try:
        loaded = load_pes("custom", pes.__file__)
        assert sys.modules["pes"].__name__ == "pes"
        assert loaded.__name__ == "VoltPI"
        with pytest.raises(InputError, match="give no template"):
            loaded(settings="settings.yaml", verbosity=False)
    finally:
        sys.modules.pop("pes", None)
        if saved is not None:
            sys.modules["pes"] = saved


def test_parameters_become_settings(monkeypatch):
    seen = {}

    def make(settings, template, overrides):
        seen.update(overrides, settings=settings, template=template)
        return ToyEvaluator(8)

    monkeypatch.setattr(pes, "make_evaluator", make)
    given = {"field": "0 0 0.05", "displacement": "null null 0.1", "charges.model": "qeq"}
    pes.VoltPI("s.yaml", "t.xyz", verbosity=True, **given)
    assert seen == {
        "settings": "s.yaml",
        "template": "t.xyz",
        "field": [0.0, 0.0, 0.05],
        "displacement": [None, None, 0.1],
        "charges.model": "qeq",
    }
