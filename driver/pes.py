"""VoltPI as one of i-PI's potential-energy surfaces: evaluated inside i-PI (``ffdirect``) or by ``i-pi-py_driver``.

In an i-PI input, with the path that ``python -m voltpi.driver.pes`` prints::

    <ffdirect name='voltpi'>
      <pes>custom</pes> <pes_path> /.../voltpi/driver/pes.py </pes_path>
      <parameters>{settings: settings.yaml, template: start.xyz, field: 0 0 0.05}</parameters>
    </ffdirect>

``settings`` and ``template`` (the start structure) are files, relative to where i-PI runs; every other parameter is a
dotted key of the settings. i-PI splits its parameters at commas, so a vector is written with blanks.

i-PI loads this file by its path and registers it under the name ``pes``: imports here must be absolute.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from ipi.pes.dummy import Dummy_driver
from ipi.utils.softexit import softexit

from voltpi.driver.client import EvaluatorLike, describe, evaluate_batch, refuse_filled_batches
from voltpi.driver.ipi_input import parameter_value
from voltpi.driver.protocol import Array, ResultLike, Structures, check_result, encode_extras
from voltpi.potential.errors import InputError

__DRIVER_NAME__ = "voltpi"
__DRIVER_CLASS__ = "VoltPI"

# the launcher looks for this in i-PI's log: i-PI itself ends with status 0 after a soft exit
STOPPED = "VoltPI stopped the run: "

Answer = tuple[float, Array, Array, str]


class VoltPI(Dummy_driver):
    """The PES; parameters as above. Raises InputError for settings or a start structure that cannot be right."""

    def __init__(self, settings: str = "", template: str = "", verbosity: bool = False, **overrides: Any) -> None:
        super().__init__(verbose=bool(verbosity))
        overrides.pop("verbose", None)
        if not settings or not template:
            missing = "settings" if not settings else "template"
            raise InputError(
                f"the <parameters> of VoltPI's PES give no {missing}; "
                "write {settings: settings.yaml, template: start.xyz}"
            )
        self._evaluator = make_evaluator(
            str(settings), str(template), {k: parameter_value(v) for k, v in overrides.items()}
        )

    def compute(self, cell: Any, pos: Any) -> Answer | list[Answer]:
        """Energy, forces, virial (atomic units), extras (JSON) for cell h [3,3] and positions [n,3] (bohr), or lists.

        A failure ends i-PI softly, so that a RESTART is left: an exception would end it without one.
        """
        batched = isinstance(cell, list)
        try:
            structures = Structures(
                np.array(cell if batched else [cell], dtype=np.float64),
                np.array(pos if batched else [pos], dtype=np.float64),
            )
            if not softexit.flist and not softexit.triggered:  # not inside i-PI: there is a socket in between
                refuse_filled_batches(self._evaluator, len(structures.positions))
            answers = [_answer(result, structures) for result in evaluate_batch(self._evaluator, structures)]
        except Exception as error:
            _stop(describe(error))
        return answers if batched else answers[0]

    def compute_structure(self, cell: Array, pos: Array) -> Answer:
        """One structure (the entry of i-PI's older versions)."""
        answer = self.compute(cell, pos)
        assert isinstance(answer, tuple)
        return answer


def make_evaluator(settings: str, template: str, overrides: dict[str, Any]) -> EvaluatorLike:
    """The evaluator of a settings file and a start structure. Raises InputError."""
    from voltpi.driver.potentiostat import run_evaluator
    from voltpi.driver.settings import load_settings
    from voltpi.driver.structures import read_structures

    tree = load_settings(settings, overrides, origin="<parameters>")
    return run_evaluator(tree, read_structures(template)[0])


def _answer(result: ResultLike, structures: Structures) -> Answer:
    check_result(result, structures.positions.shape[1])
    forces, virial = np.ascontiguousarray(result.forces), np.ascontiguousarray(result.virial)
    return (
        float(result.energy),
        forces.astype(np.float64),
        virial.astype(np.float64),
        encode_extras(result.extras).decode(),
    )


def _stop(sentence: str) -> NoReturn:
    if softexit.flist:  # inside i-PI, which has things to save
        softexit.trigger(status="restartable", message=STOPPED + sentence)
    sys.exit(STOPPED + sentence)


if __name__ == "__main__":
    print(Path(__file__).resolve())
