"""What ``voltpi analyze`` does with spectra: infrared, Raman, density of states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voltpi.analysis.kinds import CHARGES, SKIP, TEMPERATURE, Analysis, Option
from voltpi.analysis.output import checked_skip, output_stem, write_results

if TYPE_CHECKING:
    from voltpi.analysis.spectra_kinds import Spectrum

__all__ = ["SPECTRA", "analyze_ir", "analyze_raman", "analyze_vdos"]

# matplotlib, SciPy and ASE are imported inside the functions: listing the analyses costs nothing


def analyze_ir(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    source: str = "auto",
    charges: str | None = None,
    skip: float = 0.0,
    temperature: float | None = None,
    window: str = "hann",
    quantum_correction: str = "harmonic",
    resolution: float | None = None,
    max_wavenumber: float = 4500.0,
) -> dict[str, Any]:
    """Infrared absorption n·α (cm⁻¹) of one run, or the mean of several; formula in ``voltpi.analysis.spectra_kinds``.

    ``source``: auto, dipole or current; ``charges``: a file, for runs of another program. Writes ir.csv, .json, .png
    and .svg. Raises InputError.
    """
    from voltpi.analysis.spectra_kinds import infrared

    spectrum = infrared(
        paths,
        source=source,
        charges=charges,
        skip=checked_skip(skip),
        temperature=temperature,
        window=window,
        quantum=quantum_correction,
        resolution=resolution,
        top=max_wavenumber,
    )
    return _written(spectrum, paths, out, "ir", 0)


def analyze_raman(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    intensity: str = "reduced",
    laser: float | None = None,
    skip: float = 0.0,
    temperature: float | None = None,
    window: str = "hann",
    quantum_correction: str = "harmonic",
    resolution: float | None = None,
    max_wavenumber: float = 4500.0,
) -> dict[str, Any]:
    """Raman spectra (unpolarized, VV, VH, isotropic, anisotropic) of one run, or the mean of several.

    Formulae in ``voltpi.analysis.spectra_kinds``. ``laser``: wavelength in nm, for ``intensity`` stokes. Writes
    raman.csv, .json, .png and .svg. Raises InputError.
    """
    from voltpi.analysis.spectra_kinds import raman

    spectrum = raman(
        paths,
        intensity=intensity,
        laser=laser,
        skip=checked_skip(skip),
        temperature=temperature,
        window=window,
        quantum=quantum_correction,
        resolution=resolution,
        top=max_wavenumber,
    )
    return _written(spectrum, paths, out, "raman", 2)


def analyze_vdos(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    skip: float = 0.0,
    temperature: float | None = None,
    window: str = "hann",
    resolution: float | None = None,
    max_wavenumber: float = 4500.0,
) -> dict[str, Any]:
    """Vibrational density of states (modes per cm⁻¹), of all atoms and by element, from velocities or positions.

    Formula in ``voltpi.analysis.spectra_kinds``. Writes vdos.csv, .json, .png and .svg. Raises InputError.
    """
    from voltpi.analysis.spectra_kinds import density_of_states

    spectrum = density_of_states(
        paths,
        skip=checked_skip(skip),
        temperature=temperature,
        window=window,
        resolution=resolution,
        top=max_wavenumber,
    )
    return _written(spectrum, paths, out, "vdos", len(spectrum.columns) - 1)


def _written(spectrum: Spectrum, paths: Sequence[Path], out: Path | None, name: str, others: int) -> dict[str, Any]:
    from voltpi.analysis.spectra_figures import draw_spectrum

    first = paths[0].resolve()
    beside = first if first.is_dir() and len(paths) == 1 else first.parent
    stem = output_stem(out, beside, name)
    figures = draw_spectrum(spectrum, stem, others)
    return write_results(stem, spectrum.numbers(), spectrum.report(), *spectrum.table(), figures)


_WINDOW = Option(
    "window",
    "what correlation functions are multiplied by",
    default="hann",
    kind=str,
    choices=("hann", "gaussian", "blackman", "triangle", "none"),
)
_CORRECTION = Option(
    "quantum-correction",
    "of classical correlations; harmonic: classical linear response",
    default="harmonic",
    kind=str,
    choices=("harmonic", "standard", "schofield", "none"),
)
_RESOLUTION = Option("resolution", "cm⁻¹, the width that a sharp line gets (default 20, or what the run allows)")
_TOP = Option("max-wavenumber", "cm⁻¹, where the spectrum ends", default=4500.0)
_SHARED = (SKIP, TEMPERATURE, _WINDOW, _RESOLUTION, _TOP)

SPECTRA = (
    Analysis(
        "ir",
        "infrared absorption from the dipole or the charge current",
        analyze_ir,
        (
            Option(
                "source",
                "dipole, or current: Born charges (or charges) times velocities",
                default="auto",
                kind=str,
                choices=("auto", "dipole", "current"),
            ),
            CHARGES,
            _CORRECTION,
            *_SHARED,
        ),
    ),
    Analysis(
        "raman",
        "Raman spectra from polarizabilities",
        analyze_raman,
        (
            Option(
                "intensity",
                "reduced: activity; susceptibility: over wavenumber; stokes: with the Bose factor",
                default="reduced",
                kind=str,
                choices=("reduced", "susceptibility", "stokes"),
            ),
            Option("laser", "wavelength in nm, for the fourth power of the scattered wavenumber"),
            _CORRECTION,
            *_SHARED,
        ),
    ),
    Analysis("vdos", "vibrational density of states, by element", analyze_vdos, _SHARED),
)
