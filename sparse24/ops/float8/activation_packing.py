"""Activations pruned to 2:4 and their gradients in e4m3, packed along features and along tokens by their own scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import E4M3, metadata_bytes
from ...reference import bias_gradient
from ...reference import float8 as reference
from .._common import call_without_grad, define_op, matrix, pointer, where
from ..activation_packing import (
    as_row_major,
    check_activation_backward_compress,
    check_activation_compress,
    packed_fields,
)
from ..activations import KINDS
from ..arguments import names_wrong_types
from ..mvue import empty_tile_sums, has_kernel, mvue_fields
from .gradients import empty_mvue

_REMEDY = "functional.sparse_activation_mlp"


def _empty_forms(u: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for packed, packed_t, E_t and scale."""
    packed = u.new_empty(u.shape[0], u.shape[1] // 2, dtype=E4M3)
    if seed is None:
        along_tokens = packed.new_empty(0), packed.new_empty(0, dtype=torch.uint8)
    else:
        along_tokens = empty_mvue(u, float8=True)
    return packed, *along_tokens, u.new_empty(1, dtype=torch.float32)


def _empty_E(u: Tensor) -> Tensor:
    return u.new_empty(metadata_bytes(*u.shape, E4M3), dtype=torch.uint8)


def _along_tokens(seed: Tensor | None, packed_t: Tensor, E_t: Tensor) -> tuple[int, ...] | None:
    return None if seed is None else mvue_fields(seed, packed_t, E_t)


# ---- forward --------------------------------------------------------------------------------------------------------


def _compress(u: Tensor, kind: str, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    check_activation_compress(u, kind, seed)
    library, *place = where(u)
    if library is None or not has_kernel(u) or u.numel() == 0:
        return reference.activation_compress(u, kind, seed)
    u, E, (packed, packed_t, E_t, scale) = as_row_major(u), _empty_E(u), _empty_forms(u, seed)
    along_tokens = _along_tokens(seed, packed_t, E_t)
    library.activation_pack(KINDS[kind], matrix(u), packed_fields(packed, E, scale), along_tokens, *place)
    return packed, E, packed_t, E_t, scale


def _fake_compress(u: Tensor, kind: str, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    check_activation_compress(u, kind, seed)
    packed, *others = _empty_forms(u, seed)
    return packed, _empty_E(u), *others


_op_compress = define_op(
    "activation_compress_float8",
    "(Tensor u, str kind, Tensor? seed=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compress,
    _fake_compress,
)


@names_wrong_types
def activation_compress_float8(u: Tensor, kind: str, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """`ops.activation_compress` in e4m3: (packed, E, packed_t, E_t, scale).

    u, kind, seed  as there; which two of four are kept, too
    packed, E      e4m3 (tokens, d_ff/2) and 8-bit metadata for (tokens, d_ff): h / scale to nearest
    packed_t, E_t  e4m3 (d_ff, padded/2), tokens padded to 32, and metadata for (d_ff, padded): what `mvue_quantize`
                   with float8=True packs of the pruned h; empty without a seed
    scale          one float32: `scale_of` the largest finite h, found by a read of u more

    h is rounded to u's dtype, and then cast; equal on CPU and GPU. Raises as `ops.activation_compress`.
    Source: arXiv 2503.16672.
    """
    return call_without_grad("float8.activation_compress_float8", _REMEDY, _op_compress, (u, kind, seed))


# ---- backward -------------------------------------------------------------------------------------------------------


def _backward(
    dh: Tensor, u: Tensor, kind: str, seed: Tensor | None = None, bias_grad: bool = False
) -> tuple[Tensor, ...]:
    check_activation_backward_compress(dh, u, kind, seed)
    library, *place = where(u)
    if library is None or not has_kernel(u) or u.numel() == 0:
        *forms, du = reference.activation_backward_compress(dh, u, kind, seed)
        return *forms, bias_gradient(du).float() if bias_grad else du.new_empty(0, dtype=torch.float32)
    dh, u, (packed, packed_t, E_t, scale) = as_row_major(dh), as_row_major(u), _empty_forms(u, seed)
    sums = empty_tile_sums(u) if bias_grad else None
    forms = packed_fields(packed, None, scale), _along_tokens(seed, packed_t, E_t)
    library.activation_pack_backward(KINDS[kind], matrix(dh), matrix(u), *forms, pointer(sums), *place)
    return packed, packed_t, E_t, scale, scale.new_empty(0) if sums is None else sums.sum(0)


def _fake_backward(
    dh: Tensor, u: Tensor, kind: str, seed: Tensor | None = None, bias_grad: bool = False
) -> tuple[Tensor, ...]:
    check_activation_backward_compress(dh, u, kind, seed)
    return *_empty_forms(u, seed), u.new_empty(u.shape[1] if bias_grad else 0, dtype=torch.float32)


_op_backward = define_op(
    "activation_backward_compress_float8",
    "(Tensor dh, Tensor u, str kind, Tensor? seed=None, bool bias_grad=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


@names_wrong_types
def activation_backward_compress_float8(
    dh: Tensor, u: Tensor, kind: str, seed: Tensor | None = None, bias_grad: bool = False
) -> tuple[Tensor, ...]:
    """`ops.activation_backward_compress` in e4m3: (packed, packed_t, E_t, scale, db).

    Operands as there; forms and rounding as in `activation_compress_float8`, of the pruned du, whose metadata along
    features is that of h; scale is `scale_of` its largest finite magnitude. db is made of du in u's dtype, before it is
    cast. Raises as both do.
    Source: arXiv 2503.16672.
    """
    args = (dh, u, kind, seed, bias_grad)
    return call_without_grad("float8.activation_backward_compress_float8", _REMEDY, _op_backward, args)
