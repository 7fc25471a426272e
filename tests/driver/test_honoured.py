"""The page that says which model honours which setting is what trying gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltpi.driver.honoured import SETTINGS, honoured, page

Table = dict[str, dict[str, str]]
PAGE = Path(__file__).parents[2] / "docs" / "models-and-settings.md"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return honoured(tmp_path_factory.mktemp("stand-ins"))


def test_the_page_is_what_trying_gives(table: Table) -> None:
    """Columns of models whose package is not installed here are taken from the page as they are."""
    written = PAGE.read_text()
    columns = [cell.strip() for cell in written.split("| setting |")[1].splitlines()[0].split("|") if cell.strip()]
    assert list(table) == [name for name in columns if name in table]
    if list(table) == columns:
        assert page(table) == written, "run python -m voltpi.driver.honoured > docs/models-and-settings.md"
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in written.splitlines() if line.startswith("|")}
    for setting in SETTINGS:
        for column, cell in zip(columns, rows[setting], strict=True):
            if column in table:
                assert cell.strip().startswith("no" if table[column][setting] else "yes"), (setting, column)


def test_refusals_name_what_was_set(table: Table) -> None:
    assert not table["trained, PQEq"]["`field`, periodic"]
    assert "charges.conserve: fragments" in table["trained, latent, `total`"]["`field`, periodic"]
    assert "electrodes need charges" in table["trained, no charges"]["electrodes at potentials"]
    for row in table.values():
        assert all("\n" not in sentence for sentence in row.values())
