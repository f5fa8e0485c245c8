"""Activations of a feed-forward layer: gated (`act(gate) * up`) and plain, forward, backward, backward with MVUE."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..errors import Sparse24Error
from ..formats import WEIGHT_DTYPES, as_major
from ._common import call_without_grad, check_same_device, check_weight_dtype, define_op, matrix, where
from .arguments import names_wrong_types
from .mvue import check_seed, empty_bias_grad, empty_mvue, empty_tile_sums, has_kernel, mvue_fields

#: names of activations -> codes of the C++ library
KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "squared_relu": 4, "identity": 5}


def check_input(gate_up: Tensor, kind: str, gated: bool) -> int:
    """Rules on the input; returns the width of h."""
    if gate_up.dim() == 0:
        raise Sparse24Error("the activation's input must have at least one dimension, got a scalar")
    if gate_up.dtype not in WEIGHT_DTYPES:
        check_weight_dtype(gate_up, "gate_up" if gated else "x")
    return width_of_h(gate_up.shape[-1], kind, gated)


def width_of_h(width: int, kind: str, gated: bool) -> int:
    """Of an activation of rows of `width`."""
    if kind not in KINDS:
        raise Sparse24Error(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if gated and width % 2:
        raise Sparse24Error(
            f"gate_up must hold two halves, [gate | up], in its last dimension, got an odd width {width}"
        )
    return width // 2 if gated else width


def _as_matrix(t: Tensor) -> Tensor:
    """[..., n] as a 2-D row- or column-major matrix; a copy only where strides allow neither."""
    return as_major(t if t.dim() == 2 else t.reshape(-1, t.shape[-1]))


def _empty_h(gate_up: Tensor, width: int, column_major: bool) -> Tensor:
    if column_major:
        return gate_up.new_empty((width, *gate_up.shape[:-1])).movedim(0, -1)
    return gate_up.new_empty((*gate_up.shape[:-1], width))


def compute_activation(gate_up: Tensor, kind: str, gated: bool, column_major: bool = False) -> Tensor:
    width = check_input(gate_up, kind, gated)
    library, *place = where(gate_up)
    if library is None:
        h = reference.gated_activation(gate_up, kind, gated)
        return _empty_h(gate_up, width, column_major).copy_(h)
    h = _empty_h(gate_up, width, column_major)
    if h.numel() == 0:
        return h
    rows = h.reshape(-1, width) if h.dim() != 2 else h  # a view: h's leading dimensions are dense
    source = _as_matrix(gate_up)  # it may be a copy, which must live until the kernel has been called
    library.activation_forward(KINDS[kind], gated, matrix(source), matrix(rows), None, None, *place)
    return h


def _forward_fake(gate_up: Tensor, kind: str, gated: bool, column_major: bool) -> Tensor:
    return _empty_h(gate_up, check_input(gate_up, kind, gated), column_major)


_op_forward = define_op(
    "activation",
    "(Tensor gate_up, str kind, bool gated, bool column_major) -> Tensor",
    compute_activation,
    _forward_fake,
)


@names_wrong_types
def gated_activation(gate_up: Tensor, kind: str = "silu", *, column_major: bool = False) -> Tensor:
    """h = act(gate) * up, with gate_up = [gate | up] in this order.

    gate_up       (..., 2*d_ff) fp32, bf16 or fp16; a 2-D one may be row- or column-major, others are read as rows
    kind          "silu" (SwiGLU), "gelu" (erf), "gelu_tanh", "relu", "squared_relu"; "identity" gives x, exactly
    column_major  lay h out with tokens contiguous instead of features
    returns       (..., d_ff) in gate_up's dtype; fp32 arithmetic inside

    Differentiable form: `functional.gated_activation`. Raises Sparse24Error for an unknown kind, a scalar and an odd
    last dimension; Sparse24DtypeError for another dtype.
    """
    return call_without_grad(
        "gated_activation", "functional.gated_activation", _op_forward, (gate_up, kind, True, column_major)
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


def check_backward(dh: Tensor, gate_up: Tensor, kind: str, gated: bool) -> int:
    width = check_input(gate_up, kind, gated)
    if dh.shape != (*gate_up.shape[:-1], width) or dh.dtype != gate_up.dtype:
        raise Sparse24Error(
            f"dh must have shape {(*gate_up.shape[:-1], width)} and dtype {gate_up.dtype}, got {tuple(dh.shape)} and "
            f"{dh.dtype}"
        )
    if dh.device != gate_up.device:
        check_same_device(gate_up, "gate_up", dh=dh)
    return width


def _empty_backward(gate_up: Tensor, width: int, recompute_h: bool, column_major: bool) -> tuple[Tensor, Tensor]:
    h = _empty_h(gate_up, width, column_major) if recompute_h else gate_up.new_empty(0)
    return _empty_h(gate_up, gate_up.shape[-1], column_major), h


def _backward(
    dh: Tensor, gate_up: Tensor, kind: str, gated: bool, recompute_h: bool, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    d_gate_up, h = _empty_backward(gate_up, check_backward(dh, gate_up, kind, gated), recompute_h, column_major)
    library, *place = where(gate_up)
    if library is None:
        result, result_h = reference.gated_activation_backward(dh, gate_up, kind, gated)
        return d_gate_up.copy_(result), h.copy_(result_h) if recompute_h else h
    if d_gate_up.numel() == 0:
        return d_gate_up, h
    dh, gate_up = _as_matrix(dh), _as_matrix(gate_up)
    # Views: leading dimensions of results are dense.
    operands = matrix(dh), matrix(gate_up), matrix(d_gate_up.reshape(gate_up.shape))
    rows_h = matrix(h.reshape(dh.shape)) if recompute_h else None
    library.activation_backward(KINDS[kind], gated, *operands, rows_h, None, None, 0, *place)
    return d_gate_up, h


def _backward_fake(
    dh: Tensor, gate_up: Tensor, kind: str, gated: bool, recompute_h: bool, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    return _empty_backward(gate_up, check_backward(dh, gate_up, kind, gated), recompute_h, column_major)


_op_backward = define_op(
    "activation_backward",
    "(Tensor dh, Tensor gate_up, str kind, bool gated, bool recompute_h, bool column_major=False) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


@names_wrong_types
def gated_activation_backward(
    dh: Tensor, gate_up: Tensor, kind: str = "silu", *, recompute_h: bool = False, column_major: bool = False
):
    """d_gate_up = [d_gate | d_up] from dh and gate_up; with `recompute_h`, the pair (d_gate_up, h) from the same read.

    dh            (..., d_ff), gate_up (..., 2*d_ff), one dtype; each row- or column-major where 2-D
    column_major  lay d_gate_up and h out with tokens contiguous instead of features
    returns       d_gate_up (..., 2*d_ff), and h (..., d_ff)

    Raises as `gated_activation`, and Sparse24Error for a dh whose shape, dtype or device is not that of h.
    """
    args = (dh, gate_up, kind, True, recompute_h, column_major)
    d_gate_up, h = call_without_grad("gated_activation_backward", "functional.gated_activation", _op_backward, args)
    return (d_gate_up, h) if recompute_h else d_gate_up


@names_wrong_types
def activation_backward(
    dh: Tensor, x: Tensor, kind: str = "gelu_tanh", *, recompute_h: bool = False, column_major: bool = False
):
    """dx of `activation`; arguments, results and errors as `gated_activation_backward`, without a gate."""
    args = (dh, x, kind, False, recompute_h, column_major)
    d_x, h = call_without_grad("activation_backward", "functional.activation", _op_backward, args)
    return (d_x, h) if recompute_h else d_x


def _check_backward_mvue(dh: Tensor, gate_up: Tensor, kind: str, gated: bool, seed: Tensor) -> int:
    if gate_up.dim() != 2:
        raise Sparse24Error(f"gate_up must be 2-D, (tokens, width), got shape {tuple(gate_up.shape)}; flatten it first")
    check_seed(seed, gate_up)
    return check_backward(dh, gate_up, kind, gated)


def _backward_mvue(dh, gate_up, kind, gated, seed, recompute_h, bias_grad) -> tuple[Tensor, ...]:
    _check_backward_mvue(dh, gate_up, kind, gated, seed)
    results = compute_backward_mvue(dh, gate_up, kind, gated, seed, recompute_h, bias_grad)
    return tuple(gate_up.new_empty(0) if t is None else t for t in results)


def compute_backward_mvue(dh, gate_up, kind, gated, seed, recompute_h, bias_grad) -> tuple[Tensor | None, ...]:
    """(d_gate_up, packed, E, h, bias_grad) of operands that have been checked; None where they are not wanted."""
    library, *place = where(gate_up)
    if library is None or not has_kernel(gate_up):
        if library is None:
            d_gate_up, h = reference.gated_activation_backward(dh, gate_up, kind, gated)
            d_gate_up, h = d_gate_up.contiguous(), h.contiguous()
        else:
            d_gate_up, h = _backward(dh, gate_up, kind, gated, recompute_h)
        db = reference.bias_gradient(d_gate_up) if bias_grad else None
        return d_gate_up, *reference.mvue_compress(d_gate_up, seed), h if recompute_h else None, db
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    packed, E = empty_mvue(gate_up)
    h = gate_up.new_empty(dh.shape) if recompute_h else None
    tile_sums = empty_tile_sums(gate_up) if bias_grad else None
    if d_gate_up.numel():
        dh, gate_up = as_major(dh), as_major(gate_up)
        operands = matrix(dh), matrix(gate_up), matrix(d_gate_up)
        rows_h, sums_pointer = matrix(h) if recompute_h else None, tile_sums.data_ptr() if bias_grad else 0
        mvue = mvue_fields(seed, packed, E)
        library.activation_backward(KINDS[kind], gated, *operands, rows_h, None, mvue, sums_pointer, *place)
    # Without tokens there are no tiles, and their sum is zero.
    return d_gate_up, packed, E, h, None if tile_sums is None else tile_sums.sum(0)


def fake_backward_mvue(dh, gate_up, kind, gated, seed, recompute_h, bias_grad) -> tuple[Tensor, ...]:
    width = _check_backward_mvue(dh, gate_up, kind, gated, seed)
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    h = gate_up.new_empty((gate_up.shape[0], width) if recompute_h else 0)
    db = empty_bias_grad(gate_up) if bias_grad else gate_up.new_empty(0)
    return d_gate_up, *empty_mvue(gate_up), h, db


_op_backward_mvue = define_op(
    "activation_backward_mvue",
    "(Tensor dh, Tensor gate_up, str kind, bool gated, Tensor seed, bool recompute_h, bool bias_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_mvue,
    fake_backward_mvue,
)


def _results(out: tuple[Tensor, ...], recompute_h: bool, bias_grad: bool) -> tuple[Tensor, ...]:
    d_gate_up, packed, E, h, db = out
    return (d_gate_up, packed, E, *(h,) * recompute_h, *(db,) * bias_grad)


@names_wrong_types
def gated_activation_backward_mvue(
    dh: Tensor, gate_up: Tensor, kind: str, seed: Tensor, *, recompute_h: bool = False, bias_grad: bool = False
) -> tuple[Tensor, ...]:
    """(d_gate_up, packed, E): the gradient twice from one read, dense and MVUE-packed for the weight gradient.

    dh (tokens, d_ff), gate_up (tokens, 2*d_ff), seed int64 (2,). packed and E are equal, bit for bit, to
    `mvue_compress(d_gate_up, seed)`. With `recompute_h` follows h (tokens, d_ff), with `bias_grad` then the sums of
    d_gate_up over its tokens, (2*d_ff,) fp32.

    Raises as `gated_activation_backward`, and Sparse24Error for a gate_up that is not 2-D or a seed on another device;
    Sparse24DtypeError for a seed that is not two int64.
    """
    args = (dh, gate_up, kind, True, seed, recompute_h, bias_grad)
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
