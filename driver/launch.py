"""``voltpi run``: starts i-PI and its drivers, shows progress, watches, and leaves everything on disk.

i-PI runs in the folder of its input, with unix sockets under a private prefix (so that no stale socket can block it).
It ends with status 0 after almost anything, so what happened is read from its log, its RESTART and the drivers. Nothing
here waits without a limit: whichever process dies, the others are stopped, i-PI softly so that a RESTART is left.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from voltpi.driver.check import refuse_starts
from voltpi.driver.client import TcpAddress, UnixAddress
from voltpi.driver.ipi_input import RunInput, SocketForceField, read_input
from voltpi.driver.pes import STOPPED
from voltpi.driver.progress import Progress, checkpoint_state
from voltpi.driver.schedule import clock_settings, refusals
from voltpi.driver.settings import load_settings
from voltpi.potential.errors import InputError

__all__ = ["RunRecord", "driver_command", "read_input", "run", "settings_for"]

CONNECT_SECONDS = 600  # for a driver; this process notices long before when i-PI is gone
SOFT_STOP_SECONDS = (15.0, 75.0)  # with the drivers, and without: i-PI waits up to 60 s for one that does not answer
LOCK = ".voltpi.lock"
_POLL_SECONDS = 0.2
_GOODBYE_SECONDS = 30.0
_LOG_LINES = 12


def run(
    input_xml: str | Path,
    *,
    drivers: int = 1,
    settings: str | Path | None = None,
    template: str | Path | None = None,
    quiet: bool = False,
) -> int:
    """Runs an i-PI input or continues a RESTART; returns the exit status.

    Parameters:
        input_xml: the XML. Beside it, ``settings.yaml`` (or ``settings-NAME.yaml`` for ``<ffsocket name='NAME'>``)
            holds the settings of the drivers; an ``<ffdirect>`` names its own, and needs no driver.
        drivers: for every ``<ffsocket>``, sharing the CPU's cores.
        settings: another settings file.
        template: another start structure than the XML's (for a checkpoint whose first run is not known here).
        quiet: no progress, only what went wrong.

    Returns 0 when all steps were done; 1 when the run failed or was stopped; 2 when a driver or i-PI's PES refused its
    input.
    Raises InputError for anything that can be known to be wrong before.
    """
    if drivers < 1:
        raise InputError(f"--drivers is {drivers}: give 1 or more")
    plan = read_input(input_xml)
    record = RunRecord.of(plan, template)
    for ff in plan.sockets:
        record.settings[ff.name] = settings_for(plan, ff, settings, record)
        start = record.templates.get(ff.name)
        if start is None or not start.is_file():
            raise InputError(
                f"{plan.path.name}: a checkpoint holds no start structure and "
                f"{record.path.name}, which says where it is, is not here (or names a missing file); "
                "give it with --template START.xyz"
            )
    refuse_starts(plan, record.settings)
    clocks = {ff.name: clock_options(plan, ff, record.settings[ff.name], drivers) for ff in plan.sockets}
    with _alone_in(plan.folder):
        # a short name in /tmp: unix socket paths have about a hundred bytes
        place = "/tmp" if os.access("/tmp", os.W_OK) else None
        scratch = Path(tempfile.mkdtemp(prefix=f"voltpi-{os.getpid()}-", dir=place))
        try:
            return _Session(plan, record, drivers, clocks, scratch, quiet).run()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds the run folder's lock, which the system drops when this process ends, however it ends.

    Raises InputError where another run holds it: both would write the same RESTART and outputs.
    """
    path = folder / LOCK
    try:
        file = path.open("a")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); run in a folder that can") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another `voltpi run` is going on in this folder; wait for it, or run in a folder of its own"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


