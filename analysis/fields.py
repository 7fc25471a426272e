"""The field that a run was done in, from what the run left: its record, its i-PI input, its settings."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ipi.utils.io.inputs.io_xml import read_dict
from numpy.typing import ArrayLike, NDArray

from voltpi.potential.errors import InputError

__all__ = ["field_of"]

Array = NDArray[np.float64]


def field_of(folder: Path, outputs: Iterable[Path], given: ArrayLike | None = None) -> Array:
    """The field [3] (V/Å) of the run in ``folder`` that wrote ``outputs``.

    The one given; else what the run itself names: the settings in PREFIX.run.json (written by ``voltpi run``) and the
    ``<parameters>`` of ``<ffdirect>`` in its XML or RESTART; else settings.yaml and settings-NAME.yaml in the folder.
    Raises InputError where none of them says it, two of them disagree, or one cannot be read.
    """
    if given is not None:
        return _vector("--field", given)
    names = [path.name for path in outputs]
    found = [*_recorded(folder, names), *_direct(folder, names)]
    if not found:
        # i-PI and driver were started by hand: which of these files the driver got is not written anywhere
        beside = [folder / "settings.yaml", *sorted(folder.glob("settings-*.yaml"))]
        found = [(str(path), _in_settings(path)) for path in beside if path.is_file()]
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


def _wrote(prefix: str, names: list[str]) -> bool:
    """Whether outputs of these names may come from a run with this prefix."""
    return not prefix or any(name.startswith(f"{prefix}.") for name in names)


def _recorded(folder: Path, names: list[str]) -> Iterator[tuple[str, Array]]:
    """Fields of the settings that ``voltpi run`` gave to its drivers."""
    records = {path.name.removesuffix(".run.json"): path for path in sorted(folder.glob("*.run.json"))}
    mine = [path for prefix, path in records.items() if _wrote(prefix, names)]
    if not mine and "i-pi" in records:  # the record's name where the outputs have no prefix
        mine = [records["i-pi"]]
    for path in mine:
        try:
            settings = [folder / name for name in json.loads(path.read_text())["settings"].values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: cannot be read ({type(error).__name__}: {error}); remove it and give --field X Y Z in V/Å"
            ) from None
        for file in settings:
            if not file.is_file():
                raise InputError(f"{path}: names the settings {file}, which are not there; give --field X Y Z in V/Å")
            yield str(file), _in_settings(file)


def _direct(folder: Path, names: list[str]) -> Iterator[tuple[str, Array]]:
    """Fields of VoltPI inside i-PI: ``field`` in ``<parameters>``, or that of the settings named there."""
    for path in (*sorted(folder.glob("*.xml")), folder / "RESTART"):
        try:
            root = ET.parse(path).getroot()
        except (OSError, ET.ParseError, UnicodeDecodeError):
            continue
        output = root.find("output")
        prefix = "i-pi" if output is None else output.get("prefix", "i-pi").strip()
        if root.tag != "simulation" or not _wrote(prefix, names):
            continue
        for element in root.iter("ffdirect"):
            text = (element.findtext("parameters") or "").strip()
            try:
                parameters = dict(read_dict(text)) if text else {}
            except ValueError:
                continue  # i-PI could not have read them either
            if "settings" not in parameters:  # another potential than VoltPI
                continue
            source = f"{path} (<ffdirect name='{element.get('name', '')}'>)"
            if "field" in parameters:
                value = parameters["field"]
                yield source, _vector(source, value.split() if isinstance(value, str) else value)
                continue
            file = folder / str(parameters["settings"])
            if not file.is_file():
                raise InputError(f"{source}: names the settings {file}, which are not there; give --field X Y Z in V/Å")
            yield str(file), _in_settings(file)


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
