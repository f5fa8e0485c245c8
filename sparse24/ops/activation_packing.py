"""Activations pruned to 2:4, packed for sparse products: behind a (squared) ReLU most of h is zero anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..errors import Sparse24Error
from ..formats import BLOCK, DTYPE_CODE, is_row_major, metadata_bytes
from ._common import (
    call_without_grad,
    check_same_device,
    check_weight_dtype,
    define_op,
    matrix,
    pointer,
    where,
)
from .activations import KINDS
from .arguments import names_wrong_types
from .mvue import check_seed, empty_bias_grad, empty_mvue, empty_tile_sums, has_kernel, mvue_fields

#: those that make zeros
PRUNED_KINDS = ("relu", "squared_relu")


def check_activation_compress(u: Tensor, kind: str, seed: Tensor | None) -> None:
    if u.dim() != 2:
        raise Sparse24Error(f"u must be 2-D, (tokens, d_ff), got shape {tuple(u.shape)}; flatten it first")
    check_weight_dtype(u, "u")
    if kind not in PRUNED_KINDS:
        raise Sparse24Error(
            f"kind must be {' or '.join(PRUNED_KINDS)}, got {kind!r}: other activations make no zeros, so pruning them "
            "to 2:4 would lose half of h"
        )
    if u.shape[1] % BLOCK:
        raise Sparse24Error(
            f"u must have features in multiples of {BLOCK}, got {u.shape[1]} in shape {tuple(u.shape)}; keep such a "
            "layer's activations dense"
        )
    if seed is not None:
        check_seed(seed, u, "u")


def packed_fields(packed: Tensor, E: Tensor | None = None, scale: Tensor | None = None) -> tuple[int, ...]:
    """The form along features, as the binding takes it."""
    return packed.data_ptr(), DTYPE_CODE[packed.dtype], pointer(E), pointer(scale)


def as_row_major(t: Tensor) -> Tensor:
    return t if is_row_major(t) else t.contiguous()


def _empty_rows(u: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1] // 2)


def _empty_E(u: Tensor) -> Tensor:
    return u.new_empty(metadata_bytes(*u.shape), dtype=torch.uint8)


def _empty_columns(u: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for packed_t and E_t."""
    return empty_mvue(u) if seed is not None else (u.new_empty(0), u.new_empty(0, dtype=torch.uint8))


