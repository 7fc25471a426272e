"""The same training with and without long range, over several seeds, as one table.

    python compare.py SETTINGS.yaml --out FOLDER [--charges pqeq qeq none] [--seeds 0 1 2] [--set training.epochs=40]
                      [--without data.train=FILE]

Every run is ``voltpi train SETTINGS.yaml`` with another ``charges.model``, ``training.seed`` and ``output``; all else
is equal. A command that was stopped (Ctrl-C) goes on where it was when it is given again. FOLDER/table.json and the
table on the screen hold means over seeds and, after ±, the standard deviation of one seed. Without charges nothing
feels a field: ``--without`` then names a file of the same structures whose fields are not told.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from voltpi.driver.train import train

LABELS = {
    "force_rmse": "force RMSE, eV/Å",
    "energy_rmse": "energy RMSE, meV/atom",
    "stress_rmse": "stress RMSE, GPa",
}


def run(settings: Path, folder: Path, charges: str, seed: int, overrides: Sequence[str]) -> dict[str, dict[str, float]]:
    """Errors on validation of one training, by data set."""
    output = (folder / f"{charges}-{seed}").resolve()
    # without charges none of their other settings has a meaning
    model = "charges={model: none}" if charges == "none" else f"charges.model={charges}"
    own = [model, f"training.seed={seed}", f"output={output}", "name=model", "figures=false"]
    train(settings, [*overrides, *own])
    errors = json.loads((output / "report.json").read_text())["errors"]
    return {name: numbers for name, numbers in errors.items() if isinstance(numbers, dict)}


def shown(values: list[float]) -> str:
    """Mean, and standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--charges", nargs="+", default=["pqeq", "none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--without", action="append", default=[], metavar="KEY=VALUE", help="settings of none only")
    options = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    for seed, charges in itertools.product(options.seeds, options.charges):  # a stopped command has pairs
        overrides = [*options.overrides, *(options.without if charges == "none" else [])]
        found.setdefault(charges, []).append(run(options.settings, options.out, charges, seed, overrides))
    (options.out / "table.json").write_text(json.dumps({"seeds": options.seeds, "errors": found}, indent=1) + "\n")
    names = list(next(iter(found.values()))[0])
    table = Table("data", "", *options.charges, title=f"validation, {len(options.seeds)} seed(s)")
    for name, (key, label) in itertools.product(names, LABELS.items()):
        if all(key in errors.get(name, {}) for runs in found.values() for errors in runs):
            table.add_row(name, label, *(shown([e[name][key] for e in found[c]]) for c in options.charges))
    Console().print(table)


if __name__ == "__main__":
    main()
