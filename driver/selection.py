"""A small language that says which atoms are meant.

    element Au          element Au Pt           chemical symbols
    index 0:100         index 3 5 7 20:         places in the file from 0; as in Python, the end of a range is left out
    tag 1               tag 1 2                 ASE's tags, where the file has them
    z < 10              10 <= x                 Cartesian coordinates x, y, z (Å) as they are in the file: < <= > >=
    10 < z < 20                                 a window
    all                                         every atom

They combine with ``and``, ``or``, ``not`` and parentheses; ``not`` binds tightest, then ``and``:

    element Au and (z < 5 or z > 45) and not index 0
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from numpy.typing import NDArray

from voltpi.potential.errors import InputError

__all__ = ["Selection", "parse_selection", "select"]

Selection = Callable[[Atoms], NDArray[np.bool_]]
"""Atoms -> which of them are meant, [n]."""

_AXES = ("x", "y", "z")
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_TERMS = "element, index, tag, all or a coordinate such as z < 10"
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<range> \d*:\d*(?![\w.:]) ) |
    (?P<number> [+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.:]) ) |
    (?P<word> [A-Za-z]+\b ) |
    (?P<sign> [<>]=? ) |
    (?P<bracket> [()] )
    )""",
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str  # a group of _TOKEN, or "end"
    text: str
    at: int  # of its first character, from 0


def select(selection: str | Sequence[int], atoms: Atoms) -> NDArray[np.int64]:
    """Indices of the atoms that are meant, ascending, each once.

    Parameters
    ----------
    selection : an expression as above, or a list of indices

    Raises InputError, one sentence, for an expression that cannot be read (with the place in it), an index that the
    structure does not have, and tags where it has none. No atom at all is an answer too.
    """
    n = len(atoms)
    if isinstance(selection, str):
        return np.flatnonzero(parse_selection(selection)(atoms))
    for i in selection:
        if not 0 <= i < n:
            raise InputError(f"index {i} is no atom: the structure has {n}, counted from 0 to {n - 1}")
    return np.unique(np.asarray(selection, dtype=np.int64))


def parse_selection(text: str) -> Selection:
    """What an expression means, before there is a structure. Raises InputError with the place of the mistake."""
    return _Parser(text).parse()


