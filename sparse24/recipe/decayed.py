"""Which tensors have got their decay: a step that is called again, or that has failed, must not add it twice.

The decay of a step stays in `.grad`, where the optimizer reads it. Who steps twice on one gradient, or again after an
error, has it in there already. A gradient that is new is another tensor, or has another version: autograd, `zero_grad`
and FSDP2 raise it. A replayed CUDA graph does not; in a process that has graphs every gradient on a GPU counts as new.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from ..layers.parallel import sharding

#: the pool of the caching allocator that no graph has for itself
COMMON_POOL = (0, 0)


class Decayed:
    """The tensors that a decay was added to, as long as nobody has written them since."""

    def __init__(self):
        self._stamps: dict[int, tuple[weakref.ref, tuple[int, int]]] = {}
        self._has_graphs = False

    def __reduce__(self):
        return Decayed, ()  # a copy has other tensors

    def note(self, tensors: Iterable[Tensor]) -> None:
        """They have just got their decay. Inside a capture none of them has: that is for each replay to do."""
        if not _is_capturing():
            self._stamps.update((id(tensor), (weakref.ref(tensor), _versions(tensor))) for tensor in tensors)

    def step_is_over(self) -> None:
        """What the optimizer has written to these tensors in its step makes no new gradient of them."""
        alive = [tensor for ref, _ in self._stamps.values() if (tensor := ref()) is not None]
        self._stamps.clear()
        self.note(alive)

    def has(self, tensor: Tensor) -> bool:
        ref, versions = self._stamps.get(id(tensor), (None, None))
        if ref is None or ref() is not tensor or versions != _versions(tensor):
            return False
        return not (tensor.is_cuda and self._may_be_replayed())

    def _may_be_replayed(self) -> bool:
        """Whether graphs are about: each has a pool of the allocator, and is captured or will be replayed."""
        self._has_graphs = self._has_graphs or _is_capturing() or _has_pools()
        return self._has_graphs


def _versions(tensor: Tensor) -> tuple[int, int]:
    """Some writes to a DTensor show in the tensor itself, and others in this rank's part of it."""
    return tensor._version, sharding.local(tensor)._version


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _has_pools() -> bool:
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # an allocator that tells nothing
        return True
    return any(tuple(segment.get("segment_pool_id", COMMON_POOL)) != COMMON_POOL for segment in segments)
