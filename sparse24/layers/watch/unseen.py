"""Writes that leave no trace: `weight.data.copy_(...)`, as averages swap themselves in and out of a model.

A weight counts its writes, but not those that go through `.data`, and comparing all of it in each forward pass would
cost as much as packing it. So a layer compares the first rows with their packed form, and waits for the device once:

- When an evaluation (passes without gradients) or a training begins: in the first pass of either kind after the other,
  after `model.eval()` or `train()`, and after a packing that is not a step's. Who swaps weights evaluates them, and
  trains on after swapping back.
- In each pass of an evaluation: the first layer of the model and one other, in turn. In a training without a recipe,
  where nobody says when a step is over, the same in the first two passes and in every 16th: each comparison keeps the
  host from running ahead of the device.
- In a training under a recipe, in each pass of the steps that the recipe asks for: all layers in the first two steps,
  one layer in every 16th. Who writes between passes does so in every step. Once that has been found, all layers compare
  in each pass.

What one layer finds makes all others look. Compiled passes and captured graphs compare nothing; where there are such,
`eval()` and `train()` compare at once.
"""

from __future__ import annotations

import weakref

import torch

from ...functional.soft import soft_threshold
from .. import packing
from ..state import PACKED, SOFT, SPARSE, mask_of, state_of
from .owners import weights_moved

ROWS, ROWS_FLOAT8 = 4, 64
EVERY = 16  # passes or steps of a training


class Lookout:
    """What the layers of one model know together. Copies of the model have their own.

    evaluation, training  of layers that have compared in the pass that began it; new ones for each write that is found
    wary        writes were found between the passes of a training, so every layer looks in each of them
    recomputes  activation checkpointing runs layers without gradients, and again in backward: both are training
    """

    def __init__(self):
        self.wary = self.recomputes = False
        self.alarm()
        self._first = None
        self._size = self._calls = 0  # layers of the pass before, and of this one so far
        self._turn = 0  # which of them looks, beside the first

    def alarm(self) -> None:
        """A write was found: each layer looks once more, and in the two passes that follow some do."""
        self.evaluation, self.training = object(), object()
        self._passes = 0

    def has_turn(self, layer, trains: bool) -> bool:
        """Whether `layer` looks in this pass: the first to ask, whose calls begin the passes, and one other."""
        first = None if self._first is None else self._first()
        if first is None:
            self._first, first = weakref.ref(layer), layer
        if first is layer:
            self._passes += 1
            self._size, self._calls = self._calls, 0
        self._calls += 1
        if trains and self._passes > 2 and self._passes % EVERY:
            return False
        if first is layer:
            self._turn = self._turn + 1 if self._turn + 1 < self._size else 1
            return True
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


def look_again(layer) -> None:
    """The next pass compares: an evaluation or a training begins, or the weight has come from elsewhere."""
    state_of(layer).looked = None


def look_until_packed(layer) -> None:
    """Each pass compares until the next packing, which is that of a step."""
    state_of(layer).keeps_looking = True


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
    if weight is None or weight.is_meta or layer.weight is not weight:  # torch.fx shows a tracer in its place
        return True
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def needs_look(state, weight) -> bool:
    """Whether this pass may be one that compares; false in most steps of a training, which this must not slow down."""
    if state.looked is not state.lookout.training or state.keeps_looking or not torch.is_grad_enabled():
        return True
    return weight.requires_grad and not state.has_owner


def look(layer, weight) -> None:
    """Before an eager pass over the packed `weight` of `layer`: pack it if it was written unseen, and say so."""
    if _cannot_look(layer):
        return
    state, lookout = state_of(layer), state_of(layer).lookout
    trains = _is_training_pass(layer)
    is_stepped = trains and (state.has_owner or not weight.requires_grad)  # written by the recipe's step, or never
    moment = lookout.training if trains else lookout.evaluation
    is_first = state.looked is not moment
    is_asked = state.keeps_looking if is_stepped else lookout.has_turn(layer, trains)  # it counts passes: ask in each
    if not (is_first or is_asked):
        return
    state.looked = None if lookout.wary and is_stepped else moment
    if first_rows_are_packed(layer):
        return
    lookout.alarm()
    lookout.wary |= is_stepped and not is_first
    weights_moved(layer, unseen=True)


def _is_training_pass(layer) -> bool:
    """Whether a pass has gradients, or is one that activation checkpointing will run again."""
    state, lookout, gradients = state_of(layer), state_of(layer).lookout, torch.is_grad_enabled()
    if gradients and state.looked is lookout.evaluation and torch._C._current_graph_task_id() != -1:  # in backward
        lookout.recomputes = True
    return gradients or (lookout.recomputes and layer.training)


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
