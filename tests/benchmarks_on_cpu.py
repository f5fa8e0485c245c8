"""Benchmarks of the package on a CPU: their calls run, times are made up, and nobody asks a GPU."""

import torch

from sparse24.benchmark import timing

ARMS = ("feed_forward_arm", "block_arm", "Trainer")


def call_each(us_of):
    """A `time_hot` that runs each candidate once; us_of(name) are its microseconds."""

    def time_hot(candidates, **settings):
        for call in candidates.values():
            call()
        return {name: us_of(name) for name in candidates}

    return time_hot


def without_gpu(monkeypatch, *modules, compiled=False, allocated=0, peak=10**9):
    """Make the arms of `modules` on the CPU, and the questions to torch.cuda that benchmarks ask answered."""
    for module in modules:
        for name in ARMS:
            original = getattr(module, name)
            monkeypatch.setattr(
                module,
                name,
                lambda shape, original=original, **s: original(shape, **{**s, "device": "cpu", "compiled": compiled}),
            )
    monkeypatch.setattr(timing, "header", lambda: {"device": "none"})
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    answers = {"memory_allocated": allocated, "max_memory_allocated": peak, "get_device_name": "NVIDIA H200"}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
