"""Whole feed-forward blocks in one function: fewer kernels than their layers one by one, and less to save.

`sparsify` looks at the class of a module that holds an FFN. Where the source of its forward is exactly
down(act(gate(x)) * up(x)), or down(act(up(x))) and perhaps a dropout, and the activation is one that we have, the
module gets a class whose forward is `functional.gated_mlp` or `functional.mlp`. Everything else about the module
stays; its layers stay the sparse layers that they are, and hold the parameters. Whenever the block or its children are
no longer what they were (dense phase, hooks, adapters, another activation or dtype), forward is the module's own again.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional
from ...formats import META_BLOCK
from ...functional.operands import computed_dtype
from .. import float8
from ..forward import check_input, check_weight_is_packed, has_substituted_weight
from ..packing import mask_bits
from ..parallel.row_shards import let_go
from ..sparse_layer import SparseLayer
from ..state import (
    DECAY,
    HOLDER,
    MASK,
    METADATA,
    METADATA_T,
    PACKED,
    PACKED_BUFFERS,
    PACKED_T,
    SOFT,
    SPARSE,
    add_buffers,
    drop_all,
    is_ours,
    shown_buffer,
    state_of,
)
from . import shared_packing
from .activations import ACTIVATIONS
from .forward_source import form_kind, read_forward
from .mixed_class import class_behind, mixed_class, own_class_of
from .replaced import Child, any_global_hook, child_is_unchanged, layer_is_plain, remember


@dataclass(eq=False)
class BlockState:
    """What a fused block has been found to compute, and what of the user's module that stands on.

    layers    names of (gate, up, down) or (up, down)
    kind      the activation, one of ACTIVATIONS
    tail      names of children called on the result, such as a dropout
    children  the activation's modules and functions
    forward   of the block's own class
    constants attributes of the block and their values, which the activation depends on
    halves    the packed forms of gate and up, as `shared_packing.share` made them
    """

    layers: tuple[str, ...]
    kind: str
    tail: tuple[str, ...] = ()
    children: tuple[Child, ...] = ()
    forward: Any = None
    constants: tuple[tuple[str, Any], ...] = ()
    halves: shared_packing.Halves | None = None


class FusedFeedForward:
    """What a fused block adds to its class. A mixin, left of the class; see `fuse`.

    packed, E, packed_t, E_t  the packed forms of gate and up as one weight, or None
    """

    _sparse24_own: type  # of a class: the one that it is without this mixin

    packed, E, packed_t, E_t = (shown_buffer(name) for name in PACKED_BUFFERS)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._sparse24_own = class_behind(FusedFeedForward, cls)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        link(self)
        return self

    def __reduce_ex__(self, protocol):
        # The class is made at run time: copies and pickles name its parts instead, and look at their own parts anew.
        state = {name: value for name, value in self.__dict__.items() if name != HOLDER}
        state["_buffers"] = {name: b for name, b in self._buffers.items() if name not in PACKED_BUFFERS}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set.difference(PACKED_BUFFERS)
        return _empty_fused, (own_class(self),), state

    def __setstate__(self, state):
        super().__setstate__(state)
        found = look_at(self, own_class(self))
        if isinstance(found, BlockState):
            attach(self, found)
        else:
            self.__class__ = own_class(self)

    def forward(self, x: Tensor) -> Tensor:
        # Past nn.Module's own attribute access, which costs as much as a launch: this runs for each block of a model.
        state, modules = self.__dict__[HOLDER], self._modules
        layers = [modules.get(name) for name in state.layers]
        if not (_is_unchanged(self, state, layers) and _layers_agree(layers, x)):
            return super().forward(x)
        if not torch.compiler.is_compiling():
            for layer in layers:
                check_weight_is_packed(layer)
            if len(layers) == 3 and self._buffers[PACKED] is None:  # written meanwhile, gate and up no longer fit
                return super().forward(x)
        y = _feed_forward(self, state.kind, layers, x)
        for name in state.tail:
            y = modules[name](y)
        return y


# -- how a fused block runs -----------------------------------------------------------------------------------------


def _feed_forward(block: nn.Module, kind: str, layers: list[SparseLayer], x: Tensor) -> Tensor:
    *ups, down = layers
    gated, constants = len(ups) == 2, state_of(down)
    if constants.precision is not None:
        return float8.block_forward(block, kind, layers, x)
    bias_up, bias_down = ups[0]._parameters["bias"], down._parameters["bias"]
    if bias_up is not None and gated:
        bias_up = torch.cat([up._parameters["bias"] for up in ups])
    decay = down._buffers[DECAY]
    packed_up = _packed_forms(block if gated else ups[0], ups, decay)
    packed_down = _packed_forms(down, [down], decay)
    weights = [up.as_kernel_sees(up._parameters["weight"]) for up in ups]
    down_weight = down.as_kernel_sees(down._parameters["weight"])
    operands = (state_of(ups[0]).mvue, constants.mvue)
    settings = dict(bias_down=bias_down, mvue=operands, rank=constants.rank, decay=decay, training=block.training)
    if gated:
        return functional.gated_mlp(
            x, tuple(weights), packed_up, down_weight, packed_down, kind, bias_gate_up=bias_up, **settings
        )
    return functional.mlp(x, weights[0], packed_up, down_weight, packed_down, kind, bias_up=bias_up, **settings)


def _packed_forms(module: nn.Module, layers: list[SparseLayer], decay: Tensor | None) -> functional.PackedWeight:
    buffers = module._buffers
    masks = ()
    if state_of(layers[0]).lean or decay is not None:
        masks = tuple(mask_bits(layer._buffers[MASK]) for layer in layers)
    return functional.PackedWeight(buffers[PACKED], buffers[METADATA], buffers[PACKED_T], buffers[METADATA_T], masks)


def _is_unchanged(block: nn.Module, state: BlockState, layers: list[nn.Module | None]) -> bool:
    """Whether the block is still what `look_at` found."""
    if any_global_hook() or type(block)._sparse24_own.forward is not state.forward:
        return False
    for child in state.children:
        if not child_is_unchanged(block, child):
            return False
    for name, value in state.constants:
        if block.__dict__.get(name) != value:
            return False
    for name in state.tail:
        if block._modules.get(name) is None:
            return False
    if len(layers) == 3 and block._buffers[PACKED] is None:
        return False
    for layer in layers:
        if layer is None or not layer_is_plain(layer):
            return False
    return True


def _layers_agree(layers: list[SparseLayer], x: Tensor) -> bool:
    """Whether all layers train the same way, with weights of their own, in the dtype that x has or autocast gives it.

    Where not, the layers run one by one, and say themselves what does not fit.
    """
    first = state_of(layers[0])
    if first.phase != SPARSE:
        return False
    check_input(x)
    dtype = computed_dtype(x)
    decays = layers[0]._buffers[DECAY] is not None
    for layer in layers:
        constants, buffers, parameters = state_of(layer), layer._buffers, layer._parameters
        if constants.watch is not None:
            layer.look_in_forward()
        if constants.phase != SPARSE or buffers[SOFT] is not None:
            return False
        if constants.precision != first.precision:
            return False
        if constants.mvue != first.mvue and (layer is not layers[-1] or first.precision is not None):
            return False
        weight = parameters.get("weight")
        if weight is not constants.packed_weight and has_substituted_weight(layer) or weight is None:
            return False
        if first.precision is None and buffers[PACKED].dtype not in (dtype, torch.float32):
            return False
        if weight.dtype != x.dtype and computed_dtype(weight) != dtype:
            return False
        if (buffers[DECAY] is not None) != decays or "bias" not in parameters:
            return False
    return not x.is_nested and (layers[0]._parameters["bias"] is None) == (layers[-2]._parameters["bias"] is None)


# -- which blocks, and what they are given --------------------------------------------------------------------------


def fuse(block: nn.Module) -> str:
    """Give `block` the fused forward if it is safe; returns "" or why not. Of a fused block: look at it anew."""
    own = type(block)._sparse24_own if isinstance(block, FusedFeedForward) else type(block)
    found = look_at(block, own)
    if isinstance(block, FusedFeedForward):
        if isinstance(found, BlockState):
            attach(block, found)
        return ""
    if isinstance(found, str):
        return found
    block.__class__ = _fused_class(own)
    attach(block, found)
    return ""


def look_at(block: nn.Module, own: type) -> BlockState | str:
    """What a block whose own class is `own` computes, if that can be fused; else why not."""
    if "forward" in block.__dict__:
        return "its forward is replaced on the instance"
    if clash := [
        name for name in (*block.__dict__, *block._buffers, *block._parameters, *block._modules) if is_ours(name)
    ]:
        if not isinstance(block, FusedFeedForward):
            return f"its attribute {clash[0]!r} has a name that a fused block needs; rename it"
    if hasattr(own, "_sparse24_block"):
        return own._sparse24_block(block)
    form = read_forward(block, own)
    if form is None:
        return f"the forward of {own.__name__} is not one that is known"
    layers = [block._modules[name] for name in form.layers]
    if not all(isinstance(layer, SparseLayer) for layer in layers):
        return "not all of its layers are sparse"
    if any(state_of(layer).cut is not None for layer in layers):
        return "its layers are tensor parallel, and run one by one under the hooks of their plan"
    rows = layers[0]._buffers[PACKED].shape[0]
    if len(layers) == 3 and rows % META_BLOCK:
        return f"gate and up have {rows} rows, not a multiple of {META_BLOCK}"
    if len(layers) == 3 and (layers[0].bias is None) != (layers[1].bias is None):
        return "only one of gate and up has a bias"
    if len(layers) == 3 and (shared := shared_packing.of_other_block(block, layers[:2])) is not None:
        return f"it shares {form.layers[shared]} with another block, which holds its packed form"
    if any(inspect.ismethod(getattr(block, name, None)) for name in form.uses):
        return f"its activation {form.source} is a method of {own.__name__}, which may depend on anything"
    kind = form_kind(block, form)
    if kind is None:
        return f"its activation {form.source} is not one of {', '.join(ACTIVATIONS)}"
    children = tuple(remember(block, name) for name in form.uses)
    return BlockState(form.layers, kind, form.tail, children, own.forward)


def attach(block: nn.Module, state: BlockState) -> None:
    """Give a module of a fused class its state and buffers."""
    before = block.__dict__.get(HOLDER)
    state.halves = None if before is None else before.halves
    block.__dict__[HOLDER] = state
    if before is None:
        add_buffers(block, PACKED_BUFFERS)
    link(block)


@torch.inference_mode(False)
def link(block: nn.Module) -> None:
    """Make the packed forms of gate and up halves of one buffer, if they are not already."""
    state = block.__dict__[HOLDER]
    if len(state.layers) == 2:
        return
    gate, up = ups = tuple(block._modules.get(name) for name in state.layers[:2])
    if shared_packing.is_shared(block, gate, up, state.halves):
        shared_packing.join(block, gate, up, state.halves)
        return
    state.halves = shared_packing.share(block, gate, up)  # None: forward falls back to the layers
    if state.halves is not None:
        shared_packing.watch(block, ups, link)
        let_go([shards for up in ups if (shards := state_of(up).shards) is not None])
        shared_packing.pack_by_one_scale(ups)


def ffn_layers(block: FusedFeedForward) -> tuple[nn.Module, ...]:
    """(gate, up, down) or (up, down) of a fused block."""
    return tuple(getattr(block, name) for name in block.__dict__[HOLDER].layers)


def unfuse(model: nn.Module) -> None:
    """Give every fused block of `model` its own class back."""
    for block in [module for module in model.modules() if isinstance(module, FusedFeedForward)]:
        unfuse_block(block)


def unfuse_block(block: FusedFeedForward) -> None:
    """Give a fused block its own class back, and take off what it was given."""
    own = own_class(block)
    if HOLDER in block.__dict__:
        shared_packing.unwatch(tuple(block._modules.get(name) for name in block.__dict__[HOLDER].layers))
    drop_all(block)
    block.__class__ = own


def own_class(block: FusedFeedForward) -> type:
    """The class of the module before it was fused."""
    return own_class_of(FusedFeedForward, block)


@cache
def _fused_class(own: type) -> type:
    for known in FusedFeedForward.__subclasses__():
        if known.__bases__ == (FusedFeedForward, own):
            return known  # SparseGatedMLP
    return mixed_class(FusedFeedForward, own, "Fused")


def _empty_fused(own: type) -> FusedFeedForward:
    return object.__new__(_fused_class(own))
