"""``voltpi export``: what it accepts, and what it refuses in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltpi.driver.cli import main


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["water", "--set", "field=[0,0,0.1]"], "field cannot be exported"),
        (["water", "--set", "charges.response=shells"], "charges.response cannot be exported"),
        (["water", "--to", "openkim"], "--to is openkim"),
        (["none"], "export needs a model"),
        (["nowhere.safetensors"], "neither a shipped model"),
    ],
)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    file = tmp_path / "model.pt"
    assert main(["export", *arguments, "--output", str(file)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not file.exists()


@pytest.mark.filterwarnings("ignore")  # metatomic warns of names of its own that are to change
def test_exports_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("metatomic.torch", reason="metatomic-torch is not installed (the extra [metatomic])")
    file = tmp_path / "batio3.pt"
    arguments = ["export", "batio3", "--to", "metatomic", "--output", str(file)]
    assert main(arguments) == 0
    assert "energy and charge at zero field" in capsys.readouterr().out
    size = file.stat().st_size
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert file.stat().st_size == size
