"""Weights packed both ways in e4m3, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import Sparse24DtypeError, Sparse24Error
from ...formats import BLOCK, DTYPE_CODE, WEIGHT_DTYPES, as_major, metadata_bytes, names
from ...reference import float8 as reference
from ...reference import transposable_mask
from .._common import check_mask, check_same_device, check_weight, define_op, matrix, where
from ..arguments import check_no_shared_memory, check_writable, names_wrong_types
from ..mask import pack_item
from .operands import E4M3, check_packed, check_scale, note


def empty_packed_float8(rows: int, cols: int, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised packed (rows, cols/2), E, packed_t (cols, rows/2), E_t in e4m3 for a (rows, cols) weight."""
    return (
        torch.empty((rows, cols // 2), dtype=E4M3, device=device),
        torch.empty(metadata_bytes(rows, cols, E4M3), dtype=torch.uint8, device=device),
        torch.empty((cols, rows // 2), dtype=E4M3, device=device),
        torch.empty(metadata_bytes(cols, rows, E4M3), dtype=torch.uint8, device=device),
    )


def _check_pack(weights, masks, forms, scales, amaxes) -> None:
    lists = (weights, masks, *forms, scales, amaxes)
    if not weights or len({len(each) for each in lists}) > 1:
        raise Sparse24Error(
            "weights, masks, packed, E, packed_t, E_t, scales and amaxes must be non-empty lists of one length, got "
            f"{', '.join(str(len(each)) for each in lists)}"
        )
    for w, mask, scale in zip(weights, masks, scales, strict=True):
        check_weight(w)
        check_mask(mask, *w.shape)
        check_same_device(w, "w", mask=mask)
        check_scale(w, "scale", scale)
    for amax in amaxes:
        check_scale(weights[0], "amax", amax)
    for form, like in zip(forms, ("packed", "E", "packed_t", "E_t"), strict=True):
        for w, out in zip(weights, form, strict=True):
            rows, cols = w.shape
            sizes = dict(
                packed=(rows, cols // 2), packed_t=(cols, rows // 2),
                E=(metadata_bytes(rows, cols, E4M3),), E_t=(metadata_bytes(cols, rows, E4M3),),
            )  # fmt: skip
            dtype = torch.uint8 if like in ("E", "E_t") else E4M3
            if (*out.shape, out.dtype, out.device) != (*sizes[like], dtype, w.device) or not out.is_contiguous():
                raise Sparse24Error(
                    f"{like} must be contiguous {dtype} of shape {sizes[like]} on {w.device}, got {out.dtype} of shape "
                    f"{tuple(out.shape)} on {out.device}; ops.float8.empty_packed_float8 makes it"
                )


def _check_memory(search, weights, masks, forms, scales, amaxes) -> None:
    """Outputs have memory of their own, but for amaxes: weights of one scale raise the same."""
    amaxes = list({amax.data_ptr(): amax for amax in amaxes}.values())
    names = ("packed", "E", "packed_t", "E_t", "amaxes", *(["masks"] if search else []))
    written = [*forms, amaxes, *([masks] if search else [])]
    named = [(f"{name}[{i}]", t) for name, each in zip(names, written, strict=True) for i, t in enumerate(each)]
    read = [(f"weights[{i}]", w) for i, w in enumerate(weights)] + [(f"scales[{i}]", s) for i, s in enumerate(scales)]
    read += [] if search else [(f"masks[{i}]", mask) for i, mask in enumerate(masks)]
    check_writable(*named)
    check_no_shared_memory(named, read)


def _pack_float8_(search, weights, masks, packed, E, packed_t, E_t, scales, amaxes) -> None:
    forms = (packed, E, packed_t, E_t)
    _check_pack(weights, masks, forms, scales, amaxes)
    _check_memory(search, weights, masks, forms, scales, amaxes)
    library, *place = where(weights[0])
    if library is None:
        _pack_by_reference(search, weights, masks, forms, scales, amaxes)
        return
    groups: dict[tuple, list] = {}  # one launch takes weights of one dtype and layout class
    weights = [as_major(w) for w in weights]
    for w, mask, *out, scale, amax in zip(weights, masks, packed, E, packed_t, E_t, scales, amaxes, strict=True):
        item = pack_item(w, mask, E4M3, tuple(out), scale, amax)
        groups.setdefault((w.dtype, w.stride(1) == 1), []).append(item)
    run = library.search_and_pack if search else library.pack_by_mask
    for items in groups.values():
        run(items, *place)


def _pack_by_reference(search, weights, masks, forms, scales, amaxes) -> None:
    for i, (w, mask, scale, amax) in enumerate(zip(weights, masks, scales, amaxes, strict=True)):
        if search:
            mask.copy_(transposable_mask(w))
        for form, value in zip(forms, reference.pack_float8(w, mask, scale, E4M3), strict=True):
            form[i].copy_(value)
        note(w, (scale, amax, None))


def _pack_float8_fake(search, weights, masks, packed, E, packed_t, E_t, scales, amaxes) -> None:
    _check_pack(weights, masks, (packed, E, packed_t, E_t), scales, amaxes)


_op_pack_float8_ = define_op(
    "pack_float8_",
    "(bool search, Tensor[] weights, Tensor(a!)[] masks, Tensor(b!)[] packed, Tensor(c!)[] E, Tensor(d!)[] packed_t, "
    "Tensor(e!)[] E_t, Tensor[] scales, Tensor(f!)[] amaxes) -> ()",
    _pack_float8_,
    _pack_float8_fake,
)


@names_wrong_types
def pack_float8_(
    search: bool, weights: Sequence[Tensor], masks: Sequence[Tensor], forms, scales: Sequence[Tensor],
    amaxes: Sequence[Tensor],
) -> None:  # fmt: skip
    """Pack weights both ways in e4m3, in place; with `search`, by masks that are searched in the same pass.

    weights  of (rows, cols) fp32, bf16 or fp16        masks  uint16 (rows/4, cols/4), written by a search
    forms    lists of packed, E, packed_t and E_t, as `empty_packed_float8` makes them
    scales   one float32 each: w ~= scale * packed      amaxes  one float32 each, raised to the largest |w|

    The mask is searched on the weight as it is, not on what its 8 bits keep. Raises as `compress_`; nothing is written
    then.
    """
    if not len(weights):  # without a tensor torch finds no implementation that could refuse it
        _check_pack(*map(list, (weights, masks, forms, scales, amaxes)))
    _op_pack_float8_(search, list(weights), list(masks), *map(list, forms), list(scales), list(amaxes))


def unpack_dense(packed: Tensor, E: Tensor, scale: Tensor, m: int, k: int, dtype: torch.dtype) -> Tensor:
    library, *place = where(packed)
    if library is None or dtype not in DTYPE_CODE:
        return reference.decompress_float8(packed, E, scale, m, k).to(dtype)
    out = packed.new_empty((m, k), dtype=dtype)
    library.unpack(
        (packed.data_ptr(), DTYPE_CODE[packed.dtype], E.data_ptr(), scale.data_ptr()), 0, matrix(out), *place
    )
    return out


def _check_decompress(packed: Tensor, E: Tensor, scale: Tensor, m: int, k: int, dtype: torch.dtype) -> None:
    if k % BLOCK:
        raise Sparse24Error(f"k must be a multiple of {BLOCK}, got {k}")
    if dtype not in WEIGHT_DTYPES:
        raise Sparse24DtypeError(f"dtype must be {names(WEIGHT_DTYPES)}, got {dtype}")
    check_packed(packed, E, scale, "packed", m, k)


def _decompress(packed, E, scale, m, k, dtype) -> Tensor:
    _check_decompress(packed, E, scale, m, k, dtype)
    return unpack_dense(packed, E, scale, m, k, dtype)


def _decompress_fake(packed, E, scale, m, k, dtype) -> Tensor:
    _check_decompress(packed, E, scale, m, k, dtype)
    return packed.new_empty((m, k), dtype=dtype)


_op_decompress_float8 = define_op(
    "decompress_float8",
    "(Tensor packed, Tensor E, Tensor scale, int m, int k, ScalarType dtype) -> Tensor",
    _decompress,
    _decompress_fake,
)


@names_wrong_types
def decompress_float8(
    packed: Tensor, E: Tensor, scale: Tensor, m: int, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The dense (m, k) of an 8-bit operand, scale * packed with zeros where nothing was kept.

    Raises Sparse24Error where packed or E do not have the size that m and k declare, and for a k that is no multiple of
    4; Sparse24DtypeError for a dtype that no weight has, or a scale that is not one float32.
    """
    return _op_decompress_float8(packed, E, scale, m, k, dtype)
