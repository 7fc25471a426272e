"""What VoltPI needs to know of an i-PI input (or RESTART): forcefields, steps, start structure, outputs.

Read before anything is started, so that mistakes cost a sentence instead of a run; i-PI still checks the whole file.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from voltpi.analysis.ipi_xml import fill_templates, output_start, words_of
from voltpi.potential.errors import InputError

__all__ = [
    "Barostat",
    "DirectForceField",
    "Driven",
    "ForceComponent",
    "Motion",
    "RunInput",
    "SocketForceField",
    "overrides_of",
    "parameter_value",
    "read_input",
]

if TYPE_CHECKING:
    from voltpi.analysis.driven_field import DrivenField

_PES_FILE = Path(__file__).with_name("pes.py")
# of <parameters>, no settings: the files of VoltPI's PES, and what i-PI itself wants to know
_FILES = ("settings", "template")
_OF_IPI = frozenset({"verbose", "verbosity"})
# kinds of what stands in these tags, and i-PI's names of the units that people abbreviate
_KINDS = {"timestep": "time", "tau": "time", "time": "time", "temperature": "temperature", "pressure": "pressure"}
_UNITS = {"fs": "femtosecond", "ps": "picosecond", "k": "kelvin", "gpa": "gigapascal", "mpa": "megapascal"}
_COMMON_UNITS = {"time": "femtosecond", "temperature": "kelvin", "pressure": "megapascal"}
# of <dynamics>: which need a temperature, and which barostats belong to those that change the cell
_AT_TEMPERATURE = ("nvt", "nvt-cc", "npt", "nst", "sc", "scnpt", "eda-nvt")
_BAROSTATS = {
    "npt": ("isotropic", "flexible", "anisotropic", "stochastic-rescaling"),
    "nst": ("anisotropic",),
    "scnpt": ("sc-isotropic",),
}


@dataclass(frozen=True)
class SocketForceField:
    """An ``<ffsocket>``: i-PI listens, drivers connect. ``wraps`` where it folds atoms into the cell first."""

    name: str
    mode: Literal["unix", "inet", "shm"]
    address: str
    port: int
    batch_size: int
    latency: float
    wraps: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, Any]:
        """Dotted keys of the settings and what ``<parameters>`` gives them."""
        return overrides_of(self.parameters)


@dataclass(frozen=True)
class DirectForceField:
    """An ``<ffdirect>``: i-PI evaluates inside its own process.

    ``ours`` where it loads VoltPI's PES, ``wraps`` where it folds atoms into the cell first, ``threaded`` where batches
    may come short.
    """

    name: str
    pes: str
    pes_path: Path | None
    parameters: dict[str, Any]
    batch_size: int
    ours: bool
    wraps: bool = False
    threaded: bool = False

    @property
    def overrides(self) -> dict[str, Any]:
        """Dotted keys of the settings and what ``<parameters>`` gives them."""
        return overrides_of({key: value for key, value in self.parameters.items() if key not in _FILES})


@dataclass(frozen=True)
class Barostat:
    """What changes the cell: its ``mode``, and the entries of h (``xx``, ``xz``, …) that it holds ``fixed``."""

    mode: str
    fixed: frozenset[str]

    def changes(self, direction: int) -> bool:
        """Whether lengths along this axis (0, 1, 2 for x, y, z) change, or what lies along it is sheared."""
        pairs = ("".join(sorted("xyz"[direction] + other)) for other in "xyz")
        return not self.fixed.issuperset(pairs)


@dataclass(frozen=True)
class ForceComponent:
    """A ``<force>`` of a system: which forcefield, evaluated on how many beads (0: on all)."""

    forcefield: str
    n_beads: int


@dataclass(frozen=True)
class Driven:
    """A ``<driven_dynamics>``: the field in time, and where its Born charges come from.

    field : None where it cannot be read, for the reason that ``problem`` says
    born_charges : mode of ``<bec>`` (``driver``, ``file``, ``manual``, ``none``)
    asr_threshold : largest mean of the Born charges, per atom once more
    multiple_steps : whether ``<nmts>`` asks for any
    """

    field: DrivenField | None
    problem: str
    born_charges: str
    asr_threshold: float
    multiple_steps: bool


@dataclass(frozen=True)
class Motion:
    """A ``<motion>``: how atoms are moved, and which are not.

    mode : of ``<motion>`` (``dynamics``, ``minimize``, …)
    dynamics : mode of ``<dynamics>`` or ``<driven_dynamics>`` (``nvt``, ``eda-nve``, …), empty where there is none
    thermostats : modes of what acts on the atoms, those inside ``multi`` one by one; empty where there is none
    multiple_steps : whether forces are evaluated with several timesteps (``<nmts>``)
    fixes_com : ``<fixcom>``, as written
    fixed_atoms, fixed_dofs : ``<fixatoms>``, ``<fixatoms_dof>`` (3·atom + direction)
    driven : by a field in time
    """

    mode: str
    dynamics: str
    thermostats: tuple[str, ...]
    multiple_steps: bool
    fixes_com: bool
    fixed_atoms: frozenset[int]
    fixed_dofs: frozenset[int]
    driven: Driven | None = None


@dataclass(frozen=True)
class RunInput:
    """What ``voltpi run`` and ``voltpi check`` need of an i-PI input; ``first_step`` is 0 but in a checkpoint."""

    path: Path
    sockets: tuple[SocketForceField, ...]
    direct: tuple[DirectForceField, ...]
    steps: int
    first_step: int
    timestep: float | None  # fs
    n_beads: int
    template: Path | None  # the start structure of the first system; None: a checkpoint, which holds none
    prefix: str
    properties: tuple[Path, ...]  # files with a column `step`, in full
    barostat: Barostat | None
    cell_is_given: bool  # by the input itself, and not only by the start structure
    motions: tuple[Motion, ...] = ()
    forces: tuple[ForceComponent, ...] = ()
    templates: dict[str, Path] = field(default_factory=dict)  # by forcefield: where a system that it acts on starts
    n_systems: int = 1
    moves_systems: bool = False  # <smotion>: exchanges between systems and the like
    temperature: float | None = None  # K
    time: float | None = None  # fs, where a checkpoint says it
    masses: tuple[tuple[int, tuple[float, ...]], ...] = ()  # amu, given by hand: (index, one mass) or (-1, all masses)
    extras: frozenset[str] = frozenset()  # what <trajectory extra_type=…> asks of the drivers
    committee: bool = False  # whether there is an <ffcommittee>, which gives out extras under names of its own
    problems: tuple[str, ...] = ()  # at which i-PI would stop before its first step, each with the fix

    @property
    def held(self) -> frozenset[int]:
        """Degrees of freedom (3·atom + direction) that every ``<motion>`` leaves where they are."""
        each = [m.fixed_dofs | {3 * atom + d for atom in m.fixed_atoms for d in range(3)} for m in self.motions]
        return frozenset.intersection(*each) if each else frozenset()

    @property
    def folder(self) -> Path:
        """Where i-PI runs and writes."""
        return self.path.parent

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a RESTART or another checkpoint of i-PI."""
        return self.template is None

    def template_of(self, forcefield: str) -> Path | None:
        """The start structure of the systems that this forcefield acts on; None in a checkpoint."""
        return self.templates.get(forcefield, self.template)

    def mass(self, atom: int) -> float | None:
        """The mass (amu) that the input itself gives an atom; None where it follows from the element."""
        given = None
        for index, masses in self.masses:
            if index == atom:
                given = masses[0]
            elif index < 0 and atom < len(masses):
                given = masses[atom]
        return given

    def advice(self) -> list[str]:
        """Sentences about what is allowed but slow."""
        return [
            f"{self.path.name}: <ffsocket name='{ff.name}'> asks for batches of {ff.batch_size} with <latency> "
            f"{ff.latency:g}, which i-PI mostly sends half empty; set <latency>1e-2</latency>, or use <ffdirect>"
            for ff in self.sockets
            if ff.batch_size > 1 and ff.latency < 1e-3
        ]


