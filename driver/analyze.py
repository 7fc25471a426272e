"""``voltpi analyze WHAT FILES…``: the analyses and their options come from ``voltpi.analysis``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from voltpi.analysis import ANALYSES
from voltpi.potential.errors import InputError

__all__ = ["analyze"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see `{self.prog} --help`")


def _parser() -> _Parser:
    parser = _Parser(
        prog="voltpi analyze", description="Numbers as CSV and JSON, and figures, from the files of a run."
    )
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for analysis in ANALYSES.values():
        sub = kinds.add_parser(analysis.name, help=analysis.summary, description=analysis.summary)
        sub.add_argument("files", nargs="+", type=Path, metavar="FILES", help="folders or files of runs")
        sub.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the run)")
        sub.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
        for option in analysis.options:
            if option.kind is bool:
                sub.add_argument(f"--{option.name}", action="store_true", help=option.help)
                continue
            letters = tuple("XYZ"[: option.count]) if 1 < option.count <= 3 else "X"
            sub.add_argument(
                f"--{option.name}",
                type=option.kind,
                nargs=None if option.count == 1 else option.count,
                default=option.default,
                choices=option.choices,
                metavar=None if option.choices else letters,
                help=option.help,
            )
    return parser


def analyze(arguments: Sequence[str]) -> list[str]:
    """Runs one analysis; returns the lines to print.

    Raises InputError for an unknown analysis or option, a missing file, and what the analysis refuses.
    """
    given = vars(_parser().parse_args(list(arguments) or ["--help"]))
    analysis = ANALYSES[given.pop("what")]
    files, out, as_json = given.pop("files"), given.pop("out"), given.pop("json")
    for path in files:
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder; give the files of a run")
    if analysis.needs_setup:
        from voltpi.driver.run_setup import describe_run

        given["describe"] = describe_run
    answer: dict[str, Any] = analysis.run(files, out, **given)
    if as_json:
        return [json.dumps({key: value for key, value in answer.items() if key != "report"}, allow_nan=False)]
    return [*(f"wrote {path}" for path in answer["files"]), *answer["report"], f"figure: {answer['figure']}"]
