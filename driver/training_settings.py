"""What ``voltpi train`` needs to know, as one typed tree; YAML in, one clear sentence with file and line out.

``charges``, ``coulomb`` and ``dispersion`` are those of the settings of a run (``voltpi.driver.settings``). Units: Å,
eV, e, V/Å inside; what the labels are in is said under ``data.units``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from ase.data import atomic_numbers
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from voltpi.driver.settings import Charges, Coulomb, Dispersion, Settings, finite_number
from voltpi.driver.settings_file import Origins, assign, explain, key_path, origin_of, parse_value, read_yaml
from voltpi.potential.committee import FEWEST
from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.pair import nuclear_repulsion
from voltpi.potential.training.config import TrainConfig
from voltpi.potential.training.labels import KINDS, Source, Units
from voltpi.potential.training.loss import Loss

__all__ = ["DataFile", "TrainingSettings", "load_training", "made_of"]

Number = Annotated[float, BeforeValidator(finite_number)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Labels(_Strict):
    """Names of labels: ``auto`` finds the usual ones, ``none`` leaves one out."""

    energy: str = "auto"
    forces: str = "auto"
    stress: str = "auto"
    virial: str = "auto"
    field: str = "auto"
    charge: str = "auto"
    dipole: str = "auto"
    polarizability: str = "auto"
    born_charges: str = "auto"
    group: str = "auto"

    @model_validator(mode="after")
    def _required(self) -> Labels:
        for kind in ("energy", "forces"):
            if getattr(self, kind) == "none":
                raise PydanticCustomError("contradiction", f"{kind} cannot be none; a network is trained on it")
        return self


def _units(value: Any) -> Units:
    if isinstance(value, Units):
        return value
    names = [f.name for f in dataclasses.fields(Units)]
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ValueError(f"expected units of {', '.join(names)}, such as {{energy: hartree}}")
    unknown = [k for k in value if k not in names]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}; the keys here are {', '.join(names)}")
    return Units(**value)


UnitsOf = Annotated[Units, PlainValidator(_units)]


class DataFile(_Strict):
    """One file; ``labels`` and ``units`` where they differ from those of ``data``."""

    file: str
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] = "data"
    frames: str = ":"
    weight: Positive = 1.0
    labels: Labels | None = None
    units: UnitsOf | None = None


def _files(value: Any) -> Any:
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries or not all(isinstance(x, str | dict | DataFile) for x in entries):
        raise ValueError("expected a file, or a list of files or of mappings with the key file")
    return tuple({"file": x} if isinstance(x, str) else x for x in entries)


def _fraction_or_files(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else _files(value)


class Data(_Strict):
    """Labelled structures; ``validation`` is a part of them (by hash), or files of its own."""

    train: Annotated[tuple[DataFile, ...], BeforeValidator(_files)]
    validation: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | tuple[DataFile, ...], BeforeValidator(_fraction_or_files)
    ] = 0.1
    labels: Labels = Labels()
    units: UnitsOf = Units()
    check_units: bool = True
    split_seed: int = 0

    def sources(self, files: Sequence[DataFile]) -> list[Source]:
        """The files as the reader wants them."""
        out = []
        for file in files:
            labels = file.labels or self.labels
            keys = {f"{kind}_key": getattr(labels, kind) for kind in KINDS}
            named: dict[str, Any] = {key: None if name == "none" else name for key, name in keys.items()}
            units = file.units or self.units
            out.append(Source(file.file, file.name, units=units, weight=file.weight, frames=file.frames, **named))
        return out


def _repulsion(value: Any) -> Any:
    if value in (None, "none"):
        return None
    if value == "covalent":
        return value
    numbers = list(value.values()) if isinstance(value, dict) else [None]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in numbers):
        raise ValueError("expected none, covalent, or where it ends by pair of elements, such as {H-H: 1.2} (Å)")
    return {str(pair): float(end) for pair, end in value.items()}


class Network(_Strict):
    """NequIP (``voltpi.potential.shortrange.nequip``); neighbours and scale come from the data."""

    hidden_irreps: str = "32x0e+32x1o"
    sh_irreps: str = "1x0e+1x1o"
    layers: Count = 3
    r_max: Positive = 5.0
    n_basis: Count = 8
    radial_layers: Count = 2
    radial_hidden: Count = 64
    use_sc: bool = True
    repulsion: Annotated[str | dict[str, float] | None, PlainValidator(_repulsion)] = None

    @model_validator(mode="after")
    def _inside(self) -> Network:
        try:
            nuclear_repulsion(self.repulsion, self.r_max)
        except InputError as error:
            reason = str(error)
            reason = reason if reason.startswith("repulsion") else f"repulsion: {reason}"
            raise PydanticCustomError("contradiction", "{reason}", {"reason": reason}) from None
        return self


class Weights(_Strict):
    """Weights of the loss and, with ``kind: huber``, where it turns linear (eV/atom, eV/Å, eV/Å³).

    neutrality : of what latent charges lack to add up by themselves (1/e²)
    """

    energy: Annotated[Number, Field(ge=0)] = 1.0
    forces: Annotated[Number, Field(ge=0)] = 10.0
    stress: Annotated[Number, Field(ge=0)] = 10.0
    neutrality: Annotated[Number, Field(ge=0)] = 0.05
    kind: Literal["mse", "huber"] = "mse"
    huber_energy: Positive = 0.02
    huber_forces: Positive = 1.0
    huber_stress: Positive = 0.01

    @model_validator(mode="after")
    def _consistent(self) -> Weights:
        for name in ("huber_energy", "huber_forces", "huber_stress"):
            if self.kind == "mse" and name in self.model_fields_set:
                raise PydanticCustomError("contradiction", f"{name} belongs to kind: huber; set that or remove {name}")
        if not self.energy + self.forces + self.stress > 0:
            raise PydanticCustomError("contradiction", "all weights are 0; give at least one that is not")
        return self

    def build(self) -> Loss:
        """The loss."""
        huber = {f"huber_{k}": getattr(self, f"huber_{k}") for k in ("energy", "forces", "stress")}
        own = huber if self.kind == "huber" else {}
        return Loss(self.energy, self.forces, self.stress, **own, neutrality=self.neutrality)


class Training(_Strict):
    """How long, how fast, on what; see ``voltpi.potential.training.config.TrainConfig``.

    ``committee`` : members of a committee, or None; ``last-layers`` are fitted after the training, ``seeds`` are as
    many trainings, with the seeds ``seed``, ``seed`` + 1, … (``voltpi.potential.committee``).
    """

    epochs: Count | None = 200
    hours: Positive | None = None
    batch_size: Count = 4
    batch_atoms: Count | None = None
    learning_rate: Positive = 5e-3
    min_learning_rate: Annotated[Number, Field(ge=0)] = 1e-5
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    plateau_factor: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    plateau_patience: Annotated[int, Field(ge=0)] = 20
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    clip_norm: Positive | None = 10.0
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    validate_every: Count = 1
    patience: Count | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "float64", "tf32"] = "float32"
    threads: Count | None = None
    committee: Annotated[int, Field(ge=FEWEST)] | None = None
    committee_kind: Literal["last-layers", "seeds"] = "last-layers"

    @model_validator(mode="after")
    def _ends(self) -> Training:
        if self.epochs is None and self.hours is None:
            raise PydanticCustomError("contradiction", "epochs and hours are both null; give at least one")
        if self.batch_atoms is not None and "batch_size" in self.model_fields_set:
            raise PydanticCustomError("contradiction", "batch_size and batch_atoms exclude each other; keep one")
        if self.committee is None and "committee_kind" in self.model_fields_set:
            raise PydanticCustomError("contradiction", "committee_kind is for a committee; give committee: 8, say")
        return self

    def build(self, loss: Loss, device: str) -> TrainConfig:
        """The trainer's configuration."""
        own = self.model_dump(exclude={"hours", "precision", "device", "committee", "committee_kind"})
        return TrainConfig(
            **own,
            loss=loss,
            max_seconds=None if self.hours is None else 3600 * self.hours,
            dtype="float64" if self.precision == "float64" else "float32",
            tf32=self.precision == "tf32",
            device=device,
        )


