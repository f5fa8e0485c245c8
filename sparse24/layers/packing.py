"""Packing the weights of many sparse layers at once: one multi-tensor op a group, in place.

A layer's mask and packed forms live in buffers of fixed address, so that compiled code and CUDA graphs that read
them stay valid. Everything that changes a weight ends here: the recipe after each optimizer step, and the modules'
own hooks after a load, a move or a copy.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor

from .. import formats, ops
from ..formats import FLOAT8_DTYPES, metadata_bytes
from ..functional.soft import row_mask, soft_threshold
from . import float8
from .state import MASK, PACKED, PACKED_BUFFERS, SOFT, TRANSPOSED_BUFFERS, mask_of, state_of

# layer -> (a feed-forward block that has the layer's packed forms in a buffer of its own, what restores that when the
# forms have moved)
blocks: weakref.WeakKeyDictionary[torch.nn.Module, tuple[weakref.ref, Callable]] = weakref.WeakKeyDictionary()


def packed_dtype(weight: Tensor, compute_dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of packed values: `compute_dtype` if given; else the weight's, but 16 bits on a GPU.

    The sparse tensor cores multiply 16-bit values. A float32 weight on a GPU is a master weight for autocast, whose
    usual dtype there is bfloat16; on a CPU it is packed as it is and cast like any other weight when autocast is on.
    """
    return compute_dtype or formats.packed_dtype(weight.dtype, weight.device.type == "cuda")


#: the stamp of a packed weight in shared memory, which other processes write without a trace (Hogwild)
SHARED = (-1, -1)


def stamp(weight: Tensor) -> tuple[int, int] | None:
    """Address and version of a weight, which most writes change; None where there is no version."""
    return None if weight.is_inference() else (weight.data_ptr(), weight._version)


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether `tensor` is a DTensor, without importing torch.distributed for plain tensors."""
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def full_weight(layer) -> Tensor:
    """The weight as kernels see it, [out_features, in_features], gathered where FSDP2 has sharded it; of a
    tensor-parallel layer, this rank's part.
    """
    weight = layer.kernel_weight()
    return weight.full_tensor() if is_dtensor(weight) else weight


def whole_weight(layer) -> Tensor:
    """As `full_weight`, of all tensor-parallel parts. Collective where the weight is a DTensor."""
    weight = layer.weight.detach()
    return layer.as_kernel_sees(weight.full_tensor() if is_dtensor(weight) else weight)


def mask_bits(mask: Tensor) -> Tensor:
    """The uint16 [rows/4, cols/4] form that ops take of a module's uint8 [rows/4, cols/2] mask; shares memory."""
    return mask.view(torch.uint16)


def mask_bytes(mask: Tensor) -> Tensor:
    """The uint8 [rows/4, cols/2] form in which modules and states keep a mask; shares memory."""
    return mask.view(torch.uint8)


