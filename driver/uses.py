"""The inputs that ship: listing them and copying one to a folder."""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from voltpi.potential.errors import InputError

__all__ = ["copy_use", "describe_uses"]


def _uses() -> dict[str, Traversable]:
    root = resources.files("voltpi.inputs")
    folders = (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(("_", ".")))
    return {entry.name: entry for entry in sorted(folders, key=lambda entry: entry.name)}


def describe_uses() -> dict[str, str]:
    """Name -> one line: the title of its README, else the first sentence of its settings' comment."""
    return {name: _describe(folder) for name, folder in _uses().items()}


def _describe(folder: Traversable) -> str:
    for file in ("README.md", "settings.yaml"):
        if (folder / file).is_file():
            lines = (folder / file).read_text(encoding="utf-8").splitlines()
            title = next((line for line in lines if line.strip()), "")
            if title.startswith("#"):
                return title.lstrip("# ").split(". ")[0].strip().rstrip(".")
    return ""


def copy_use(use: str, target: Path) -> Path:
    """Copies the files of a use to ``target``, which must not exist or be empty.

    Raises InputError for an unknown use, and rather than overwrite anything.
    """
    uses = _uses()
    if use not in uses:
        near = difflib.get_close_matches(use, uses, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the uses are {', '.join(uses) or '(none installed)'}"
        raise InputError(f"there is no use called {use}; {hint}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"{target}: exists already and nothing is overwritten; give another folder: voltpi new {use} DIR"
        )
    try:
        _copy(uses[use], target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); give another folder") from None
    return target


def _copy(source: Traversable, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.name.startswith(("__", ".")):
            continue
        if entry.is_dir():
            _copy(entry, target / entry.name)
        else:
            (target / entry.name).write_bytes(entry.read_bytes())