class Targets(_Strict):
    """Weights of the relative squared errors that charges are fitted by; kinds without a label do not count."""

    dipole: Annotated[Number, Field(ge=0)] = 1.0
    polarizability: Annotated[Number, Field(ge=0)] = 1.0
    born_charges: Annotated[Number, Field(ge=0)] = 1.0


class ChargeFitting(_Strict):
    """Element parameters that are fitted before the network is trained (``voltpi.potential.training.charge_fit``), or
    together with it (``voltpi.potential.training.joint``).

    train : which; prior : weight of what holds them to ``charges.parameters``; steps : of BFGS, at most (``before``);
    rate : their learning rate over that of the network (``joint``); targets : all 1 where not given, but for ``joint``,
    where what is not given is 0
    """

    mode: Literal["before", "joint"] = "before"
    train: Annotated[tuple[Literal["chi", "eta", "R", "K"], ...], Field(min_length=1)] = ("chi", "eta", "R", "K")
    targets: Targets = Targets()
    prior: Annotated[Number, Field(ge=0)] = 1e-4
    steps: Count = 200
    rate: Positive = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> ChargeFitting:
        other, key = ("joint", "rate") if self.mode == "before" else ("before", "steps")
        if key in self.model_fields_set:
            raise PydanticCustomError("contradiction", f"{key} belongs to mode: {other}; set that or remove {key}")
        if self.mode == "before" and not any(self.weights().values()):
            raise PydanticCustomError("contradiction", "targets: all weights are 0; give at least one that is not")
        return self

    def weights(self) -> dict[str, float]:
        """Weight of every kind of label."""
        return self.targets.model_dump(exclude_unset=self.mode == "joint")


