"""Everything that can be known to be wrong before a run, each finding with its fix."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from voltpi.driver.driven import advice as driven_advice
from voltpi.driver.driven import refusals as driven_refusals
from voltpi.driver.driven import sum_rule
from voltpi.driver.schedule import extreme_times, settings_at
from voltpi.driver.schedule import refusals as schedule_refusals
from voltpi.driver.settings import Settings, load_settings
from voltpi.driver.settings_file import read_yaml
from voltpi.potential.errors import InputError, VoltPIError

if TYPE_CHECKING:
    from voltpi.driver.evaluator import Evaluator
    from voltpi.driver.ipi_input import DirectForceField, RunInput, SocketForceField
    from voltpi.driver.launch import RunRecord
    from voltpi.driver.potentiostat import Potentiostat
    from voltpi.potential.model import Potential
    from voltpi.potential.response import Response
    from voltpi.potential.systems import Systems

__all__ = ["Finding", "check", "default_template", "refuse_starts"]

# beyond these a run does not conserve energy whatever the potential (fs)
_LONGEST_TIMESTEP = 5.0
_LONGEST_TIMESTEP_WITH_HYDROGEN = 1.5
# extras of a potentiostat, and of voltages that change with time
_EXTRAS_OF_A_RUN = frozenset({"potentiostat_charge", "potentiostat_target", "step"})
# what i-PI's <ffcommittee> adds to those of its drivers, which it gives out as committee_NAME
_EXTRAS_OF_A_COMMITTEE = frozenset({"committee_pot", "committee_uncertainty", "committee_force", "committee_virial"})
# a start structure with such a force (eV/Å) explodes in its first steps
_LARGEST_FORCE = 50.0
# from here on Born charges cost more to send than a step should
_MANY_ATOMS = 1000
_COULOMB_CONSTANT = 14.4  # eV Å/e², for a hint


@dataclass(frozen=True)
class Finding:
    """One sentence, about something that is right or a problem with its fix."""

    ok: bool
    sentence: str


def check(path: str | Path, template: str | Path | None = None) -> Iterator[Finding]:
    """Checks an i-PI input (XML, RESTART) or a settings file, as far as possible; problems do not end the search.

    Settings of a training are checked with their data.
    ``template`` is the start structure where the input names none (for a settings file: ``start.xyz`` beside it).
    """
    path = Path(path)
    if not path.is_file():
        yield Finding(False, f"{path}: there is no such file; give an i-PI input (XML) or a settings file (YAML)")
    elif path.suffix.lower() not in (".yaml", ".yml"):
        yield from _check_input(path, template)
    elif _is_of_a_training(path):
        yield from _check_training(path)
    else:
        yield from _check_settings(path, template)


def default_template(settings: Path) -> Path:
    """The start structure of ``settings[-NAME].yaml``: ``start[-NAME].xyz`` beside it, else ``start.xyz`` there.

    Raises InputError where there is none.
    """
    own = settings.parent / f"{settings.stem.replace('settings', 'start', 1)}.xyz"  # of settings-NAME.yaml
    start = own if own.is_file() else settings.parent / "start.xyz"
    if not start.is_file():
        raise InputError(f"{settings}: there is no start.xyz beside it; give the start structure with --template FILE")
    return start


def _check_settings(path: Path, template: str | Path | None) -> Iterator[Finding]:
    from voltpi.driver.build import build_potential

    try:
        settings = load_settings(path)
        potential = build_potential(settings)
    except VoltPIError as error:
        yield Finding(False, str(error))
        return
    yield Finding(True, f"{path}: settings are valid")
    try:
        start = Path(template) if template is not None else default_template(path)
    except InputError:
        yield _without_structure(path)
        return
    yield from _check_start(settings, potential, start)


def _without_structure(path: Path) -> Finding:
    return Finding(True, f"{path}: the potential can be built (no start structure was given to evaluate)")


def _is_of_a_training(path: Path) -> bool:
    try:
        return not read_yaml(path)[0].keys().isdisjoint({"data", "training"})
    except InputError:
        return False  # which is said where the settings are read


def _check_training(path: Path) -> Iterator[Finding]:
    """Settings of ``voltpi train`` and the frames that they name."""
    from voltpi.driver.training_data import read_samples
    from voltpi.driver.training_settings import load_training
    from voltpi.potential.checkpoints import load_potential
    from voltpi.potential.committee import LastLayers
    from voltpi.potential.shortrange.nequip import NequIP

    said: list[str] = []
    try:
        settings = load_training(path)
        said.append(f"{path}: settings of a training are valid; `voltpi train {path}` takes them")
        known, cutoff, charged = [], settings.network.r_max, settings.charges.model != "none"
        if settings.start is not None:
            start = load_potential(settings.start)
            network, charged = start.short_range, start.charges is not None
            if not isinstance(network, NequIP | LastLayers):
                raise settings.refusal("start", f"model {settings.start} has no one network to train further")
            known, cutoff = [z for z in network.species if z], network.cutoff
        read_samples(settings, known, cutoff, charged=charged, say=said.append)
    except VoltPIError as error:
        yield from (Finding(True, sentence) for sentence in said)
        yield Finding(False, str(error))
        return
    yield from (Finding(True, sentence) for sentence in said)


def _check_start(settings: Settings, potential: Potential, start: Path) -> Iterator[Finding]:
    from voltpi.driver.structures import read_structures

    try:
        atoms = read_structures(start)[0]
    except InputError as error:
        yield Finding(False, str(error))
        return
    yield from _evaluates(settings, atoms, str(start), potential=potential)


def _evaluates(
    settings: Settings, atoms: Atoms, name: str, plan: RunInput | None = None, *, potential: Potential | None = None
) -> Iterator[Finding]:
    """Whether the potential of these settings gives finite, sensible numbers for the structure, and its electrodes."""
    from voltpi.driver.build import build_potential
    from voltpi.driver.evaluator import Evaluator
    from voltpi.driver.potentiostat import Potentiostat, settings_of, without_ghost
    from voltpi.potential.fragments import name_fragment, unpaired

    fields = {"field"} if settings.in_field else set()
    later = {time: settings_at(settings, time) for time in extreme_times(settings)}
    settings = settings_at(settings)
    try:
        if settings.potentiostat is not None:
            yield from _ghost(Potentiostat(settings, atoms), settings, atoms, name, plan)
            later = {time: settings_of(then, atoms) for time, then in later.items()}
            atoms, settings = without_ghost(atoms, settings), settings_of(settings, atoms)
        evaluator = Evaluator(build_potential(settings) if potential is None else potential, atoms, settings)
        response = evaluator.evaluate_systems(np.asarray(atoms.cell)[None], atoms.get_positions()[None])
    except VoltPIError as error:
        yield Finding(False, f"{name}: {error}")
        return
    energy = float(response.energy[0])
    forces = response.forces.detach().cpu().norm(dim=-1)
    if not np.isfinite(energy) or not bool(forces.isfinite().all()):
        yield Finding(False, f"{name}: energy or forces are not finite numbers; check the structure")
        return
    largest = float(forces.max())
    if largest > _LARGEST_FORCE:
        atom = int(forces.argmax())
        yield Finding(
            False,
            f"{name}: the force on atom {atom} ({atoms.symbols[atom]}) is {largest:.0f} eV/Å and a run would explode; "
            "relax or equilibrate the structure first",
        )
    else:
        yield Finding(
            True,
            f"{name}: {len(atoms)} atoms, energy {energy:.6f} eV, largest force {largest:.2f} eV/Å, all terms finite",
        )
    if odd := unpaired(evaluator.prepared):
        names = ", ".join(name_fragment(evaluator.prepared, fragment) for fragment in odd[:3])
        yield Finding(
            True,
            f"hint: {name}: {len(odd)} fragments have an odd number of electrons with the charge they keep ({names}): "
            "radicals, or ions whose charge is not given as initial_charges",
        )
    for time, then in later.items():
        yield _evaluates_at(time, then, evaluator, atoms, name)
    if settings.displacement is not None:
        yield from _displaced(evaluator.prepared, settings, response, name)
    if response.electrodes:
        yield from _electrodes(evaluator.prepared, settings, response, name)
        if plan is not None:
            yield from _free_metal(evaluator.prepared, settings, plan, name)
    if plan is not None and response.born_charges is not None:
        for sentence in sum_rule(plan, response.born_charges.detach().cpu().numpy()):
            yield Finding(False, f"{name}: {sentence}")
    if plan is not None and len(plan.sockets) + len(plan.direct) == 1:
        given = {*evaluator.extras_of(response, 1)[0], "raw"} | _EXTRAS_OF_A_RUN | fields
        if plan.committee:
            given = {f"committee_{key}" for key in given} | _EXTRAS_OF_A_COMMITTEE
        yield from _extras(sorted(plan.extras - given), settings, name)


def _evaluates_at(time: float, settings: Settings, start: Evaluator, atoms: Atoms, name: str) -> Finding:
    """Whether the potential of ``start`` answers for the structure with what acts at ``time`` (ps) too."""
    from voltpi.driver.evaluator import Evaluator

    at = f"{name}: at {time:g} ps, when what changes is largest"
    try:
        evaluator = Evaluator(start.potential, atoms, settings)
        response = evaluator.evaluate_systems(np.asarray(atoms.cell)[None], atoms.get_positions()[None])
    except VoltPIError as error:
        return Finding(False, f"{at}: {error}")
    if not bool(response.energy.isfinite().all()) or not bool(response.forces.isfinite().all()):
        return Finding(False, f"{at}, energy or forces are not finite numbers; change the schedule")
    return Finding(True, f"{at}, energy {float(response.energy[0]):.6f} eV, all terms finite")


def _displaced(systems: Systems, settings: Settings, response: Response, name: str) -> Iterator[Finding]:
    """The field that a displacement leaves in the start structure, and which branch of M that is."""
    moment, field = (np.round(x[0].cpu().numpy(), 4).tolist() for x in (response.dipole, response.field))
    yield Finding(True, f"{name}: at the displacement M is {moment} e Å, which leaves the field {field} V/Å")
    if settings.polarization_reference is not None or systems.carried is None:
        return
    cell, loose = systems.cell[0].cpu().numpy(), systems.carried
    if systems.fragments is not None and systems.parents is not None:  # made whole: their net charges count
        loose = loose.new_zeros(int(systems.fragments.max()) + 1).index_add(0, systems.fragments, loose)
    largest = float(loose.abs().max())
    quantum = 4 * np.pi * _COULOMB_CONSTANT * largest / abs(np.linalg.det(cell)) * np.linalg.norm(cell, axis=1).max()
    if largest > 1e-6:
        yield Finding(
            True,
            f"hint: {name}: M counts carried charges where the file has their atoms; one atom put at another image "
            f"would change the field by up to {quantum:.2g} V/Å. For a crystal give polarization_reference: FILE, a "
            "structure without polarization from which M then counts",
        )


def _extras(missing: list[str], settings: Settings, name: str) -> Iterator[Finding]:
    """What the input would print but the drivers will not send: i-PI stops at the first step."""
    switches = {"BEC": "born_charges: true", "electrode_capacitance": "capacitance: true"}
    switches |= {"energy_uncertainty": "uncertainty: energy", "committee_pot": "uncertainty: energy"}
    switches |= {"forces_uncertainty": "uncertainty: forces"}
    switches |= dict.fromkeys(("committee_force", "committee_virial"), "uncertainty: members")
    for key in missing:
        option = switches.get(key, f"{key}: true")
        known = hasattr(settings.output, option.partition(":")[0])
        fix = f"set output.{option}" if known else "remove that <trajectory>"
        yield Finding(False, f"{name}: the input prints extra_type='{key}', which these settings do not give; {fix}")


def _free_metal(systems: Systems, settings: Settings, plan: RunInput, name: str) -> Iterator[Finding]:
    """Electrodes that i-PI moves, which they may; but not where nothing but charge acts between their atoms."""
    assert systems.electrode is not None
    bare = settings.has_model and settings.short_range is not None
    for k, part in enumerate(settings.electrodes):
        own = (systems.electrode == k).nonzero()[:, 0].tolist()
        free = [atom for atom in own if not {3 * atom, 3 * atom + 1, 3 * atom + 2} <= plan.held]
        if free and bare:
            yield Finding(
                False,
                f"{name}: {len(free)} of {len(own)} atoms of electrode {part.name} (the first is {free[0]}) are not in "
                "<fixatoms>, and short_range.pair beside a model gives them nothing that holds them; fix them",
            )
        elif free:
            yield Finding(
                True,
                f"hint: {name}: {len(free)} of {len(own)} atoms of electrode {part.name} (the first is {free[0]}) are "
                "not in <fixatoms> and move",
            )
    if len({part.eta is None for part in settings.electrodes}) == 2:
        yield Finding(
            True,
            f"hint: {name}: some electrodes have eta and others do not: between an ideal conductor and a metal with "
            "PQEq parameters lies the difference of their electronegativities; give all an eta, or chi",
        )


def _ghost(
    potentiostat: Potentiostat, settings: Settings, atoms: Atoms, name: str, plan: RunInput | None
) -> Iterator[Finding]:
    """How fast the charge of a potentiostat moves in this run."""
    from voltpi.driver.potentiostat import describe_ghost

    capacitance = potentiostat.capacitance(np.asarray(atoms.cell), atoms.positions)
    mass = None if plan is None else plan.mass(len(atoms) - 1)
    if plan is None or mass is None:
        yield Finding(True, f"{name}: the capacitance at the start, with all atoms held, is {capacitance:.5g} e/V")
        return
    ok, sentence = describe_ghost(plan, settings, capacitance, mass)
    yield Finding(ok, f"{name}: {sentence}")


def _electrodes(systems: Systems, settings: Settings, response: Response, name: str) -> Iterator[Finding]:
    """How many atoms the electrodes have, what they are held at and answer, and what balances their charge."""
    assert systems.electrode is not None
    total = 0.0
    for k, part in enumerate(settings.electrodes):
        answers = {key: float(value[0]) for key, value in response.electrodes[part.name].items()}
        total += answers["charge"]
        n = int((systems.electrode == k).sum())
        unit, answer = "V", f"{answers['charge']:z.6f} e"
        if part.control == "charge":
            unit, answer = "e", f"{answers['potential']:z.4f} V"
        yield Finding(True, f"{name}: electrode {part.name}: {n} atoms, {part.value:g} {unit}, which gives {answer}")
    net = float(systems.net_charge[0])
    balance = f"has a net charge of {net:g} e (charges.net_charge)" if net else "is neutral"
    yield Finding(
        True,
        f"{name}: the electrodes carry {total:z.6f} e in all and the other atoms {net - total:z.6f} e; the structure "
        f"{balance}",
    )
    if len(settings.electrodes) > 1 and bool(systems.pbc.all()) and not settings.coulomb.boundary.startswith("finite"):
        yield Finding(
            True,
            f"hint: {name}: the cell is periodic in all directions, so that electrodes also face each other's images "
            "across its face; coulomb.boundary: slab-z, or finite-field-z, is for one capacitor alone",
        )


def _check_input(path: Path, template: str | Path | None) -> Iterator[Finding]:
    from voltpi.driver.ipi_input import read_input

    try:
        plan = read_input(path)
    except InputError as error:
        yield Finding(False, str(error))
        return
    sentence = _ipi_refusal(path)
    if sentence:
        yield Finding(False, f"{path}: i-PI does not accept it ({sentence}); see i-PI's reference for that tag")
    else:
        yield Finding(True, f"{path}: well-formed, and i-PI knows its tags")
    yield from (Finding(False, sentence) for sentence in plan.problems)
    from voltpi.driver.launch import RunRecord

    try:
        record = RunRecord.of(plan, template)
        atoms = _first_start(plan, record, template)
    except InputError as error:
        yield Finding(False, str(error))
        return
    yield from (Finding(True, f"hint: {sentence}") for sentence in plan.advice())
    if atoms is not None:
        yield from _timestep(plan, atoms)
        beyond = sorted(dof // 3 for dof in plan.held if dof >= 3 * len(atoms))
        if beyond:
            yield Finding(
                False,
                f"{plan.path.name}: <fixatoms> or <fixatoms_dof> names atom {beyond[-1]} but the start structure has "
                f"atoms 0 to {len(atoms) - 1}; list those of this structure",
            )
    yield from _forcefields(plan, record)


def _ipi_refusal(path: Path) -> str:
    """What i-PI's own parser says against the file, or an empty string."""
    from ipi.inputs.simulation import InputSimulation
    from ipi.utils.io.inputs import io_xml

    try:
        with contextlib.redirect_stdout(io.StringIO()), path.open() as handle:
            InputSimulation().parse(io_xml.xml_parse_file(handle).fields[0][1])
    except Exception as error:  # i-PI raises many kinds
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _first_start(plan: RunInput, record: RunRecord, template: str | Path | None) -> Atoms | None:
    from voltpi.driver.structures import read_structures

    start = template if template is not None else plan.template or next(iter(record.templates.values()), None)
    return None if start is None else read_structures(start)[0]