def empty_mask(rows: int, cols: int, device: torch.device) -> Tensor:
    """Room for the mask of a [rows, cols] weight, uint8 [rows/4, cols/2]; the contents are not a mask yet."""
    return torch.zeros(rows // 4, cols // 2, dtype=torch.uint8, device=device)


@torch.inference_mode(False)  # what it makes is written later, outside of a caller's inference mode
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
        if state_of(layer).shards is not None:
            _search_rows(layer, search)
        elif state_of(layer).soft_scale is not None:
            _pack_soft(layer, search)
        else:
            # One launch for many weights; but a sharded one is gathered, packed and forgotten before the next.
            alone = layer if is_dtensor(layer.kernel_weight()) else None
            groups[layer.weight.device, layer.weight.dtype, alone, float8.has_float8(layer)].append(layer)
    for (*_, eight_bits), group in groups.items():
        run = _pack_float8(group, search) if eight_bits else ops.prune_compress_ if search else ops.compress_
        weights, masks = [full_weight(layer) for layer in group], [mask_bits(mask_of(layer)) for layer in group]
        _run(run, weights, masks, group)
        for layer in group:
            layer.note_packed(searched=search)
    restore_blocks(chain.from_iterable(groups.values()))


def _search_rows(layer, search: bool) -> None:
    """Of a layer whose rows are packed for each gather of FSDP2 only the mask is kept."""
    if search:
        mask_bits(mask_of(layer)).copy_(ops.transposable_mask(layer.kernel_weight()))
    layer.note_packed(searched=search)


def _run(run, weights: list[Tensor], masks: list[Tensor], layers: list) -> None:
    """`run` into the buffers of the layers. What lies in pieces inside the buffer of a fused block goes by a copy: E of
    gate and up, and their packed_t where that is K-major.
    """
    outputs = [[layer._buffers[name] for layer in layers] for name in PACKED_BUFFERS]
    pieces = []
    for form, flat in zip(outputs, (False, True, False, True), strict=True):
        for i, t in enumerate(form):
            if (flat and t.dim() == 2) or not t.is_contiguous():
                form[i] = t.new_empty(t.numel() if flat else t.shape)
                pieces.append((t, form[i].view(t.shape)))
    run(weights, masks, *outputs)
    if pieces:
        words = torch.int64  # eight bytes at a time
        torch._foreach_copy_([t.view(words) for t, _ in pieces], [made.view(words) for _, made in pieces])


def set_weight_scale(layer) -> list:
    """Make the scale of a layer's weight from the weight; the other layers that have it too, which are to be packed."""
    partner = float8.scale_partner(layer)
    layers = [layer] if partner is None else [layer, partner]
    float8.set_weight_scale(layers, [full_weight(one) for one in layers], layer.largest_of_parts)
    return layers[1:]


def _pack_float8(layers: list, search: bool) -> Callable:
    """What packs the layers in 8 bits, by their weights' scales."""
    casts = [float8.weight_cast(layer) for layer in layers]

    def run(weights: list[Tensor], masks: list[Tensor], *forms: list[Tensor]) -> None:
        ops.float8.pack_float8_(search, weights, masks, forms, [c.scale for c in casts], [c.amax for c in casts])

    return run


def restore_blocks(layers: Iterable) -> None:
    """Let each fused block around the layers see that its own buffer still holds their packed forms."""
    for block, restore in dict(blocks[layer] for layer in layers if layer in blocks).items():
        if block() is not None:
            restore(block())


def _pack_soft(layer, search: bool) -> None:
    """S-STE: the thresholded weight times its fixed scale, packed along rows; packed_t and E_t are of no use.

    What is kept follows the weights at each step. The layer's mask, which flip rates compare, moves with a search.
    """
    weight, buffers = full_weight(layer), layer._buffers
    mask = row_mask(weight)
    soft = soft_threshold(weight) * state_of(layer).soft_scale.to(weight)
    if buffers[SOFT] is None or (buffers[SOFT].shape, buffers[SOFT].dtype) != (soft.shape, soft.dtype):
        buffers[SOFT] = soft
    else:
        buffers[SOFT].copy_(soft)
    _run(ops.compress_, [soft], [mask], [layer])
    if search:
        layer.take_mask(mask)
    layer.note_packed(searched=search)


@torch.no_grad()
def pack_substitute(layer, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The packed forms, and S-STE's "soft" weight, that `layer` would have with another weight: new tensors by the
    names of its buffers.

    weight  [out_features, in_features] as kernels see it; pruned by the layer's mask, or by S-STE's rule
    dtype   of the packed values

    Raises Sparse24Error for a weight of another shape or on another device than the mask.
    """
    weight, mask, soft, state = weight.detach(), mask_bits(layer._buffers[MASK]), None, state_of(layer)
    if state.precision is not None:
        return _pack_substitute_float8(weight, mask) | {SOFT: None}
    if state.soft_scale is not None:
        mask, soft = row_mask(weight), soft_threshold(weight) * state.soft_scale.to(weight)
    packed = ops.compress(weight if soft is None else soft, mask, dtype)
    forms = dict(zip(PACKED_BUFFERS, packed, strict=True))
    if state.lean:
        forms |= {name: forms[name].new_empty(0) for name in TRANSPOSED_BUFFERS}
    return forms | {SOFT: soft}


def as_bits(values: Tensor) -> Tensor:
    """8-bit floats as bytes, which compare; others as they are."""
    return values.view(torch.uint8) if values.dtype in FLOAT8_DTYPES else values


@torch.no_grad()
def pack_as(layer, weight: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """packed, E, packed_t and E_t of a weight under a mask, uint16, in the form that the layer's have; by the scale of
    its own weight where they are 8-bit ones.
    """
    dtype = layer._buffers[PACKED].dtype
    if state_of(layer).precision is None:
        return ops.compress(weight, mask, dtype)
    scale, forms = float8.weight_cast(layer).scale, ops.empty_packed(*weight.shape, dtype, weight.device)
    amax = torch.zeros_like(scale)
    ops.float8.pack_float8_(False, [weight], [mask], [[t] for t in forms], [scale], [amax])
    return forms


@torch.no_grad()
def pack_direction(layer, weight: Tensor, dtype: torch.dtype, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """(packed, E), or (packed_t, E_t), of a weight under the layer's mask: new tensors.

    In 8 bits by the scale of the layer's weight, whose amax is raised, as the packing after a step does it.
    """
    bits, (rows, cols) = mask_bits(layer._buffers[MASK]), weight.shape
    if state_of(layer).precision is not None:
        forms, cast = ops.empty_packed(rows, cols, dtype, weight.device), float8.weight_cast(layer)
        ops.float8.pack_float8_(False, [weight], [bits], [[t] for t in forms], [cast.scale], [cast.amax])
        return forms[2:] if transposed else forms[:2]
    if transposed:
        return ops.compress_transposed([weight], [bits], dtype)
    values, E = weight.new_empty((rows, cols // 2), dtype=dtype), weight.new_empty(0, dtype=torch.uint8)
    E_bytes = E.new_empty(metadata_bytes(rows, cols, dtype))
    ops.compress_([weight], [bits], [values], [E_bytes], [values.new_empty(0)], [E])
    return values, E_bytes


def _pack_substitute_float8(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    amax = weight.abs().amax().float().reshape(1)
    scale, forms = ops.float8.scale_of(amax), ops.empty_packed(*weight.shape, ops.float8.E4M3, weight.device)
    ops.float8.pack_float8_(False, [weight], [mask], [[t] for t in forms], [scale], [amax])
    return dict(zip(PACKED_BUFFERS, forms, strict=True)) | {float8.SCALE_BUFFERS["w"]: scale}


@torch.no_grad()
def search_masks(layers: Iterable) -> list[Tensor]:
    """The masks that a search would find now, as new uint16 tensors; the layers stay as they are."""
    return [ops.transposable_mask(full_weight(layer)) for layer in layers]
