"""One buffer for gate and up of a fused block, so that one product reads both and nothing is held twice.

The packed forms of the two layers are halves of the block's. Only E of the forward product lies interleaved: it orders
columns by 64 first and rows within, so of each 64 columns the two layers have a piece.
"""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from .. import ops
from ..formats import META_BLOCK
from . import packing
from .sparse_layer import SparseLayer
from .state import METADATA, METADATA_T, PACKED, PACKED_BUFFERS, PACKED_T, TRANSPOSED_BUFFERS, state_of

#: (the block's packed values, the buffers of gate, the buffers of up)
Halves = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def share(block: nn.Module, gate: nn.Module, up: nn.Module) -> Halves | None:
    """Make the packed forms of gate and up halves of the block's buffers; None, and no buffers, if they do not fit."""
    buffers = block._buffers
    if not can_share(gate, up):
        buffers.update(dict.fromkeys(PACKED_BUFFERS))
        return None
    rows, cols = gate.kernel_weight().shape
    packed, lean = gate._buffers[PACKED], state_of(gate).lean
    whole = ops.empty_packed(2 * rows, cols, packed.dtype, packed.device)
    for name, tensor in zip(PACKED_BUFFERS, whole, strict=True):
        buffers[name] = tensor.new_empty(0) if lean and name in TRANSPOSED_BUFFERS else tensor
    pieces = buffers[METADATA].view(-(-cols // META_BLOCK), 2, -1)
    halves = []
    for index, layer in enumerate((gate, up)):
        for name in (PACKED,) if lean else (PACKED, PACKED_T, METADATA_T):
            half = buffers[name].chunk(2)[index]
            half.copy_(layer._buffers[name])
            layer._buffers[name] = half
        piece = pieces[:, index]
        piece.copy_(layer.flat_E().view(piece.shape))
        layer._buffers[METADATA] = piece
        halves.append({name: layer._buffers[name] for name in PACKED_BUFFERS})
    return buffers[PACKED], *halves


def can_share(gate: nn.Module, up: nn.Module) -> bool:
    """Whether both are sparse layers whose packed forms are alike and fill whole blocks of E."""
    if not (isinstance(gate, SparseLayer) and isinstance(up, SparseLayer)):
        return False
    return _form(gate) == _form(up) and gate._buffers[PACKED].shape[0] % META_BLOCK == 0


def is_shared(block: nn.Module, gate: nn.Module, up: nn.Module, halves: Halves | None) -> bool:
    """Whether the layers' packed forms are still the halves that `share` gave them: this runs after each step."""
    if halves is None or block._buffers[PACKED] is not halves[0]:
        return False
    return all(
        layer._buffers.get(name) is half
        for layer, own in zip((gate, up), halves[1:], strict=True)
        for name, half in own.items()
    )


def watch(block: nn.Module, layers: tuple[nn.Module, ...], restore) -> None:
    """Call restore(block) whenever one of the layers has been packed."""
    for layer in layers:
        packing.blocks[layer] = (weakref.ref(block), restore)


def unwatch(layers: tuple[nn.Module, ...]) -> None:
    for layer in layers:
        if layer is not None:
            packing.blocks.pop(layer, None)


def _form(layer: SparseLayer) -> tuple:
    packed = layer._buffers[PACKED]
    return packed.shape, packed.dtype, packed.device, state_of(layer).lean
