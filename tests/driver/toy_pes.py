"""VoltPI's PES for i-PI with the toy evaluator in place of a model; everything else is the shipped code."""

import sys
from pathlib import Path

import voltpi.driver.pes as shipped

sys.path.insert(0, str(Path(__file__).parent))
from toy import ToyEvaluator

__DRIVER_NAME__ = "toy"
__DRIVER_CLASS__ = "Toy"

shipped.make_evaluator = lambda settings, template, overrides: ToyEvaluator(int(overrides.pop("atoms", 8)), **overrides)


class Toy(shipped.VoltPI):
    pass
