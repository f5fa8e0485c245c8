"""Activations of a feed-forward layer: gated (`act(gate) * up`) and plain, forward, backward, backward with MVUE."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..errors import Sparse24Error
from ..formats import DTYPE_CODE, as_major
from ._common import call_without_grad, check_same_device, check_weight_dtype, define_op, where
from .arguments import names_wrong_types
from .mvue import check_seed, empty_bias_grad, empty_mvue, empty_tile_sums, has_kernel

#: names of activations -> codes of the C++ library
KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "squared_relu": 4, "identity": 5}


def _check(gu: Tensor, kind: str, gated: bool) -> int:
    """Rules on the input; returns the width of h."""
    if kind not in KINDS:
        raise Sparse24Error(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if gu.dim() == 0:
        raise Sparse24Error("the activation's input must have at least one dimension, got a scalar")
    check_weight_dtype(gu, "gu" if gated else "x")
    width = gu.shape[-1]
    if gated and width % 2:
        raise Sparse24Error(f"gu must hold two halves, [gate | up], in its last dimension, got an odd width {width}")
    return width // 2 if gated else width


def _as_matrix(t: Tensor) -> Tensor:
    """[..., n] as a 2-D row- or column-major matrix; a copy only where strides allow neither."""
    return as_major(t if t.dim() == 2 else t.reshape(-1, t.shape[-1]))


def _empty_h(gu: Tensor, width: int, column_major: bool) -> Tensor:
    if column_major:
        return gu.new_empty((width, *gu.shape[:-1])).movedim(0, -1)
    return gu.new_empty((*gu.shape[:-1], width))


def _forward(gu: Tensor, kind: str, gated: bool, column_major: bool) -> Tensor:
    width = _check(gu, kind, gated)
    library, *place = where(gu)
    if library is None:
        h = reference.gated_activation(gu, kind, gated)
        return _empty_h(gu, width, column_major).copy_(h)
    h = _empty_h(gu, width, column_major)
    if h.numel() == 0:
        return h
    matrix = _as_matrix(gu)
    rows = h.reshape(-1, width) if h.dim() != 2 else h  # a view: h's leading dimensions are dense
    library.activation_forward(
        KINDS[kind], gated, matrix.data_ptr(), DTYPE_CODE[gu.dtype], *matrix.shape, *matrix.stride(),
        rows.data_ptr(), *rows.stride(), *place,
    )  # fmt: skip
    return h


def _forward_fake(gu: Tensor, kind: str, gated: bool, column_major: bool) -> Tensor:
    return _empty_h(gu, _check(gu, kind, gated), column_major)


_op_forward = define_op(
    "activation", "(Tensor gu, str kind, bool gated, bool column_major) -> Tensor", _forward, _forward_fake
)


@names_wrong_types
def gated_activation(gu: Tensor, kind: str = "silu", *, column_major: bool = False) -> Tensor:
    """h = act(gate) * up, with gu = [gate | up] in this order.

    gu            (..., 2*d_ff) fp32, bf16 or fp16; a 2-D gu may be row- or column-major, others are read as rows
    kind          "silu" (SwiGLU), "gelu" (erf), "gelu_tanh", "relu", "squared_relu"; "identity" gives x, exactly
    column_major  lay h out with tokens contiguous instead of features
    returns       (..., d_ff) in gu's dtype; fp32 arithmetic inside

    Differentiable form: `functional.gated_activation`. Raises Sparse24Error for an unknown kind, a scalar and an odd
    last dimension; Sparse24DtypeError for another dtype.
    """
    return call_without_grad(
        "gated_activation", "functional.gated_activation", _op_forward, (gu, kind, True, column_major)
    )


@names_wrong_types
def activation(x: Tensor, kind: str = "gelu_tanh", *, column_major: bool = False) -> Tensor:
    """act(x) without a gate, for feed-forward layers such as GPT-2's; arguments as `gated_activation`, x of any width.

    Raises Sparse24Error for an unknown kind and a scalar, Sparse24DtypeError for another dtype.
    """
    return call_without_grad("activation", "functional.activation", _op_forward, (x, kind, False, column_major))


@names_wrong_types
def column_major_copy(t: Tensor) -> Tensor:
    """The same values, (..., n), bit for bit, with all but the last dimension contiguous in memory.

    Raises Sparse24Error for a scalar, Sparse24DtypeError for a dtype that activations do not take.
    """
    return call_without_grad("column_major_copy", "torch's clone", _op_forward, (t, "identity", False, True))


def _check_backward(dh: Tensor, gu: Tensor, kind: str, gated: bool) -> int:
    width = _check(gu, kind, gated)
    if tuple(dh.shape) != (*gu.shape[:-1], width) or dh.dtype != gu.dtype:
        raise Sparse24Error(
            f"dh must have shape {(*gu.shape[:-1], width)} and dtype {gu.dtype}, got {tuple(dh.shape)} and {dh.dtype}"
        )
    check_same_device(gu, "gu", dh=dh)
    return width


def _empty_backward(gu: Tensor, width: int, recompute_h: bool, column_major: bool) -> tuple[Tensor, Tensor]:
    h = _empty_h(gu, width, column_major) if recompute_h else gu.new_empty(0)
    return _empty_h(gu, gu.shape[-1], column_major), h


def _backward(
    dh: Tensor, gu: Tensor, kind: str, gated: bool, recompute_h: bool, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    d_gu, h = _empty_backward(gu, _check_backward(dh, gu, kind, gated), recompute_h, column_major)
    library, *place = where(gu)
    if library is None:
        result, result_h = reference.gated_activation_backward(dh, gu, kind, gated)
        return d_gu.copy_(result), h.copy_(result_h) if recompute_h else h
    if d_gu.numel() == 0:
        return d_gu, h
    _run_backward(library, place, kind, gated, dh, gu, d_gu, h if recompute_h else None)
    return d_gu, h


def _run_backward(library, place, kind, gated, dh, gu, d_gu, h, seed=None, packed=None, E=None, tile_sums=None) -> None:
    dh, gu = _as_matrix(dh), _as_matrix(gu)
    d_gu = d_gu.reshape(gu.shape)  # views: leading dimensions of results are dense
    h_place = (0, 0, 0)
    if h is not None:
        h = h.reshape(dh.shape)
        h_place = (h.data_ptr(), *h.stride())
    mvue = (0, 0, 0, 0)
    if seed is not None:
        mvue = (seed.data_ptr(), packed.data_ptr(), E.data_ptr(), 0 if tile_sums is None else tile_sums.data_ptr())
    library.activation_backward(
        KINDS[kind], gated, dh.data_ptr(), DTYPE_CODE[dh.dtype], *dh.shape, *dh.stride(), gu.data_ptr(), *gu.stride(),
        d_gu.data_ptr(), *d_gu.stride(), *h_place, *mvue, *place,
    )  # fmt: skip


def _backward_fake(
    dh: Tensor, gu: Tensor, kind: str, gated: bool, recompute_h: bool, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    return _empty_backward(gu, _check_backward(dh, gu, kind, gated), recompute_h, column_major)


_op_backward = define_op(
    "activation_backward",
    "(Tensor dh, Tensor gu, str kind, bool gated, bool recompute_h, bool column_major=False) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


@names_wrong_types
def gated_activation_backward(
    dh: Tensor, gu: Tensor, kind: str = "silu", *, recompute_h: bool = False, column_major: bool = False
):
    """d_gu = [d_gate | d_up] from dh and gu; with `recompute_h`, the pair (d_gu, h) from the same read.

    dh            (..., d_ff), gu (..., 2*d_ff), one dtype; each row- or column-major where 2-D
    column_major  lay d_gu and h out with tokens contiguous instead of features
    returns       d_gu (..., 2*d_ff), and h (..., d_ff)

    Raises as `gated_activation`, and Sparse24Error for a dh whose shape, dtype or device is not that of h.
    """
    args = (dh, gu, kind, True, recompute_h, column_major)
    d_gu, h = call_without_grad("gated_activation_backward", "functional.gated_activation", _op_backward, args)
    return (d_gu, h) if recompute_h else d_gu


@names_wrong_types
def activation_backward(
    dh: Tensor, x: Tensor, kind: str = "gelu_tanh", *, recompute_h: bool = False, column_major: bool = False
):
    """dx of `activation`; arguments, results and errors as `gated_activation_backward`, without a gate."""
    args = (dh, x, kind, False, recompute_h, column_major)
    d_x, h = call_without_grad("activation_backward", "functional.activation", _op_backward, args)
    return (d_x, h) if recompute_h else d_x


def _check_backward_mvue(dh: Tensor, gu: Tensor, kind: str, gated: bool, seed: Tensor) -> int:
    if gu.dim() != 2:
        raise Sparse24Error(f"gu must be 2-D, (tokens, width), got shape {tuple(gu.shape)}; flatten it first")
    check_seed(seed, gu)
    return _check_backward(dh, gu, kind, gated)


def _backward_mvue(dh, gu, kind, gated, seed, recompute_h, bias_grad) -> tuple[Tensor, ...]:
    width = _check_backward_mvue(dh, gu, kind, gated, seed)
    library, *place = where(gu)
    if library is None or not has_kernel(gu):
        if library is None:
            d_gu, h = reference.gated_activation_backward(dh, gu, kind, gated)
            d_gu, h = d_gu.contiguous(), h.contiguous() if recompute_h else gu.new_empty(0)
        else:
            d_gu, h = _backward(dh, gu, kind, gated, recompute_h)
        db = reference.bias_gradient(d_gu) if bias_grad else gu.new_empty(0)
        return d_gu, *reference.mvue_compress(d_gu, seed), h, db
    d_gu = torch.empty_like(gu, memory_format=torch.contiguous_format)
    packed, E = empty_mvue(*gu.shape, gu.dtype, gu.device)
    h = gu.new_empty((gu.shape[0], width) if recompute_h else 0)
    tile_sums = empty_tile_sums(gu) if bias_grad else None
    if d_gu.numel():
        h_or_none = h if recompute_h else None
        _run_backward(library, place, kind, gated, dh, gu, d_gu, h_or_none, seed, packed, E, tile_sums)
    # Without tokens there are no tiles, and their sum is zero.
    return d_gu, packed, E, h, gu.new_empty(0) if tile_sums is None else tile_sums.sum(0)


def _backward_mvue_fake(dh, gu, kind, gated, seed, recompute_h, bias_grad) -> tuple[Tensor, ...]:
    width = _check_backward_mvue(dh, gu, kind, gated, seed)
    d_gu = torch.empty_like(gu, memory_format=torch.contiguous_format)
    h = gu.new_empty((gu.shape[0], width) if recompute_h else 0)
    db = empty_bias_grad(gu) if bias_grad else gu.new_empty(0)
    return d_gu, *empty_mvue(*gu.shape, gu.dtype, gu.device), h, db


_op_backward_mvue = define_op(
    "activation_backward_mvue",
    "(Tensor dh, Tensor gu, str kind, bool gated, Tensor seed, bool recompute_h, bool bias_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_mvue,
    _backward_mvue_fake,
)


def _results(out: tuple[Tensor, ...], recompute_h: bool, bias_grad: bool) -> tuple[Tensor, ...]:
    d_gu, packed, E, h, db = out
    return (d_gu, packed, E, *(h,) * recompute_h, *(db,) * bias_grad)


@names_wrong_types
def gated_activation_backward_mvue(
    dh: Tensor, gu: Tensor, kind: str, seed: Tensor, *, recompute_h: bool = False, bias_grad: bool = False
) -> tuple[Tensor, ...]:
    """(d_gu, packed_dgu, E_dgu): the gradient twice from one read, dense and MVUE-packed for the weight gradient.

    dh (tokens, d_ff), gu (tokens, 2*d_ff), seed int64 (2,). packed and E are equal, bit for bit, to
    `mvue_compress(d_gu, seed)`. With `recompute_h` follows h (tokens, d_ff), with `bias_grad` then the sums of d_gu
    over its tokens, (2*d_ff,) fp32.

    Raises as `gated_activation_backward`, and Sparse24Error for a gu that is not 2-D or a seed on another device;
    Sparse24DtypeError for a seed that is not two int64.
    """
    args = (dh, gu, kind, True, seed, recompute_h, bias_grad)
    out = call_without_grad("gated_activation_backward_mvue", "functional.gated_mlp", _op_backward_mvue, args)
    return _results(out, recompute_h, bias_grad)


@names_wrong_types
def activation_backward_mvue(
    dh: Tensor, x: Tensor, kind: str, seed: Tensor, *, recompute_h: bool = False, bias_grad: bool = False
) -> tuple[Tensor, ...]:
    """The same for a plain activation: (d_x, packed, E), then h and bias_grad where asked for. Errors as there."""
    args = (dh, x, kind, False, seed, recompute_h, bias_grad)
    out = call_without_grad("activation_backward_mvue", "functional.mlp", _op_backward_mvue, args)
    return _results(out, recompute_h, bias_grad)
