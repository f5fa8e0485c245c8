"""Packing the weights of many sparse layers at once: one multi-tensor op a group, in place.

A layer's mask and packed forms live in buffers of fixed address, so that compiled code and CUDA graphs that read
them stay valid. Everything that changes a weight ends here: the recipe after each optimizer step, and the modules'
own hooks after a load, a move or a copy.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from .. import ops
from ..functional.soft import row_mask, soft_threshold

# The packed forms of a layer, by buffer name, in the order in which every op takes and gives them.
PACKED_NAMES = ("packed", "E", "packed_t", "E_t")
TRANSPOSED_NAMES = PACKED_NAMES[2:]  # empty in a lean layer, and then not written
SPARSE_BUFFERS = ("mask", *PACKED_NAMES)

# layer -> the feed-forward block that has the layer's packed forms in a buffer of its own, and is to be told of
# changes.
blocks: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, without importing torch.distributed for plain tensors."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def full_weight(layer) -> Tensor:
    """The weight as kernels see it, [out_features, in_features], gathered where FSDP2 has sharded it."""
    weight = layer.kernel_weight()
    return weight.full_tensor() if is_dtensor(weight) else weight


def mask_bits(mask: Tensor) -> Tensor:
    """The uint16 [rows/4, cols/4] form that ops take of a module's uint8 [rows/4, cols/2] mask; shares memory."""
    return mask.view(torch.uint16)


def mask_bytes(mask: Tensor) -> Tensor:
    """The uint8 [rows/4, cols/2] form in which modules and states keep a mask; shares memory."""
    return mask.view(torch.uint8)


def empty_mask(rows: int, cols: int, device: torch.device) -> Tensor:
    """Room for the mask of a [rows, cols] weight, uint8 [rows/4, cols/2]; the contents are not a mask yet."""
    return torch.zeros(rows // 4, cols // 2, dtype=torch.uint8, device=device)


@torch.no_grad()
def pack(layers: Iterable, *, search: bool) -> None:
    """Write the packed forms of `layers` from their weights, in place.

    search  True: find each layer's mask anew from the magnitudes of its weight; False: keep the mask

    Layers on the meta device are left alone: there is nothing to read.
    """
    groups = defaultdict(list)
    for layer in layers:
        if layer.weight.is_meta:
            layer.note_packed()
            continue
        if layer.soft_scale is not None:
            _pack_soft(layer, search)
        else:
            # One launch for many weights; but a sharded one is gathered, packed and forgotten before the next.
            alone = layer if is_dtensor(layer.weight) else None
            groups[layer.weight.device, layer.weight.dtype, alone].append(layer)
    for group in groups.values():
        run = ops.prune_compress_ if search else ops.compress_
        weights, masks = [full_weight(layer) for layer in group], [mask_bits(layer.mask) for layer in group]
        _run(run, weights, masks, group)
        for layer in group:
            layer.note_packed(searched=search)
    _tell_blocks(chain.from_iterable(groups.values()))


def _run(run, weights: list[Tensor], masks: list[Tensor], layers: list) -> None:
    """`run` into the buffers of the layers. E of gate and up of a fused block lies in pieces: it goes by a copy."""
    outputs = [[layer._buffers[name] for layer in layers] for name in PACKED_NAMES]
    pieces = [(i, E) for i, E in enumerate(outputs[1]) if E.dim() == 2]
    for i, E in pieces:
        outputs[1][i] = E.new_empty(E.numel())
    run(weights, masks, *outputs)
    if pieces:
        words = torch.int64  # eight bytes at a time
        made = [outputs[1][i].view(E.shape).view(words) for i, E in pieces]
        torch._foreach_copy_([E.view(words) for _, E in pieces], made)


def _tell_blocks(layers: Iterable) -> None:
    told = {id(block): block for layer in layers if layer in blocks and (block := blocks[layer]()) is not None}
    for block in told.values():
        block.link()


def _pack_soft(layer, search: bool) -> None:
    """S-STE: the thresholded weight times its fixed scale, packed along rows; packed_t and E_t are of no use.

    What is kept follows the weights at each step. The layer's mask, which flip rates compare, moves with a search.
    """
    weight = full_weight(layer)
    mask = row_mask(weight)
    soft = soft_threshold(weight) * layer.soft_scale.to(weight)
    if layer.soft is None or (layer.soft.shape, layer.soft.dtype) != (soft.shape, soft.dtype):
        layer.soft = soft
    else:
        layer.soft.copy_(soft)
    _run(ops.compress_, [soft], [mask], [layer])
    if search:
        layer.mask.copy_(mask_bytes(mask))
    layer.note_packed(searched=search)


@torch.no_grad()
def pack_apart(layer, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The packed forms and, for S-STE, "soft" that `layer` would have with another weight, as new tensors by name.

    weight  [out_features, in_features] as kernels see it; pruned by the layer's mask, or by S-STE's rule
    dtype   of the packed values

    Raises Sparse24Error for a weight of another shape or on another device than the mask.
    """
    weight, mask, soft = weight.detach(), mask_bits(layer.mask), None
    if layer.soft_scale is not None:
        mask, soft = row_mask(weight), soft_threshold(weight) * layer.soft_scale.to(weight)
    packed = ops.compress(weight if soft is None else soft, mask, dtype)
    forms = dict(zip(PACKED_NAMES, packed, strict=True))
    if layer.lean:
        forms |= {name: forms[name].new_empty(0) for name in TRANSPOSED_NAMES}
    return forms | {"soft": soft}


@torch.no_grad()
def search_masks(layers: Iterable) -> list[Tensor]:
    """The masks that a search would find now, as new uint16 tensors; the layers stay as they are."""
    return [ops.transposable_mask(full_weight(layer)) for layer in layers]
