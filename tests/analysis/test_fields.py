"""Which field, start structure and temperature a run had, from what it left in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from voltpi.analysis.fields import applied_of, field_of
from voltpi.analysis.run_inputs import ensemble_temperature, given_to_drivers
from voltpi.potential.errors import InputError

DIRECT = """<simulation><output prefix='run'/>
<ffdirect name='voltpi'><pes>custom</pes><pes_path>pes.py</pes_path><parameters>{parameters}</parameters></ffdirect>
</simulation>"""


def settings(folder: Path, field: float | None, name: str = "settings.yaml") -> None:
    (folder / name).write_text("model: water\n" + ("" if field is None else f"field: [{field}, 0, 0]\n"))


def record(folder: Path, prefix: str = "run", **names: str) -> None:
    (folder / f"{prefix}.run.json").write_text(json.dumps({"template": "start.xyz", "settings": names}))


def direct(folder: Path, parameters: str, name: str = "input.xml") -> None:
    (folder / name).write_text(DIRECT.format(parameters="{" + parameters + "}"))


def along_x(folder: Path, output: str = "run.out") -> float:
    x, y, z = field_of(folder, [folder / output])
    assert (y, z) == (0.0, 0.0)
    return float(x)


def test_settings_beside_the_run(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    assert along_x(tmp_path) == 0.1
    settings(tmp_path, None)
    assert along_x(tmp_path) == 0.0
    assert field_of(tmp_path, [], [0, 0.3, 0]).tolist() == [0.0, 0.3, 0.0]


def test_record_of_voltpi_run_comes_first(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    (tmp_path / "elsewhere").mkdir()
    settings(tmp_path / "elsewhere", 0.2, "other.yaml")
    record(tmp_path, voltpi="elsewhere/other.yaml")
    assert along_x(tmp_path) == 0.2


def test_record_of_another_prefix_says_nothing(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    settings(tmp_path, 0.2, "other.yaml")
    record(tmp_path, "heating", voltpi="other.yaml")
    assert along_x(tmp_path) == 0.1
    record(tmp_path, "i-pi", voltpi="other.yaml")  # what an empty prefix leaves
    assert along_x(tmp_path, "out") == 0.2


def test_parameters_of_ffdirect_come_before_settings(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    settings(tmp_path, 0.2, "other.yaml")
    direct(tmp_path, "settings: settings.yaml, template: start.xyz, field: 0.05 0 0")
    assert along_x(tmp_path) == 0.05
    direct(tmp_path, "settings: other.yaml, template: start.xyz")
    assert along_x(tmp_path) == 0.2
    direct(tmp_path, "eps: 1.0, field: 7")  # another potential
    assert along_x(tmp_path) == 0.1


def test_disagreement_is_refused(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    settings(tmp_path, 0.1, "settings-a.yaml")
    assert along_x(tmp_path) == 0.1
    settings(tmp_path, 0.2, "settings-a.yaml")
    with pytest.raises(InputError, match=r"0\.1.* in .*settings\.yaml but .*0\.2.*settings-a\.yaml; give --field"):
        along_x(tmp_path)
    record(tmp_path, a="settings-a.yaml")
    assert along_x(tmp_path) == 0.2
    direct(tmp_path, "settings: settings.yaml, template: start.xyz")
    with pytest.raises(InputError, match="give --field X Y Z"):
        along_x(tmp_path)
    assert field_of(tmp_path, [tmp_path / "run.out"], [0.3, 0, 0])[0] == 0.3


def test_checkpoint_that_says_another_field(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    direct(tmp_path, "settings: settings.yaml, template: start.xyz, field: 0.05 0 0")
    direct(tmp_path, "settings: settings.yaml, template: start.xyz, field: 0.07 0 0", "RESTART")
    with pytest.raises(InputError, match="RESTART"):
        along_x(tmp_path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    record(tmp_path, voltpi="gone.yaml")
    with pytest.raises(InputError, match=r"run\.run\.json: names the settings .*gone\.yaml"):
        along_x(tmp_path)
    (tmp_path / "run.run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.run\.json: cannot be read"):
        along_x(tmp_path)
    (tmp_path / "run.run.json").unlink()
    direct(tmp_path, "settings: gone.yaml, template: start.xyz")
    with pytest.raises(InputError, match=r"input\.xml .*gone\.yaml"):
        along_x(tmp_path)
    direct(tmp_path, "settings: gone.yaml, template: start.xyz, field: from-frame")
    with pytest.raises(InputError, match="give three numbers in V/Å"):
        along_x(tmp_path)


def test_start_structure_and_parameters(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    assert given_to_drivers(tmp_path, [tmp_path / "run.out"])[0].template is None
    (tmp_path / "start.xyz").touch()
    assert given_to_drivers(tmp_path, [])[0].template == tmp_path / "start.xyz"
    (tmp_path / "other.xyz").touch()
    (tmp_path / "input.xml").write_text(
        "<simulation><output prefix='run'/><system><initialize><file mode='ase'> other.xyz </file></initialize>"
        "</system></simulation>"
    )
    assert given_to_drivers(tmp_path, [tmp_path / "run.out"])[0].template == tmp_path / "other.xyz"
    direct(tmp_path, "settings: settings.yaml, template: third.xyz, electrodes.left.potential: 0.5", "direct.xml")
    given = given_to_drivers(tmp_path, [tmp_path / "run.out"])[0]
    assert given.template == tmp_path / "third.xyz"
    assert given.overrides == {"electrodes.left.potential": 0.5}
    record(tmp_path, voltpi="settings.yaml")
    assert given_to_drivers(tmp_path, [tmp_path / "run.out"])[0].template == tmp_path / "start.xyz"


def test_temperature_of_the_input(tmp_path: Path) -> None:
    text = (
        "<simulation><output prefix='{}'/><system><ensemble><temperature units='{}'> {} </temperature></ensemble>"
        "</system></simulation>"
    )
    assert ensemble_temperature(tmp_path, []) is None
    (tmp_path / "input.xml").write_text(text.format("run", "kelvin", 320))
    assert ensemble_temperature(tmp_path, [tmp_path / "run.out"]) == pytest.approx(320.0)
    (tmp_path / "RESTART").write_text(text.format("run", "", 320 * 3.16681e-6))  # hartree, with few digits
    assert ensemble_temperature(tmp_path, [tmp_path / "run.out"]) == pytest.approx(320.0)
    (tmp_path / "longer.xml").write_text(text.format("run", "kelvin", 350))
    assert ensemble_temperature(tmp_path, [tmp_path / "run.out"]) is None
    (tmp_path / "other.xml").write_text(text.format("other", "kelvin", 500))
    assert ensemble_temperature(tmp_path, [tmp_path / "other.out"]) == pytest.approx(500.0)


def test_displacement_beside_the_field(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("field: [0.1, null, 0]\ndisplacement: [null, 0.2, {ramp: {start: 0}}]\n")
    applied = applied_of(tmp_path, [])
    assert applied.held.tolist() == [False, True, True]
    assert applied.changing.tolist() == [False, False, True]
    np.testing.assert_array_equal(applied.field, [0.1, 0.0, 0.0])
    np.testing.assert_array_equal(applied.control, [0.1, 0.2, np.nan])
    assert str(applied) == "[0.1, 0.2, changing], displacement along yz"
    assert applied_of(tmp_path, [], [0, 0, 1]).held.tolist() == [False] * 3


def test_schedule_of_the_field(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("field: [0.1, {square: {low: 0, high: 1, period: 2}}, 0]\n")
    applied = applied_of(tmp_path, [])
    assert applied.changing.tolist() == [False, True, False]
    np.testing.assert_array_equal(applied.field, [0.1, np.nan, 0.0])
    assert not applied.held.any()


def test_records_hold_one_start_structure_for_each_forcefield(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    content = {"templates": {"a": "a.xyz", "b": "b.xyz"}, "settings": dict.fromkeys("ab", "settings.yaml")}
    (tmp_path / "run.run.json").write_text(json.dumps(content))
    starts = [given.template for given in given_to_drivers(tmp_path, [tmp_path / "run.out"])]
    assert starts == [tmp_path / "a.xyz", tmp_path / "b.xyz"]
    record(tmp_path, a="settings.yaml", b="settings.yaml")  # as they were before
    starts = [given.template for given in given_to_drivers(tmp_path, [tmp_path / "run.out"])]
    assert starts == [tmp_path / "start.xyz"] * 2


def test_start_structure_of_the_system_that_wrote_the_outputs(tmp_path: Path) -> None:
    settings(tmp_path, 0.1)
    systems = "".join(
        f"<system prefix='{name}'><initialize><file mode='ase'> {name}.xyz </file></initialize></system>"
        for name in "ab"
    )
    (tmp_path / "input.xml").write_text(f"<simulation><output prefix='run'/>{systems}</simulation>")
    for name in "ab":
        (tmp_path / f"{name}.xyz").touch()
    for name in "ab":
        assert given_to_drivers(tmp_path, [tmp_path / f"{name}_run.out"])[0].template == tmp_path / f"{name}.xyz"


def test_parameters_with_dotted_keys(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("field: [0.1, {ramp: {start: 0, rate: 1, until: 1}}, 0]\n")
    direct(tmp_path, "settings: settings.yaml, field.2: 0.05")
    assert applied_of(tmp_path, [tmp_path / "run.out"]).control.tolist()[::2] == [0.1, 0.05]
    direct(tmp_path, "settings: settings.yaml, field.1.ramp.rate: 2, field.0: null")
    applied = applied_of(tmp_path, [tmp_path / "run.out"])
    assert applied.changing.tolist() == [False, True, False]
    assert applied.control.tolist()[0] == 0.0
    direct(tmp_path, "settings: settings.yaml, field: 0 0 0.2, field.0: 0.3")
    assert applied_of(tmp_path, [tmp_path / "run.out"]).control.tolist() == [0.3, 0.0, 0.2]
    direct(tmp_path, "settings: settings.yaml, displacement.2: 0.3")
    with pytest.raises(InputError, match=r"displacement\.2 is given, but the settings have no list"):
        applied_of(tmp_path, [tmp_path / "run.out"])


def test_displacement_taken_away_in_parameters(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("field: [0.1, 0, 0]\ndisplacement: [null, null, 0.3]\n")
    direct(tmp_path, "settings: settings.yaml, displacement: null")
    assert str(applied_of(tmp_path, [tmp_path / "run.out"])) == "field [0.1, 0, 0]"
    direct(tmp_path, "settings: settings.yaml, displacement.2: null, field.2: 0.2")
    assert str(applied_of(tmp_path, [tmp_path / "run.out"])) == "field [0.1, 0, 0.2]"


def test_displacement_in_parameters(tmp_path: Path) -> None:
    """They come before the settings, also the field of these stays where D is not given."""
    (tmp_path / "settings.yaml").write_text("field: [0.1, 0, 0]\n")
    direct(tmp_path, "settings: settings.yaml, displacement: null null 0.3")
    applied = applied_of(tmp_path, [tmp_path / "run.out"])
    assert applied.held.tolist() == [False, False, True]
    assert applied.control.tolist() == [0.1, 0.0, 0.3]
    direct(tmp_path, "settings: settings.yaml, displacement: null up 0.3")
    with pytest.raises(InputError, match=r"displacement is .*; give three numbers"):
        applied_of(tmp_path, [tmp_path / "run.out"])
