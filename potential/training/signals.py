"""Ctrl-C that lets the running step finish."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["SoftStop"]


class SoftStop:
    """While entered, turns the first SIGINT or SIGTERM into ``asked``; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SoftStop:
        self.asked = False
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for which, handler in self._previous.items():
            signal.signal(which, handler)
        self._previous = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
