"""The language of selections: what each expression means, and that every mistake is one sentence with its place."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms

from voltpi.driver.selection import parse_selection, select
from voltpi.potential.errors import InputError


def atoms() -> Atoms:
    """Ten atoms at z = 0 … 9 Å, with x = −z/10 and tags 0 0 1 1 2 2 3 3 -1 -1."""
    z = np.arange(10.0)
    return Atoms(
        "Au3NaClPt2YCuAu", np.stack([-z / 10, 0 * z, z], axis=1), tags=[0, 0, 1, 1, 2, 2, 3, 3, -1, -1], cell=[3, 3, 20]
    )


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("all", range(10)),
        ("element Au", [0, 1, 2, 9]),
        ("element Au Pt", [0, 1, 2, 5, 6, 9]),
        ("element Y", [7]),  # yttrium, not the coordinate
        ("index 3", [3]),
        ("index 7 3 3", [3, 7]),
        ("index 0:4", [0, 1, 2, 3]),
        ("index :2 8:", [0, 1, 8, 9]),
        ("index 0:10", range(10)),
        ("tag 1", [2, 3]),
        ("tag -1 +2", [4, 5, 8, 9]),
        ("z < 3", [0, 1, 2]),
        ("z<=3", [0, 1, 2, 3]),
        ("z > 7", [8, 9]),
        ("z >= 7.", [7, 8, 9]),
        ("2 > z", [0, 1]),
        ("1 < z <= 3", [2, 3]),
        ("3 >= z > 1", [2, 3]),
        ("x < -0.65", [7, 8, 9]),
        ("-.25 < x", [0, 1, 2]),
        ("y < 1e-3", range(10)),
        ("z > 3 and z < 6", [4, 5]),
        ("z < 2 or z > 8", [0, 1, 9]),
        ("not z < 8", [8, 9]),
        ("not not z < 2", [0, 1]),
        ("element Au and not (z < 1 or z > 8)", [1, 2]),
        ("element Au and z < 1 or z > 8", [0, 9]),  # and binds tighter than or
        ("z > 8 or element Au and z < 1", [0, 9]),
        ("not element Au and z < 4", [3]),  # not binds tighter than and
        ("(element Na or element Cl) and tag 1", [3]),
        ("  element\n Au and\tz>5", [9]),
        ("element Fe", []),
    ],
)
def test_what_an_expression_selects(expression: str, expected: list[int]) -> None:
    indices = select(expression, atoms())
    assert indices.dtype == np.int64
    assert indices.tolist() == list(expected)


def test_coordinates_are_those_of_the_file_and_not_wrapped() -> None:
    structure = atoms()
    structure.pbc = True
    structure.positions[4, 2] += 20
    assert select("z > 20", structure).tolist() == [4]


def test_a_list_of_indices_is_a_selection_too() -> None:
    assert select([5, 2, 2], atoms()).tolist() == [2, 5]
    assert select((9,), atoms()).tolist() == [9]
    for wrong in ([3, 10], [-1]):
        with pytest.raises(
            InputError, match=f"index {wrong[-1]} is no atom: the structure has 10, counted from 0 to 9"
        ):
            select(wrong, atoms())


@pytest.mark.parametrize(
    ("expression", "place", "expected", "found"),
    [
        ("Au", 1, "element, index, tag", "'Au'"),
        ("element", 8, "symbol of an element", "the end"),
        ("element au", 9, "did you mean Au?", "'au'"),
        ("element X", 9, "symbol of an element", "'X'"),
        ("element Au x < 3", 12, "symbol of an element", "'x'"),
        ("element Au, Pt", 11, "'and', 'or' or the end", "','"),
        ("element Au and", 15, "element, index, tag", "the end"),
        ("element Au and or z < 3", 16, "element, index, tag", "'or'"),
        ("index", 6, "an index or a range", "the end"),
        ("index -1", 7, "an index from 0", "'-1'"),
        ("index 1.5", 7, "an index from 0", "'1.5'"),
        ("index 1:2:3", 7, "an index or a range", "'1:2:3'"),
        ("index 3:x", 7, "an index or a range", "'3:x'"),
        ("tag one", 5, "a whole number", "'one'"),
        ("tag 1.5", 5, "a whole number", "'1.5'"),
        ("z", 2, "<, <=, > or >=", "the end"),
        ("z = 3", 3, "<, <=, > or >=", "'='"),
        ("z < ten", 5, "a number (Å)", "'ten'"),
        ("z < 1.2.3", 5, "a number (Å)", "'1.2.3'"),
        ("10 < 20", 6, "x, y or z", "'20'"),
        ("10 < w", 6, "x, y or z", "'w'"),
        ("10 < z > 5", 8, "< or <= as before z", "'>'"),
        ("(z < 10", 8, "'and', 'or' or ')'", "the end"),
        ("z < 10)", 7, "'and', 'or' or the end", "')'"),
        ("not", 4, "element, index, tag", "the end"),
        ("z < 5 & z > 2", 7, "'and', 'or' or the end", "'&'"),
        ("", 1, "element, index, tag", "the end"),
    ],
)
def test_mistakes_are_one_sentence_with_the_place(expression: str, place: int, expected: str, found: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_selection(expression)  # before there is a structure
    message = str(raised.value)
    assert message.startswith(f"'{expression}', character {place}: expected ")
    assert expected in message
    assert message.endswith(f"found {found}")


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("index 10", "index 10 is beyond the structure, which has 10 atoms, counted from 0 to 9"),
        ("index 5:11", "index 5:11 is beyond"),
        ("index 12:", "index 12: is beyond"),
        ("z < 3 and index 99", "index 99 is beyond"),
    ],
)
def test_an_index_beyond_the_structure_is_refused(expression: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        select(expression, atoms())


def test_tags_that_the_file_does_not_have_are_not_zero() -> None:
    with pytest.raises(InputError, match="tag 0: the structure has no tags"):
        select("tag 0", Atoms("Au"))
