"""What a person sees of a training: a bar with live errors, a line an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Display"]

_SHOWN = (("F", "force_rmse", ".4f"), ("E", "energy_rmse", ".2f"), ("S", "stress_rmse", ".3f"))


def _errors(means: Mapping[str, float], prefix: str = "") -> str:
    return " ".join(f"{name} {means[prefix + key]:{form}}" for name, key, form in _SHOWN if prefix + key in means)


class Display:
    """Force errors in eV/Å, energy errors in meV/atom, stress errors in GPa (RMSE); silent unless ``shown``."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn())
        more = (TimeRemainingColumn(), TextColumn("{task.fields[live]}"))
        self._bar = Progress(*columns, *more, disable=not shown)
        self._task = self._bar.add_task("training", total=1.0, live="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, done: float, epoch: int, means: Mapping[str, float]) -> None:
        """Part of the run that is over, and errors of the running epoch."""
        self._bar.update(self._task, completed=done, live=f"epoch {epoch} · {_errors(means)}")

    def epoch(
        self, epoch: int, seconds: float, rate: float, row: Mapping[str, float], validated: list[str], best: bool
    ) -> None:
        """One line of errors in training and, by data set, in validation."""
        if not self.shown:
            return
        text = f"epoch {epoch:4d} {seconds:7.0f} s  rate {rate:.1e}  train {_errors(row, 'train_')}"
        for name in validated:
            text += f"  {name} {_errors(row, f'{name}_')}"
        self.say(text + ("  *" if best else ""))

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            self._bar.console.print(text, highlight=False, soft_wrap=True, markup=False)