def _timestep(plan: RunInput, atoms: Atoms) -> Iterator[Finding]:
    if plan.timestep is None:
        return
    hydrogen = bool((atoms.numbers == 1).any())
    longest = _LONGEST_TIMESTEP_WITH_HYDROGEN if hydrogen else _LONGEST_TIMESTEP
    what = " for a structure with hydrogen" if hydrogen else ""
    if not 0 < plan.timestep <= longest:
        advice = "0.25 to 0.5 fs" if hydrogen else "0.5 to 2 fs"
        yield Finding(
            False,
            f"{plan.path.name}: <timestep> is {plan.timestep:g} fs, outside 0 … {longest:g} fs{what}; use {advice}",
        )
    else:
        yield Finding(
            True, f"{plan.path.name}: <timestep> {plan.timestep:g} fs, {plan.n_beads} beads, {plan.steps} steps"
        )


def _forcefields(plan: RunInput, record: RunRecord) -> Iterator[Finding]:
    """Every forcefield that is ours: settings valid, start structure known, finite numbers."""
    from voltpi.driver.build import build_potential
    from voltpi.driver.launch import settings_for
    from voltpi.driver.structures import read_structures

    for ff in plan.sockets:
        try:
            file = settings_for(plan, ff, None, record)
            settings = load_settings(file, ff.overrides, origin="<parameters>", folder=plan.folder)
            start = record.templates.get(ff.name)
            atoms = None if start is None else read_structures(start)[0]
            if atoms is None:
                build_potential(settings)
        except VoltPIError as error:
            yield Finding(False, str(error))
            continue
        if atoms is None:
            yield _without_structure(file)
        else:
            yield from _evaluates_in_a_run(plan, ff, settings, atoms, f"{plan.path.name}, <ffsocket name='{ff.name}'>")
    for direct in plan.direct:
        if not direct.ours:
            yield Finding(
                True, f"{plan.path.name}: <ffdirect name='{direct.name}'> is not VoltPI's and was not checked"
            )
            continue
        name = f"{plan.path.name}, <ffdirect name='{direct.name}'>"
        try:
            settings, own = _parts_of(plan, direct)
        except InputError as error:
            yield Finding(False, f"{name}: {error}")
            continue
        yield from _evaluates_in_a_run(plan, direct, settings, own, name)


