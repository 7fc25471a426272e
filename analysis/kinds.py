"""What an analysis and an option of one are; ``voltpi.analysis.registry`` has the list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["AUDIT", "BIN", "CHARGES", "EMPTY", "FIELD", "SKIP", "TEMPERATURE", "Analysis", "Option"]


@dataclass(frozen=True)
class Option:
    """An option of an analysis: ``--name`` followed by ``count`` values of one ``kind``; ``kind`` bool: a flag.

    A dash in the name becomes an underscore in the argument of ``Analysis.run``.
    """

    name: str
    help: str
    count: int = 1
    default: float | str | bool | tuple[float, ...] | None = None
    kind: type[float] | type[int] | type[str] | type[bool] = float
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Analysis:
    """An analysis: ``run(paths, out, **options)`` writes CSV, JSON and figures and returns a JSON-able dict.

    The dict holds ``report`` (lines for a person), ``figure`` and ``files`` (paths) beside the numbers. With ``out``
    None the files go beside the run. Wrong input raises InputError. One that ``needs_setup`` takes ``describe``, which
    says what a run's settings mean for its start structure (``voltpi.analysis.capacitor``): only the driver knows.
    """

    name: str
    summary: str
    run: Callable[..., dict[str, Any]]
    options: tuple[Option, ...] = ()
    needs_setup: bool = False


SKIP = Option("skip", "time at the start to leave out, fs", default=0.0)
BIN = Option("bin", "width of bins, Å", default=0.1)
AUDIT = Option("audit", "frames in which the potential of the electrodes is summed over all charges", default=20.0)
TEMPERATURE = Option("temperature", "in K, where the run's files do not say it")
EMPTY = Option("empty", "change of the charge with the voltage at fixed nuclei, e/V, where it cannot be computed")
FIELD = Option("field", "the field in V/Å, where the run's files do not say it", count=3)
CHARGES = Option("charges", "file of charges (e): CSV element,charge, or extended XYZ with initial_charges", kind=str)