def overrides_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the ``<parameters>`` of an ``<ffsocket>``: dotted keys and their values.

    Raises InputError for the files of an ``<ffdirect>``, which a driver behind a socket has from its command line.
    """
    for key in _FILES:
        if key in parameters:
            raise InputError(
                f"<parameters> of an <ffsocket> name the {key} {parameters[key]}, as those of an <ffdirect> do; remove "
                "it: `voltpi run` takes settings-NAME.yaml (of <ffsocket name='NAME'>) or settings.yaml beside the "
                "XML and the structure of <initialize>, `voltpi drive` what --settings and --template say"
            )
    return {key: parameter_value(value) for key, value in parameters.items() if key not in _OF_IPI}


def parameter_value(value: Any) -> Any:
    """``0 0 0.05`` as a list of numbers (whole ones stay whole) and nulls; anything else as it is."""
    words = value.split() if isinstance(value, str) else []
    if len(words) < 2 or not all(word == "null" or _is_number(word) for word in words):
        return value
    return [yaml.safe_load(word) for word in words]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_input(xml: str | Path) -> RunInput:
    """Reads an i-PI input or checkpoint. Raises InputError, one sentence with file, tag and fix."""
    path = Path(xml).resolve()
    if not path.is_file():
        raise InputError(
            f"{xml}: there is no such file; give an i-PI input (XML), for example one made by `voltpi new`"
        )
    try:
        root = ET.parse(path).getroot()
    except (ET.ParseError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path.name}: not well-formed XML ({error}); close the tag or quote the attribute there"
        ) from error
    if root.tag != "simulation":
        raise InputError(f"{path.name}: the outermost tag is <{root.tag}> and not <simulation>; give an i-PI input")
    tags = _Tags(path.name, root)
    fill_templates(root, path.name)
    _refuse_units(tags)
    prefix = _prefix(root)
    sockets = tuple(_socket(tags, element) for element in root.iter("ffsocket"))
    direct = tuple(_direct(tags, element, path.parent) for element in root.iter("ffdirect"))
    if not any(element.tag.lower().startswith("ff") for element in root):
        raise InputError(f"{path.name}: no forcefield; add <ffsocket> or <ffdirect> (see `voltpi new`)")
    n_beads = _beads(tags)
    starts = [_start(tags, system, path.parent) for system in root.iterfind("system")]
    steps = tags.number(root, "total_steps", 1000, int, least=1)
    first_step = tags.number(root, "step", 0, int, least=0)
    problems = [*_finished(first_step, steps), *_problems(root, n_beads)]
    for ff in direct:
        if not ff.threaded and n_beads % ff.batch_size:
            raise InputError(
                f"{path.name}: <ffdirect name='{ff.name}'> has <batch_size> {ff.batch_size}, which does not divide "
                f"{n_beads} beads, and i-PI would wait for ever; use a divisor, or threaded='True'"
            )
    return RunInput(
        path=path,
        sockets=sockets,
        direct=direct,
        steps=steps,
        first_step=first_step,
        timestep=_timestep(root),
        n_beads=n_beads,
        template=next((start for start in starts if start is not None), None),
        prefix=prefix,
        properties=tuple(path.parent / name for name in _step_files(root)),
        barostat=_barostat(root),
        cell_is_given=any(element.find("cell") is not None for element in root.iter("initialize")),
        motions=tuple(_motion(element) for element in root.iter("motion") if element.get("mode") != "multi"),
        forces=tuple(_force(element) for element in root.iterfind("system/forces/force")),
        templates=_templates(tags, starts, {*(ff.name for ff in sockets), *(ff.name for ff in direct if ff.ours)}),
        n_systems=len(starts),
        moves_systems=_text(root, "smotion") != "" or any(len(e) > 0 for e in root.iterfind("smotion")),
        time=_quantity(root.find("system/ensemble/time"), "time", "femtosecond"),
        temperature=_quantity(next(root.iter("temperature"), None), "temperature", "kelvin"),
        masses=tuple(_masses(root)),
        extras=frozenset(
            element.get("extra_type", "").strip()
            for element in root.iter("trajectory")
            if (element.text or "").strip().startswith("extras") and element.get("extra_type", "").strip()
        ),
        committee=root.find("ffcommittee") is not None,
        problems=tuple(dict.fromkeys(f"{path.name}: {sentence}" for sentence in problems)),
    )


class _Tags:
    """Values of tags, with errors that name the file and the tag."""

    def __init__(self, file: str, root: ET.Element) -> None:
        self.file, self.root = file, root

    def fail(self, tag: str, sentence: str) -> InputError:
        return InputError(f"{self.file}: <{tag}> {sentence}")

    def number(self, parent: ET.Element, tag: str, default: Any, kind: type, least: float | None = None) -> Any:
        text = parent.findtext(tag)
        if text is None:
            return default
        try:
            value = kind(text.strip())
        except ValueError:
            raise self.fail(tag, f"is '{text.strip()}'; give a number ({kind.__name__})") from None
        if least is not None and value < least:
            raise self.fail(tag, f"is {value}; give {least:g} or more")
        return value


def _text(parent: ET.Element, tag: str, default: str = "") -> str:
    return (parent.findtext(tag) or default).strip()


def _socket(tags: _Tags, element: ET.Element) -> SocketForceField:
    name = element.get("name", "").strip()
    here = f"ffsocket name='{name}'"
    mode = element.get("mode", "inet").strip()
    if mode not in ("unix", "inet", "shm"):
        raise tags.fail(here, f"has mode='{mode}'; use unix, inet or shm")
    port = tags.number(element, "port", 65535, int)
    if mode == "inet" and not 1 <= port <= 65535:
        raise tags.fail(here, f"has <port> {port}; use one of 1025…65535")
    address = _text(element, "address", "localhost")
    parameters = _parameters(tags, element, here)
    try:
        overrides_of(parameters)
    except InputError as error:
        raise InputError(f"{tags.file}, <{here}>: {error}") from None
    return SocketForceField(
        name=name,
        mode=mode,  # type: ignore[arg-type]
        address=address,
        port=port,
        batch_size=tags.number(element, "batch_size", 1, int, least=1),
        latency=tags.number(element, "latency", 1e-4, float, least=0),
        wraps=_wraps(element),
        parameters=parameters,
    )


def _wraps(element: ET.Element) -> bool:
    return _is_true(element.get("pbc", "false"))


def _is_true(text: str) -> bool:
    return text.strip().lower() == "true"


def _direct(tags: _Tags, element: ET.Element, folder: Path) -> DirectForceField:
    name = element.get("name", "").strip()
    here = f"ffdirect name='{name}'"
    pes = _text(element, "pes", "dummy")
    pes_path = folder / _text(element, "pes_path") if pes == "custom" else None
    if pes_path is not None and not pes_path.is_file():
        raise tags.fail(
            here,
            f"names the <pes_path> {_text(element, 'pes_path')}, which is no file; "
            f"VoltPI's is {_PES_FILE} (printed by `python -m voltpi.driver.pes`)",
        )
    parameters = _parameters(tags, element, here)
    ours = pes_path is not None and pes_path.samefile(_PES_FILE)
    for key in _FILES if ours else ():
        if key not in parameters:
            raise tags.fail(
                here, f"gives no {key} in <parameters>; write {{settings: settings.yaml, template: start.xyz}}"
            )
        if not (folder / str(parameters[key])).is_file():
            raise tags.fail(
                here,
                f"names the {key} {parameters[key]} in <parameters>, which is no file in {folder}; "
                "paths are relative to that folder",
            )
    batch_size = tags.number(element, "batch_size", 1, int, least=1)
    threaded = _is_true(element.get("threaded", "false"))
    return DirectForceField(name, pes, pes_path, parameters, batch_size, ours, _wraps(element), threaded)


def _parameters(tags: _Tags, element: ET.Element, here: str) -> dict[str, Any]:
    from ipi.utils.io.inputs.io_xml import read_dict

    text = _text(element, "parameters")
    try:
        return dict(read_dict(text)) if text else {}
    except ValueError as error:
        raise tags.fail(
            here,
            f"has <parameters> that i-PI cannot read ({error}); write {{key: value, key: value}}, and vectors "
            "with blanks: {field: 0 0 0.05}",
        ) from error


def _prefix(root: ET.Element) -> str:
    output = root.find("output")
    return "i-pi" if output is None else output.get("prefix", "i-pi").strip()


def _step_files(root: ET.Element) -> Iterator[str]:
    for element in root.iterfind("output/properties"):
        names = [part.partition("{")[0].strip() for part in (element.text or "").strip(" []\n\t").split(",")]
        for system in root.iterfind("system") if "step" in names else ():
            yield output_start(root, system) + element.get("filename", "out").strip()


def _beads(tags: _Tags) -> int:
    for tag in ("initialize", "beads"):
        for element in tags.root.iter(tag):
            text = element.get("nbeads", "1").strip()
            if not text.isdigit() or int(text) < 1:
                raise tags.fail(tag, f"has nbeads='{text}'; give a whole number from 1")
            return int(text)
    raise tags.fail(
        "system",
        "has neither <initialize> nor <beads>; add <initialize nbeads='1'><file mode='ase'> start.xyz "
        "</file></initialize>",
    )


def _timestep(root: ET.Element) -> float | None:
    return _quantity(next(root.iter("timestep"), None), "time", "femtosecond")


def _quantity(element: ET.Element | None, kind: str, unit: str) -> float | None:
    """The number in a tag with i-PI's units, in ``unit``; None where there is none, or i-PI will refuse it."""
    values = _quantities(element, kind, unit)
    return values[0] if len(values) == 1 else None


