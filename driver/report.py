"""What the command line prints: JSON lines, and tables for people."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from ase import Atoms
from rich.console import Console
from rich.table import Table

__all__ = ["json_line", "print_frame", "print_models"]

_MOST_ATOMS = 32


def json_line(record: dict[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(record, allow_nan=False, separators=(",", ":"))


def _vector(values: Any, digits: int = 4) -> str:
    return "  ".join(f"{x: .{digits}f}" for x in values)


def print_frame(record: dict[str, Any], atoms: Atoms, title: str) -> None:
    """A frame as a table: totals always, atoms where there are few."""
    console = Console()
    console.print(title, soft_wrap=True, highlight=False, markup=False)
    totals = Table(show_header=False)
    of_energy = f" ± {record['energy_uncertainty']:.3g}" if "energy_uncertainty" in record else ""
    totals.add_row("energy", f"{record['energy']:.6f}{of_energy} eV")
    for name, value in record["energy_terms"].items():
        totals.add_row(f"  {name}", f"{value:.6f} eV")
    forces = np.linalg.norm(record["forces"], axis=1)
    totals.add_row("largest force", f"{forces.max():.4f} eV/Å (atom {int(forces.argmax())})")
    if "forces_uncertainty" in record:
        doubt = np.asarray(record["forces_uncertainty"])
        where = f"at most {doubt.max():.3g} (atom {int(doubt.argmax())})"
        totals.add_row("uncertainty of forces", f"{np.sqrt(np.mean(doubt**2)):.3g} eV/Å a component, {where}")
    if np.any(record["stress"]):  # exactly zero without a volume
        totals.add_row("pressure", f"{-np.trace(record['stress']) / 3 * 160.21766208:.4f} GPa")
    totals.add_row("dipole", f"{_vector(record['dipole'])} e·Å")
    totals.add_row("charges", f"{min(record['charges']):.4f} … {max(record['charges']):.4f} e")
    for name, values in record["electrodes"].items():
        totals.add_row(f"electrode {name}", f"{values['charge']:.6f} e at {values['potential']:.4f} V")
    if "born_charges" in record:
        totals.add_row("Born charges", f"{_by_element(atoms, record['born_charges'])} e (mean thirds of traces)")
    if "polarizability" in record:
        totals.add_row("polarizability", f"{np.trace(record['polarizability']) / 3:.4f} Å³ (isotropic)")
    if "smallest_curvature" in record:
        totals.add_row("smallest curvature", f"{record['smallest_curvature']:.4f} eV/Å² (shells)")
    totals.add_row("residual", f"{record['residual']:.1e} V after {record['iterations']} iterations")
    totals.add_row("time", f"{record['seconds']:.2f} s")
    console.print(totals)
    if len(atoms) > _MOST_ATOMS:
        return
    table = Table("atom", "charge (e)", "shell (Å)", "force (eV/Å)")
    for i, symbol in enumerate(atoms.symbols):
        row = (f"{record['charges'][i]: .4f}", _vector(record["shells"][i]), _vector(record["forces"][i]))
        table.add_row(f"{i} {symbol}", *row)
    console.print(table)
    if "born_charges" in record:
        console.print(_born_charges(record, atoms))


def _by_element(atoms: Atoms, born: Any) -> str:
    thirds = np.trace(np.asarray(born), axis1=1, axis2=2) / 3
    symbols = np.asarray(atoms.get_chemical_symbols())
    return ", ".join(f"{symbol} {thirds[symbols == symbol].mean():.4f}" for symbol in dict.fromkeys(symbols.tolist()))


def _born_charges(record: dict[str, Any], atoms: Atoms) -> Table:
    """Of every atom's ∂M/∂r [3, 3] (e) the mean and the diagonal, and how large the rest is; the sum of all below."""
    table = Table("Born charge (e)", "mean", "xx        yy       zz", "largest other")
    born = np.asarray(record["born_charges"])
    for name, own in zip(
        [f"{i} {s}" for i, s in enumerate(atoms.symbols)] + ["sum"], [*born, born.sum(0)], strict=True
    ):
        other = np.abs(own - np.diag(np.diag(own))).max()
        table.add_row(name, f"{np.trace(own) / 3: z.4f}", _vector(np.diag(own).round(4) + 0.0), f"{other:z.4f}")
    return table


def print_models() -> None:
    """The shipped models and what their cards say."""
    from voltpi.potential.checkpoints import list_models, read_card

    console = Console()
    for name in list_models():
        table = Table(title=name, show_header=False, title_justify="left")
        for key, value in read_card(name).items():
            table.add_row(str(key), _card_text(value))
        console.print(table)


def _card_text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_card_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_card_text(item) for item in value)
    if isinstance(value, float):
        return f"{float(f'{value:.3g}'):g}"  # three digits, and no exponent where none is needed
    return str(value)