class TrainedCharges(Charges):
    """Charges as in the settings of a run, and how their parameters are fitted, or None."""

    fit: ChargeFitting | None = None

    @field_validator("fit", mode="before")
    @classmethod
    def _read_fit(cls, value: Any) -> Any:
        if value in ("joint", "before"):
            return {"mode": value}
        return None if value == "none" else value

    def fit_of(self, mode: str) -> ChargeFitting | None:
        """How parameters are fitted, if they are in this ``mode``."""
        return self.fit if self.fit is not None and self.fit.mode == mode and self.model != "none" else None


def _references(value: Any) -> Any:
    if value in ("fit", "keep"):
        return value
    if isinstance(value, dict) and value:
        for symbol in value:
            if not atomic_numbers.get(symbol):
                raise ValueError(f"no element is called {symbol}; write like {{O: -432.1}}")
        return {symbol: finite_number(energy) for symbol, energy in value.items()}
    raise ValueError("expected 'fit', 'keep' (fine-tuning) or a mapping of element to eV")


class TrainingSettings(_Strict):
    """All that a training needs, validated; :func:`load_training` reads it.

    start : a model to fine-tune, which brings network, charges and dispersion; or None to train from scratch
    freeze : parameters that stay (``voltpi.potential.training.freezing``)
    reference_energies : ``fit`` (regression), ``keep`` (those of ``start``), or eV by element
    ridge : holds fitted reference energies near 0, or near those of ``start`` (``reference_energies``)
    figures : whether learning curves and parity plots are drawn at the end
    """

    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] = "model"
    output: str = "training"
    data: Data
    start: str | None = None
    freeze: tuple[str, ...] = ()
    network: Network = Network()
    charges: TrainedCharges = TrainedCharges()
    coulomb: Coulomb = Coulomb()
    dispersion: Dispersion | None = None
    reference_energies: Annotated[Literal["fit", "keep"] | dict[str, float], PlainValidator(_references)] = "fit"
    ridge: Annotated[Number, Field(ge=0)] = 0.0
    loss: Weights = Weights()
    training: Training = Training()
    figures: bool = True

    _origins: Origins = PrivateAttr(default_factory=dict)

    @field_validator("dispersion", mode="before")
    @classmethod
    def _read_dispersion(cls, value: Any) -> Any:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSettings:
        for key, sentence in self._contradictions():
            raise PydanticCustomError("contradiction", "{sentence}", {"sentence": sentence, "key": key})
        return self

    def _contradictions(self) -> list[tuple[str, str]]:
        out: list[tuple[str, str]] = []
        given = self.model_fields_set
        if self.start is not None:
            for key in ("network", "charges", "coulomb", "dispersion"):
                if key in given:
                    out.append((key, f"{key} comes from the model that start names; remove one of the two"))
        elif self.freeze:
            out.append(("freeze", "freeze is for fine-tuning; name a model in start, or remove freeze"))
        elif self.reference_energies == "keep":
            out.append(("reference_energies", "reference_energies: keep is for fine-tuning; name a model in start"))
        if self.charges.model not in ("pqeq", "qeq", "latent", "none"):
            known = "pqeq, qeq, latent or none"
            out.append(("charges.model", f"charges.model: {self.charges.model} cannot be trained with; use {known}"))
        if self.charges.fit is not None and self.charges.model not in ("pqeq", "qeq", "none"):
            out.append(("charges.fit", f"charges.fit is for pqeq and qeq, not {self.charges.model}; remove it"))
        if self.charges.fit_of("joint") and self.training.committee and self.training.committee_kind == "seeds":
            key = "training.committee_kind"
            sentence = (
                f"{key}: seeds would give each member charges of its own with charges.fit: joint; use last-layers"
            )
            out.append((key, sentence))
        if self.coulomb.method == "taper":
            out.append(("coulomb.method", "coulomb.method: taper cannot be trained with; use auto"))
        return out

    def run_settings(self) -> Settings:
        """The long-range part alone, as settings of a run."""
        parts = {k: getattr(self, k) for k in ("charges", "coulomb", "dispersion")}
        settings = Settings(**parts)
        settings._origins.update(self._origins)
        return settings

    def refusal(self, key: str, sentence: str) -> InputError:
        """The error to raise about ``key``, with the place where it was given."""
        where = origin_of(self._origins, key_path(key))
        return InputError(f"{where}: {sentence}" if where else sentence)