def _quantities(element: ET.Element | None, kind: str, unit: str) -> tuple[float, ...]:
    from ipi.utils.units import unit_to_internal, unit_to_user

    if element is None or not element.text:
        return ()
    try:
        factor = unit_to_internal(kind, element.get("units", "automatic"), 1.0)
        return tuple(float(unit_to_user(kind, unit, factor * float(word))) for word in words_of(element.text))
    except (ValueError, TypeError, KeyError):
        return ()  # i-PI says what is wrong with it


def _refuse_units(tags: _Tags) -> None:
    """Raises InputError for a unit that i-PI does not know."""
    from ipi.utils.units import unit_to_internal

    for element in tags.root.iter():
        kind, unit = _KINDS.get(element.tag), element.get("units")
        if kind is None or unit is None:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # i-PI prints its table of units
                unit_to_internal(kind, unit, 1.0)
        except (ValueError, TypeError, KeyError):
            known = _UNITS.get(unit.strip().lower(), _COMMON_UNITS[kind])
            raise tags.fail(element.tag, f"has units='{unit}': unit '{unit}' is unknown; write {known}") from None


def _finished(step: int, total: int) -> Iterator[str]:
    """What is wrong where no step is left: i-PI ends with a traceback."""
    if step >= total:
        yield f"the run is finished: <step> is {step} and <total_steps> {total}; raise <total_steps> there to go on"