@dataclass
class RunRecord:
    """What a continuation needs and i-PI's RESTART does not hold; a small JSON file beside the outputs.

    ``templates`` (start structures) and ``settings`` are files by the name of the ``<ffsocket>``.
    """

    path: Path
    templates: dict[str, Path] = field(default_factory=dict)
    settings: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: RunInput, template: str | Path | None = None) -> RunRecord:
        """The record of this run, with what its first part left if this is a checkpoint. Raises InputError.

        ``template``: the start structure for all drivers, instead of those of the input.
        """
        record = cls(plan.folder / f"{plan.prefix or 'i-pi'}.run.json")
        record.templates = {ff.name: start for ff in plan.sockets if (start := plan.template_of(ff.name)) is not None}
        if plan.is_checkpoint and record.path.is_file():
            try:
                known = json.loads(record.path.read_text())
                record.settings = {name: plan.folder / path for name, path in known["settings"].items()}
                # earlier records hold one for all
                starts = (
                    known["templates"] if "templates" in known else dict.fromkeys(known["settings"], known["template"])
                )
                record.templates = {name: plan.folder / path for name, path in starts.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{record.path.name}: cannot be read ({type(error).__name__}: {error}); remove it and give "
                    "--settings and --template"
                ) from error
        if template is not None:
            record.templates = dict.fromkeys((ff.name for ff in plan.sockets), Path(template).resolve())
        return record

    def write(self) -> None:
        """Writes it, with paths relative to its folder, where there are drivers to start again."""
        if not self.settings:
            return
        folder = self.path.parent
        content = {
            key: {name: os.path.relpath(path, folder) for name, path in files.items()}
            for key, files in (("templates", self.templates), ("settings", self.settings))
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def settings_for(plan: RunInput, ff: SocketForceField, given: str | Path | None, record: RunRecord) -> Path:
    """The settings file of a forcefield's drivers: given, of the first run, or beside the XML. Raises InputError."""
    if given is not None:
        candidates = [Path(given).resolve()]
    else:
        known = record.settings.get(ff.name)
        candidates = [
            *([known] if known else []),
            plan.folder / f"settings-{ff.name}.yaml",
            plan.folder / "settings.yaml",
        ]
    for path in candidates:
        if path.is_file():
            return path
    if given is not None:
        raise InputError(f"{given}: there is no such settings file; check the path given with --settings")
    raise InputError(
        f"{plan.path.name}: <ffsocket name='{ff.name}'> needs settings for its drivers; put settings.yaml into "
        f"{plan.folder} or give --settings FILE"
    )


def driver_command(ff: SocketForceField, settings: Path, template: Path, socket_prefix: str) -> list[str]:
    """The command line of one driver."""
    command = [
        sys.executable,
        "-m",
        "voltpi.driver.cli",
        "drive",
        "--settings",
        str(settings),
        "--template",
        str(template),
        "--wait",
        str(CONNECT_SECONDS),
    ]
    # i-PI sends them too, but a driver that knows them builds its potential once
    for key, value in ff.overrides.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    if ff.mode == "inet":
        host = "localhost" if ff.address in ("", "0.0.0.0") else ff.address
        TcpAddress(host, ff.port)  # says so if it cannot be
        return [*command, "--host", host, "--port", str(ff.port)]
    UnixAddress(ff.address, socket_prefix)
    command += ["--unix", ff.address, "--socket-prefix", socket_prefix]
    return [*command, "--shm"] if ff.mode == "shm" else command


def clock_options(plan: RunInput, ff: SocketForceField, settings: Path, drivers: int) -> list[str]:
    """What the driver of a forcefield whose potentials change with time must know besides; else nothing.

    Raises InputError where they cannot follow the time.
    """
    try:
        tree = load_settings(settings, ff.overrides, origin="<parameters>", folder=plan.folder)
    except InputError:
        return []  # the driver says it
    if not tree.scheduled:
        return []
    where = f"{plan.path.name}, <ffsocket name='{ff.name}'>"
    if drivers > 1:
        raise InputError(
            f"{where}: {tree.scheduled[0]} changes with time, and of {drivers} drivers none could count the steps; run "
            "it with one"
        )
    for sentence in refusals(plan, ff, tree):
        raise InputError(f"{where}: {sentence}")
    return [word for assignment in clock_settings(plan) for word in ("--set", assignment)]


def ipi_command(xml: str, socket_prefix: str) -> list[str]:
    """The command line of i-PI, from the environment of this Python. Raises InputError when it is not installed."""
    beside = Path(sys.executable).with_name("i-pi")
    script = str(beside) if beside.is_file() else shutil.which("i-pi")
    if script is None:
        raise InputError(f"i-pi is not beside {sys.executable}: install it there with `python -m pip install ipi`")
    return [sys.executable, script, "-S", socket_prefix, xml]


def _environment(threads: int) -> dict[str, str]:
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment.setdefault(name, str(max(1, threads)))
    return environment


def _cores() -> int:
    """Cores for the drivers: one is left to i-PI and the rest of the machine.

    Threads that wait for one another while something else has their core are slow out of all proportion (64 H2O on two
    cores, one of them busy: 0.3 s a step with one thread, 2.5 s with two; both free: 0.29 and 0.21 s).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


@dataclass
class _Process:
    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls, name: str, command: Sequence[str], folder: Path, log: Path, threads: int, *, append: bool
    ) -> _Process:
        with log.open("ab" if append else "wb") as out:
            # its own session: Ctrl-C reaches only the launcher, which stops the others in the right order
            popen = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(threads),
                start_new_session=True,
            )
        return cls(name, popen, log)

    @property
    def status(self) -> int | None:
        return self.popen.poll()

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, seconds: float = 5.0) -> None:
        """SIGTERM, then SIGKILL."""
        if self.status is None:
            self.popen.terminate()
            if not self.wait(seconds):
                self.popen.kill()
                self.popen.wait()

    def tail(self, lines: int) -> list[str]:
        """The last lines of the log that are not blank."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 65536))
            text = file.read().decode("utf-8", errors="replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]

    def last_words(self) -> str:
        """The sentence a driver left."""
        return (self.tail(1) or ["it said nothing"])[0].removeprefix("error: ")


class _Stop(Exception):
    """Ends a session with a sentence and an exit status."""

    def __init__(self, sentence: str, status: int = 1, show: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.status, self.show = status, show


class _Session:
    """One i-PI with its drivers, from start to end."""

    def __init__(
        self,
        plan: RunInput,
        record: RunRecord,
        n_drivers: int,
        clocks: dict[str, list[str]],
        scratch: Path,
        quiet: bool,
    ) -> None:
        self.plan, self.record, self.scratch, self.quiet = plan, record, scratch, quiet
        self.n_drivers, self.clocks = n_drivers, clocks
        self.ipi: _Process | None = None
        self.drivers: list[_Process] = []
        self.interrupted = threading.Event()
        self.began = time.time()
        self._alone_since: float | None = None

    def run(self) -> int:
        """Starts, watches, stops; returns the exit status."""
        (self.plan.folder / "EXIT").unlink(missing_ok=True)  # one left over would end the run at its first step
        progress = Progress(self.plan, quiet=self.quiet)
        try:
            with self._signals(), progress:
                self._start()
                self._watch(progress)
                self._judge(progress)
        except _Stop as stop:
            self._stop_all()
            for line in stop.show:
                print(f"  | {line}", file=sys.stderr)
            print(f"error: {stop}{self._how_to_continue()}", file=sys.stderr, flush=True)
            return stop.status
        finally:
            self._stop_all()
        progress.done()
        return 0

    # -- starting

    def _start(self) -> None:
        plan = self.plan
        prefix = str(self.scratch / "s_")
        settings, templates = self.record.settings, self.record.templates
        commands = {
            (ff.name, i): driver_command(ff, settings[ff.name], templates[ff.name], prefix) + self.clocks[ff.name]
            for ff in plan.sockets
            for i in range(self.n_drivers)
        }
        self.record.write()
        stem, append = plan.prefix or "i-pi", plan.first_step > 0
        cores = _cores()
        self.ipi = _Process.start(
            "i-PI",
            ipi_command(plan.path.name, prefix),
            plan.folder,
            plan.folder / f"{stem}.i-pi.log",
            1 if commands else cores,
            append=append,
        )
        self._log_start = self.ipi.log.stat().st_size if append else 0
        for number, ((name, _), command) in enumerate(commands.items(), 1):
            log = plan.folder / f"{stem}.driver-{number}.log"
            self.drivers.append(
                _Process.start(
                    f"driver {number} of <ffsocket name='{name}'>",
                    command,
                    plan.folder,
                    log,
                    cores // len(commands),
                    append=append,
                )
            )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM (batch systems send it) ask for a soft stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {s: signal.signal(s, lambda *_: self.interrupted.set()) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    # -- watching

    def _watch(self, progress: Progress) -> None:
        """Returns when i-PI has ended; raises _Stop when something else ended the run."""
        assert self.ipi is not None
        while self.ipi.status is None:
            if self.interrupted.is_set():
                raise _Stop("interrupted")
            for driver in self.drivers:
                if driver.status:
                    self._driver_failed(driver)
            self._watch_goodbyes()
            if progress.update():
                raise _Stop(
                    f"i-PI's state is not a number any more since step {progress.step}: start again from an earlier "
                    "checkpoint with a shorter <timestep>"
                )
            self.interrupted.wait(_POLL_SECONDS)
        progress.update()

    def _driver_failed(self, driver: _Process) -> None:
        assert self.ipi is not None
        # when i-PI dies, its drivers complain first
        if self.ipi.wait(2.0) and self.ipi.status:
            return
        status = driver.status
        if status is not None and status < 0:
            words = f"it was killed by {signal.Signals(-status).name}; its last line was: {driver.last_words()}"
        else:
            words = driver.last_words()
        raise _Stop(f"{driver.name} stopped: {words} (log: {driver.log.name})", 2 if status == 2 else 1)

    def _watch_goodbyes(self) -> None:
        """Without drivers i-PI waits for ever: drivers leave shortly before i-PI does, or were dropped by it."""
        if not self.drivers or any(driver.status is None for driver in self.drivers):
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > _GOODBYE_SECONDS:
            raise _Stop(
                "i-PI goes on but sent all drivers away: is its <timeout> shorter than one evaluation? "
                f"({self.drivers[0].last_words()})"
            )

    # -- the end

    def _judge(self, progress: Progress) -> None:
        """Raises _Stop unless i-PI did what its input asked for."""
        assert self.ipi is not None
        log = self._ipi_log()
        if self.ipi.status:
            refusal = re.findall(r"^(?:voltpi\.\S*|\S*\.)?InputError: (.*)", log, flags=re.MULTILINE)
            if refusal:
                raise _Stop(refusal[-1], 2)
            raise _Stop(
                f"i-PI stopped with status {self.ipi.status}; the end of {self.ipi.log.name} is above",
                show=self.ipi.tail(_LOG_LINES),
            )
        if stopped := re.search(re.escape(STOPPED) + r"(.*?)\.?(?: Restartable as is| *$)", log, flags=re.MULTILINE):
            raise _Stop(stopped[1])
        step, finite = checkpoint_state(self.plan.folder / "RESTART") if self._has_restart() else (progress.step, True)
        if not finite:
            raise _Stop(
                "i-PI ended with positions or momenta that are not numbers: start again from an earlier checkpoint "
                "with a shorter <timestep>"
            )
        progress.step = step
        if step >= self.plan.steps or re.search(r"[Ww]all ?clock time (?:expired|elapsed)", log):
            return
        # i-PI calls an EXIT file a success, like a motion (an optimization, say) that is finished before the last step
        if "EXIT file detected" in log or "I-PI reports success" not in log:
            raise _Stop(f"i-PI stopped at step {step} of {self.plan.steps} (an EXIT file or a signal?)")

    def _ipi_log(self) -> str:
        assert self.ipi is not None
        with self.ipi.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode("utf-8", errors="replace")

    def _has_restart(self) -> bool:
        """Whether this run wrote a RESTART."""
        restart = self.plan.folder / "RESTART"
        return restart.is_file() and restart.stat().st_mtime >= self.began - 1.0

    def _how_to_continue(self) -> str:
        if not self._has_restart():
            return ""
        step, finite = checkpoint_state(self.plan.folder / "RESTART")
        if not finite or not 0 < step < self.plan.steps:
            return ""
        restart = os.path.relpath(self.plan.folder / "RESTART")
        return f"; the state of step {step} of {self.plan.steps} is kept, continue with `voltpi run {restart}`"

    def _stop_all(self) -> None:
        """i-PI softly first (it still needs its drivers to end a step), then the drivers, then whatever is left."""
        if self.ipi is not None and self.ipi.status is None:
            self.ipi.popen.terminate()
            if not self.ipi.wait(SOFT_STOP_SECONDS[0]):
                for driver in self.drivers:  # one of them may be what i-PI waits for
                    driver.stop()
                self.ipi.wait(SOFT_STOP_SECONDS[1])
            if self.ipi.status is None:
                self.ipi.popen.kill()
                self.ipi.popen.wait()
        for driver in self.drivers:
            if self.ipi is None or not driver.wait(2.0):
                driver.stop()
