"""Ctrl-C as a request: heard between two steps of a training; a second one acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Signals that wait for the end of a step. asked: the signal that came, 0 before.

    Only in the main thread, and only where nobody else handles them. terminate: whether SIGTERM, with which clusters end a
    job, waits too. tell: is told of the first.
    """

    def __init__(self, *, terminate: bool = False, tell: Callable[[str], None] | None = None) -> None:
        self.asked = 0
        self.tell = tell
        self._kinds = {signal.SIGINT: signal.default_int_handler}
        if terminate:
            self._kinds[signal.SIGTERM] = signal.SIG_DFL  # type: ignore[assignment]
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for kind, usual in self._kinds.items():
                if signal.getsignal(kind) is usual:
                    self._before[kind] = signal.signal(kind, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self.pass_on()  # one that came behind the last step

    def pass_on(self) -> None:
        """End the process by SIGTERM, where that is what came."""
        if self.asked == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or number  # torchrun sends a SIGTERM behind the Ctrl-C
        if self.tell is not None:
            self.tell("stops behind this step; Ctrl-C once more stops at once")
