"""The long-range part that a network does not learn: computed once, kept on disk, subtracted from the labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.model import Potential
from voltpi.potential.systems import Systems
from voltpi.potential.training.dataset import Sample, make_samples, read_source
from voltpi.potential.training.labels import Source
from voltpi.potential.training.splitting import structure_hash

__all__ = ["Baseline", "LongRange", "describe", "load_dataset", "subtract_baseline"]

Baseline = Callable[[Systems], tuple[Tensor, Tensor, Tensor]]
"""Long-range part that the network does not learn: systems -> energy [b] (eV), forces [n, 3] (eV/Å), virial [b, 3, 3]
(eV)."""


class LongRange:
    """Charges in the field of each frame, and dispersion, as a baseline.

    ``key`` names them and all their settings. Raises InputError, where called, for a field on a model whose charges do
    not all feel it: ``shells`` and ``frozen`` hold the charges of a run's first structure, which data do not have.
    """

    def __init__(self, charges: PQEq | None, dispersion: D3 | None) -> None:
        self.response = "all" if charges is None else charges.response
        self.of_molecules = charges is not None and charges.conserve == "fragments"
        # without a field nothing depends on what feels it, and carried charges need not be solved for
        charges = None if charges is None else dataclasses.replace(charges, response="all")
        self.potential = Potential(charges=charges, dispersion=dispersion)
        self.key = json.dumps([describe(part) for part in (charges, dispersion)])

    def __call__(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        """Energy [b] (eV), forces [n, 3] (eV/Å) and virial [b, 3, 3] (eV)."""
        if self.response != "all" and bool((systems.field != 0).any()):
            raise InputError(
                f"is in a field, but charges.response is {self.response}, which holds the charges of a run's first "
                "structure: set charges.response to all (in periodic cells with charges.conserve: fragments)"
            )
        answer = self.potential(self.potential.prepare(systems))
        return answer.energy, answer.forces, answer.virial


def describe(part: Any) -> dict[str, Any] | None:
    """All settings of charges (PQEq, or tapered as in an imported model) or dispersion, JSON-able."""
    if isinstance(part, TaperedPQEq):
        return {"kind": "taper", **{f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}}
    return None if part is None else part.config


def load_dataset(
    sources: Source | Sequence[Source],
    cutoff: float,
    *,
    baseline: Baseline | None = None,
    baseline_key: str = "",
    cache: str | Path | None = None,
    progress: bool = True,
) -> list[Sample]:
    """Read, check and prepare all frames of ``sources`` with neighbours within ``cutoff`` (Å).

    ``baseline`` is evaluated once per frame and subtracted (:func:`subtract_baseline`).

    Raises InputError for unreadable files and for labels that are missing, misshapen or not finite.
    """
    samples: list[Sample] = []
    for source in [sources] if isinstance(sources, Source) else sources:
        loaded = make_samples(*read_source(source), cutoff)
        if baseline is not None:
            loaded = subtract_baseline(loaded, baseline, baseline_key, cache=cache, progress=progress)
        samples += loaded
    return samples


def subtract_baseline(
    samples: Sequence[Sample],
    baseline: Baseline,
    key: str,
    *,
    cache: str | Path | None = None,
    progress: bool = True,
) -> list[Sample]:
    """Samples of one file whose labels are what ``baseline`` leaves.

    With a ``cache`` folder its values are kept in ``NAME-HASH.npz``, found again by structure, file and ``key``: a
    string that names the baseline and all its settings, to be changed whenever the baseline changes. Errors of the
    baseline name file and frame.
    """
    if not samples:
        return []
    if cache is not None and not key:
        raise InputError("baseline_key is empty: name the baseline and its settings, so that its cache can be trusted")
    dataset = samples[0].dataset
    name = hashlib.sha256(f"{Path(samples[0].path).name}\n{key}".encode()).hexdigest()[:16]
    store = None if cache is None else Path(cache) / f"{dataset}-{name}.npz"
    known = _read_cache(store)
    hashes = [_hash(s) for s in samples]
    wanted = [i for i, h in enumerate(hashes) if f"{h}.virial" not in known]
    saved = time.monotonic()
    try:
        for i in track(wanted, description=f"long range of {dataset}", disable=not progress or not wanted):
            if f"{hashes[i]}.virial" in known:  # the same structure twice in one file
                continue
            for part, value in _evaluate(baseline, samples[i]).items():
                known[f"{hashes[i]}.{part}"] = value
            if time.monotonic() - saved > 60:
                _write_cache(store, known)
                saved = time.monotonic()
    finally:  # also when interrupted: what was computed is kept
        if wanted:
            _write_cache(store, known)
    return [_without(sample, h, known) for sample, h in zip(samples, hashes, strict=True)]


def _hash(sample: Sample) -> str:
    given = b"" if sample.initial_charges is None else sample.initial_charges.numpy().tobytes()
    digest = structure_hash(sample.systems)
    return hashlib.sha256(digest.encode() + given).hexdigest() if given else digest


def _without(sample: Sample, h: str, known: Mapping[str, np.ndarray]) -> Sample:
    stress = sample.stress
    if stress is not None:
        stress = stress + torch.as_tensor(known[f"{h}.virial"]) / sample.volume
    return dataclasses.replace(
        sample,
        energy=sample.energy - float(known[f"{h}.energy"]),
        forces=sample.forces - torch.as_tensor(known[f"{h}.forces"]),
        stress=stress,
    )


def _evaluate(baseline: Baseline, sample: Sample) -> dict[str, np.ndarray]:
    where = f"{sample.path}, frame {sample.frame}"
    systems = sample.molecules if isinstance(baseline, LongRange) and baseline.of_molecules else sample.systems
    try:
        answer = baseline(systems)
    except VoltPIError as error:
        raise type(error)(f"{where}: {error}") from error
    shapes = {"energy": (), "forces": tuple(sample.forces.shape), "virial": (3, 3)}
    parts = {}
    for (part, shape), value in zip(shapes.items(), answer, strict=True):
        array = value.detach().cpu().double().numpy()
        if array.size != int(np.prod(shape)):
            raise ValueError(f"{where}: baseline gave {part} {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise VoltPIError(f"{where}: the {part} of the baseline is not finite: remove the frame")
        parts[part] = array.reshape(shape)
    return parts


def _read_cache(store: Path | None) -> dict[str, np.ndarray]:
    if store is None or not store.exists():
        return {}
    try:
        with np.load(store, allow_pickle=False) as data:
            return dict(data)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{store}: not a baseline cache ({error}): delete it") from error


def _write_cache(store: Path | None, known: Mapping[str, np.ndarray]) -> None:
    if store is None:
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    partial = store.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.savez(file, **known)  # type: ignore[arg-type]
    partial.replace(store)