class _Parser:
    """Recursive descent, one method a rule; every rule leaves ``self.token`` at what it did not understand."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.token = self._read(0)

    def parse(self) -> Selection:
        selection = self._or()
        if self.token.kind != "end":
            self._refuse("'and', 'or' or the end")
        return selection

    def _read(self, start: int) -> _Token:
        match = _TOKEN.match(self.text, start)
        if match is not None and match.lastgroup is not None:
            return _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup))
        rest = self.text[start:].lstrip()
        at = len(self.text) - len(rest)
        return _Token("unknown", rest.split()[0], at) if rest else _Token("end", "", at)

    def _next(self) -> _Token:
        """The current token; moves on."""
        token = self.token
        self.token = self._read(token.at + len(token.text))
        return token

    def _is(self, *texts: str) -> bool:
        return self.token.text in texts

    def _refuse(self, expected: str) -> NoReturn:
        found = f"'{self.token.text}'" if self.token.text else "the end"
        raise InputError(f"'{self.text}', character {self.token.at + 1}: expected {expected}, found {found}")

    def _or(self) -> Selection:
        parts = [self._and()]
        while self._is("or"):
            self._next()
            parts.append(self._and())
        return parts[0] if len(parts) == 1 else lambda atoms: np.any([part(atoms) for part in parts], axis=0)

    def _and(self) -> Selection:
        parts = [self._not()]
        while self._is("and"):
            self._next()
            parts.append(self._not())
        return parts[0] if len(parts) == 1 else lambda atoms: np.all([part(atoms) for part in parts], axis=0)

    def _not(self) -> Selection:
        if self._is("not"):
            self._next()
            inner = self._not()
            return lambda atoms: ~inner(atoms)
        if self._is("("):
            self._next()
            inner = self._or()
            if not self._is(")"):
                self._refuse("'and', 'or' or ')'")
            self._next()
            return inner
        return self._term()

    def _term(self) -> Selection:
        if self.token.kind == "number" or self._is(*_AXES):
            return self._window()
        rules = {"all": self._all, "element": self._element, "index": self._index, "tag": self._tag}
        if self.token.text not in rules:
            self._refuse(_TERMS)
        return rules[self._next().text]()

    def _all(self) -> Selection:
        return lambda atoms: np.ones(len(atoms), dtype=bool)

    def _element(self) -> Selection:
        numbers = []
        while self.token.kind == "word" and not self._is("and", "or"):
            known = atomic_numbers.get(self.token.text, 0)
            if not known:
                guess = self.token.text.capitalize()
                hint = f" (did you mean {guess}?)" if atomic_numbers.get(guess) else ""
                self._refuse(f"the symbol of an element{hint}")
            numbers.append(known)
            self._next()
        if not numbers:
            self._refuse("the symbol of an element")
        return lambda atoms: np.isin(atoms.numbers, numbers)

    def _index(self) -> Selection:
        ranges: list[tuple[int, int | None]] = []  # first, and the first beyond
        while self.token.kind in ("number", "range"):
            if self.token.kind == "range":
                first, _, end = self._next().text.partition(":")
                ranges.append((int(first or 0), int(end) if end else None))
            else:
                place = self._whole("an index from 0", least=0)
                ranges.append((place, place + 1))
        if not ranges:
            self._refuse("an index or a range such as 0:100")
        return lambda atoms: _places(ranges, len(atoms))

    def _tag(self) -> Selection:
        tags = []
        while self.token.kind == "number":
            tags.append(self._whole("a whole number"))
        if not tags:
            self._refuse("a whole number")

        def tagged(atoms: Atoms) -> NDArray[np.bool_]:
            if not atoms.has("tags"):
                raise InputError(f"tag {tags[0]}: the structure has no tags; select by element, index or coordinate")
            return np.isin(atoms.get_tags(), tags)

        return tagged

    def _whole(self, expected: str, least: int | None = None) -> int:
        text = self.token.text
        if not re.fullmatch(r"[+-]?\d+", text) or (least is not None and int(text) < least):
            self._refuse(expected)
        return int(self._next().text)

    def _window(self) -> Selection:
        """``z < 10``, ``10 < z`` or ``10 < z < 20``."""
        bounds = []  # (compare(value, bound), bound)
        first = None
        if self.token.kind == "number":
            bound = float(self._next().text)
            first = self._sign()
            mirrored = first.translate(str.maketrans("<>", "><"))
            bounds.append((_SIGNS[mirrored], bound))
        if not self._is(*_AXES):
            self._refuse("x, y or z")
        axis = _AXES.index(self._next().text)
        if first is None or self.token.kind == "sign":
            if first is not None and self.token.text[0] != first[0]:
                self._refuse(f"{first[0]} or {first[0]}= as before {_AXES[axis]}")
            sign = self._sign()
            if self.token.kind != "number":
                self._refuse("a number (Å)")
            bounds.append((_SIGNS[sign], float(self._next().text)))
        return lambda atoms: np.all([compare(atoms.positions[:, axis], bound) for compare, bound in bounds], axis=0)

    def _sign(self) -> str:
        if self.token.kind != "sign":
            self._refuse("<, <=, > or >=")
        return self._next().text


def _places(ranges: Sequence[tuple[int, int | None]], n: int) -> NDArray[np.bool_]:
    chosen = np.zeros(n, dtype=bool)
    for first, end in ranges:
        if first >= n or (end is not None and end > n):
            text = str(first) if end == first + 1 else f"{first}:{'' if end is None else end}"
            raise InputError(f"index {text} is beyond the structure, which has {n} atoms, counted from 0 to {n - 1}")
        chosen[first:end] = True
    return chosen
