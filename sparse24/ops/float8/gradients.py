"""MVUE with casts from the same read: of a gradient, and of an activation's gradient that is never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import DTYPE_CODE, META_BLOCK, as_major, metadata_bytes, padded_tokens
from ...reference import float8 as reference
from ...reference import gated_activation_backward
from .._common import define_op, matrix, pointer, where
from ..activations import KINDS, check_backward
from ..arguments import names_wrong_types
from ..mvue import check_seed, empty_tile_sums, mvue_fields
from .operands import E4M3, Cast, check_cast, note, output, takes_one_pass


def empty_mvue(dy: Tensor, float8: bool) -> tuple[Tensor, Tensor]:
    """Room for the pruned form of dy (tokens, features)."""
    tokens, features = dy.shape
    dtype = E4M3 if float8 else dy.dtype
    padded = padded_tokens(tokens, dtype)
    rows, columns = (features, padded // 2) if float8 else (padded // 2, features)
    E = dy.new_empty(metadata_bytes(features, padded, dtype), dtype=torch.uint8)
    return dy.new_empty(rows, columns, dtype=dtype), E


def _mvue_by_reference(dy: Tensor, seed: Tensor, scale: Tensor, float8: bool) -> tuple[Tensor, Tensor]:
    if float8:
        return reference.mvue_pack_float8(dy, seed, scale, E4M3)
    return torch.ops.sparse24.mvue_compress.default(dy, seed)


def _check_mvue(dy: Tensor, seed: Tensor, cast: Cast) -> None:
    check_cast(dy, cast)
    check_seed(seed, dy)


def _mvue_quantize(dy, seed, scale, float8, bias_grad, amax, counts) -> tuple[Tensor, ...]:
    cast = (scale, amax, counts)
    _check_mvue(dy, seed, cast)
    return _all_given(*compute_mvue_quantize(dy, seed, cast, float8, bias_grad))


def _all_given(packed: Tensor, E: Tensor, dy8: Tensor, sums: Tensor | None) -> tuple[Tensor, ...]:
    return packed, E, dy8, dy8.new_empty(0, dtype=torch.float32) if sums is None else sums


def compute_mvue_quantize(
    dy: Tensor, seed: Tensor, cast: Cast, float8: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of operands that have been checked; no sums without `bias_grad`."""
    library, *place = where(dy)
    if library is None:
        packed, E = _mvue_by_reference(dy, seed, cast[0], float8)
        note(dy, cast)
        return packed, E, reference.to_float8(dy, cast[0]), dy.sum(0, dtype=torch.float32) if bias_grad else None
    dy = as_major(dy)
    packed, E = empty_mvue(dy, float8)
    dy8 = dy.new_empty(*dy.shape, dtype=E4M3)
    sums = empty_tile_sums(dy) if bias_grad else None
    fields = mvue_fields(seed, packed, E, cast[0] if float8 else None)
    library.mvue_pack(matrix(dy), fields, output(dy8, None, cast, dy8.numel()), pointer(sums), *place)
    return packed, E, dy8, None if sums is None else sums.sum(0)


def _mvue_quantize_fake(dy, seed, scale, float8, bias_grad, amax, counts) -> tuple[Tensor, ...]:
    _check_mvue(dy, seed, (scale, amax, counts))
    bias = dy.new_empty(dy.shape[1] if bias_grad else 0, dtype=torch.float32)
    return *empty_mvue(dy, float8), dy.new_empty(dy.shape, dtype=E4M3), bias


_op_mvue_quantize = define_op(
    "mvue_quantize",
    "(Tensor dy, Tensor seed, Tensor scale, bool float8, bool bias_grad, Tensor(a!)? amax, "
    "Tensor(b!)? counts) -> (Tensor, Tensor, Tensor, Tensor)",
    _mvue_quantize,
    _mvue_quantize_fake,
)


