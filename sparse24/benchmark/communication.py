"""What ranks send to one another in a training step: bytes of each kind of collective, and the time it is exposed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: parts of the names of collective ops -> (kind, which argument of c10d's op is whole on a rank: outputs come first)
KINDS = {
    "allgather": ("gather", 0),
    "all_gather": ("gather", 0),
    "reduce_scatter": ("reduce", 1),
    "allreduce": ("reduce", 0),
    "all_reduce": ("reduce", 0),
}


class CountBytes(TorchDispatchMode):
    """Within it, `bytes["gather"]` and `bytes["reduce"]` grow with each collective of this rank, in backward too.

    A gather counts what it puts together on a rank, a reduction what a rank puts in. A ring sends (n - 1) / n of that.
    """

    def __init__(self):
        super().__init__()
        self.bytes = Counter(gather=0, reduce=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "placements") for kind in types):
            return NotImplemented  # a DTensor's op: what it sends comes here by itself
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        found = next((entry for part, entry in KINDS.items() if part in name), None)
        if found is not None and namespace in ("c10d", "_c10d_functional"):
            kind, whole = found
            if namespace == "c10d":
                tensors = args[whole]
            else:
                tensors = out if kind == "gather" else args[0]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in _tensors(tensors))
        return out


def _tensors(value) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def uncovered(spans: Iterable[tuple[float, float]], covers: Iterable[tuple[float, float]]) -> float:
    """Length of the union of `spans` that no interval of `covers` lies over."""
    edges = [(at, 0, step) for start, end in spans for at, step in ((start, 1), (end, -1))]
    edges += [(at, 1, step) for start, end in covers for at, step in ((start, 1), (end, -1))]
    open_ = [0, 0]  # how many spans and how many covers are over the present place
    total, before = 0.0, 0.0
    for at, which, step in sorted(edges):
        if open_[0] and not open_[1]:
            total += at - before
        open_[which] += step
        before = at
    return total


def exposed_ms(step: Callable[[], None]) -> float:
    """Milliseconds of a step in which this rank's GPU runs kernels of NCCL and no others; NaN without a GPU."""
    if not torch.cuda.is_available():
        return math.nan
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    sent, computed = [], []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            (sent if "nccl" in event.name.lower() else computed).append(span)
    return uncovered(sent, computed) / 1e3