def _problems(root: ET.Element, n_beads: int) -> Iterator[str]:
    """Why i-PI would stop before its first step, as far as its parser does not say it."""
    names = [top.get("name", "").strip() for top in root if top.tag.lower().startswith("ff")]
    for system in root.iterfind("system"):
        for force in (*system.iterfind("forces/force"), *system.iterfind("ensemble/bias/force")):
            if (name := force.get("forcefield", "").strip()) not in names:
                close = difflib.get_close_matches(name, names, 1)
                fix = f"did you mean {close[0]}?" if close else f"give one of {', '.join(names)}"
                yield f"<force forcefield='{name}'> names no forcefield; {fix}"
        temperature = system.find("ensemble/temperature")
        values = _quantities(temperature, "temperature", "kelvin")
        given = temperature is not None and bool((temperature.text or "").strip()) and not any(v < 0 for v in values)
        for tag, default in (("dynamics", "nve"), ("driven_dynamics", "eda-nve")):
            moved = (motion for motion in system.iter("motion") if motion.get("mode", "dynamics").strip() == tag)
            for dynamics in (part for motion in moved for part in motion.iterfind(tag)):
                mode = dynamics.get("mode", default).strip()
                if not given and (mode in _AT_TEMPERATURE or (mode == "nve" and n_beads > 1)):
                    beads = f" with {n_beads} beads" if mode == "nve" else ""
                    yield (
                        f"<{tag} mode='{mode}'>{beads} needs a temperature, but <ensemble> has none; add <temperature "
                        "units='kelvin'> 300 </temperature> to <ensemble>"
                    )
                yield from _barostat_problems(dynamics, mode)


