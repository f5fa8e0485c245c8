"""One buffer for gate and up of a fused block, so that one product reads both and nothing is held twice.

The packed forms of the two layers are halves of the block's. Only E of the forward product lies interleaved: it orders
columns by 64 first and rows within, so of each 64 columns the two layers have a piece. And E_t of 8-bit forms has
blocks of 128 columns: where the border between gate and up lies inside one, it is put together after each packing.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...formats import FORMATS, META_BLOCK, metadata_bytes, metadata_order
from .. import float8, packing
from ..sparse_layer import SparseLayer
from ..state import METADATA, METADATA_T, PACKED, PACKED_BUFFERS, PACKED_T, TRANSPOSED_BUFFERS, state_of


class Halves(NamedTuple):
    """What `share` has made of a block's buffers.

    packed    the block's packed values
    of_layers the buffers of gate and of up
    order     int64: where each eight bytes of the block's E_t are in gate's and up's, one after the other; None where
              these are halves of it
    """

    packed: Tensor
    of_layers: tuple[dict[str, Tensor], dict[str, Tensor]]
    order: Tensor | None


def share(block: nn.Module, gate: nn.Module, up: nn.Module) -> Halves | None:
    """Make the packed forms of gate and up halves of the block's buffers; None, and no buffers, if they do not fit."""
    buffers = block._buffers
    if not can_share(gate, up):
        buffers.update(dict.fromkeys(PACKED_BUFFERS))
        return None
    rows, cols = gate._buffers[PACKED].shape[0], gate.kernel_weight().shape[1]
    packed, lean = gate._buffers[PACKED], state_of(gate).lean
    whole = ops.empty_packed(2 * rows, cols, packed.dtype, packed.device)
    for name, tensor in zip(PACKED_BUFFERS, whole, strict=True):
        buffers[name] = tensor.new_empty(0) if lean and name in TRANSPOSED_BUFFERS else tensor
    form = FORMATS[packed.dtype]
    pieces = buffers[METADATA].view(-(-cols // form.meta_tile_k), 2, -1)
    order = None if lean or rows % form.meta_tile_k == 0 else _order(cols, rows, packed.dtype).to(packed.device)
    names = (PACKED,) if lean else (PACKED, PACKED_T) if order is not None else (PACKED, PACKED_T, METADATA_T)
    halves = []
    for index, layer in enumerate((gate, up)):
        for name in names:
            along = 1 if name == PACKED_T and not form.mn_major else 0
            half = buffers[name].chunk(2, along)[index]
            _copy_held(half, layer._buffers[name])
            layer._buffers[name] = half
        piece = pieces[:, index]
        _copy_held(piece, layer._buffers[METADATA])
        layer._buffers[METADATA] = piece
        halves.append({name: layer._buffers[name] for name in PACKED_BUFFERS})
    if form.scaled:
        float8.share_weight_scale(gate, up)
    return Halves(buffers[PACKED], tuple(halves), order)


def _copy_held(half: Tensor, form: Tensor) -> None:
    """Copy a form; one of FSDP2 has no memory between two passes, and nothing to be copied."""
    if form.untyped_storage().nbytes():
        half.copy_(form.reshape(half.shape))


def _order(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """`Halves.order` for E_t of two weights (k, m), by words of 64 columns; k is a multiple of 64."""
    of_one, of_both = (metadata_order(m, columns, dtype)[:, ::8] // 8 for columns in (k, 2 * k))
    of_one = of_one[:, : k // META_BLOCK]
    order = torch.empty(of_both.numel(), dtype=torch.int64)
    order[of_both.flatten()] = torch.cat([of_one, of_one + metadata_bytes(m, k, dtype) // 8], 1).flatten()
    return order


def join(block: nn.Module, gate: nn.Module, up: nn.Module, halves: Halves) -> None:
    """After gate or up was packed: E_t of the block, where it does not consist of theirs."""
    if halves.order is not None:
        words = torch.cat([layer._buffers[METADATA_T] for layer in (gate, up)]).view(torch.int64)
        torch.index_select(words, 0, halves.order, out=block._buffers[METADATA_T].view(torch.int64))


def can_share(gate: nn.Module, up: nn.Module) -> bool:
    """Whether both are sparse layers whose packed forms are alike and fill whole blocks of E."""
    if not (isinstance(gate, SparseLayer) and isinstance(up, SparseLayer)):
        return False
    if state_of(gate).cut is not None or state_of(up).cut is not None:
        return False  # a plan's hooks are on the layers, which run one by one
    return _form(gate) == _form(up) and gate._buffers[PACKED].shape[0] % META_BLOCK == 0


def is_shared(block: nn.Module, gate: nn.Module, up: nn.Module, halves: Halves | None) -> bool:
    """Whether the layers' packed forms are still the halves that `share` gave them: this runs after each step."""
    if halves is None or block._buffers[PACKED] is not halves.packed:
        return False
    return all(
        layer._buffers.get(name) is half
        for layer, own in zip((gate, up), halves.of_layers, strict=True)
        for name, half in own.items()
    )


def pack_by_one_scale(layers: tuple[nn.Module, ...]) -> None:
    """Pack the halves of an 8-bit operand anew, by the scale that `share` has given both."""
    if float8.has_float8(layers[0]):
        packing.pack(layers, search=False)


def watch(block: nn.Module, layers: tuple[nn.Module, ...], restore) -> None:
    """Call restore(block) whenever one of the layers has been packed."""
    for layer in layers:
        packing.blocks[layer] = (weakref.ref(block), restore)


def of_other_block(block: nn.Module, layers: list[nn.Module]) -> int | None:
    """The index of the first of the layers that another block watches, if any: one buffer holds a layer's forms."""
    for index, layer in enumerate(layers):
        other = packing.blocks.get(layer, (lambda: None,))[0]()
        if other is not None and other is not block:
            return index
    return None


def unwatch(layers: tuple[nn.Module, ...]) -> None:
    for layer in layers:
        if layer is not None:
            packing.blocks.pop(layer, None)


def _form(layer: SparseLayer) -> tuple:
    packed = layer._buffers[PACKED]
    state = state_of(layer)
    return packed.shape, packed.dtype, packed.device, state.lean, state.precision