@names_wrong_types
def mvue_quantize(
    dy: Tensor,
    seed: Tensor,
    scale: Tensor,
    *,
    float8: bool,
    bias_grad: bool = False,
    amax: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy in e4m3 and its MVUE form for the weight gradient, from one read: (packed, E, dy8, bias_grad).

    dy      (tokens, features)                     seed, bias_grad  as in `mvue_compress`
    float8  packed is e4m3, (features, tokens padded to 32 / 2), rounded at random without bias; else as `mvue_compress`
    scale   of dy8, and of packed where that is 8 bits: kept values reach at most twice the largest |dy|, which the
            margin of 2 in `scale_of` leaves room for
    dy8     (tokens, features)                     amax, counts  as in `quantize`, of dy
    """
    return _op_mvue_quantize(dy, seed, scale, float8, bias_grad, amax, counts)


def _activation_backward_quantize(dh, gate_up, kind, gated, seed, scale, float8, bias_grad, amax, counts):
    cast = (scale, amax, counts)
    _check_mvue(gate_up, seed, cast)
    check_backward(dh, gate_up, kind, gated)
    return _all_given(*compute_activation_backward_quantize(dh, gate_up, (kind, gated), seed, cast, float8, bias_grad))


def compute_activation_backward_quantize(
    dh: Tensor, gate_up: Tensor, activation: tuple[str, bool], seed: Tensor, cast: Cast, float8: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of operands that have been checked; no sums without `bias_grad`."""
    kind, gated = activation
    library, *place = where(gate_up)
    if library is None:
        d_gate_up = gated_activation_backward(dh, gate_up, kind, gated)[0]
        return compute_mvue_quantize(d_gate_up, seed, cast, float8, bias_grad)
    dh, gate_up = as_major(dh), as_major(gate_up)
    if gated and gate_up.is_cuda and gate_up.shape[1] // 2 % META_BLOCK:
        # A block of E would hold features of gate and of up, which no thread block has both of: two passes.
        d_gate_up = torch.ops.sparse24.activation_backward.default(dh, gate_up, kind, True, False)[0]
        return compute_mvue_quantize(d_gate_up, seed, cast, float8, bias_grad)
    packed, E = empty_mvue(gate_up, float8)
    d_gate_up8 = gate_up.new_empty(*gate_up.shape, dtype=E4M3)
    sums = empty_tile_sums(gate_up) if bias_grad else None
    stored = None if takes_one_pass(dh.shape[1], dh, gate_up) else gate_up.new_empty(gate_up.shape)
    dense = (0 if stored is None else stored.data_ptr(), DTYPE_CODE[gate_up.dtype], *gate_up.shape, gate_up.shape[1], 1)
    fields = mvue_fields(seed, packed, E, cast[0] if float8 else None)
    library.activation_backward(
        KINDS[kind], gated, matrix(dh), matrix(gate_up), dense, None,
        output(d_gate_up8, None, cast, d_gate_up8.numel()), fields, pointer(sums), *place,
    )  # fmt: skip
    return packed, E, d_gate_up8, None if sums is None else sums.sum(0)


def _activation_backward_quantize_fake(dh, gate_up, kind, gated, seed, scale, float8, bias_grad, amax, counts):
    check_backward(dh, gate_up, kind, gated)
    return _mvue_quantize_fake(gate_up, seed, scale, float8, bias_grad, amax, counts)


_op_activation_backward_quantize = define_op(
    "activation_backward_quantize",
    "(Tensor dh, Tensor gate_up, str kind, bool gated, Tensor seed, Tensor scale, bool float8, bool bias_grad, "
    "Tensor(a!)? amax, Tensor(b!)? counts) -> (Tensor, Tensor, Tensor, Tensor)",
    _activation_backward_quantize,
    _activation_backward_quantize_fake,
)


@names_wrong_types
def activation_backward_quantize(
    dh: Tensor, gate_up: Tensor, kind: str, seed: Tensor, scale: Tensor, *, gated: bool, float8: bool,
    bias_grad: bool = False, amax: Tensor | None = None, counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The activation's gradient, never stored itself: its MVUE form and its e4m3 form, (packed, E, d8, bias_grad).

    dh (tokens, d_ff), gate_up as in forward; the rest as in `mvue_quantize`, of d_gate_up. Raises as both do.
    """
    besides = (bias_grad, amax, counts)
    return _op_activation_backward_quantize(dh, gate_up, kind, gated, seed, scale, float8, *besides)
