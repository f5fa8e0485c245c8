"""Which tests run which lines, and a plugin of pytest that runs chosen tests, quickest first."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest


class Reach(NamedTuple):
    """Of each test, the seconds that it took and the lines that it ran, by source file."""

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[int]]]

    def of(self, module: Path, first: int, last: int) -> dict[str, float]:
        """The tests that run one of these lines of a module, with their seconds."""
        wanted = set(range(first, last + 1))
        return {
            test: s for test, s in self.seconds.items() if wanted.intersection(self.lines[test].get(str(module), ()))
        }

    def __or__(self, other: Reach) -> Reach:
        return Reach(self.seconds | other.seconds, self.lines | other.lines)


class Recording:
    """A plugin that traces source files while each test runs and, at the end, writes a Reach as JSON.

    What a test's child processes run is not seen.
    """

    def __init__(self, sources: list[Path], to: Path):
        self.sources, self.to = {str(path) for path in sources}, to
        self.reach = Reach({}, {})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        ran: dict[str, set[int]] = defaultdict(set)

        def of_line(frame, event, arg):
            ran[frame.f_code.co_filename].add(frame.f_lineno)
            return of_line

        start = time.monotonic()
        sys.settrace(lambda frame, *_: of_line if frame.f_code.co_filename in self.sources else None)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.reach.seconds[item.nodeid] = time.monotonic() - start
            self.reach.lines[item.nodeid] = {file: sorted(lines) for file, lines in ran.items()}

    def pytest_sessionfinish(self):
        self.to.write_text(json.dumps(self.reach))


class Chosen:
    """A plugin that runs these tests alone, quickest first."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def pytest_collection_modifyitems(self, items):
        kept = [item for item in items if item.nodeid in self.seconds]
        items[:] = sorted(kept, key=lambda item: self.seconds[item.nodeid])
