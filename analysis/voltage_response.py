"""Charge against voltage over several runs: dQ/dΨ as the slope of a straight line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voltpi.analysis.capacitance import MICROFARAD_PER_CM2, ChargeSummary
from voltpi.analysis.statistics import LinearFit, linear_fit, plus_minus
from voltpi.potential.errors import InputError

__all__ = ["VoltageResponse", "voltage_response"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class VoltageResponse:
    """Q (e) with errors at voltages (V) of several runs, the line through them; area Å².

    caution: what to say where the error of a run cannot be trusted, else empty
    """

    voltages: Array
    charges: Array
    errors: Array
    line: LinearFit
    area: float
    caution: str

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        scale = MICROFARAD_PER_CM2 / self.area
        return {
            "voltage_V": self.voltages.tolist(),
            "charge_e": self.charges.tolist(),
            "charge_error_e": self.errors.tolist(),
            "capacitance_e_per_V": self.line.slope,
            "capacitance_error_e_per_V": self.line.slope_error,
            "capacitance_uF_per_cm2": self.line.slope * scale,
            "capacitance_error_uF_per_cm2": self.line.slope_error * scale,
            "error_is_reliable": not self.caution,
            "charge_at_zero_voltage_e": self.line.intercept,
            "charge_at_zero_voltage_error_e": self.line.intercept_error,
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        scale = MICROFARAD_PER_CM2 / self.area
        slope, error = self.line.slope, self.line.slope_error
        both = f"{plus_minus(slope, error, '.5f')} e/V, {plus_minus(slope * scale, error * scale, '.3f')} µF/cm²"
        return [f"capacitance dQ/dΨ            {both} ({len(self.voltages)} runs){self.caution}"]


def voltage_response(runs: list[ChargeSummary]) -> VoltageResponse:
    """Straight line through ⟨Q⟩(Ψ).

    Raises InputError for fewer than two voltages, one that is not known or changes, or other electrodes.
    """
    for summary in runs:
        if summary.changing:
            raise InputError(f"{summary.run.folder}: its voltage changes with time; leave it out")
        if not np.isfinite(summary.voltage):
            raise InputError(
                f"{summary.run.folder}: its voltage is not known; print extra_type='electrode_potentials', or leave it "
                "out"
            )
        if abs(summary.area - runs[0].area) > 1e-6 * runs[0].area:
            raise InputError(
                f"{summary.run.folder}: its electrodes have another area than the first run's; leave it out"
            )
    voltages = np.array([summary.voltage for summary in runs])
    if np.ptp(voltages) == 0.0:
        raise InputError("all runs have the same voltage: give runs at two or more voltages")
    charges = np.array([summary.charge.value for summary in runs])
    errors = np.array([summary.charge.error for summary in runs])
    known = bool(np.all(np.isfinite(errors)) and errors.min() > 0.0)
    line = linear_fit(voltages, charges, errors if known else None)
    caution = next(filter(None, (summary.caution for summary in runs)), "")
    return VoltageResponse(voltages, charges, errors, line, runs[0].area, caution)