def _parts_of(plan: RunInput, direct: DirectForceField) -> tuple[Settings, Atoms]:
    """Settings and start structure that an ``<ffdirect>`` of ours names. Raises InputError."""
    from voltpi.driver.structures import read_structures

    file = plan.folder / str(direct.parameters["settings"])
    settings = load_settings(file, direct.overrides, origin="<parameters>", folder=plan.folder)
    return settings, read_structures(plan.folder / str(direct.parameters["template"]))[0]


def _unlike_start(plan: RunInput, direct: DirectForceField, own: Atoms) -> str:
    """What is wrong where an ``<ffdirect>`` of ours has other atoms than its systems start from, or an empty string."""
    from voltpi.driver.structures import read_structures

    start = plan.template_of(direct.name)
    if start is None or np.array_equal(own.numbers, (atoms := read_structures(start)[0]).numbers):
        return ""
    return (
        f"its template has {len(own)} atoms ({own.symbols}) but <initialize> starts from {len(atoms)} "
        f"({atoms.symbols}); give both the same file"
    )


def _evaluates_in_a_run(
    plan: RunInput, ff: SocketForceField | DirectForceField, settings: Settings, atoms: Atoms, name: str
) -> Iterator[Finding]:
    yield from (Finding(False, f"{name}: {sentence}") for sentence in _against(plan, ff, settings, atoms))
    yield from (Finding(True, f"hint: {name}: {sentence}") for sentence in driven_advice(plan, settings))
    wanted = "BEC" in plan.extras or any(m.driven is not None for m in plan.motions)
    if settings.output.born_charges and not wanted and len(atoms) >= _MANY_ATOMS:
        yield Finding(
            True,
            f"hint: {name}: output.born_charges is true, but the input prints no extra_type='BEC' and no driven "
            f"dynamics takes them; for {len(atoms)} atoms they cost a solution for each direction and much text at "
            "every step: set it to false",
        )
    yield from _evaluates(settings, atoms, name, plan)


