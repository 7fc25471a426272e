"""The field that a run was done in, from what the run left: its record, its i-PI input, its settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from voltpi.analysis.run_inputs import Given, given_to_drivers
from voltpi.potential.errors import InputError

__all__ = ["field_of"]

Array = NDArray[np.float64]


def field_of(folder: Path, outputs: Iterable[Path], given: ArrayLike | None = None) -> Array:
    """The field [3] (V/Å) of the run in ``folder`` that wrote ``outputs``.

    The one given; else that of the settings and parameters that its drivers got (``voltpi.analysis.run_inputs``).
    Raises InputError where none of them says it, two of them disagree, or one cannot be read.
    """
    if given is not None:
        return _vector("--field", given)
    found = [_given_to(driver) for driver in given_to_drivers(folder, outputs)]
    if not found:
        raise InputError(f"{folder}: no settings.yaml that says the field; give --field X Y Z in V/Å")
    source, field = found[0]
    for other, value in found[1:]:
        if not np.allclose(value, field, rtol=1e-9, atol=1e-12):
            raise InputError(
                f"{folder}: the field is {field.tolist()} V/Å in {source} but {value.tolist()} V/Å in {other}; "
                "give --field X Y Z, or move away the file that the run did not use"
            )
    return field


def _given_to(driver: Given) -> tuple[str, Array]:
    """Source and field of what one driver got."""
    if "field" in driver.overrides:
        value = driver.overrides["field"]
        return driver.source, _vector(driver.source, value.split() if isinstance(value, str) else value)
    return str(driver.settings), _in_settings(driver.settings)


def _in_settings(path: Path) -> Array:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct it") from None
    value = (content or {}).get("field", [0.0, 0.0, 0.0]) if isinstance(content, dict | None) else content
    return _vector(str(path), value)


def _vector(source: str, value: Any) -> Array:
    try:
        vector = np.array([float(x) for x in value])
    except (TypeError, ValueError):
        vector = np.zeros(0)
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise InputError(
            f"{source}: field is {value!r}; give three numbers in V/Å, such as [0.1, 0, 0], or --field X Y Z"
        )
    return vector
