"""Writes that leave no trace: `weight.data.copy_(...)`, as averages swap themselves in and out of a model.

A weight counts its writes, but not those that go through `.data`, and comparing all of it in each forward pass would
cost as much as packing it. So its first rows are compared with their packed form, and not everywhere at all times:

- where an evaluation (passes without gradients) or a training begins, by each layer: after a packing that is not that
  of a step, and after `model.eval()` or `train()`. Somebody who swaps weights evaluates them, and trains on after
  swapping back;
- in each pass of an evaluation, or of a model whose weights want gradients and have no recipe, by the first layer of
  the model, and by one other, in turn;
- in a training pass every so many steps by one layer, in turn, which a recipe asks for: who writes between steps does
  so in all of them. Once that has been found, each layer looks in each step.

What one layer finds makes all others look. Compiled passes and captured graphs compare nothing; where there are such,
`eval()` and `train()` compare at once.
"""

from __future__ import annotations

import weakref

import torch

from ..functional.soft import soft_threshold
from . import packing
from .owners import weights_moved
from .state import PACKED, SOFT, SPARSE, mask_of, state_of

ROWS, ROWS_FLOAT8 = 4, 64


class Lookout:
    """Which layers of a model look in an evaluation pass: the first that runs, and one more, another in each pass.

    alarms  writes found so far: each makes all layers look once more
    wary    some were found between the steps of a training: from there on every layer looks in every step

    Copies of a model have their own.
    """

    def __init__(self):
        self.alarms, self.wary = 0, False
        self._first = None
        self._calls = self._turn = 0  # of layers in this pass; which of them looks, beside the first

    def is_on(self, layer) -> bool:
        """Whether it is `layer`'s turn. A pass begins with the layer that was the first to ask."""
        first = None if self._first is None else self._first()
        if first is None:
            self._first, first = weakref.ref(layer), layer
        if first is layer:
            self._turn = self._turn + 1 if self._turn + 1 < self._calls else 1
            self._calls = 1
            return True
        self._calls += 1
        return self._calls == self._turn + 1

    def __deepcopy__(self, memo):
        return Lookout()  # deepcopy keeps it in `memo`, for all layers that are copied together

    def __reduce__(self):
        return Lookout, ()


def share_lookout(layers) -> None:
    """Of the layers of one model some look for all."""
    lookout = Lookout()
    for layer in layers:
        state_of(layer).lookout = lookout


def look_again(layer, *, between_steps: bool = False) -> None:
    """The next pass compares, whatever was compared before: somebody begins an evaluation or a training.

    between_steps  nobody does: what is found then was written by something that takes part in the training
    """
    state = state_of(layer)
    state.looked, state.must_look, state.sampled = None, True, between_steps


def look_if_compiled(layer) -> None:
    """Somebody begins an evaluation or a training, and no eager pass has gone through since the layer was packed."""
    if ran_compiled(layer) and not _cannot_look(layer) and not seems_packed(layer):
        weights_moved(layer, unseen=True)


def ran_compiled(layer) -> bool:
    """Whether no eager pass has gone through a 2:4 layer since it was packed; it may have been left out as well."""
    state = state_of(layer)
    return state.passed != state.packs and state.phase == SPARSE and not layer.shares_memory()


def _cannot_look(layer) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    weight = layer._parameters.get("weight")
    if weight is None or layer.weight is not weight:  # torch.fx shows a tracer in its place
        return True
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def look(layer) -> None:
    """Before an eager pass that is not a step's of a recipe, and the first that is after such: pack unseen writes."""
    if _cannot_look(layer):
        return
    state, gradients = state_of(layer), torch.is_grad_enabled()
    lookout, must, sampled = state.lookout, gradients and state.must_look, state.sampled
    state.must_look, state.sampled = not gradients, False
    if gradients and torch._C._current_graph_task_id() != -1:
        state.recomputed = True  # a checkpoint's second pass: the first had no gradients and was training all the same
    wary = lookout is not None and lookout.wary
    if state.recomputed and layer.training and not (sampled or wary):
        return
    trains = gradients and (state.has_owner or not layer.weight.requires_grad)
    has_turn = not trains and (lookout is None or lookout.is_on(layer))
    now = (state.packs, 0 if lookout is None else lookout.alarms)
    if not (must or has_turn or now != state.looked):
        return
    state.looked = now
    if first_rows_are_packed(layer):
        return
    if lookout is not None:
        lookout.alarms += 1
        lookout.wary |= sampled
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