def load_training(path: Path, overrides: Sequence[str] = ()) -> TrainingSettings:
    """Settings from a YAML file, then ``overrides`` (``a.b=c``); paths in the file are relative to its folder.

    Name and output folder are those of the file where they are not given. Raises InputError, one sentence that names
    file, line, key, value and fix.
    """
    data, origins = read_yaml(path)
    _resolve(data, path.parent)
    data.setdefault("name", "".join(c if c.isalnum() or c in "._+-" else "-" for c in path.stem))
    data.setdefault("output", str(path.parent / path.stem))
    return made_of(data, origins, overrides)


def made_of(data: dict[str, Any], origins: Origins, overrides: Sequence[str] = ()) -> TrainingSettings:
    """Settings from a tree of keys, then ``overrides``; errors as :func:`load_training` has them."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set {item}: expected key=value, such as training.epochs=100")
        assign(data, origins, key.strip(), parse_value(text, f"--set {item}"), f"--set {item}")
    try:
        settings = TrainingSettings.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, TrainingSettings, origins)) from None
    settings._origins.update(origins)
    try:
        settings.run_settings()
    except ValidationError as error:
        raise InputError(explain(error, Settings, origins)) from None
    return settings


def _resolve(data: dict[str, Any], folder: Path) -> None:
    """Makes paths relative to the folder of the settings file absolute, wherever they are."""
    if isinstance(data.get("output"), str):
        data["output"] = str(folder / data["output"])
    start = data.get("start")
    if isinstance(start, str) and ("/" in start or start.endswith(".safetensors")):
        data["start"] = str(folder / start)
    charges = data.get("charges")
    if isinstance(charges, dict) and isinstance(charges.get("parameters"), str) and charges["parameters"] != "default":
        charges["parameters"] = str(folder / charges["parameters"])
    files = data.get("data")
    if not isinstance(files, dict):
        return
    for key in ("train", "validation"):
        value = files.get(key)
        if isinstance(value, str):
            files[key] = str(folder / value)
        for k, entry in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(entry, dict) and isinstance(entry.get("file"), str):
                entry["file"] = str(folder / entry["file"])
            elif isinstance(entry, str) and isinstance(value, list):
                value[k] = str(folder / entry)
