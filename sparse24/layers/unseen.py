"""Writes that leave no trace: `weight.data.copy_(...)`, as averages swap themselves in and out of a model.

A weight counts its writes, but not those that go through `.data`, and comparing all of it in each forward pass would
cost as much as packing it. Somebody who swaps weights evaluates them, and trains on after swapping back. So the first
rows are compared with their packed form where an evaluation (a pass without gradients) or a training begins: by each
layer after a packing and after `model.eval()` or `train()`, and in every pass by one layer of the model, the lookout.
What it finds makes the others look too. A training step, compiled code and a captured graph compare nothing.
"""

from __future__ import annotations

import weakref

import torch

from ..functional.soft import soft_threshold
from . import packing
from .owners import weights_moved
from .state import PACKED, SOFT, mask_of, state_of

ROWS, ROWS_FLOAT8 = 4, 64


class Lookout:
    """Which layer of a model looks in each evaluation pass: the first that runs. Copies of a model have their own."""

    def __init__(self):
        self.alarms = 0
        self._layer = None

    def is_on(self, layer) -> bool:
        """Whether `layer` is the one, or becomes it."""
        if self._layer is None or self._layer() is None:
            self._layer = weakref.ref(layer)
        return self._layer() is layer

    def __deepcopy__(self, memo):
        return Lookout()  # deepcopy keeps it in `memo`, for all layers that are copied together

    def __reduce__(self):
        return Lookout, ()


def share_lookout(layers) -> None:
    """Of the layers of one model one looks for all."""
    lookout = Lookout()
    for layer in layers:
        state_of(layer).lookout = lookout


def look_again(layer) -> None:
    """Somebody begins an evaluation or a training: the next pass compares, whatever was compared before."""
    state = state_of(layer)
    state.looked, state.evaluated = None, True


def look(layer) -> None:
    """Before an eager pass without gradients, and the first with them after such: have unseen writes packed."""
    if torch._C._len_torch_dispatch_stack() or (layer.weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    state, trains = state_of(layer), torch.is_grad_enabled()
    state.evaluated = not trains
    if trains and torch._C._current_graph_task_id() != -1:
        state.recomputed = True  # a checkpoint's second pass: the first had no gradients and was training all the same
    if state.recomputed and layer.training:
        return
    lookout = state.lookout
    now = (state.packs, 0 if lookout is None else lookout.alarms)
    looks_always = lookout is not None and lookout.is_on(layer)
    if not trains and not looks_always and now == state.looked:
        return
    state.looked = now
    if first_rows_are_packed(layer):
        return
    if lookout is not None:
        lookout.alarms += 1
    state.looked = None
    weights_moved(layer, unseen=True)


def seems_packed(layer) -> bool:
    """Whether a weight shows neither by its version nor in its first rows that it was written since it was packed."""
    if state_of(layer).stamp is None or state_of(layer).stamp == packing.SHARED or layer.weight.is_meta:
        return True
    return not layer.weight_has_changed() and first_rows_are_packed(layer)


@torch.no_grad()
def first_rows_are_packed(layer) -> bool:
    """Whether the packed form begins as that of the present weight does. Waits for the device."""
    state, buffers = state_of(layer), layer._buffers
    rows = ROWS if state.precision is None else ROWS_FLOAT8
    weight = layer.kernel_weight()[:rows]
    if state.soft_scale is not None:
        fresh, packed = soft_threshold(weight) * state.soft_scale.to(weight), buffers[SOFT]
    else:
        fresh = packing.pack_as(layer, weight, packing.mask_bits(mask_of(layer))[: weight.shape[0] // 4])[0]
        packed = buffers[PACKED]
    return torch.equal(fresh.contiguous().view(torch.uint8), packed[: weight.shape[0]].contiguous().view(torch.uint8))
