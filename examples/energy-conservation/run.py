"""Runs the systems through i-PI, each with several ways to find the charges.

python run.py [SYSTEM ...] [--schemes default published taper] [--runs runs] [--steps N]

Every run has a folder RUNS/SYSTEM/SCHEME with all that i-PI needs; a finished one is not run again. A scheme named like
``tolerance-1e-6`` or ``accuracy-1e-4`` is the default with another residual of the charges (V) or accuracy of the
Coulomb sum.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from voltpi.driver.launch import run

HERE = Path(__file__).resolve().parent


class Plan(NamedTuple):
    """Time step (fs) and picoseconds of a system, for the default and for the tapered sums, which are slower."""

    timestep: float
    default: float
    tapered: float


PLANS = {
    "nacl": Plan(1.0, 2.0, 1.0),
    "batio3": Plan(0.5, 1.5, 0.5),
    "cspbi3": Plan(1.0, 2.0, 1.0),
    "water": Plan(0.25, 1.0, 0.25),
    "lipon": Plan(0.5, 0.5, 0.05),
}


def written(folder: Path, start: Path, system: str, scheme: str, steps: int | None) -> Path:
    """Writes input, settings and start of one run; the path of the input."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(start, folder / "start.xyz")
    shutil.copy(HERE / "settings" / f"{system}.yaml", folder / "settings.yaml")
    plan, text = PLANS[system], (HERE / "input.xml").read_text()
    length = plan.tapered if scheme in ("published", "taper") else plan.default
    steps = steps or round(1000 * length / plan.timestep)
    text = re.sub(r"(<total_steps>).*?(</total_steps>)", rf"\g<1> {steps} \g<2>", text)
    text = re.sub(r"(<timestep.*?>).*?(</timestep>)", rf"\g<1> {plan.timestep} \g<2>", text)
    if scheme != "default":
        name, _, value = scheme.partition("-")
        key = {"tolerance": "tolerance", "accuracy": "coulomb.accuracy"}.get(name)
        options = f"scheme: default, {key}: {value}" if key else f"scheme: {scheme}"
        direct = (
            f"<ffdirect name='voltpi' pbc='False'>\n    <pes>custom</pes> <pes_path> {HERE / 'schemes.py'} </pes_path>"
            f"\n    <parameters>{{settings: settings.yaml, template: start.xyz, {options}}}</parameters>\n  </ffdirect>"
        )
        text = re.sub(r"<!-- run.py puts.*?-->\s*<ffsocket.*?</ffsocket>", lambda _: direct, text, flags=re.DOTALL)
    (folder / "input.xml").write_text(text)
    return folder / "input.xml"


def main() -> int:
    """Returns the number of runs that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help=f"of {', '.join(PLANS)}; all that have a start structure")
    parser.add_argument("--schemes", nargs="+", default=["default", "published", "taper"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, help="instead of those of the plan")
    options = parser.parse_args()
    starts = {name: options.runs / "starts" / f"{name}.xyz" for name in options.systems or PLANS}
    failed = 0
    for system, start in starts.items():
        if not start.is_file():
            print(f"{system}: no {start}; see make_starts.py", file=sys.stderr)
            failed += bool(options.systems)
            continue
        for scheme in options.schemes:
            folder = options.runs / system / scheme
            if (folder / "done").is_file():
                continue
            print(f"{system}, {scheme}", flush=True)
            if run(written(folder, start, system, scheme, options.steps)):
                failed += 1
            else:
                (folder / "done").touch()
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
