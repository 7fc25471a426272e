"""``voltpi check`` of capacitors: what would end or spoil a run is said before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltpi.driver.check import check, default_template
from voltpi.driver.uses import copy_use


def findings(folder: Path, xml: str, *edits: tuple[str, str]) -> list[tuple[bool, str]]:
    """What check says of an input of ``folder`` with words of its XML and settings exchanged."""
    for path in (folder / xml, folder / "settings.yaml"):
        text = path.read_text()
        for old, new in edits:
            text = text.replace(old, new)
        path.write_text(text)
    return [(finding.ok, finding.sentence) for finding in check(folder / xml)]


@pytest.fixture
def nacl(tmp_path: Path) -> Path:
    return copy_use("nacl-capacitor", tmp_path / "run")


def problems(found: list[tuple[bool, str]]) -> list[str]:
    return [sentence for ok, sentence in found if not ok]


def hints(found: list[tuple[bool, str]]) -> list[str]:
    return [sentence for ok, sentence in found if ok and sentence.startswith("hint:")]


def test_the_shipped_input_has_no_problem_and_no_hint(nacl: Path) -> None:
    found = findings(nacl, "input.xml")
    assert not problems(found)
    assert not hints(found)


def test_fixed_atoms_beyond_the_structure(nacl: Path) -> None:
    (sentence,) = problems(findings(nacl, "input.xml", ("98, 99 ]", "98, 99, 999 ]")))
    assert "<fixatoms> or <fixatoms_dof> names atom 999" in sentence
    assert "atoms 0 to 227" in sentence


def test_metal_that_moves_is_hinted_at(nacl: Path) -> None:
    found = findings(nacl, "input.xml", ("98, 99 ]", "98 ]"))
    assert not problems(found)
    (sentence,) = hints(found)
    assert "1 of 50 atoms of electrode" in sentence
    assert "(the first is 99) are not in <fixatoms>" in sentence


def test_extras_that_no_setting_gives(nacl: Path) -> None:
    found = findings(nacl, "input.xml", ("extra_type='capacitive_energy'", "extra_type='shells'"))
    (sentence,) = problems(found)
    assert sentence.endswith("extra_type='shells', which these settings do not give; set output.shells: true")


def test_extras_that_nothing_gives(nacl: Path) -> None:
    (sentence,) = problems(findings(nacl, "input.xml", ("extra_type='capacitive_energy'", "extra_type='spin'")))
    assert sentence.endswith("extra_type='spin', which these settings do not give; remove that <trajectory>")


def test_one_electrode_without_eta(nacl: Path) -> None:
    old = 'z > 15", potential: 0.5, eta: 1.805132}'
    (sentence,) = hints(findings(nacl, "input.xml", (old, 'z > 15", potential: 0.5}')))
    assert "some electrodes have eta and others do not" in sentence


def test_free_metal_beside_a_model_that_does_not_know_it(tmp_path: Path) -> None:
    folder = copy_use("water-capacitor", tmp_path / "run")
    text = (folder / "input.xml").read_text()
    begin, end = text.index("<fixatoms>"), text.index("</fixatoms>")
    found = findings(folder, "input.xml", (text[begin:end], "<fixatoms> [ 0, 1 ] "))
    assert any("30 of 32 atoms of electrode" in sentence for sentence in problems(found))
    assert all("nothing that holds them; fix them" in sentence for sentence in problems(found))


def test_settings_of_a_variant_are_checked_with_their_own_start(nacl: Path) -> None:
    assert default_template(nacl / "settings-potentiostat.yaml").name == "start-potentiostat.xyz"
    assert default_template(nacl / "settings-zero-voltage.yaml").name == "start.xyz"
    assert all(finding.ok for finding in check(nacl / "settings-potentiostat.yaml"))
