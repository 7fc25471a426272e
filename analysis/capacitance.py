"""Capacitance from the charge of the electrodes: from its fluctuations, and from its change with the voltage.

Q is half the charge of the upper electrode of the pair less that of the lower, the quantity that the voltage
Ψ = ψ_high − ψ_low acts on: Ω = E − Ψ Q − (mean potential)·(total). The pair are the two electrodes of the potentiostat,
or those that are not at a charge where there are two, else the outermost ones. Then

    dQ/dΨ = β ⟨δQ²⟩ + ⟨∂Q/∂Ψ⟩,     the second at fixed nuclei

since nuclei are weighted by exp(−βΩ). With the charges solved at every step, electrodes of fixed atoms and an
electrolyte of constant charges the second is the capacitance C_empty of the electrodes alone, a number: L. Scalfi,
D. T. Limmer, A. Coretti, S. Bonella, P. A. Madden, M. Salanne, B. Rotenberg, Phys. Chem. Chem. Phys. 22, 10480 (2020);
L. Scalfi et al., J. Chem. Phys. 153, 174704 (2020). It is computed here from their geometry. Where charges or shells of
the electrolyte respond, it depends on the nuclei and holds their share, too: it is then the mean of what the driver
wrote as ``electrode_capacitance`` (``output.capacitance``), or must be given. Where the charge is a degree of freedom
of its own (potentiostat), its fluctuations are complete: dQ/dΨ = β⟨δQ²⟩. At constant charge nothing is evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import constants

from voltpi.analysis.capacitor import Setup
from voltpi.analysis.electrode_series import ElectrodeSeries, electrode_series
from voltpi.analysis.empty_capacitance import empty_capacitance
from voltpi.analysis.ipi_files import convert, iter_extras
from voltpi.analysis.run_inputs import ensemble_temperature
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import Mean, mean_with_error, plus_minus
from voltpi.potential.errors import InputError

__all__ = ["MICROFARAD_PER_CM2", "ChargeSummary", "charge_summary", "variance"]

Array = NDArray[np.float64]

MICROFARAD_PER_CM2 = constants.e * 1e22
"""µF/cm² in 1 e/V/Å²."""
BOLTZMANN = constants.k / constants.e
"""eV/K."""


def variance(series: Array) -> tuple[float, float]:
    """⟨δx²⟩ of a correlated series, freed of the bias 2τ/n, and its standard error from the correlations of δx²."""
    mean = mean_with_error(series)
    squares = mean_with_error((series - series.mean()) ** 2)
    bias = max(1.0 - 2.0 * mean.tau / mean.n, 1.0 / mean.n)
    return squares.value / bias, squares.error / bias


@dataclass(frozen=True)
class ChargeSummary:
    """What one run says of its electrodes' charge.

    difference [f] and charge: Q (e) of the module's head, its mean; means: those of every electrode · potentials: means
    (V) of the electrodes at a charge, by name, where they are known · voltage: Ψ (V) as applied, else its mean, nan:
    not known; answered: its mean along the run, None: not known · changing: whether the applied voltage changes with
    time · fluctuation: β⟨δQ²⟩ with its error, e/V, None where it has no meaning, or without a temperature · empty:
    ⟨∂Q/∂Ψ⟩, e/V, None: not known; source: where it comes from, or why there is none · area Å² · temperature K
    """

    run: Run
    setup: Setup
    series: ElectrodeSeries
    difference: Array
    charge: Mean
    means: tuple[Mean, ...]
    potentials: dict[str, Mean]
    voltage: float
    answered: Mean | None
    changing: bool
    fluctuation: tuple[float, float] | None
    empty: float | None
    source: str
    area: float
    temperature: float | None

    @property
    def charge_per_voltage(self) -> tuple[float, float] | None:
        """⟨Q⟩/Ψ (e/V) with the error of both; None without a voltage, or where it changes with time."""
        if self.changing or not np.isfinite(self.voltage) or not self.voltage:
            return None
        value, error = self.charge.value / self.voltage, self.charge.error
        if self._measured is not None:
            error = float(np.hypot(error, value * self._measured.error))
        return value, error / abs(self.voltage)

    @property
    def _measured(self) -> Mean | None:
        """The mean voltage where ``voltage`` is that, and not one that is applied."""
        low, high = self.setup.pair()
        return None if np.isfinite(self.setup.targets[high] - self.setup.targets[low]) else self.answered

    @property
    def caution(self) -> str:
        """What to say where the error of charge or (if that is what fluctuates) voltage cannot be trusted."""
        return (self._measured or self.charge).caution

    @property
    def capacitance(self) -> tuple[float, float] | None:
        """dQ/dΨ (e/V) from fluctuations with its error."""
        if self.fluctuation is None or self.empty is None:
            return None
        return self.fluctuation[0] + self.empty, self.fluctuation[1]

    @property
    def per_area(self) -> float:
        """µF/cm² in 1 e/V."""
        return MICROFARAD_PER_CM2 / self.area

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        names = [electrode.name for electrode in self.setup.electrodes]
        spacing = float(np.ptp(self.series.time)) / max(len(self.series.time) - 1, 1)
        out: dict[str, Any] = {
            "run": str(self.run.folder),
            "records": self.charge.n,
            "length_ps": float(np.ptp(self.series.time)) / 1000.0,
            "area_A2": self.area,
            "temperature_K": self.temperature,
            "electrode_charge_e": dict(zip(names, (m.value for m in self.means), strict=True)),
            "electrode_charge_error_e": dict(zip(names, (m.error for m in self.means), strict=True)),
            "charge_e": self.charge.value,
            "charge_error_e": self.charge.error,
            "charge_rms_e": float(self.difference.std()),
            "autocorrelation_time_fs": self.charge.tau * spacing,
            "independent_samples": self.charge.n_independent,
            "error_is_reliable": self.charge.reliable,
            "voltage_V": self.voltage,
        }
        if self.answered is not None:
            out |= {"mean_voltage_V": self.answered.value, "mean_voltage_error_V": self.answered.error}
        if self.potentials:
            out["electrode_potential_V"] = {name: mean.value for name, mean in self.potentials.items()}
            out["electrode_potential_error_V"] = {name: mean.error for name, mean in self.potentials.items()}
        if self.charge_per_voltage is not None:
            value, error = self.charge_per_voltage
            out["charge_per_voltage_e_per_V"], out["charge_per_voltage_error_e_per_V"] = value, error
            out["charge_per_voltage_uF_per_cm2"] = value * self.per_area
            out["charge_per_voltage_error_uF_per_cm2"] = error * self.per_area
        if self.fluctuation is not None:
            out |= {
                "beta_variance_e_per_V": self.fluctuation[0],
                "beta_variance_error_e_per_V": self.fluctuation[1],
                "at_fixed_nuclei_e_per_V": self.empty,
                "at_fixed_nuclei_source": self.source,
            }
        if self.capacitance is not None:
            value, error = self.capacitance
            out |= {
                "fluctuation_capacitance_e_per_V": value,
                "fluctuation_capacitance_error_e_per_V": error,
                "fluctuation_capacitance_uF_per_cm2": value * self.per_area,
                "fluctuation_capacitance_error_uF_per_cm2": error * self.per_area,
            }
        return out

    def table(self) -> tuple[list[str], Array]:
        """Header and one row for every record."""
        names, series = [electrode.name for electrode in self.setup.electrodes], self.series
        header = ["step", "time_fs", *(f"charge_{n}_e" for n in names), *(f"potential_{n}_V" for n in names)]
        return header, np.column_stack([series.steps, series.time, series.charges, series.potentials])

    def report(self) -> list[str]:
        """Lines for a person."""
        lines = [
            f"charge of {electrode.name:<19}{plus_minus(mean.value, mean.error, '.5f')} e{mean.caution}"
            for electrode, mean in zip(self.setup.electrodes, self.means, strict=True)
        ]
        lines += [
            f"potential of {name:<16}{plus_minus(mean.value, mean.error, '.5f')} V{mean.caution}"
            for name, mean in self.potentials.items()
        ]
        if self.changing:
            lines.append("charge/voltage               left out: the voltage changes with time")
        elif self.charge_per_voltage is not None:
            both = self._both(*self.charge_per_voltage)
            lines.append(f"charge/voltage               {both} at {self.voltage:.6g} V{self.caution}")
        if self.answered is not None and (self.setup.potentiostat is not None or self._measured is not None):
            mean = plus_minus(self.answered.value, self.answered.error, ".4f")
            target = f", target {self.voltage:.6g} V" if self._measured is None else ""
            lines.append(f"mean of the voltage          {mean} V{target}{self.answered.caution}")
        if self.fluctuation is not None:
            both = self._both(*self.fluctuation)
            lines.append(f"β⟨δQ²⟩                       {both} at {self.temperature:.6g} K{self.caution}")
        if self.capacitance is not None:
            both = self._both(*self.capacitance)
            lines.append(f"fluctuation capacitance      {both} (with {self.source}){self.caution}")
        elif self.fluctuation is not None:
            lines.append(f"fluctuation capacitance      not known: {self.source}")
        return lines

    def _both(self, value: float, error: float) -> str:
        scaled = plus_minus(value * self.per_area, error * self.per_area, ".3f")
        return f"{plus_minus(value, error, '.5f')} e/V, {scaled} µF/cm²"


def charge_summary(
    run: Run, setup: Setup, *, skip: float = 0.0, temperature: float | None = None, empty: float | None = None
) -> ChargeSummary:
    """Charge of one run without its first ``skip`` fs.

    ``temperature`` (K): else that of the i-PI input, or the mean of the properties'. ``empty`` (e/V) replaces ⟨∂Q/∂Ψ⟩.
    Raises InputError when the run's files do not hold what is needed, or the options cannot be.
    """
    if len(setup.electrodes) < 2:
        raise InputError(f"{run.folder}: its settings have {len(setup.electrodes)} electrodes; two make a capacitor")
    if temperature is not None and not temperature > 0.0:
        raise InputError(f"temperature is {temperature:g}: give a positive number in K")
    series = electrode_series(run, setup).after(skip)
    low, high = setup.pair()
    difference = 0.5 * (series.charges[:, high] - series.charges[:, low])
    answered = series.potentials[:, high] - series.potentials[:, low]
    target = float(setup.targets[high] - setup.targets[low])
    voltage = target if np.isfinite(target) else float(answered.mean())
    kelvin = temperature or ensemble_temperature(run.folder, run.outputs) or _measured_temperature(run, series)
    fluctuation = None
    known, source = None, _why_not(setup, difference)
    held = {e.name: series.potentials[:, k] for k, e in enumerate(setup.electrodes) if e.charge is not None}
    if not source and kelvin is not None:
        value, error = variance(difference)
        fluctuation = value / (BOLTZMANN * kelvin), error / (BOLTZMANN * kelvin)
        known, source = _at_fixed_nuclei(run, setup, empty, int(series.steps[0]))
    area = setup.sum_over(np.asarray(setup.start.cell)).area
    return ChargeSummary(
        run,
        setup,
        series,
        difference,
        mean_with_error(difference),
        tuple(mean_with_error(series.charges[:, k]) for k in range(len(setup.electrodes))),
        {name: mean_with_error(values) for name, values in held.items() if np.isfinite(values).all()},
        voltage,
        mean_with_error(answered) if np.isfinite(answered).all() else None,
        _changes(setup),
        fluctuation,
        known,
        source,
        area,
        kelvin,
    )


def _at_fixed_nuclei(run: Run, setup: Setup, given: float | None, first: int) -> tuple[float | None, str]:
    """⟨∂Q/∂Ψ⟩ (e/V) from step ``first`` on, and where it comes from or why it is not known."""
    if given is not None:
        return given, f"--empty {given:g} e/V"
    written = run.extras.get("electrode_capacitance")
    if written:
        kept = [[value for step, value in iter_extras(path) if step >= first] for path in written]
        if not all(kept):
            return None, "no electrode_capacitance was written in the part of the run that is kept; skip less"
        values = [float(np.mean(bead)) for bead in kept]
        # e²/hartree: the reciprocal converts
        mean = float(np.mean(values) / convert(np.ones(1), "energy", "atomic_unit", "electronvolt")[0])
        return mean, f"the driver's {mean:.5f} e/V at fixed nuclei"
    if setup.potentiostat is not None:
        return 0.0, "nothing to add: the potentiostat moves the charge"
    if setup.responding:
        return (
            None,
            "the electrolyte responds at fixed nuclei; set output.capacitance, or give that share as --empty (e/V)",
        )
    try:
        value = empty_capacitance(setup, setup.start.positions, np.asarray(setup.start.cell))
    except InputError as error:
        return None, str(error)
    return value, f"{value:.5f} e/V of the empty capacitor"


def _changes(setup: Setup) -> bool:
    """Whether a voltage is applied that changes with time."""
    return any(setup.electrodes[k].charge is None and np.isnan(setup.targets[k]) for k in setup.pair())


def _why_not(setup: Setup, difference: Array) -> str:
    """Why fluctuations of the charge say nothing; empty where they do."""
    pair = list(setup.pair())
    if any(setup.electrodes[k].charge is not None for k in pair):
        return "at constant charge"
    if _changes(setup):
        return "the voltage changes with time"
    return "" if len(difference) > 1 else "a single record"


def _measured_temperature(run: Run, series: ElectrodeSeries) -> float | None:
    table = run.table()
    if "temperature" not in table.columns:
        return None
    kept = run.times(table.get("step")) >= series.time[0]
    return float(table.get("temperature", "temperature", "kelvin")[kept].mean())
