"""One typed tree of all that a run needs to know; YAML in, one clear sentence with file and line out.

The same keys are used in a YAML file, in ``--set a.b=c`` and in i-PI's ``<parameters>``. A key that is valid here but
that the installed potential cannot honour is refused where the potential is built (``voltpi.driver.build``), never
ignored.

Units: Å, eV, e, V, V/Å.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from voltpi.driver.settings_base import Strict, finite_number, nonempty, optional_part
from voltpi.driver.settings_charges import Charges, Coulomb, Dispersion, Pair, ShortRange, Taper
from voltpi.driver.settings_external import (
    Clock,
    Cyclic,
    Displacement,
    Electrode,
    Potentiostat,
    Ramp,
    Schedule,
    Square,
    Table,
    UniformField,
)
from voltpi.driver.settings_file import Origins, assign, explain, key_path, origin_of, parse_value, read_yaml
from voltpi.potential.errors import InputError

__all__ = [
    "Charges",
    "Clock",
    "Coulomb",
    "Cyclic",
    "Dispersion",
    "Electrode",
    "Output",
    "Pair",
    "Potentiostat",
    "Ramp",
    "Schedule",
    "Settings",
    "ShortRange",
    "Square",
    "Table",
    "Taper",
    "finite_number",
    "load_settings",
]


def _uncertainty(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return "forces" if value else "none"
    return value


class Output(Strict):
    """What is computed and passed on beyond energy, forces and virial.

    uncertainty : of a committee: ``energy``, ``forces`` (that of the energy too; also ``true``) or ``members`` (both,
        and what i-PI's ``<ffcommittee>`` reads)
    """

    charges: bool = True
    shells: bool = False
    born_charges: bool = False
    polarizability: bool = False
    smallest_curvature: bool = False
    capacitance: bool = False
    uncertainty: Annotated[Literal["none", "energy", "forces", "members"], BeforeValidator(_uncertainty)] = "none"


def _device(value: Any) -> str:
    if isinstance(value, str) and (
        value in ("auto", "cpu", "cuda") or (value.startswith("cuda:") and value[5:].isdigit())
    ):
        return value
    raise ValueError("expected auto, cpu, cuda or cuda:n")


class Settings(Strict):
    """All a run needs, validated; ``load_settings`` reads it.

    Raises ``pydantic.ValidationError`` when built directly; ``load_settings`` turns that into one
    sentence (``InputError``).
    """

    model: Annotated[str, BeforeValidator(nonempty)] = "none"
    short_range: ShortRange | None = None
    dispersion: Dispersion | None = None
    charges: Charges = Charges()
    coulomb: Coulomb = Coulomb()
    field: UniformField = (0.0, 0.0, 0.0)
    displacement: Displacement = None
    field_under_strain: Literal["uniform", "reduced"] = "uniform"
    polarization_reference: Annotated[str, BeforeValidator(nonempty)] | None = None
    electrodes: tuple[Electrode, ...] = ()
    potentiostat: Potentiostat | None = None
    clock: Clock | None = None
    device: Annotated[str, BeforeValidator(_device)] = "auto"
    precision: Literal["double", "mixed", "single"] = "mixed"
    output: Output = Output()

    # where each key was given, for messages ("settings.yaml, line 4")
    _origins: Origins = PrivateAttr(default_factory=dict)

    @field_validator("short_range", mode="before")
    @classmethod
    def _read_short_range(cls, value: Any) -> Any:
        return optional_part(ShortRange, value)

    @field_validator("dispersion", mode="before")
    @classmethod
    def _read_dispersion(cls, value: Any) -> Any:
        return optional_part(Dispersion, value)

    @field_validator("electrodes", mode="before")
    @classmethod
    def _list_of_electrodes(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("expected a list such as [{name: left, atoms: element Au, potential: 0.5}]")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for key, sentence in _contradictions(self):
            raise PydanticCustomError("contradiction", "{sentence}", {"sentence": sentence, "key": key})
        return self

    @property
    def scheduled(self) -> list[str]:
        """The keys of potentials, fields and displacements that change with time."""
        keys = [f"electrodes.{k}.potential" for k, e in enumerate(self.electrodes) if isinstance(e.potential, Schedule)]
        if self.potentiostat is not None and isinstance(self.potentiostat.potential, Schedule):
            keys.append("potentiostat.potential")
        for name in ("field", "displacement"):
            components = () if getattr(self, name) == "from-frame" else getattr(self, name) or ()
            keys += [f"{name}.{k}" for k, component in enumerate(components) if isinstance(component, Schedule)]
        return keys

    @property
    def has_model(self) -> bool:
        """Whether a checkpoint brings the potential."""
        return self.model != "none"

    @property
    def field_from_frame(self) -> bool:
        """Whether every frame brings its own field."""
        return self.field == "from-frame"

    @property
    def in_field(self) -> bool:
        """Whether there is a uniform field or a displacement, at some time or in some frame."""
        return self.field_from_frame or self.displacement is not None or any(self.field)

    def given(self) -> dict[str, Any]:
        """Dotted key -> value of everything that was set explicitly, leaf by leaf."""
        return dict(_given(self, ""))

    def given_for_charges(self) -> list[str]:
        """The keys among them that have no meaning without charges."""
        neutral = ("charges.model", "coulomb.boundary")  # the boundary is that of short range and dispersion too
        return sorted(k for k in self.given() if k.startswith(("charges.", "coulomb.")) and k not in neutral)

    def where(self, key: str) -> str:
        """File and line (or option) that gave ``key``, or an empty string."""
        return origin_of(self._origins, key_path(key))

    def refusal(self, key: str, sentence: str) -> InputError:
        """The error to raise about ``key``, with the place where it was given."""
        where = self.where(key)
        return InputError(f"{where}: {sentence}" if where else sentence)


def _given(part: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in part.model_fields_set:
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield from _given(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _contradictions(s: Settings) -> Iterator[tuple[str, str]]:
    """Pairs (key, sentence) for settings that exclude each other, whatever the structure."""
    charges, coulomb = s.charges, s.coulomb
    given = set(s.given())
    walls = bool(s.electrodes) and s.short_range is not None and s.short_range.pair is not None
    if s.has_model and not walls and "short_range" in {key.partition(".")[0] for key in given}:
        yield (
            "short_range",
            f"short_range cannot be combined with model {s.model}, which brings its own, but for short_range.pair "
            "between electrodes and electrolyte; remove one of the two",
        )
    if s.displacement is not None:
        if s.field_from_frame:
            yield "displacement", "displacement excludes field: from-frame; give a constant field or no displacement"
            return
        for i, axis in enumerate("xyz"):
            if s.displacement[i] is not None and s.field[i]:
                yield (
                    "displacement",
                    f"displacement and field are both set along {axis}; keep one of the two in each direction",
                )
    if s.field_under_strain == "reduced" and not s.in_field:
        yield (
            "field_under_strain",
            "field_under_strain: reduced is for a field or displacement, and there is none; give one or remove it",
        )
    if s.field_under_strain == "reduced" and s.field_from_frame:
        yield (
            "field_under_strain",
            "field_under_strain: reduced keeps the voltages of one field while the cell changes, but field: from-frame "
            "brings one with every frame; remove one of the two",
        )
    if s.polarization_reference is not None and s.electrodes:
        yield (
            "polarization_reference",
            "polarization_reference is for crystals without electrodes, whose charges move in and out; remove it",
        )
    if charges.model == "none":
        for key in s.given_for_charges():
            yield key, f"{key} has no meaning with charges.model: none; remove one of the two"
    if charges.model != "fixed":
        for key in ("charges.values", "charges.width"):
            if key in given:
                yield (
                    key,
                    f"{key} belongs to charges.model: fixed, not {charges.model}; remove it or change the model",
                )
    if charges.model == "fixed":
        meaningless = ["limiter", "shell_limit", "conserve", "response", "carried", "fragments"]
        if all(e.eta is not None for e in s.electrodes):  # otherwise they have the parameters of their element
            meaningless.append("parameters")
        for key in meaningless:
            if f"charges.{key}" in given:
                yield (
                    f"charges.{key}",
                    f"charges.{key} has no meaning with charges.model: fixed, whose charges are charges.values; remove "
                    "one of the two",
                )
        if coulomb.method == "taper":
            yield "coulomb.method", "coulomb.method: taper is for charges.model: pqeq or qeq, not fixed; use auto"
    if charges.model == "latent":
        for key in ("limiter", "shell_limit", "response", "carried", "parameters"):
            if f"charges.{key}" in given and not (key == "parameters" and (s.electrodes or charges.relaxation)):
                yield (
                    f"charges.{key}",
                    f"charges.{key} has no meaning with charges.model: latent, whose charges a network gives and which "
                    "all feel a field; remove it",
                )
        if coulomb.method == "taper":
            yield "coulomb.method", "coulomb.method: taper is for charges.model: pqeq or qeq, not latent; use auto"
    elif not s.has_model:
        for key in ("charges.sigma", "charges.epsilon_infinity", "charges.relaxation"):
            if key in given:
                yield key, f"{key} belongs to charges.model: latent, not {charges.model}; remove it"
    if charges.limiter == "none" and "charges.shell_limit" in given:
        yield (
            "charges.shell_limit",
            "charges.shell_limit has no meaning with charges.limiter: none; remove one of the two",
        )
    if charges.response == "all" and charges.carried != "auto":
        yield "charges.carried", "charges.carried belongs to charges.response: shells or frozen, not all; remove it"
    if coulomb.taper is not None and coulomb.method != "taper":
        yield "coulomb.taper", "coulomb.taper needs coulomb.method: taper; set it or remove coulomb.taper"
    if coulomb.method == "direct" and coulomb.boundary not in ("auto", "open"):
        yield "coulomb.method", f"coulomb.method: direct is for open boundaries, not {coulomb.boundary}; use auto"
    if coulomb.method in ("ewald", "pme") and coulomb.boundary == "open":
        yield (
            "coulomb.method",
            f"coulomb.method: {coulomb.method} needs a periodic boundary, not open; use auto, which sums large "
            "clusters on a mesh by itself",
        )
    yield from _electrode_contradictions(s)
    if s.output.capacitance and sum(e.potential is not None for e in s.electrodes) != 2:
        yield (
            "output.capacitance",
            "output.capacitance is that between two electrodes at potentials; give these, or set it to false",
        )
    if charges.model == "none":
        for key in ("born_charges", "polarizability", "smallest_curvature"):
            if getattr(s.output, key) and not s.has_model:
                yield f"output.{key}", f"output.{key} needs charges; set charges.model (for example pqeq)"
        if not s.has_model and s.in_field:
            key = "field" if s.displacement is None else "displacement"
            yield (
                key,
                f"a {key} needs charges that feel it; set charges.model (for example pqeq) or remove the {key}",
            )


def _electrode_contradictions(s: Settings) -> Iterator[tuple[str, str]]:
    names = [e.name for e in s.electrodes]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield "electrodes", f"two electrodes are called {name}; give each its own name"
    if s.coulomb.boundary.startswith("finite-field"):
        axis = s.coulomb.boundary[-1]
        at_potentials = sum(e.control == "potential" for e in s.electrodes)
        if not len(s.electrodes) == at_potentials == 2:
            yield (
                "coulomb.boundary",
                f"coulomb.boundary: finite-field-{axis} needs two electrodes, both at potentials, whose difference is "
                f"the jump across the cell, but of {len(s.electrodes)} electrodes {at_potentials} are at potentials; "
                f"give two, or use slab-{axis}",
            )
        for key in ("response", "carried"):
            if s.given().get(f"charges.{key}", "all") != "all":
                yield (
                    f"charges.{key}",
                    f"charges.{key} has no meaning with coulomb.boundary: finite-field-{axis}, where every charge "
                    "feels the jump of the potential; remove it",
                )
    yield from _potentiostat_contradictions(s)
    if s.clock is not None and not s.scheduled:
        yield "clock", "clock is for potentials and fields that change with time, and there is none; remove it"
    if not s.electrodes:
        return
    if s.charges.model == "none" and not s.has_model:
        yield "electrodes", "electrodes need charges; set charges.model (for example fixed) or remove them"
    if s.coulomb.method == "taper":
        yield "coulomb.method", "coulomb.method: taper has no electrodes; use auto, or remove the electrodes"
    for k, electrode in enumerate(s.electrodes):
        if s.charges.model in ("fixed", "qeq") and electrode.polarizable:
            yield (
                f"electrodes.{k}.polarizable",
                f"electrode {electrode.name} cannot be polarizable with charges.model: {s.charges.model}, which has no "
                "shells; remove polarizable or use pqeq",
            )


def _potentiostat_contradictions(s: Settings) -> Iterator[tuple[str, str]]:
    if s.potentiostat is None:
        return
    names = s.potentiostat.electrodes
    if len(names) != 2 or names[0] == names[1]:
        yield (
            "potentiostat.electrodes",
            f"potentiostat.electrodes is [{', '.join(names)}]; give the names of the two electrodes between which "
            "charge flows",
        )
    known = {e.name: e for e in s.electrodes}
    for name in names:
        if name not in known:
            yield (
                "potentiostat.electrodes",
                f"potentiostat.electrodes: there is no electrode {name}; there are {', '.join(known) or 'none'}",
            )
        elif known[name].charge != 0:
            held = "a potential" if known[name].charge is None else f"a charge of {known[name].charge:g} e"
            yield (
                "potentiostat.electrodes",
                f"electrode {name} has {held} but its charge is the potentiostat's to move; give it charge: 0 (the "
                "potential belongs to the potentiostat)",
            )


def load_settings(
    path: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    origin: str = "--set",
    folder: str | Path | None = None,
) -> Settings:
    """Settings from a YAML file (or defaults), then ``overrides`` on top.

    Parameters
    ----------
    path : YAML file; paths inside it are relative to its folder
    overrides : ``["a.b=c", ...]`` as the command line has them, or a mapping of dotted (or nested) keys to values;
        text is read as YAML, so ``"[0, 0, 0.1]"`` is a list; an electrode goes by its place or its name, as in
        ``electrodes.left.potential``
    origin : what messages call the source of the overrides
    folder : what paths in the overrides are relative to (default: the working folder)

    Raises InputError, one sentence that names file, line, key, value and fix.
    """
    data: dict[str, Any] = {}
    origins: Origins = {}
    if path is not None:
        data, origins = read_yaml(Path(path))
        _resolve_paths(data, Path(path).parent)
    if isinstance(overrides, str):
        overrides = [overrides]
    for item in overrides.items() if isinstance(overrides, Mapping) else overrides:
        if isinstance(item, str):
            key, equals, text = item.partition("=")
            if not equals:
                raise InputError(f"{origin} {item}: expected key=value, such as charges.model=pqeq")
            key, value = key.strip(), parse_value(text, f"{origin} {item}")
            said = f"{origin} {item}"
        else:
            key, value = item
            # copied, because later assignments may go inside it
            value = copy.deepcopy(parse_value(value, f"{origin} {key}"))
            said = f"{origin} {key}"
        if folder is not None:
            value = _resolved(key, value, Path(folder))
        assign(data, origins, _placed(key, data, said), value, said)
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, Settings, origins)) from None
    settings._origins.update(origins)
    return settings


def _placed(key: str, data: Mapping[str, Any], origin: str) -> str:
    """``electrodes.left.potential`` -> ``electrodes.0.potential``; any other key as it is. Raises InputError."""
    first, _, rest = key.partition(".")
    name, dot, below = rest.partition(".")
    if first != "electrodes" or not name or name.isdigit():
        return key
    electrodes = data.get("electrodes")
    names = [e.get("name") for e in electrodes if isinstance(e, dict)] if isinstance(electrodes, list) else []
    if name not in names:
        known = ", ".join(map(str, names)) or "none"
        raise InputError(f"{origin}: there is no electrode {name}; the settings have {known}")
    return f"electrodes.{names.index(name)}{dot}{below}"


def _resolved(key: str, value: Any, folder: Path) -> Any:
    """The value of a dotted key, with paths in it as ``_resolve_paths`` makes them."""
    parts = key.split(".")
    tree = value
    for part in reversed(parts):
        tree = {part: tree}
    _resolve_paths(tree, folder)
    for part in parts:
        tree = tree[part]
    return tree


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Paths in a settings file are relative to that file, wherever the command is run."""
    model = data.get("model")
    if isinstance(model, str) and ("/" in model or model.endswith(".safetensors")):
        data["model"] = str(folder / model)
    short_range = data.get("short_range")
    if isinstance(short_range, dict) and isinstance(short_range.get("foundation"), str):
        kind, colon, path = short_range["foundation"].partition(":")
        if path and kind != "ase":
            short_range["foundation"] = f"{kind}{colon}{folder / path}"
    charges = data.get("charges")
    if isinstance(charges, dict) and isinstance(charges.get("parameters"), str) and charges["parameters"] != "default":
        charges["parameters"] = str(folder / charges["parameters"])
    reference = data.get("polarization_reference")
    if isinstance(reference, str) and reference:
        data["polarization_reference"] = str(folder / reference)
