"""What a run was given, from what is left in its folder: settings, start structure and temperature."""

from __future__ import annotations

import contextlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipi.utils.io.inputs.io_xml import read_dict
from ipi.utils.units import unit_to_internal, unit_to_user

from voltpi.analysis.ipi_xml import fill_templates, forcefields, systems_of
from voltpi.potential.errors import InputError

__all__ = ["Given", "ensemble_temperature", "given_to_drivers", "simulations"]


@dataclass(frozen=True)
class Given:
    """What one driver got: ``settings`` with ``overrides`` (dotted keys), the start structure ``template`` if known.

    ``source`` names the place for messages; paths in ``overrides`` are relative to ``folder``, that of the run.
    """

    source: str
    settings: Path
    template: Path | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def given_to_drivers(folder: Path, outputs: Iterable[Path]) -> list[Given]:
    """What the drivers of the run in ``folder`` that wrote ``outputs`` were given.

    What the run itself names: PREFIX.run.json (written by ``voltpi run``) and the ``<parameters>`` of ``<ffdirect>`` in
    its XML or RESTART; else settings.yaml and settings-NAME.yaml in the folder. Raises InputError for a record that
    cannot be read, or names files that are not there.
    """
    names = [path.name for path in outputs]
    found = [*_recorded(folder, names), *_direct(folder, names)]
    if found:
        return found
    # i-PI and driver were started by hand: which of these files the driver got is not written anywhere
    beside = [folder / "settings.yaml", *sorted(folder.glob("settings-*.yaml"))]
    return [Given(str(path), path, _start_structure(folder, names)) for path in beside if path.is_file()]


def ensemble_temperature(folder: Path, outputs: Iterable[Path]) -> float | None:
    """K, as the run's i-PI input says; None without an input, or where two of them disagree."""
    found = []
    for _, root in simulations(folder, [path.name for path in outputs]):
        for element in root.iterfind("system/ensemble/temperature"):
            try:
                value = unit_to_internal("temperature", element.get("units", ""), float(element.text or ""))
            except (KeyError, TypeError, ValueError):
                continue
            found.append(float(unit_to_user("temperature", "kelvin", value)))
    # a RESTART has fewer digits than the input
    return found[0] if found and max(found) - min(found) <= 1e-4 * found[0] else None


def _start_structure(folder: Path, names: list[str]) -> Path | None:
    """The file that i-PI was initialized from, or start.xyz."""
    files = [
        folder / (element.text or "").strip()
        for _, root in simulations(folder, names)
        for system in systems_of(root, names)
        for element in system.iterfind("initialize/file")
    ]
    return next((path for path in [*files, folder / "start.xyz"] if path.is_file()), None)


def _wrote(prefix: str, names: list[str]) -> bool:
    """Whether outputs of these names may come from a run with this prefix."""
    start = f"{prefix}."  # behind a prefix that the system may have
    return not prefix or any(name.startswith(start) or f"_{start}" in name for name in names)


def _recorded(folder: Path, names: list[str]) -> Iterator[Given]:
    """What ``voltpi run`` gave to its drivers."""
    records = {path.name.removesuffix(".run.json"): path for path in sorted(folder.glob("*.run.json"))}
    mine = [path for prefix, path in records.items() if _wrote(prefix, names)]
    if not mine and "i-pi" in records:  # the record's name where the outputs have no prefix
        mine = [records["i-pi"]]
    for path in mine:
        try:
            record = json.loads(path.read_text())
            settings = [folder / name for name in record["settings"].values()]
            starts = record.get("templates") or dict.fromkeys(record["settings"], record.get("template"))
            templates = {name: folder / start for name, start in starts.items() if start}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: cannot be read ({type(error).__name__}: {error}); remove it and give --field X Y Z in V/Å"
            ) from None
        for file in settings:
            if not file.is_file():
                raise InputError(f"{path}: names the settings {file}, which are not there; give --field X Y Z in V/Å")
        known = _parameters_of_sockets(folder, names)
        own = _forcefields(folder, names)
        for name, file in zip(record["settings"], settings, strict=True):
            if own is None or name in own:
                parameters = known.get(name, {})
                source = f"{file} (<parameters> of <ffsocket name='{name}'>)" if parameters else str(file)
                yield Given(source, file, templates.get(name), parameters, folder)


def _forcefields(folder: Path, names: list[str]) -> set[str] | None:
    """The forcefields of the systems that wrote outputs of these names, where the input has several systems."""
    found = [forcefields(root, names) for _, root in simulations(folder, names)]
    return next((own for own in found if own is not None), None)


def _parameters_of_sockets(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The ``<parameters>`` of each ``<ffsocket>``, which come before the settings of its drivers."""
    found: dict[str, dict[str, Any]] = {}
    for _, root in simulations(folder, names):
        for element in root.iter("ffsocket"):
            text = (element.findtext("parameters") or "").strip()
            with contextlib.suppress(ValueError):  # i-PI could not have read them either
                found.setdefault(element.get("name", ""), dict(read_dict(text)) if text else {})
    return found


def _direct(folder: Path, names: list[str]) -> Iterator[Given]:
    """What VoltPI inside i-PI was given."""
    for path, root in simulations(folder, names):
        own = forcefields(root, names)
        for element in root.iter("ffdirect"):
            if own is not None and element.get("name", "").strip() not in own:
                continue
            text = (element.findtext("parameters") or "").strip()
            try:
                parameters = dict(read_dict(text)) if text else {}
            except ValueError:
                continue  # i-PI could not have read them either
            if "settings" not in parameters:  # another potential than VoltPI
                continue
            source = f"{path} (<ffdirect name='{element.get('name', '')}'>)"
            settings, template = folder / str(parameters.pop("settings")), parameters.pop("template", None)
            if "field" not in parameters and not settings.is_file():
                raise InputError(
                    f"{source}: names the settings {settings}, which are not there; give --field X Y Z in V/Å"
                )
            yield Given(source, settings, None if template is None else folder / str(template), parameters, folder)


def simulations(folder: Path, names: list[str]) -> Iterator[tuple[Path, ET.Element]]:
    """i-PI inputs and restarts of the run, parsed, with the systems of their templates."""
    for path in (*sorted(folder.glob("*.xml")), folder / "RESTART"):
        try:
            root = ET.parse(path).getroot()
        except (OSError, ET.ParseError, UnicodeDecodeError):
            continue
        output = root.find("output")
        prefix = "i-pi" if output is None else output.get("prefix", "i-pi").strip()
        if root.tag == "simulation" and _wrote(prefix, names):
            fill_templates(root, path.name)
            yield path, root
