"""The field in time of i-PI's driven dynamics: ``<efield>`` of ``<driven_dynamics>`` in a run's input or RESTART."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ipi.utils.units import unit_to_internal, unit_to_user
from numpy.typing import ArrayLike, NDArray

from voltpi.analysis.ipi_xml import words_of
from voltpi.analysis.run_inputs import simulations
from voltpi.potential.errors import InputError

__all__ = ["DrivenField", "driven_field_of", "read_efield"]

Array = NDArray[np.float64]

C_CM_PER_FS = 2.99792458e-5
"""The speed of light in cm/fs."""


@dataclass(frozen=True)
class DrivenField:
    """ε(t) = amplitude · cos(frequency·t + phase) · exp(−½ ((t − peak)/sigma)²).

    amplitude [3] V/Å · frequency rad/fs · phase rad · peak, sigma fs; without envelope sigma is infinite
    """

    amplitude: tuple[float, float, float]
    frequency: float = 0.0
    phase: float = 0.0
    peak: float = 0.0
    sigma: float = math.inf

    @property
    def is_pulse(self) -> bool:
        """Whether i-PI applies the envelope: it leaves it out where the peak is not after time 0."""
        return self.peak > 0.0 and math.isfinite(self.sigma)

    @property
    def strength(self) -> float:
        """V/Å, of the amplitude."""
        return float(np.linalg.norm(self.amplitude))

    @property
    def wavenumber(self) -> float:
        """cm⁻¹, of the frequency."""
        return self.frequency / (2.0 * math.pi * C_CM_PER_FS)

    def __call__(self, time: ArrayLike) -> Array:
        """ε [..., 3] (V/Å) at times (fs)."""
        t = np.asarray(time, dtype=float)
        shape = self.envelope(t) * np.cos(self.frequency * t + self.phase)
        return shape[..., None] * np.array(self.amplitude)

    def rate(self, time: ArrayLike) -> Array:
        """∂ε/∂t [..., 3] (V/Å/fs) at times (fs)."""
        t = np.asarray(time, dtype=float)
        angle = self.frequency * t + self.phase
        change = -self.frequency * np.sin(angle)
        if self.is_pulse:
            change = change - (t - self.peak) / self.sigma**2 * np.cos(angle)
        return (self.envelope(t) * change)[..., None] * np.array(self.amplitude)

    def envelope(self, time: ArrayLike) -> Array:
        """The Gaussian, 1 at its top; 1 throughout without one."""
        t = np.asarray(time, dtype=float)
        return np.exp(-0.5 * ((t - self.peak) / self.sigma) ** 2) if self.is_pulse else np.ones_like(t)

    def words(self) -> str:
        """The field in words."""
        vector = f"({', '.join(f'{x:g}' for x in self.amplitude)}) V/Å"
        wave = f" at {self.wavenumber:.4g} cm⁻¹" if self.frequency else ""
        if self.is_pulse:
            return f"a pulse of {vector}{wave}, highest at {self.peak:g} fs, with sigma {self.sigma:g} fs"
        return f"a plane wave of {vector}{wave}" if self.frequency else f"a constant field of {vector}"


def read_efield(driven: ET.Element) -> DrivenField:
    """The field of a ``<driven_dynamics>``. Raises ValueError for what i-PI cannot read either."""
    tag = driven.find("efield")
    amplitude = _numbers(tag, "amp", "electric-field", "v/ang", [0.0, 0.0, 0.0])
    if len(amplitude) != 3:
        raise ValueError(f"<amp> has {len(amplitude)} numbers; give three")

    def one(name: str, family: str, unit: str, default: float) -> float:
        values = _numbers(tag, name, family, unit, [default])
        if len(values) != 1:
            raise ValueError(f"<{name}> has {len(values)} numbers; give one")
        return values[0]

    x, y, z = amplitude
    return DrivenField(
        (x, y, z),
        one("freq", "frequency", "atomic_unit", 0.0) * float(unit_to_internal("time", "femtosecond", 1.0)),
        one("phase", "number", "", 0.0),
        one("peak", "time", "femtosecond", 0.0),
        one("sigma", "time", "femtosecond", math.inf),
    )


def _numbers(parent: ET.Element | None, tag: str, family: str, unit: str, default: list[float]) -> list[float]:
    element = None if parent is None else parent.find(tag)
    if element is None or not (element.text or "").strip():
        return default
    try:
        factor = unit_to_user(family, unit, unit_to_internal(family, element.get("units", "automatic"), 1.0))
        return [float(factor) * float(word) for word in words_of(element.text)]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"<{tag}> is '{(element.text or '').strip()}'; give numbers in a unit of i-PI") from None


def driven_field_of(folder: Path, outputs: Iterable[Path]) -> DrivenField:
    """The field in time of the run in ``folder`` that wrote ``outputs``, as its i-PI input (or RESTART) says.

    Raises InputError where none of them drives the dynamics, one cannot be read, or two disagree.
    """
    found: list[tuple[Path, DrivenField]] = []
    for path, root in simulations(folder, [output.name for output in outputs]):
        for driven in root.iter("driven_dynamics"):
            try:
                found.append((path, read_efield(driven)))
            except ValueError as error:
                raise InputError(f"{path}: <efield>: {error}") from None
    if not found:
        raise InputError(
            f"{folder}: no i-PI input with <driven_dynamics> beside the outputs, which says the field in time; put "
            "the run's input there"
        )
    source, field = found[0]
    times = np.linspace(0.0, 2.0 * field.peak + 1000.0, 401)
    for other, also in found[1:]:
        # a RESTART has fewer digits than the input
        if not np.allclose(also(times), field(times), rtol=0.0, atol=1e-4 * field.strength):
            raise InputError(
                f"{folder}: the driving field is {field.words()} in {source.name} but {also.words()} in {other.name}; "
                "move away the file that the run did not use"
            )
    return field
