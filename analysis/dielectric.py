"""Static dielectric constant by four estimates: fluctuations of M and slopes of ⟨P⟩, at constant field and constant D.

In every Cartesian direction a run imposes f: the macroscopic field ε (tin-foil boundaries), or the displacement
D = ε + 4πk_e P, both in V/Å, P = M/V. A marks the directions with D (A_aa = 1), and κ = 4πk_e/V. What weights nuclei
is E − Σ_b ε_b M_b + V/(8πk_e) Σ_a (D_a − κM_a)², with charges and shells stationary in it, so that ∂/∂f at fixed nuclei
is −M (beside a number) for either, and the mean answers as

    X := κ ∂⟨M⟩/∂f = ⟨x⟩ + κβ⟨δM δMᵀ⟩,     x = κ ∂M/∂f at fixed nuclei                                       (1)

exactly, in any mixture of the two. The first term is the electrons': M of the driver is that of shells (and charges)
relaxed at these nuclei, so ⟨δM δMᵀ⟩ holds none of their own response, and with the polarizability α = ∂M/∂ε that the
driver sends, x = κα (1 + κAα)⁻¹ follows from ε = f − κAM. A model of constant charges has x = 0. With
κ dM = (ε_r − 1) dε the constant is

    ε_r = 1 + X (1 − AX)⁻¹                                                                                    (2)

(a) constant ε, fluctuations: ε_r = ⟨ε∞⟩ + κβ⟨δM²⟩, ε∞ = 1 + κα: M. Neumann, Mol. Phys. 50, 841 (1983).
(b) constant ε, slope: ε_r = 1 + 4πk_e d⟨P⟩/dε.
(c) constant D, fluctuations: 1/ε_r = ⟨1/ε∞⟩ − κβ⟨δM²⟩: C. Zhang, M. Sprik, Phys. Rev. B 93, 144201 (2016), who have no
    electrons, so 1 for ⟨1/ε∞⟩; constant D: M. Stengel, N. A. Spaldin, D. Vanderbilt, Nat. Phys. 5, 304 (2009).
(d) constant D, slope: 1/ε_r = d⟨ε⟩/dD = 1 − 4πk_e d⟨P⟩/dD.

The slopes need no electronic term: ⟨P⟩ has it already where M has the shells. Scalars are the mean over the directions
of their kind (an isotropic medium, a cubic crystal) or one Cartesian component, the tensor of (2) comes from each run.
(c) and (d) measure 1/ε_r, so of a strongly polar liquid they give ε_r only to ±ε_r² times the error of 1/ε_r; the
interval given is that of 1/ε_r inverted. D in one direction alone gives 1/ε_zz, D in all (ε⁻¹)_zz, the same where the
axes are principal ones.

Beads: M is the mean over the ring polymer and α too, which makes (1) the static (Kubo) response, β at the physical
temperature. Changing volume: P = ⟨M⟩/⟨V⟩ and κ = 4πk_e/⟨V⟩; (1) then is the whole response at zero field, where M and V
are not correlated, and is not evaluated elsewhere.

Errors: those of the means of correlated series (``voltpi.analysis.statistics``), for (1) of κβ δM δMᵀ, carried on to
first order. δM is from the mean of the run; the bias −2τ/n that this has is taken out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import constants, optimize, stats

from voltpi.analysis.charges_of import has_fixed_charges
from voltpi.analysis.ipi_files import convert, read_extras
from voltpi.analysis.polarization import Polarization, polarization_of
from voltpi.analysis.run_inputs import ensemble_temperature
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import LinearFit, Mean, linear_fit, mean_with_error, plus_minus
from voltpi.potential.errors import InputError

__all__ = ["Dielectric", "DielectricRun", "Estimate", "Slope", "dielectric_of", "dielectric_run"]

Array = NDArray[np.float64]
Kind = Literal["field", "displacement"]

FOUR_PI_K_E = constants.e / constants.epsilon_0 / constants.angstrom
"""e²/ε_0 in eV·Å: 4πk_e."""
BOLTZMANN = constants.k / constants.e
"""eV/K."""
_UNLIKELY = 0.01  # chance of a χ² below which points are not on a line, or estimates do not agree


@dataclass(frozen=True)
class Estimate:
    """One estimate of ε_r.

    value, error: ε_r and its standard error to first order · low, high: ε_r one standard error below and above, of the
    quantity that was measured: ε_r itself at constant field, 1/ε_r at constant D (high is inf where that may be 0)
    runs: how many · cautions: what to know
    """

    name: str
    kind: Kind
    value: float
    error: float
    low: float
    high: float
    runs: int
    cautions: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[float, float]:
        """What was measured with its error: ε_r, or 1/ε_r at constant D."""
        if self.kind == "field":
            return self.value, self.error
        return 1.0 / self.value, self.error / self.value**2

    def numbers(self) -> dict[str, Any]:
        """JSON-able."""
        value, error = self.measured
        name = "relative_permittivity" if self.kind == "field" else "inverse_permittivity"
        return {
            "estimate": self.name,
            "relative_permittivity": self.value,
            "relative_permittivity_error": self.error,
            "relative_permittivity_low": self.low,
            "relative_permittivity_high": self.high,
            "measured": name,
            "measured_value": value,
            "measured_error": error,
            "runs": self.runs,
            "cautions": list(self.cautions),
        }

    def report(self) -> str:
        """A line for a person."""
        out = f"{self.name:<34}{plus_minus(self.value, self.error, '.3f')}"
        if self.kind == "displacement":
            out += f"  [{self.low:.3f}, {self.high:.3f}], 1/ε_r = {plus_minus(*self.measured, '.5f')}"
        return out + "".join(f"; {caution}" for caution in self.cautions)


def _estimate(name: str, kind: Kind, value: float, error: float, runs: int, cautions: Iterable[str]) -> Estimate:
    """From what was measured: ε_r at constant field, 1/ε_r at constant D."""
    notes = tuple(dict.fromkeys(cautions))
    if kind == "field":
        return Estimate(name, kind, value, error, value - error, value + error, runs, notes)
    high = 1.0 / (value - error) if value > error else float("inf")
    low = 1.0 / (value + error) if value + error > 0.0 else float("nan")
    return Estimate(name, kind, 1.0 / value, error / value**2, low, high, runs, notes)


@dataclass(frozen=True)
class DielectricRun:
    """What one run says.

    polarized: 4πk_e⟨P⟩ [3] (V/Å) with errors · response, response_error [3, 3]: X of (1), or None and ``lacking`` says
    why · electronic [3, 3]: ⟨x⟩ · scalars: kind -> mean over its directions of X_ii, its error · slow: whether there
    are too few independent samples for the errors · temperature K · complete: whether M has all that answers a field
    """

    run: Run
    polarization: Polarization
    temperature: float | None
    polarized: tuple[Mean, Mean, Mean]
    response: Array | None
    response_error: Array | None
    electronic: Array | None
    electronic_source: str
    scalars: dict[Kind, tuple[float, float]]
    slow: bool
    complete: bool
    lacking: str

    @property
    def control(self) -> Array:
        """What is imposed [3], V/Å."""
        return self.run.applied.control

    @property
    def permittivity(self) -> tuple[Array, Array] | None:
        """ε_r [3, 3] of (2) with its error; None without X."""
        if self.response is None or self.response_error is None:
            return None
        held = np.diag(self.run.applied.held.astype(float))
        right = np.linalg.inv(np.eye(3) - held @ self.response)
        left = np.eye(3) + self.response @ right @ held
        error = np.sqrt(np.einsum("ij,jk,kl->il", left**2, self.response_error**2, right**2))
        return np.eye(3) + self.response @ right, error

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        p, applied = self.polarization, self.run.applied
        out: dict[str, Any] = {
            "run": str(self.run.folder),
            "source": p.source,
            "field_V_per_A": [
                None if held else x for x, held in zip(applied.field.tolist(), applied.held, strict=True)
            ],
            "displacement_V_per_A": applied.displacement.tolist(),
            "records": len(p.time),
            "length_ps": float(np.ptp(p.time)) / 1000.0,
            "volume_A3": float(p.volume.mean()),
            "temperature_K": self.temperature,
            "polarization_4pi_ke_P_V_per_A": [m.value for m in self.polarized],
            "polarization_4pi_ke_P_error_V_per_A": [m.error for m in self.polarized],
            "errors_are_reliable": not self.slow,
            "electronic_source": self.electronic_source,
        }
        tensor = self.permittivity
        if tensor is None:
            return out | {"no_fluctuations_because": self.lacking}
        out["relative_permittivity_tensor"], out["relative_permittivity_tensor_error"] = (x.tolist() for x in tensor)
        if self.electronic is not None:
            out["electronic_response"] = self.electronic.tolist()
        return out


def dielectric_run(
    run: Run,
    skip: float = 0.0,
    *,
    temperature: float | None = None,
    electronic: float | None = None,
    along: int | None = None,
    charges: str | Path | None = None,
) -> DielectricRun:
    """Fluctuations and mean of one run without its first ``skip`` fs.

    ``temperature`` (K): else that of the i-PI input, or the mean of the properties'. ``electronic``: ε∞ where the run
    did not write the polarizability. ``along``: the component that scalars are of; None: the mean of the directions.
    ``charges``: a file of charges that make M (``voltpi.analysis.polarization``).
    Raises InputError when the run's files do not hold what is needed, or its field changes with time.
    """
    applied = run.applied
    if applied.changing.any():
        raise InputError(
            f"{run.folder}: its field or displacement changes with time ({applied}); use voltpi analyze hysteresis"
        )
    p = polarization_of(run, charges).after(skip)
    kelvin = temperature or ensemble_temperature(run.folder, run.outputs) or _measured_temperature(run, p)
    kappa = FOUR_PI_K_E / float(p.volume.mean())
    polarized = [mean_with_error(kappa * p.dipole[:, k]) for k in range(3)]
    shells = "without shells" not in p.source
    series, source = _electronic_series(run, p, kappa, electronic, shells)
    lacking = ""
    if series is None:
        lacking = source
    elif kelvin is None:
        lacking = "the temperature is not known: give --temperature (K)"
    elif len(p.time) < 2:
        lacking = "a single record"
    elif np.ptp(p.volume) > 1e-6 * p.volume.mean() and applied.control.any():
        lacking = "the volume changes and there is a field"
    response = error = electrons = None
    scalars: dict[Kind, tuple[float, float]] = {}
    if not lacking and series is not None and kelvin is not None:
        n = len(p.time)
        bias = np.array([max(1.0 - 2.0 * mean.tau / n, 1.0 / n) for mean in polarized])
        moved = (p.dipole - p.dipole.mean(axis=0)) / np.sqrt(bias)
        products = kappa / (BOLTZMANN * kelvin) * moved[:, :, None] * moved[:, None, :]
        spread, spread_error = _means(products)
        electrons, electrons_error = _means(series)
        response, error = electrons + spread, np.hypot(electrons_error, spread_error)
        for kind, directions in _directions(applied.held, along).items():
            parts = [mean_with_error(x[:, directions, directions].mean(axis=1)) for x in (products, series)]
            # a single record of the polarizability has no error
            scalars[kind] = (
                sum(part.value for part in parts),
                float(np.sqrt(np.nansum([part.error**2 for part in parts]))),
            )
    return DielectricRun(
        run,
        p,
        kelvin,
        (polarized[0], polarized[1], polarized[2]),
        response,
        error,
        electrons,
        source if series is not None else "",
        scalars,
        not all(mean.reliable for mean in polarized),
        shells or charges is not None or has_fixed_charges(run),
        lacking,
    )


def _directions(held: NDArray[np.bool_], along: int | None) -> dict[Kind, list[int]]:
    """The directions of each kind that scalars are means over, without kinds that have none."""
    chosen = range(3) if along is None else [along]
    kinds: dict[Kind, list[int]] = {
        "field": [k for k in chosen if not held[k]],
        "displacement": [k for k in chosen if held[k]],
    }
    return {kind: directions for kind, directions in kinds.items() if directions}


def _means(series: Array) -> tuple[Array, Array]:
    """Mean and error [3, 3] of a series [f, 3, 3]."""
    means = [[mean_with_error(series[:, i, j]) for j in range(3)] for i in range(3)]
    value, error = (np.array([[getattr(m, name) for m in row] for row in means]) for name in ("value", "error"))
    return value, np.nan_to_num(error)


def _measured_temperature(run: Run, p: Polarization) -> float | None:
    if run.properties is None or "temperature" not in run.properties.columns:
        return None
    kept = run.times(run.properties.get("step")) >= p.time[0]
    return float(run.properties.get("temperature", "temperature", "kelvin")[kept].mean()) if kept.any() else None


def _electronic_series(
    run: Run, p: Polarization, kappa: float, given: float | None, shells: bool
) -> tuple[Array | None, str]:
    """x [f, 3, 3] of (1) and where it comes from, or None and why it is not known."""
    held = np.diag(run.applied.held.astype(float))
    if given is not None:
        inside = (given - 1.0) * np.linalg.inv(np.eye(3) + (given - 1.0) * held)
        return np.asarray(inside[None], dtype=np.float64), f"--electronic {given:g}"
    files = run.extras.get("polarizability")
    if files and shells:
        beads = [read_extras(path) for path in files]
        n = min(len(bead.steps) for bead in beads)
        kept = beads[0].steps[:n] >= p.steps[0]
        if not kept.any() or beads[0].values.shape[1:] != (3, 3):
            return None, "no polarizability [3, 3] was written in the part of the run that is kept; skip less"
        bohr = float(convert(1.0, "length", "atomic_unit", "angstrom"))
        volume = np.interp(beads[0].steps[:n][kept], p.steps, p.volume)[:, None, None]
        # of the polarizability volume: 4πk_e α / V has no k_e left
        alpha = [4.0 * np.pi * bohr**3 * bead.values[:n][kept] for bead in beads]
        scale = kappa / FOUR_PI_K_E
        x = [scale * a @ np.linalg.inv(np.eye(3) + held @ a / volume) for a in alpha]
        mean: Array = np.mean(x, axis=0)
        return mean, "polarizability sent by the driver"
    if not shells:
        return np.zeros((1, 3, 3)), "none: M is that of charges"
    if has_fixed_charges(run):
        return np.zeros((1, 3, 3)), "none: the model's charges are constant"
    return None, (
        "the electrons' share is not known: set output.polarizability and write "
        "<trajectory extra_type='polarizability'> extras </trajectory>, or give --electronic (ε∞)"
    )


@dataclass(frozen=True)
class Slope:
    """4πk_e⟨P⟩ against ε or D along ``axis`` [3] with a line (V/Å), and which of the points it is through.

    chance: of a χ² at least that large where the points lie on the line; nan where that cannot be said
    """

    kind: Kind
    axis: Array
    control: Array
    polarized: Array
    error: Array
    used: NDArray[np.bool_]
    line: LinearFit
    chance: float

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        return {
            "axis": self.axis.tolist(),
            f"{self.kind}_V_per_A": self.control.tolist(),
            "polarization_4pi_ke_P_V_per_A": self.polarized.tolist(),
            "polarization_4pi_ke_P_error_V_per_A": self.error.tolist(),
            "used": self.used.tolist(),
            "slope": self.line.slope,
            "slope_error": self.line.slope_error,
            "chance_of_scatter": self.chance,
        }


@dataclass(frozen=True)
class Dielectric:
    """All estimates that the runs allow; ``missing``: name -> why not.

    combined: the ε_r most likely by all of them, with its interval; chance: of a χ² at least as large where all
    estimates have the same ε_r, nan for fewer than two
    """

    runs: tuple[DielectricRun, ...]
    estimates: tuple[Estimate, ...]
    slopes: tuple[Slope, ...]
    missing: dict[str, str]
    combined: tuple[float, float, float]
    chi_squared: float
    chance: float
    along: int | None

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        value, low, high = self.combined
        return {
            "component": "mean" if self.along is None else "xyz"[self.along] * 2,
            "estimates": [estimate.numbers() for estimate in self.estimates],
            "missing": self.missing,
            "combined_relative_permittivity": value,
            "combined_relative_permittivity_low": low,
            "combined_relative_permittivity_high": high,
            "chi_squared": self.chi_squared,
            "chance_of_disagreement": self.chance,
            "slopes": {slope.kind: slope.numbers() for slope in self.slopes},
            "runs": [run.numbers() for run in self.runs],
        }

    def table(self) -> tuple[list[str], list[list[float | str]]]:
        """Header and one row for every estimate."""
        header = ["estimate", "relative_permittivity", "error", "low", "high", "measured", "measured_error"]
        return header, [[e.name, e.value, e.error, e.low, e.high, *e.measured] for e in self.estimates]

    def report(self) -> list[str]:
        """Lines for a person."""
        lines = [estimate.report() for estimate in self.estimates]
        lines += [f"{name:<34}none: {why}" for name, why in self.missing.items()]
        if np.isfinite(self.chance):
            value, low, high = self.combined
            verdict = "the estimates agree" if self.chance > _UNLIKELY else "the estimates do not agree"
            if any(_FEW in estimate.cautions for estimate in self.estimates):
                verdict = "whether they agree cannot be told while errors are guesses"
            lines.append(
                f"together: ε_r = {value:.3f} [{low:.3f}, {high:.3f}]; {verdict} "
                f"(χ² {self.chi_squared:.1f} of {len(self.estimates) - 1} degrees of freedom)"
            )
        return lines


_NAMES: dict[tuple[Kind, str], str] = {
    ("field", "fluctuations"): "(a) fluctuations at constant ε",
    ("field", "slope"): "(b) slope of ⟨P⟩ against ε",
    ("displacement", "fluctuations"): "(c) fluctuations at constant D",
    ("displacement", "slope"): "(d) slope of ⟨ε⟩ against D",
}
_FEW = "fewer than 20 independent samples in a run: the error is a guess"


def dielectric_of(runs: list[DielectricRun], along: int | None = None) -> Dielectric:
    """The estimates that these runs allow, side by side.

    Raises InputError where none is possible, or fields lie on different axes.
    """
    estimates: list[Estimate] = []
    slopes: list[Slope] = []
    missing: dict[str, str] = {}
    kinds: tuple[Kind, Kind] = ("field", "displacement")
    for kind in kinds:
        mine = [run for run in runs if kind in _directions(run.run.applied.held, along)]
        one, two = (_NAMES[kind, way] for way in ("fluctuations", "slope"))
        if not mine:
            missing |= dict.fromkeys((one, two), "no run at constant " + ("ε" if kind == "field" else "D"))
            continue
        fluctuating = _from_fluctuations(one, kind, mine)
        if isinstance(fluctuating, str):
            missing[one] = fluctuating
        else:
            estimates.append(fluctuating)
        slope = _slope(kind, mine, along)
        if isinstance(slope, str):
            missing[two] = slope
        else:
            slopes.append(slope)
            estimates.append(_from_slope(two, slope, mine))
    if not estimates:
        raise InputError("no dielectric constant: " + "; ".join(f"{name}: {why}" for name, why in missing.items()))
    return Dielectric(tuple(runs), tuple(estimates), tuple(slopes), missing, *_together(estimates), along)


def _cautions(runs: list[DielectricRun]) -> list[str]:
    few = [_FEW] if any(run.slow for run in runs) else []
    return few + ([] if all(run.complete for run in runs) else ["M is that of charges, without the shells' share"])


def _from_fluctuations(name: str, kind: Kind, runs: list[DielectricRun]) -> Estimate | str:
    """From the runs without a field, weighted by their lengths, else that in the weakest one; or why not."""
    able = [run for run in runs if kind in run.scalars]
    if not able:
        return runs[0].lacking
    strengths = [float(np.linalg.norm(run.control)) for run in able]
    chosen = [run for run, strength in zip(able, strengths, strict=True) if strength <= min(strengths) + 1e-12]
    weights = np.array([max(float(np.ptp(run.polarization.time)), 1e-12) for run in chosen])
    weights /= weights.sum()
    value = float(weights @ [run.scalars[kind][0] for run in chosen])
    error = float(np.sqrt(weights**2 @ [run.scalars[kind][1] ** 2 for run in chosen]))
    cautions = _cautions(chosen)
    if min(strengths) > 0.0:
        cautions.append(f"in {min(strengths):g} V/Å, as there is no run at zero")
    return _estimate(name, kind, 1.0 + value if kind == "field" else 1.0 - value, error, len(chosen), cautions)


def _slope(kind: Kind, runs: list[DielectricRun], along: int | None) -> Slope | str:
    """The line through 4πk_e⟨P⟩, or why there is none. Raises InputError for fields on different axes."""
    vectors = np.array([run.control for run in runs])
    mine = np.array([run.run.applied.held == (kind == "displacement") for run in runs])
    inside = np.where(mine, vectors, 0.0)
    strengths = np.linalg.norm(inside, axis=1)
    what = "ε" if kind == "field" else "D"
    if len(np.unique(np.round(inside, 12), axis=0)) < 2:
        return f"all runs have one {what}"
    axis = inside[strengths.argmax()] / strengths.max()
    axis = axis * np.sign(axis[np.abs(axis).argmax()])
    if along is not None and abs(axis[along]) < 1.0 - 1e-9:
        return f"{what} is along [{', '.join(f'{x:.3g}' for x in axis)}], not {'xyz'[along]}"
    control = inside @ axis
    for run, vector, part in zip(runs, vectors, control, strict=True):
        if np.linalg.norm(vector - part * axis) > 1e-9:
            raise InputError(
                f"{run.run.folder}: its {run.run.applied} is not along [{', '.join(f'{x:.3g}' for x in axis)}] alone, "
                f"as the strongest {what} of the runs is; leave it out"
            )
    covered = (mine | (np.abs(axis) < 1e-9)).all(axis=1)
    kept = [k for k in range(len(runs)) if covered[k]]
    means = [_along(runs[k], axis) for k in kept]
    control, y = control[kept], np.array([m.value for m in means])
    error = np.array([m.error for m in means])
    if len(np.unique(np.round(control, 12))) < 2:
        return f"all runs with {what} along the axis have one {what}"
    order = np.argsort(control)
    control, y, error = control[order], y[order], error[order]
    weights = error if np.isfinite(error).all() and error.min() > 0.0 else None
    used = np.ones(len(y), dtype=bool)
    while True:
        line, chance = _line(control[used], y[used], None if weights is None else weights[used])
        rest = used & (np.abs(control) < np.abs(control[used]).max() - 1e-12)
        if not chance < _UNLIKELY or len(np.unique(np.round(control[rest], 12))) < 2:
            return Slope(kind, axis, control, y, error, used, line, chance)
        used = rest


def _along(run: DielectricRun, axis: Array) -> Mean:
    """4πk_e⟨P⟩ along an axis, V/Å."""
    p = run.polarization
    return mean_with_error(FOUR_PI_K_E / float(p.volume.mean()) * (p.dipole @ axis))


def _line(x: Array, y: Array, error: Array | None) -> tuple[LinearFit, float]:
    """A line, and the chance of a χ² at least as large as its own (nan where nothing is left over)."""
    line = linear_fit(x, y, error)
    if error is None or len(x) < 3:
        return line, float("nan")
    chi_squared = float((((y - line.intercept - line.slope * x) / error) ** 2).sum())
    return line, float(stats.chi2.sf(chi_squared, len(x) - 2))


def _from_slope(name: str, slope: Slope, runs: list[DielectricRun]) -> Estimate:
    cautions = _cautions(runs)
    if not slope.used.all():
        strong = float(np.abs(slope.control[slope.used]).max())
        cautions.append(f"not straight beyond {strong:g} V/Å: stronger ones are left out")
    elif slope.chance < _UNLIKELY:
        cautions.append("not straight: the fields are too strong for a linear response")
    elif not np.isfinite(slope.chance):
        cautions.append("whether the fields are weak enough cannot be told from two")
    measured = 1.0 + slope.line.slope if slope.kind == "field" else 1.0 - slope.line.slope
    return _estimate(name, slope.kind, measured, slope.line.slope_error, int(slope.used.sum()), cautions)


def _together(estimates: list[Estimate]) -> tuple[tuple[float, float, float], float, float]:
    """The most likely ε_r with its interval, χ² and the chance of one at least as large."""
    known = [(e.kind, *e.measured) for e in estimates if np.isfinite(e.error) and e.error > 0.0]
    if len(known) < 2 or len(known) < len(estimates):
        return (float("nan"),) * 3, float("nan"), float("nan")

    def chi_squared(logarithm: float) -> float:
        value = float(np.exp(logarithm))
        aims = {"field": value, "displacement": 1.0 / value}
        return float(sum(((measured - aims[kind]) / error) ** 2 for kind, measured, error in known))

    grid = np.linspace(0.0, np.log(1e5), 2000)  # ε_r from 1 on
    start = int(np.argmin([chi_squared(x) for x in grid]))
    low, high = grid[max(start - 1, 0)], grid[min(start + 1, len(grid) - 1)]
    best = float(optimize.minimize_scalar(chi_squared, bounds=(low, high), method="bounded").x)
    least = chi_squared(best)
    ends = [_where_larger_by_one(chi_squared, best, least, end) for end in (grid[0] - 5.0, grid[-1])]
    return (
        (float(np.exp(best)), float(np.exp(ends[0])), float(np.exp(ends[1]))),
        least,
        float(stats.chi2.sf(least, len(known) - 1)),
    )


def _where_larger_by_one(function: Any, best: float, least: float, end: float) -> float:
    """Where χ² is one larger than at its least, towards ``end``; inf, or −inf, where it never is."""
    if function(end) < least + 1.0:
        return float(np.copysign(np.inf, end - best))
    return float(optimize.brentq(lambda x: function(x) - least - 1.0, best, end))
