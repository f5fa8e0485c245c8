"""A test that takes long is shown and goes on, whether it runs Python or is stuck in C."""

import ctypes
import os
import time

import pytest
from watchdog import watching


@pytest.fixture
def shown(tmp_path):
    """(file descriptor, function that reads what was written to it)."""
    path = tmp_path / "stderr"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    yield fd, path.read_text
    os.close(fd)


def wait_for(read, text):
    while text not in read():
        time.sleep(0.01)


def test_a_test_that_waits_is_shown_where_it_waits(shown):
    fd, read = shown
    with watching("test_x", fd, seconds=0.01):
        wait_for(read, "test_x runs for 0.01 s and goes on")
    assert "in wait_for\n    time.sleep(0.01)" in read()


def test_code_that_keeps_the_interpreter_is_shown_too(shown):
    fd, read = shown
    with watching("test_x", fd, seconds=0.01, grace=0.05):
        ctypes.PyDLL(None).usleep(500_000)  # PyDLL holds the interpreter's lock, for ten times as long as it may
    assert "Timeout" in read() and "test_code_that_keeps_the_interpreter_is_shown_too" in read()


def test_what_ends_in_time_is_not_shown(shown):
    fd, read = shown
    with watching("test_x", fd, seconds=30):
        pass
    assert not read()


def test_frames_that_come_and_go_are_shown_without_harm(shown):
    fd, read = shown

    def deep(depth):
        return deep(depth - 1) + 1 if depth else 0

    for i in range(100):
        with watching(f"test_{i}", fd, seconds=0.001):
            while f"test_{i} runs" not in read():
                deep(50)
