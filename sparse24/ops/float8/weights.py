"""Weights packed both ways in e4m3, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Sparse24Error
from ...formats import DTYPE_CODE, as_major, metadata_bytes
from ...reference import float8 as reference
from ...reference import transposable_mask
from .._common import check_mask, check_same_device, check_weight, define_op, where
from ..mask import pack_item
from .operands import E4M3, check_scale, matrix, note


def empty_packed_float8(rows: int, cols: int, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised packed (rows, cols/2), E, packed_t (cols, rows/2), E_t in e4m3 for a (rows, cols) weight."""
    return (
        torch.empty((rows, cols // 2), dtype=E4M3, device=device),
        torch.empty(metadata_bytes(rows, cols, E4M3), dtype=torch.uint8, device=device),
        torch.empty((cols, rows // 2), dtype=E4M3, device=device),
        torch.empty(metadata_bytes(cols, rows, E4M3), dtype=torch.uint8, device=device),
    )


def _check_pack(weights, masks, forms, scales) -> None:
    for w, mask, scale in zip(weights, masks, scales, strict=True):
        check_weight(w)
        check_mask(mask, *w.shape)
        check_same_device(w, "w", mask=mask)
        check_scale(w, "scale", scale)
    for form, like in zip(forms, ("packed", "E", "packed_t", "E_t"), strict=True):
        for w, out in zip(weights, form, strict=True):
            rows, cols = w.shape
            sizes = dict(
                packed=(rows, cols // 2), packed_t=(cols, rows // 2),
                E=(metadata_bytes(rows, cols, E4M3),), E_t=(metadata_bytes(cols, rows, E4M3),),
            )  # fmt: skip
            if tuple(out.shape) != sizes[like] or not out.is_contiguous() or out.device != w.device:
                raise Sparse24Error(
                    f"{like} must be contiguous of shape {sizes[like]} on {w.device}, got {tuple(out.shape)} on "
                    f"{out.device}; ops.empty_packed_float8 makes it"
                )


def _pack_float8_(search, weights, masks, packed, E, packed_t, E_t, scales, amaxes) -> None:
    _check_pack(weights, masks, (packed, E, packed_t, E_t), scales)
    library, *place = where(weights[0])
    if library is None:
        _pack_by_reference(search, weights, masks, (packed, E, packed_t, E_t), scales, amaxes)
        return
    groups: dict[tuple, list] = {}  # one launch takes weights of one dtype and layout class
    weights = [as_major(w) for w in weights]
    for w, mask, *out, scale, amax in zip(weights, masks, packed, E, packed_t, E_t, scales, amaxes, strict=True):
        item = (*pack_item(w, mask, E4M3, tuple(out)), scale.data_ptr(), amax.data_ptr(), 0)
        groups.setdefault((w.dtype, w.stride(1) == 1), []).append(item)
    run = library.search_and_pack_float8 if search else library.pack_by_mask_float8
    for items in groups.values():
        run(items, *place)


def _pack_by_reference(search, weights, masks, forms, scales, amaxes) -> None:
    for i, (w, mask, scale, amax) in enumerate(zip(weights, masks, scales, amaxes, strict=True)):
        if search:
            mask.copy_(transposable_mask(w))
        for form, value in zip(forms, reference.compress_float8(w, mask, scale, E4M3), strict=True):
            form[i].copy_(value)
        note(amax, w)


def _pack_float8_fake(search, weights, masks, packed, E, packed_t, E_t, scales, amaxes) -> None:
    _check_pack(weights, masks, (packed, E, packed_t, E_t), scales)


_op_pack_float8_ = define_op(
    "pack_float8_",
    "(bool search, Tensor[] weights, Tensor(a!)[] masks, Tensor(b!)[] packed, Tensor(c!)[] E, Tensor(d!)[] packed_t, "
    "Tensor(e!)[] E_t, Tensor[] scales, Tensor(f!)[] amaxes) -> ()",
    _pack_float8_,
    _pack_float8_fake,
)


def pack_float8_(search: bool, weights, masks, forms, scales, amaxes) -> None:
    """Pack weights both ways in e4m3, in place; with `search`, by masks that are searched in the same pass.

    weights  of (rows, cols) fp32, bf16 or fp16        masks  uint16 (rows/4, cols/4), written by a search
    forms    lists of packed, E, packed_t and E_t, as `empty_packed_float8` makes them
    scales   one float32 each: w ~= scale * packed      amaxes  one float32 each, raised to the largest |w|

    The mask is searched on the weight as it is, not on what its 8 bits keep. Raises as `compress`.
    """
    _op_pack_float8_(search, list(weights), list(masks), *map(list, forms), list(scales), list(amaxes))


def decompress_dense(packed: Tensor, E: Tensor, scale: Tensor, m: int, k: int, dtype: torch.dtype) -> Tensor:
    library, *place = where(packed)
    if library is None or dtype not in DTYPE_CODE:
        return reference.decompress_float8(packed, E, scale, m, k).to(dtype)
    out = packed.new_empty((m, k), dtype=dtype)
    library.decompress_packed(
        (packed.data_ptr(), DTYPE_CODE[packed.dtype], E.data_ptr(), scale.data_ptr()), 0, matrix(out), *place
    )
    return out


_op_decompress_float8 = define_op(
    "decompress_float8",
    "(Tensor packed, Tensor E, Tensor scale, int m, int k, ScalarType dtype) -> Tensor",
    decompress_dense,
    lambda packed, E, scale, m, k, dtype: packed.new_empty((m, k), dtype=dtype),
)


def decompress_float8(packed: Tensor, E: Tensor, scale: Tensor, m: int, k: int, dtype=torch.float32) -> Tensor:
    """The dense (m, k) of an 8-bit operand, scale * packed with zeros where nothing was kept."""
    return _op_decompress_float8(packed, E, scale, m, k, dtype)
