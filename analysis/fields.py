"""Field and displacement that a run was done in, from what the run left: its record, its i-PI input, its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from voltpi.analysis.run_inputs import Given, given_to_drivers
from voltpi.potential.errors import InputError

__all__ = ["Applied", "applied_of", "field_of"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Applied:
    """What a run was done in, V/Å by Cartesian direction.

    field [3]: ε, 0 where D is held · displacement [3]: D, nan where ε is given · held [3]: whether D is given ·
    changing [3]: whether it changes with time, and then its value above is nan
    """

    field: Array = dataclasses.field(default_factory=lambda: np.zeros(3))
    displacement: Array = dataclasses.field(default_factory=lambda: np.full(3, np.nan))
    held: NDArray[np.bool_] = dataclasses.field(default_factory=lambda: np.zeros(3, dtype=bool))
    changing: NDArray[np.bool_] = dataclasses.field(default_factory=lambda: np.zeros(3, dtype=bool))

    @property
    def control(self) -> Array:
        """What is imposed [3]: D where it is held, ε elsewhere."""
        return np.where(self.held, self.displacement, self.field)

    def __str__(self) -> str:
        values = ", ".join(
            "changing" if moves else f"{value:g}" for value, moves in zip(self.control, self.changing, strict=True)
        )
        if not self.held.any():
            return f"field [{values}]"
        which = "".join(axis for axis, held in zip("xyz", self.held, strict=True) if held)
        return f"[{values}], displacement along {which}"


def applied_of(folder: Path, outputs: Iterable[Path], given: ArrayLike | None = None) -> Applied:
    """Field and displacement of the run in ``folder`` that wrote ``outputs``.

    ``given`` [3]: the field instead, without displacement; else settings and parameters that its drivers got
    (``voltpi.analysis.run_inputs``). Raises InputError where none of them says it, two of them disagree, or one cannot
    be read.
    """
    if given is not None:
        return Applied(field=_vector("--field", given, "field")[0])
    found = [_given_to(driver) for driver in given_to_drivers(folder, outputs)]
    if not found:
        raise InputError(f"{folder}: no settings.yaml that says the field; give --field X Y Z in V/Å")
    source, applied = found[0]
    for other, another in found[1:]:
        if not _same(applied, another):
            raise InputError(
                f"{folder}: the field is {_shown(applied)} V/Å in {source} but {_shown(another)} V/Å in {other}; "
                "give --field X Y Z, or move away the file that the run did not use"
            )
    return applied


def field_of(folder: Path, outputs: Iterable[Path], given: ArrayLike | None = None) -> Array:
    """The field [3] (V/Å) alone, as ``applied_of`` finds it."""
    return applied_of(folder, outputs, given).field


def _shown(applied: Applied) -> str:
    return str(applied.control.tolist()) if not (applied.held | applied.changing).any() else str(applied)


def _same(a: Applied, b: Applied) -> bool:
    alike = np.array_equal(a.held, b.held) and np.array_equal(a.changing, b.changing)
    return alike and np.allclose(a.control, b.control, rtol=1e-9, atol=1e-12, equal_nan=True)


def _given_to(driver: Given) -> tuple[str, Applied]:
    """Source, field and displacement of what one driver got."""
    content = _content(driver.settings) if driver.settings.is_file() or "field" not in driver.overrides else {}
    own = {key: value for key, value in driver.overrides.items() if key.partition(".")[0] in ("field", "displacement")}
    source = driver.source if own else str(driver.settings)
    for key, value in own.items():
        _put(source, content, key, value)
    field, moves = _vector(source, content.get("field"), "field")
    displacement, shifts = _vector(source, content.get("displacement"), "displacement", missing=np.nan)
    held = shifts | np.isfinite(displacement)
    return source, Applied(np.where(held, 0.0, field), displacement, held, np.where(held, shifts, moves))


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(content, dict | None):
        raise InputError(
            f"{path}: holds {content!r}, no mapping; give settings with field: [X, Y, Z], or --field X Y Z in V/Å"
        )
    return content or {}


def _put(source: str, content: dict[str, Any], key: str, value: Any) -> None:
    """Puts a value of i-PI's ``<parameters>`` at a dotted key such as ``field.2`` or ``field.2.ramp.rate``."""
    *above, last = (int(part) if part.isdigit() else part for part in key.split("."))
    here: Any = content
    try:
        for part in above:
            here = here[part]
        here[last] = _read(value)
    except (KeyError, IndexError, TypeError):
        raise InputError(
            f"{source}: {key} is given, but the settings have no list of three entries for it; give the whole of "
            f"{key.partition('.')[0]}, or --field X Y Z"
        ) from None


def _read(value: Any) -> Any:
    """Text as YAML, or as i-PI's ``<parameters>`` have a vector: with blanks."""
    if not isinstance(value, str):
        return value
    words = value.split()
    try:
        return yaml.safe_load(value) if len(words) < 2 or set("[{") & set(value) else [_read(word) for word in words]
    except yaml.YAMLError:
        return value


def _vector(source: str, value: Any, key: str, missing: float = 0.0) -> tuple[Array, NDArray[np.bool_]]:
    """Three numbers (V/Å), ``missing`` for null and nan for what changes with time; whether it does."""
    entries: Any = [None] * 3 if value is None else value
    try:
        changing = np.array([isinstance(x, dict) for x in entries])
        vector = np.array([np.nan if isinstance(x, dict) else missing if x is None else float(x) for x in entries])
    except (TypeError, ValueError):
        vector, changing = np.zeros(0), np.zeros(0, dtype=bool)
    given = [not moves and x is not None for x, moves in zip(entries, changing, strict=False)] if len(vector) else []
    if vector.shape != (3,) or not np.isfinite(vector[given]).all():
        raise InputError(
            f"{source}: {key} is {value!r}; give three numbers in V/Å, such as [0.1, 0, 0], or --field X Y Z"
        )
    return vector, changing