def _compress(u: Tensor, kind: str, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_activation_compress(u, kind, seed)
    return compute_activation_compress(u, kind, seed)


def compute_activation_compress(u: Tensor, kind: str, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of operands that have been checked."""
    library, *place = where(u)
    if library is None or not has_kernel(u):
        return reference.activation_compress(u, kind, seed)
    packed, E, (packed_t, E_t) = _empty_rows(u), _empty_E(u), _empty_columns(u, seed)
    if u.numel():
        u = as_row_major(u)
        along_tokens = None if seed is None else mvue_fields(seed, packed_t, E_t)
        library.activation_pack(KINDS[kind], matrix(u), packed_fields(packed, E), along_tokens, *place)
    return packed, E, packed_t, E_t


def fake_activation_compress(u: Tensor, kind: str, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_activation_compress(u, kind, seed)
    return _empty_rows(u), _empty_E(u), *_empty_columns(u, seed)


_op_compress = define_op(
    "activation_compress",
    "(Tensor u, str kind, Tensor? seed=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _compress,
    fake_activation_compress,
)


@names_wrong_types
def activation_compress(u: Tensor, kind: str, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h = act(u), pruned to 2:4 along features by size, and packed: (packed, E, packed_t, E_t).

    u            (tokens, d_ff) fp32, bf16 or fp16, any strides; any number of tokens, d_ff a multiple of 4
    kind         "relu" or "squared_relu", which make the zeros that pruning drops
    seed         int64 (2,) on u's device, as `mvue_compress` takes it; None: packed_t and E_t are empty
    packed, E    (tokens, d_ff/2) in u's dtype and metadata for (tokens, d_ff): what a product over d_ff reads
    packed_t, E_t  (padded_tokens/2, d_ff) and metadata for (d_ff, padded_tokens): the pruned h pruned again along
                 tokens, unbiased, with the bits of `mvue_compress(pruned h, seed)`: what a product over tokens reads

    Of four neighbouring features the two largest of max(u, 0) are kept, of equal ones the lower index first; NaN of
    either sign counts as larger than Inf. So a group without a positive value keeps places 0 and 1, of value 0. h is
    rounded to u's dtype as `activation` rounds it; equal on CPU and GPU.
    Raises Sparse24Error for another kind, a u that is not 2-D or whose d_ff is no multiple of 4, and a seed on another
    device; Sparse24DtypeError for u's dtype, and for a seed that is not two int64.
    Source: arXiv 2503.16672 (Haziza et al.: activations behind a squared ReLU, pruned to 2:4).
    """
    return call_without_grad("activation_compress", "functional.activation", _op_compress, (u, kind, seed))


# ---- backward -------------------------------------------------------------------------------------------------------


def check_activation_backward_compress(dh: Tensor, u: Tensor, kind: str, seed: Tensor | None) -> None:
    check_activation_compress(u, kind, seed)
    if dh.shape != u.shape or dh.dtype != u.dtype:
        raise Sparse24Error(
            f"dh must have shape {tuple(u.shape)} and dtype {u.dtype}, as u has, got {tuple(dh.shape)} and {dh.dtype}"
        )
    if dh.device != u.device:
        check_same_device(u, "u", dh=dh)


def _backward(
    dh: Tensor, u: Tensor, kind: str, seed: Tensor | None = None, bias_grad: bool = False
) -> tuple[Tensor, ...]:
    check_activation_backward_compress(dh, u, kind, seed)
    return compute_activation_backward_compress(dh, u, kind, seed, bias_grad)


def compute_activation_backward_compress(
    dh: Tensor, u: Tensor, kind: str, seed: Tensor | None, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of operands that have been checked."""
    library, *place = where(u)
    if library is None or not has_kernel(u):
        return reference.activation_backward_compress(dh, u, kind, seed, bias_grad)
    packed, (packed_t, E_t) = _empty_rows(u), _empty_columns(u, seed)
    tile_sums = empty_tile_sums(u) if bias_grad else None
    if u.numel():
        dh, u = as_row_major(dh), as_row_major(u)
        along_tokens = None if seed is None else mvue_fields(seed, packed_t, E_t)
        operands, sums_pointer = (matrix(dh), matrix(u), packed_fields(packed)), pointer(tile_sums)
        library.activation_pack_backward(KINDS[kind], *operands, along_tokens, sums_pointer, *place)
    # Without tokens there are no tiles, and their sum is zero.
    return packed, packed_t, E_t, empty_bias_grad(u).new_empty(0) if tile_sums is None else tile_sums.sum(0)


def fake_activation_backward_compress(
    dh: Tensor, u: Tensor, kind: str, seed: Tensor | None = None, bias_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_activation_backward_compress(dh, u, kind, seed)
    db = empty_bias_grad(u)
    return _empty_rows(u), *_empty_columns(u, seed), db if bias_grad else db.new_empty(0)


_op_backward = define_op(
    "activation_backward_compress",
    "(Tensor dh, Tensor u, str kind, Tensor? seed=None, bool bias_grad=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake_activation_backward_compress,
)


@names_wrong_types
def activation_backward_compress(
    dh: Tensor, u: Tensor, kind: str, seed: Tensor | None = None, bias_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """du of `activation_compress`, at the places that it keeps, packed: (packed, packed_t, E_t, db).

    dh, u        (tokens, d_ff) in one dtype; u, kind and seed as in `activation_compress`
    packed       (tokens, d_ff/2): du = dh act'(u) at the places that forward kept, found again in u. Its metadata is
                 the E of `activation_compress(u, kind)`
    packed_t, E_t  as there: the bits of `mvue_compress(pruned du, seed)`, where du is exactly 0 at all other places,
                 whatever dh is there; empty without a seed
    bias_grad    db is the sum of the pruned du over its tokens, (d_ff,) fp32; otherwise it is empty

    du is rounded to u's dtype as `activation_backward` rounds it; equal on CPU and GPU.
    Raises as `activation_compress`, and Sparse24Error for a dh whose shape, dtype or device is not u's.
    Source: arXiv 2503.16672.
    """
    args = (dh, u, kind, seed, bias_grad)
    return call_without_grad("activation_backward_compress", "functional.activation", _op_backward, args)
