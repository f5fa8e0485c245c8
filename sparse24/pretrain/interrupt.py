"""Ctrl-C and SIGTERM: while a model trains, the first asks it to finish its step and save, the second stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType


class StopRequest:
    """A context in which both signals raise KeyboardInterrupt, or, within `deferred`, are only noted in `signal`.

    Outside the main thread Python delivers no signals; there it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._deferred = False
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def deferred(self):
        """Inside, a signal is only noted: the code checks for it where it can stop."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again or not self._deferred:
            raise KeyboardInterrupt
