"""A test that hangs shows where, once ten minutes are over, and goes on: it may run long on purpose.

pytest's `faulthandler_timeout` shows it from a thread that does not hold the interpreter's lock, and walks frames which
the test is making and dropping meanwhile. On CPython 3.12 processes died of that. Here a thread of Python shows them,
so that no other one runs while it collects them. Where code never gives the lock back that thread cannot run, and
faulthandler does it: frames stand still then.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Iterator

SECONDS, GRACE = 600.0, 60.0


@contextlib.contextmanager
def watching(test: str, fd: int, seconds: float = SECONDS, grace: float = GRACE) -> Iterator[None]:
    """Within it, write the stacks of all threads to the file `fd` once, if it takes longer than `seconds`."""
    timer = threading.Timer(seconds, _show, (test, fd, seconds))
    timer.daemon = True
    faulthandler.dump_traceback_later(seconds + grace, file=fd)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _show(test: str, fd: int, seconds: float) -> None:
    faulthandler.cancel_dump_traceback_later()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = [f"\n{test} runs for {seconds:g} s and goes on; its threads are at:\n"]
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines += [f"{names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
    os.write(fd, "".join(lines).encode(errors="replace"))