def _barostat_problems(dynamics: ET.Element, mode: str) -> Iterator[str]:
    allowed = _BAROSTATS.get(mode)
    if allowed is None:
        return
    barostat = dynamics.find("barostat")
    have = "dummy" if barostat is None else barostat.get("mode", "dummy").strip()
    if have == "dummy" or (mode == "nst" and have not in allowed):
        what = "has no <barostat>"
        if barostat is not None:
            given = f"<barostat mode='{have}'>" if "mode" in barostat.attrib else "a <barostat> without mode"
            what = f"has {given}"
        choice = f"'{allowed[0]}'" + (f" (or {', '.join(allowed[1:])})" if allowed[1:] else "")
        yield f"<dynamics mode='{mode}'> {what}; give it a <barostat mode={choice}>"


def _masses(root: ET.Element) -> Iterator[tuple[int, tuple[float, ...]]]:
    for element in root.iterfind("system/initialize/masses"):
        if element.get("mode", "").strip() == "manual" and (m := _quantities(element, "mass", "dalton")):
            yield int(element.get("index", "-1")), m
    for element in root.iterfind("system/beads/m"):
        yield -1, _quantities(element, "mass", "dalton")


def _motion(element: ET.Element) -> Motion:
    driven = element.find("driven_dynamics")
    dynamics = element.find("dynamics") if driven is None else driven
    thermostats: list[str] = []
    multiple_steps = False
    if dynamics is not None:
        for thermostat in dynamics.iterfind("thermostat"):
            inner = [t.get("mode", "") for t in thermostat.iter("thermostat")]
            thermostats += [mode.strip() for mode in inner if mode.strip() not in ("", "multi")]
        multiple_steps = any(word not in ("0", "1") for word in words_of(dynamics.findtext("nmts")))
    return Motion(
        mode=element.get("mode", "dynamics").strip(),
        dynamics="" if dynamics is None else dynamics.get("mode", "nve" if driven is None else "eda-nve").strip(),
        thermostats=tuple(thermostats),
        multiple_steps=multiple_steps,
        fixes_com=_is_true(_text(element, "fixcom", "True")),
        fixed_atoms=frozenset(_whole(element.findtext("fixatoms"))),
        fixed_dofs=frozenset(_whole(element.findtext("fixatoms_dof"))),
        driven=None if driven is None else _driven(driven, multiple_steps),
    )


