"""How far a run of i-PI is, read from the files it writes; shown on a terminal or as lines in a log."""

from __future__ import annotations

import math
import re
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from voltpi.driver.ipi_input import RunInput

__all__ = ["Progress", "Row", "checkpoint_state", "last_row"]

_TAIL_BYTES = 65536
_LINE_SECONDS = 10.0
_SHOWN = ("temperature", "conserved", "potential")


@dataclass(frozen=True)
class Row:
    """The last row of a properties file: the step, and values by name with i-PI's units in braces."""

    step: int
    values: dict[str, float]

    @property
    def finite(self) -> bool:
        """Whether energies and temperature are; other columns may be NaN because they do not apply."""
        return all(math.isfinite(value) for name, value in self.values.items() if name.partition("{")[0] in _SHOWN)

    def __str__(self) -> str:
        shown = []
        for name, value in self.values.items():
            quantity, _, unit = name.rstrip("}").partition("{")
            if quantity in _SHOWN:
                shown.append(f"{quantity} {value:.8g}{' ' + unit if unit else ''}")
        return ", ".join(shown)


def last_row(path: Path) -> Row | None:
    """The last complete row of an i-PI properties file with a column ``step``; None while there is none."""
    try:
        with path.open("rb") as file:
            head = file.read(_TAIL_BYTES)
            size = path.stat().st_size
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
    except OSError:
        return None
    columns: dict[int, str] = {}
    for first, name in re.findall(rb"^#\s*(?:column|cols\.)\s+(\d+)\S*\s+-->\s+(\S+)", head, flags=re.MULTILINE):
        columns[int(first) - 1] = name.decode()
    lines = tail[: tail.rfind(b"\n") + 1].splitlines()
    if not lines or lines[-1].lstrip().startswith(b"#"):
        return None
    words = lines[-1].split()
    try:
        values = {name: float(words[i]) for i, name in columns.items()}
        return Row(int(values.pop("step")), values)
    except (ValueError, IndexError, KeyError):
        return None


def checkpoint_state(path: Path) -> tuple[int, bool]:
    """The step of a RESTART, and whether positions and momenta in it are finite; (0, True) if it cannot be read."""
    try:
        root = ET.parse(path).getroot()
        step = int((root.findtext("step") or "0").strip())
    except (ET.ParseError, OSError, ValueError):
        return 0, True
    bad = any(
        re.search(r"\b(?:nan|inf)\b", element.text or "", flags=re.IGNORECASE)
        for tag in ("q", "p")
        for element in root.iter(tag)
    )
    return step, not bad


class Progress:
    """Follows a run; a context manager while the bar is on the screen."""

    def __init__(self, plan: RunInput, *, quiet: bool = False, console: Console | None = None) -> None:
        self.plan, self.quiet = plan, quiet
        self.step = plan.first_step
        self.row: Row | None = None
        self._console = console or Console()
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._said = self._began
        self._stale = {path: _fingerprint(path) for path in plan.properties}
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if not quiet and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(
                plan.path.name, total=plan.steps, completed=plan.first_step, state="starting"
            )

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        elif not self.quiet:
            start = f"from step {self.plan.first_step} " if self.plan.first_step else ""
            self._say(f"{self.plan.path.name}: {self.plan.steps} steps {start}in {self.plan.folder}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self) -> bool:
        """Looks at i-PI's outputs, shows what is new; True when there is a value that is not a number."""
        for path in self.plan.properties:
            if _fingerprint(path) == self._stale.get(path):
                continue  # of an earlier run, which i-PI has not moved away yet
            row = last_row(path)
            if row is not None and (self.row is None or row.step >= self.row.step):
                self.row = row
        if self.row is None:
            return False
        self.step = max(self.row.step, self.plan.first_step)
        if self._first is None:
            self._first = (self.step, time.monotonic())
        state = f"{self._speed()}{self.row}"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.step, state=state)
        elif not self.quiet and time.monotonic() - self._said > _LINE_SECONDS:
            self._said = time.monotonic()
            self._say(f"step {self.step}/{self.plan.steps}: {state}")
        return not self.row.finite

    def done(self) -> None:
        """Says that the run is complete."""
        if self.quiet:
            return
        seconds = time.monotonic() - self._began
        steps = max(0, self.step - self.plan.first_step)
        last = f"; last: {self.row}" if self.row and str(self.row) else ""
        self._say(f"done: {steps} steps in {seconds:.1f} s{last}; outputs {self.plan.prefix}.* in {self.plan.folder}")

    def _speed(self) -> str:
        assert self._first is not None
        steps, seconds = self.step - self._first[0], time.monotonic() - self._first[1]
        if not steps or seconds <= 0:
            return ""
        if self.plan.timestep is None:
            return f"{steps / seconds:.3g} steps/s, "
        return f"{steps / seconds * self.plan.timestep * 86400 * 1e-3:.3g} ps/day, "

    def _say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
