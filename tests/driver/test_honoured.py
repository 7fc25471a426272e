"""The page that says which model honours which setting is what trying gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltpi.driver.honoured import honoured, page, read_page

Table = dict[str, dict[str, str]]
PAGE = Path(__file__).parents[2] / "docs" / "models-and-settings.md"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return honoured(tmp_path_factory.mktemp("stand-ins"))


def test_the_page_is_what_trying_gives(table: Table) -> None:
    """Columns of models whose package is not installed here are taken from the page as they are."""
    written = PAGE.read_text()
    kept = {name: row for name, row in read_page(written).items() if name not in table}
    assert list(kept) in ([], ["QET, `linear-qeq`"])
    again = "run python -m voltpi.driver.honoured docs/models-and-settings.md"
    assert page({**table, **kept}) == written, again


def test_a_page_is_read_as_it_was_written() -> None:
    """So that columns which cannot be made here survive a new page."""
    written = PAGE.read_text()
    assert page(read_page(written)) == written
    assert "QET's energy has no" in read_page(written)["QET, `linear-qeq`"]["`field`, molecule"]


def test_refusals_name_what_was_set(table: Table) -> None:
    assert not table["trained, PQEq"]["`field`, periodic"]
    assert "charges.conserve: fragments" in table["trained, latent, `total`"]["`field`, periodic"]
    assert "electrodes need charges" in table["trained, no charges"]["electrodes at potentials"]
    for row in table.values():
        assert all("\n" not in sentence for sentence in row.values())