def _driven(element: ET.Element, multiple_steps: bool) -> Driven:
    from voltpi.analysis.driven_field import read_efield

    bec = element.find("bec")
    field, problem = None, ""
    try:
        field = read_efield(element)
        threshold = float(element.findtext("asr_threshold", "1e-8"))
    except ValueError as error:
        problem, threshold = str(error), 1e-8
    mode = "none" if bec is None else bec.get("mode", "none").strip()
    return Driven(field, problem, mode, threshold, multiple_steps)


def _whole(text: str | None) -> list[int]:
    return [int(word) for word in words_of(text) if word.lstrip("-").isdigit()]


def _force(element: ET.Element) -> ForceComponent:
    beads = element.get("nbeads", "0").strip()
    return ForceComponent(element.get("forcefield", "").strip(), int(beads) if beads.isdigit() else 0)


def _barostat(root: ET.Element) -> Barostat | None:
    for dynamics in root.iter("dynamics"):
        barostat = dynamics.find("barostat")
        if dynamics.get("mode", "nve").strip() not in ("npt", "nst", "scnpt") or barostat is None:
            continue
        mode = barostat.get("mode", "dummy").strip()
        fixed = {"".join(sorted(entry)) for entry in re.findall(r"\b[xyz]{2}\b", _text(barostat, "hfix"))}
        if "offdiagonal" in _text(barostat, "hfix"):
            fixed |= {"xy", "xz", "yz"}
        if mode != "dummy":
            return Barostat(mode, frozenset(fixed))
    return None


