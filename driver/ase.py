"""An ASE calculator over the same settings (eV, Å, e; stress with ASE's sign and Voigt order)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.outputs import Properties, all_outputs
from ase.stress import full_3x3_to_voigt_6_stress

from voltpi.driver.evaluator import Evaluator, build_potential
from voltpi.driver.frames import alike, record
from voltpi.driver.settings import Settings, load_settings
from voltpi.driver.structures import frame_field

__all__ = ["VoltPICalculator"]


class VoltPICalculator(Calculator):
    """VoltPI's potential for ASE.

    Parameters
    ----------
    settings : a Settings tree, a mapping with the same keys (nested or dotted), or the path of a YAML file

    ``results`` holds, beyond ASE's own energy, free_energy, forces, stress, charges and dipole: ``shells`` [n, 3] (Å),
    ``field`` [3] (V/Å, that acts), ``residual`` (V), ``energy_terms``, ``electrodes`` {name: {charge: e, potential: V,
    residual: V}} with ``capacitive_energy`` (eV, ½ Σ ψ Q) where there are some and, as asked in ``output``,
    ``born_charges`` [n, 3, 3] (e; index order: atom, dipole direction, displacement direction), ``polarizability``
    [3, 3] (Å³), ``capacitance`` [electrodes, electrodes] (e/V, ∂Q_a/∂ψ_b at fixed nuclei), ``smallest_curvature``
    (eV/Å²), ``energy_uncertainty`` (eV), ``forces_uncertainty`` [n] (eV/Å) and ``committee``, the members' answers as
    ``voltpi.driver.frames.record`` has them. With ``field: from-frame`` the field is ``atoms.info["electric_field"]``
    (V/Å).

    The first structure fixes fragments, electrodes and carried charges; another composition or periodicity starts anew,
    and with ``charges.model: fixed`` other charges.

    Raises InputError as ``voltpi.driver.evaluator.Evaluator`` does.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "charges", "dipole"]  # noqa: RUF012 (ASE's own form)

    def __init__(self, settings: Settings | Mapping[str, Any] | str | Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(settings, str | Path):
            settings = load_settings(settings)
        elif not isinstance(settings, Settings):
            settings = load_settings(overrides=settings, origin="settings")
        self.settings: Settings = settings
        self._potential = build_potential(settings)
        self._evaluator: Evaluator | None = None
        self._first: Atoms | None = None
        self._field: np.ndarray | None = None

    def export_properties(self) -> Properties:
        """The results that ASE has a name for (``atoms.get_properties`` knows no others)."""
        return Properties({key: value for key, value in self.results.items() if key in all_outputs})

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """ASE's list of what changed; a new field in ``info`` counts as a change."""
        changes: list[str] = super().check_state(atoms, tol)
        field = self._field
        if field is not None and not np.array_equal(field, frame_field(atoms, self.settings)):
            changes.append("electric_field")
        if self._first is not None and not changes and not alike(self._first, atoms, self.settings):
            changes.append("initial_charges")  # fixed charges under a name that ASE does not follow
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Everything at once; ASE calls this when something changed."""
        super().calculate(atoms, list(properties), list(system_changes))
        assert self.atoms is not None
        atoms = self.atoms
        if self._evaluator is None or self._first is None or not alike(self._first, atoms, self.settings):
            self._evaluator, self._first = Evaluator(self._potential, atoms, self.settings), atoms.copy()
        self._field = frame_field(atoms, self.settings)
        response = self._evaluator.evaluate_systems(
            np.asarray(atoms.cell)[None], atoms.get_positions()[None], fields=self._field[None]
        )
        volume = self._evaluator.volume(np.asarray(atoms.cell))
        out = record(response, volume, 0.0)
        arrays = ["forces", "charges", "shells", "dipole", "field", "born_charges", "polarizability", "capacitance"]
        arrays.append("forces_uncertainty")
        others = ("smallest_curvature", "capacitive_energy", "energy_uncertainty")
        self.results: dict[str, Any] = {key: np.asarray(out[key]) for key in arrays if key in out}
        self.results |= {key: out[key] for key in others if key in out}
        if "committee" in out:
            self.results["committee"] = {key: np.asarray(values) for key, values in out["committee"].items()}
        self.results |= {key: out[key] for key in ("energy", "energy_terms", "electrodes", "residual", "iterations")}
        self.results["free_energy"] = out["energy"]
        if volume:
            self.results["stress"] = full_3x3_to_voigt_6_stress(np.asarray(out["stress"]))
