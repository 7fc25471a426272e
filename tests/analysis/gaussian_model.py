"""Files of runs of a medium whose polarization is known exactly: harmonic ions and harmonic electrons in a cell.

G(u; f) is stationary in M, with ions u of stiffness k and charge Z, the electrons' α, κ = 4πk_e/V and A the directions
of constant D:   M = Z u + α ε,   ε = f − κ A M,   −∂G/∂u = −k u + Zᵀ ε
so u is a Gaussian, and ε_r = 1 + κ (α + Z k⁻¹ Zᵀ), ε∞ = 1 + κα.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import units
from scipy import constants
from scipy.signal import lfilter

FOUR_PI_K_E = 4.0 * np.pi * 14.3996454784255
BOLTZMANN = constants.k / constants.e
FIELD = units.Hartree / units.Bohr  # V/Å in hartree/e/bohr


@dataclass
class Medium:
    """stiffness k [3, 3] eV/Å², charge Z [3, 3] e, alpha [3, 3] e Å/(V/Å), volume Å³, temperature K.

    As cold as that, M moves by much less than e times half the cell between records.
    """

    stiffness: np.ndarray
    charge: np.ndarray
    alpha: np.ndarray
    volume: float = 1000.0
    temperature: float = 30.0

    @property
    def kappa(self) -> float:
        return FOUR_PI_K_E / self.volume

    @property
    def permittivity(self) -> np.ndarray:
        ions = self.charge @ np.linalg.inv(self.stiffness) @ self.charge.T
        return np.eye(3) + self.kappa * (self.alpha + ions)

    def series(self, control: Sequence[float], held: Sequence[bool], n: int, seed: int, tau: float = 3.0) -> np.ndarray:
        """M [n, 3] (e Å) of a run; ``tau``: correlation time of the ions in records."""
        f, a = np.asarray(control, dtype=float), np.diag(np.asarray(held, dtype=float))
        inside = np.linalg.inv(np.eye(3) + self.kappa * self.alpha @ a)
        stiffness = self.stiffness + self.kappa * self.charge.T @ a @ inside @ self.charge
        pull = self.charge.T @ (np.eye(3) - self.kappa * a @ inside @ self.alpha) @ f
        rng = np.random.default_rng(seed)
        keep = np.exp(-1.0 / tau)
        noise = rng.normal(size=(n, 3)) * np.sqrt(BOLTZMANN * self.temperature)
        noise[1:] *= np.sqrt(1.0 - keep**2)
        white = lfilter([1.0], [1.0, -keep], noise, axis=0)
        u = np.linalg.solve(stiffness, pull) + white @ np.linalg.inv(np.linalg.cholesky(stiffness))
        return (u @ self.charge.T + self.alpha @ f) @ inside.T


def isotropic(ions: float, electrons: float, volume: float = 1000.0) -> Medium:
    """ε_r = 1 + electrons + ions."""
    eye, kappa = np.eye(3), FOUR_PI_K_E / volume
    return Medium(eye * kappa / ions, eye, eye * electrons / kappa, volume)


def write_run(
    folder: Path,
    dipoles: np.ndarray,
    *,
    settings: str,
    volume: float | np.ndarray = 1000.0,
    temperature: float | None = 30.0,
    alpha: np.ndarray | None = None,
    field: np.ndarray | None = None,
    beads: np.ndarray | None = None,
    spacing: float = 10.0,
) -> Path:
    """What i-PI would leave of a run: M [f, 3] (e Å), polarizability [3, 3] (e Å/(V/Å)) and field [f, 3] (V/Å).

    ``beads`` [p, f, 3] (e Å): what is added to M of every bead. ``volume``: Å³ of all or of every record.
    """
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(settings)
    n = len(dipoles)
    edges = np.broadcast_to(np.cbrt(volume), n)
    if temperature is not None:
        ensemble = f"<system><ensemble><temperature units='kelvin'> {temperature} </temperature></ensemble></system>"
        (folder / "input.xml").write_text(f"<simulation><output prefix='run'/>{ensemble}</simulation>")
    table = "".join(f"{k} {spacing * k:.6f}\n" for k in range(n))
    header = "# column   1     --> step : The step.\n# column   2     --> time{femtosecond} : The time.\n"
    (folder / "run.out").write_text(header + table)
    every = range(n) if np.ndim(volume) else range(1)
    frames = [
        f"1\n# CELL(abcABC): {edges[k]:.9f} {edges[k]:.9f} {edges[k]:.9f} 90.0 90.0 90.0 Step: {k} Bead: 0 "
        "positions{angstrom} cell{angstrom}\nAr 0.0 0.0 0.0\n"
        for k in every
    ]
    for bead, extra in enumerate([0.0] if beads is None else beads):
        (folder / f"run.pos_{bead}.xyz").write_text("".join(frames))
        _extras(folder / f"run.dipole_{bead}", "dipole", (dipoles + extra) / units.Bohr)
        if alpha is not None:
            volumes = np.broadcast_to(alpha * FOUR_PI_K_E / (4.0 * np.pi), (n, 3, 3))[:: max(n // 5, 1)]
            _extras(folder / f"run.polarizability_{bead}", "polarizability", volumes / units.Bohr**3, max(n // 5, 1))
        if field is not None:
            _extras(folder / f"run.field_{bead}", "field", field / FIELD)
    return folder


def _extras(path: Path, name: str, values: np.ndarray, stride: int = 1) -> None:
    lines = []
    for k, value in enumerate(values):
        lines.append(f"#EXTRAS({name})# Step:  {k * stride}  Bead:  0")
        lines += [" ".join(map(repr, row)) for row in np.atleast_2d(value).tolist()]
    path.write_text("\n".join(lines) + "\n")
