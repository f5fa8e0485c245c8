"""Fixtures of all tests. Tests that take `device` run on the CPU and, where there is one, on the GPU (marker `gpu`)."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest
import torch
from watchdog import watching

STDERR = pytest.StashKey[int]()


def pytest_configure(config):
    """The workers of pytest-xdist, and the processes that their tests start, share the cores."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)
    config.stash[STDERR] = os.dup(sys.__stderr__.fileno())  # while pytest captures nothing


def pytest_unconfigure(config):
    os.close(config.stash[STDERR])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with watching(item.nodeid, item.config.stash[STDERR]):
        return (yield)


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("multigpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
        elif item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def gpu_with_8_bit_products(request):
    """Skips tests of 8-bit layers on GPUs that have 16-bit products alone, as with SPARSE24_ARCH=sm80, not sm89."""
    parameters = getattr(request.node, "callspec", None)
    values = parameters.params.values() if parameters else ()
    eight_bits = "float8" in request.path.name or any(isinstance(v, str) and "fp8" in v for v in values)
    if not (eight_bits and request.node.get_closest_marker("gpu")):
        return
    from sparse24 import is_available
    from sparse24.ops.float8.products import why_unavailable

    if is_available("cuda") and (why := why_unavailable(torch.cuda.current_device())):
        pytest.skip(f"no 8-bit products here: {why}")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(1234)


@pytest.fixture
def file_size_limit():
    """file_size_limit(bytes): a context in which no file grows larger, as on a full disk: the kernel refuses."""
    import resource

    @contextlib.contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """run_cli(*arguments) -> (exit status, stdout, stderr) of `python -m sparse24`, in this process."""
    pytest.importorskip("typer")
    from sparse24 import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparse24", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory):
    """ranks_of(world): processes over gloo (process_ranks.py), started once for all tests of a module."""
    from process_ranks import Ranks

    started = {}

    def get(world):
        if world not in started:
            started[world] = Ranks(world, tmp_path_factory.mktemp("gloo") / "init")
        return started[world]

    yield get
    for ranks in started.values():
        ranks.end()


@pytest.fixture
def two(ranks_of):
    return ranks_of(2)


@pytest.fixture
def four(ranks_of):
    return ranks_of(4)