def _against(
    plan: RunInput, ff: SocketForceField | DirectForceField, settings: Settings, atoms: Atoms
) -> Iterator[str]:
    """What i-PI would do with this structure that its boundary, field or electrodes do not allow."""
    from voltpi.driver.ipi_input import DirectForceField
    from voltpi.driver.structures import periodic_directions, refuse_ipis_cell

    if isinstance(ff, DirectForceField) and (unlike := _unlike_start(plan, ff, atoms)):
        yield unlike
    yield from driven_refusals(plan, ff, settings)
    yield from schedule_refusals(plan, ff, settings)
    if settings.potentiostat is not None:
        from voltpi.driver.potentiostat import refusals as potentiostat_refusals

        yield from potentiostat_refusals(plan, ff, settings, atoms)

    pbc = periodic_directions(atoms, settings)
    letters = [("abc"[d], d) for d in range(3) if not pbc[d]]
    if ff.wraps and letters:
        yield (
            f"pbc='True' folds atoms into the cell along {letters[0][0]} too, which is open, and would cut what lies "
            "across its face; remove it"
        )
    if ff.wraps and settings.displacement is not None and settings.polarization_reference is None:
        yield (
            "pbc='True' folds atoms into the cell, and a restart would then count M, and the field that the "
            "displacement leaves, from other images; remove it, or give polarization_reference"
        )
    if ff.wraps and settings.coulomb.boundary.startswith("finite-field"):
        yield (
            "pbc='True' folds atoms over the face of the cell where the potential jumps, which is no place for them; "
            "remove it"
        )
    barostat = plan.barostat
    changed = [letter for letter, d in letters if barostat is not None and barostat.changes(d)]
    if barostat is not None and changed:
        axes = {"a": "xx, xy, xz", "b": "yy, xy, yz", "c": "zz, xz, yz"}
        instead = "<dynamics mode='nvt'>"
        if len(letters) == 1:
            instead += f", or a barostat of mode='flexible' with <hfix> [{axes[changed[0]]}] </hfix>"
        yield (
            f"<barostat mode='{barostat.mode}'> scales the structure along {' and '.join(changed)}, where its boundary "
            f"is open and there is no pressure; use {instead}"
        )
    if plan.is_checkpoint:  # it holds its own cell
        return
    try:
        driven = any(motion.driven is not None for motion in plan.motions)
        refuse_ipis_cell(atoms, settings, cell_is_given=plan.cell_is_given, driven=driven)
    except InputError as error:
        yield str(error)