def _start(tags: _Tags, system: ET.Element, folder: Path) -> Path | None:
    """The start structure of a system; None where it holds positions, as in a checkpoint."""
    element = system.find("initialize/file")
    if element is None:
        if system.find("beads") is not None:
            return None
        raise tags.fail("initialize", "names no start structure; add <file mode='ase'> start.xyz </file>")
    name = (element.text or "").strip()
    path = folder / name
    if not path.is_file():
        raise tags.fail("file", f"names the start structure {name}, which is no file in {folder}; check the path")
    mode = element.get("mode", "chk").strip()
    if mode not in ("ase", "xyz", "pdb"):
        raise tags.fail(
            "file",
            f"has mode='{mode}'; start from a structure with mode='ase', 'xyz' or 'pdb' "
            "(and continue a run with `voltpi run RESTART`)",
        )
    if mode == "xyz" and not _says_its_units(path, element):
        raise tags.fail(
            "file",
            f"reads {name} with mode='xyz', i-PI's own dialect in bohr unless its comment says otherwise; write "
            "'# CELL(abcABC): a b c 90 90 90 cell{angstrom} positions{angstrom}' there, or use mode='ase'",
        )
    return path


def _templates(tags: _Tags, starts: list[Path | None], ours: set[str]) -> dict[str, Path]:
    """By forcefield, the start structure of the first system that names it; ``starts`` are those of the systems.

    Raises InputError where ``ours``, which are prepared for one structure, act on systems of different atoms.
    """
    found: dict[str, Path] = {}
    for system, start in zip(tags.root.iterfind("system"), starts, strict=True):
        if start is None:
            continue
        named = {force.get("forcefield", "").strip() for force in system.iter("force")}
        # others stand inside those that are named, such as <ffcommittee>
        inside = (part for top in tags.root if top.get("name", "").strip() in named for part in top.iter())
        names = sorted({part.get("name", "").strip() for part in inside if part.tag in ("ffsocket", "ffdirect")})
        for name in names:
            known = found.setdefault(name, start)
            if name in ours and known != start:
                _refuse_other_atoms(tags, name, known, start)
    return found


def _refuse_other_atoms(tags: _Tags, name: str, first: Path, second: Path) -> None:
    from voltpi.driver.structures import read_structures

    one, other = (list(read_structures(path)[0].symbols) for path in (first, second))
    if one != other:
        unlike = f"{len(one)} atoms in {first.name} and {len(other)} in {second.name}"
        if len(one) == len(other):
            k = next(k for k, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
            unlike = f"atom {k} is {one[k]} in {first.name} and {other[k]} in {second.name}"
        raise tags.fail(
            f"force forcefield='{name}'",
            f"stands in systems of different atoms ({unlike}), but a driver is prepared for one list of atoms; give "
            "each system a forcefield of its own, or the same atoms in the same order",
        )


def _says_its_units(path: Path, element: ET.Element) -> bool:
    """Whether i-PI's XYZ dialect means the same to i-PI and to VoltPI, which reads the comment alone."""
    with path.open(errors="replace") as file:
        comment = [file.readline(4096) for _ in range(2)][1]
    given = {element.get(key, "automatic").strip() for key in ("units", "cell_units")}
    return "CELL" in comment and given == {"automatic"}
