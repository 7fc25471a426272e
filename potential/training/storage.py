"""What a training leaves on disk: tensors with a JSON header, and a log with one line an epoch."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from voltpi.potential.errors import InputError

__all__ = ["Log", "read_tensors", "read_weights", "write_tensors"]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights for ``network.load_state_dict`` and the header (``card``, ``network``, ``state``) of best.safetensors."""
    return read_tensors(Path(path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """One safetensors file with a JSON header, replaced as a whole or not at all."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(plain, partial, metadata={"voltpi": json.dumps(header)})
    os.replace(partial, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that :func:`write_tensors` wrote; InputError where it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["voltpi"])
            return {k: file.get_tensor(k) for k in file.keys()}, header  # noqa: SIM118 (safe_open is no dict)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a training checkpoint ({error}): give a file that this trainer wrote") from error


class Log:
    """``log.csv``: numbers by column, one row an epoch."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, ["epoch", *columns]

    def keep(self, epochs: int) -> None:
        """Keep the first ``epochs``: a killed run may have logged more than its checkpoint holds."""
        rows: list[dict[str, str]] = []
        if self.path.exists() and epochs:
            with self.path.open(newline="") as file:
                rows = [r for r in csv.DictReader(file) if int(r["epoch"]) < epochs]
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def write(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Append one epoch; columns without a number stay empty."""
        text = {k: f"{v:.7g}" if isinstance(v, float) else str(v) for k, v in numbers.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"epoch": str(epoch), **text})
