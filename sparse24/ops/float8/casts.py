"""Casts to e4m3 by a scale that is known or by a tensor's own, and scales from the largest magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import as_major
from ...reference import float8 as reference
from .._common import define_op, matrix, where
from ..arguments import names_wrong_types
from .operands import Cast, check_cast, empty_float8, note, output


def _quantize(x, scale, rows, transposed, amax, counts) -> tuple[Tensor, Tensor]:
    cast = (scale, amax, counts)
    check_cast(x, cast)
    return compute_quantize(x, cast, rows, transposed)


def compute_quantize(x: Tensor, cast: Cast, rows: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    """Of operands that have been checked."""
    out = empty_float8(x, *x.shape, rows, transposed)
    library, *place = where(x)
    if library is None:
        x8 = reference.to_float8(x, cast[0])
        note(x, cast)
        return x8 if rows else out[0], reference.transpose_padded(x8) if transposed else out[1]
    if x.numel() == 0:
        return out
    x = as_major(x)
    library.quantize(matrix(x), output(*out, cast, x.numel()), 0, *place)
    return out


def _quantize_fake(x, scale, rows, transposed, amax, counts) -> tuple[Tensor, Tensor]:
    check_cast(x, (scale, amax, counts))
    return empty_float8(x, *x.shape, rows, transposed)


_op_quantize = define_op(
    "quantize",
    "(Tensor x, Tensor scale, bool rows, bool transposed, Tensor(a!)? amax, Tensor(b!)? counts) -> (Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)


@names_wrong_types
def quantize(
    x: Tensor,
    scale: Tensor,
    *,
    rows: bool = True,
    transposed: bool = False,
    amax: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x / scale in e4m3, and its transpose, from one read: (x8, x8_t).

    x       (tokens, features) fp32, bf16 or fp16, row- or column-major (other strides are copied)
    scale   one float32, a power of two, on x's device
    x8      (tokens, features); empty without `rows`
    x8_t    (features, tokens padded to 32), zeros past the end; empty without `transposed`
    amax    one float32, raised to the largest finite |x|
    counts  three int64, added to: finite values that are clipped, values that become zero, all values

    To nearest even; finite values beyond 448 become 448, Inf and NaN become NaN. Raises Sparse24Error for an x that is
    not 2-D or tensors on two devices, Sparse24DtypeError for a dtype, scale, amax or counts of another kind.
    """
    return _op_quantize(x, scale, rows, transposed, amax, counts)


def _quantize_current(x: Tensor, rows: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_cast(x, None)
    library, *place = where(x)
    if library is None or x.numel() == 0:
        scale = reference.scale_of(reference.amax(x))
        return *compute_quantize(x, (scale, None, None), rows, transposed), scale
    out, scale, x = empty_float8(x, *x.shape, rows, transposed), x.new_empty(1, dtype=torch.float32), as_major(x)
    library.quantize(matrix(x), output(*out, (None, None, None), x.numel()), scale.data_ptr(), *place)
    return *out, scale


def _quantize_current_fake(x: Tensor, rows: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_cast(x, None)
    return *empty_float8(x, *x.shape, rows, transposed), x.new_empty(1, dtype=torch.float32)


_op_quantize_current = define_op(
    "quantize_current",
    "(Tensor x, bool rows, bool transposed) -> (Tensor, Tensor, Tensor)",
    _quantize_current,
    _quantize_current_fake,
)


@names_wrong_types
def quantize_current(x: Tensor, *, rows: bool = True, transposed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` by x's own scale, `scale_of` its largest finite |x|: (x8, x8_t, scale). One read of x more.

    x, rows, transposed, x8, x8_t and errors as in `quantize`; scale is one float32.
    """
    return _op_quantize_current(x, rows, transposed)


def scale_of(amax: Tensor, margin: float = 2.0) -> Tensor:
    """The smallest power of two by which amax * margin fits into e4m3; 1 for an amax of 0. fp32, of amax's shape."""
    return reference.scale_of(amax, margin)
