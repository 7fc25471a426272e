"""Freezing parts of a network by the names of its parameters."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from voltpi.potential.errors import InputError

__all__ = ["freeze"]


def freeze(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Parameters that match any of ``patterns`` require no gradient from now on; returns their names.

    A pattern is a glob on whole names (``convolutions.*.radial.*``) or the name of a part, which means all that is in
    it (``convolutions.0``, ``embedding``). Raises InputError for a pattern that matches nothing, and where nothing
    would be left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        matched = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=1)
            fix = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"freeze: no parameter of the network matches '{pattern}'; {fix}there are {', '.join(_parts(names))}"
            )
        frozen |= set(matched)
    if frozen == set(names):
        raise InputError(f"freeze: {', '.join(patterns)} leaves nothing to train; freeze less")
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return sorted(frozen)


def _parts(names: Sequence[str]) -> list[str]:
    """The first two levels of the names, each once."""
    return list(dict.fromkeys(".".join(n.split(".")[:2]) + (".*" if n.count(".") > 1 else "") for n in names))