def refuse_starts(plan: RunInput, settings: Mapping[str, Path]) -> None:
    """Raises InputError where i-PI would stop, or do what the boundary or field of a forcefield of ours forbids.

    Also where the package of a foundation model is missing. ``settings`` are the files of the ``<ffsocket>``s, by name.
    What else is wrong with them is left to the drivers.
    """
    from voltpi.driver.structures import read_structures

    for sentence in plan.problems:
        raise InputError(sentence)
    _refuse_missing_packages(plan, settings)

    def of_socket(ff: SocketForceField) -> tuple[Settings, Atoms]:
        start = plan.template_of(ff.name)
        assert start is not None
        own = load_settings(settings[ff.name], ff.overrides, origin="<parameters>", folder=plan.folder)
        return own, read_structures(start)[0]

    readers: list[tuple[SocketForceField | DirectForceField, str, Callable[[], tuple[Settings, Atoms]]]] = []
    if not plan.is_checkpoint:
        readers += [(ff, f"<ffsocket name='{ff.name}'>", partial(of_socket, ff)) for ff in plan.sockets]
    readers += [(d, f"<ffdirect name='{d.name}'>", partial(_parts_of, plan, d)) for d in plan.direct if d.ours]
    for ff, name, read in readers:
        try:
            own, atoms = read()
        except InputError:
            continue
        # what else there is to say about a checkpoint was said about its input
        for sentence in schedule_refusals(plan, ff, own) if plan.is_checkpoint else _against(plan, ff, own, atoms):
            raise InputError(f"{plan.path.name}, {name}: {sentence}")


def _refuse_missing_packages(plan: RunInput, settings: Mapping[str, Path]) -> None:
    files = [
        (f"<ffsocket name='{ff.name}'>", settings[ff.name], ff.overrides) for ff in plan.sockets if ff.name in settings
    ]
    files += [
        (f"<ffdirect name='{d.name}'>", plan.folder / str(d.parameters["settings"]), d.overrides)
        for d in plan.direct
        if d.ours
    ]
    for name, file, overrides in files:
        try:
            own = load_settings(file, overrides, origin="<parameters>", folder=plan.folder)
        except InputError:
            continue
        if own.short_range is None or own.short_range.foundation is None:
            continue
        from voltpi.potential.shortrange.foundation import missing_package  # with torch, which takes a second

        if sentence := missing_package(own.short_range.foundation):
            raise InputError(f"{plan.path.name}, {name}: {sentence}")
