"""A whole feed-forward layer of 8-bit products by one op for its forward pass and one for its backward.

As `ops/feed_forward.py` does for 16 bits, with the bits and the errors of the single ops. Layers whose scales are not
known yet, or with another backward, are put together from the single ops, in `functional`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Sparse24DtypeError
from ...formats import padded_tokens
from .. import flops
from .._common import define_op
from ..activations import check_input, width_of_h
from ..arguments import check_writable, names_wrong_types
from ..feed_forward import BackwardOptions, empty_gradients
from ..gemm.weight_gradient import compute_grad_weight
from ..mvue import check_seeds, compute_seeds
from .activations import compute_activation_quantize
from .casts import compute_quantize
from .gradients import compute_activation_backward_quantize, compute_mvue_quantize
from .operands import E4M3, Cast, check_cast, check_scale_and_notes, empty_float8
from .products import (
    Weight,
    check_dense,
    check_grad_weight,
    check_out_dtype,
    check_weight,
    compute_grad_weight_float8,
    compute_sparse_mm_float8,
)

_Input = tuple[Tensor, Tensor]  # of a weight gradient: 16 bits, or 8 bits and transposed; and the scale

# ---- forward --------------------------------------------------------------------------------------------------------


def _check_forward(x, up: Weight, down: Weight, activation, biases, casts) -> int:
    """All rules at once; what forward makes of its operands fits by itself. Returns the width of h."""
    check_cast(x, casts[0])
    rows = up[0].shape[0]
    check_weight(x, up, rows, x.shape[1], biases[0])
    check_out_dtype(x.dtype, x)
    d_ff = width_of_h(rows, *activation)
    check_scale_and_notes(x, casts[1])
    check_weight(x, down, down[0].shape[0], d_ff, biases[1])
    return d_ff


def _forward(x, up, down, kind, gated, bias_up, bias_down, full, keep_x, keep_h, *casts) -> tuple[Tensor, ...]:
    cast_x, cast_h = casts[:3], casts[3:]
    _check_forward(x, up, down, (kind, gated), (bias_up, bias_down), (cast_x, cast_h))
    # gate_up = x8 (M.W_up)^T, h = act(gate) * up; y = h8 (M.W_down)^T
    x8, x8_t = compute_quantize(x, cast_x, True, full and keep_x)
    gate_up = compute_sparse_mm_float8(x8, cast_x[0], up, bias_up, x.dtype)
    del x8
    h, h8, h8_t = compute_activation_quantize(gate_up, kind, gated, cast_h, keep_h and not full, keep_h and full)
    return compute_sparse_mm_float8(h8, cast_h[0], down, bias_down, x.dtype), gate_up, x8_t, h8_t if full else h


def _fake_forward(x, up, down, kind, gated, bias_up, bias_down, full, keep_x, keep_h, *casts) -> tuple[Tensor, ...]:
    d_ff = _check_forward(x, up, down, (kind, gated), (bias_up, bias_down), (casts[:3], casts[3:]))
    tokens, d_model = x.shape
    y, gate_up = (x.new_empty((tokens, packed.shape[0])) for packed, *_ in (down, up))
    _, x8_t = empty_float8(x, tokens, d_model, False, full and keep_x)
    if not full:
        return y, gate_up, x8_t, x.new_empty((tokens, d_ff) if keep_h else 0)
    return y, gate_up, x8_t, empty_float8(x, tokens, d_ff, False, keep_h)[1]


_op_feed_forward = define_op(
    "feed_forward_float8",
    "(Tensor x, Tensor[] up, Tensor[] down, str kind, bool gated, Tensor? bias_up, Tensor? bias_down, bool full, "
    "bool keep_x, bool keep_h, Tensor x_scale, Tensor(a!)? x_amax, Tensor(b!)? x_counts, Tensor h_scale, "
    "Tensor(c!)? h_amax, Tensor(d!)? h_counts) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)


@names_wrong_types
def feed_forward_float8(
    x: Tensor,
    up: Weight,
    down: Weight,
    activation: tuple[str, bool],
    biases: tuple[Tensor | None, Tensor | None],
    keeps: tuple[bool, bool, bool],
    casts: tuple[Cast, Cast],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, gate_up, x8_t, h): `quantize`, `sparse_mm_float8`, `activation_quantize` and `sparse_mm_float8` in turn.

    x           (tokens, d_model); y and gate_up have its dtype
    up, down    (packed, E, scale)
    activation  (kind, gated)
    keeps       (full, x, h): whether weight gradients are 8-bit products, and which inputs they will need. Where full,
                x8_t is made, and h is h8_t. What nobody needs is empty
    casts       of x and of h
    """
    return _op_feed_forward(x, up, down, *activation, *biases, *keeps, *casts[0], *casts[1])


# ---- backward -------------------------------------------------------------------------------------------------------


def _check_input(kept: _Input, name: str, dy: Tensor, features: int) -> None:
    x, scale = kept
    if x.dtype == E4M3:
        check_dense(x, scale, name)
        shape, dtype = (features, padded_tokens(dy.shape[0], E4M3)), E4M3
    else:
        shape, dtype = (dy.shape[0], features), dy.dtype
    if x.shape != shape or x.dtype != dtype or x.device != dy.device:
        raise Sparse24DtypeError(
            f"{name} must be {dtype} of shape {shape} on {dy.device}, got {x.dtype} of shape {tuple(x.shape)} on "
            f"{x.device}"
        )


def _check_backward(dy, gate_up, inputs, weights, activation, seeds, casts, out_dtype) -> int:
    """All rules at once; what backward makes of its operands fits by itself. Returns the width of h."""
    (x, h), (up, down) = inputs, weights
    check_cast(dy, casts[0])
    check_out_dtype(dy.dtype, dy)
    check_cast(gate_up, casts[1])
    d_ff = check_input(gate_up, *activation)
    check_weight(dy, down, d_ff, dy.shape[1], None)
    check_weight(dy, up, up[0].shape[0], gate_up.shape[1], None)
    if gate_up.shape[0] != dy.shape[0] or gate_up.dtype != dy.dtype or gate_up.device != dy.device:
        raise Sparse24DtypeError(
            f"dy and gate_up must be rows of the same tokens, of one dtype and device, got {dy.dtype} of shape "
            f"{tuple(dy.shape)} on {dy.device} and {gate_up.dtype} of shape {tuple(gate_up.shape)} on {gate_up.device}"
        )
    _check_input(x, "x", dy, up[0].shape[0])
    _check_input(h, "h", dy, d_ff)
    check_out_dtype(out_dtype, dy)
    if seeds is not None:
        check_seeds(seeds, dy)
    return d_ff


def _weight_gradient(dy: Weight, kept: _Input, out_dtype: torch.dtype, into: Tensor | None) -> Tensor | None:
    """MVUE(dy^T) x, or None where it was added to `into`."""
    (packed, E, _), (x, x_scale) = dy, kept
    if x.dtype != E4M3:
        return compute_grad_weight(packed, E, x, packed.shape[1], out_dtype, into)
    if into is not None:
        check_grad_weight(dy, x, x_scale, into)
        return compute_grad_weight_float8(dy, x, x_scale, into, True)
    dw = x.new_empty(packed.shape[0], x.shape[0], dtype=out_dtype)
    compute_grad_weight_float8(dy, x, x_scale, dw, False)
    return dw


def _backward(dy, gate_up, x, h, up, down, kind, gated, *options) -> tuple[Tensor, ...]:
    seeds, rank, need_x, bias_up, bias_down, out_dtype, into_up, into_down, *casts = options
    cast_dy, cast_d, activation, full = casts[:3], casts[3:], (kind, gated), h[0].dtype == E4M3
    _check_backward(dy, gate_up, (x, h), (up, down), activation, seeds, (cast_dy, cast_d), out_dtype)
    seed_down, seed_up = (compute_seeds(dy, 2, rank) if seeds is None else seeds).unbind()
    packed_dy, E_dy, dy8, db_down = compute_mvue_quantize(dy, seed_down, cast_dy, full, bias_down)
    dh = compute_sparse_mm_float8(dy8, cast_dy[0], down, None, dy.dtype)  # dh = dy8 (M.W_down)
    packed, E, d8, db_up = compute_activation_backward_quantize(dh, gate_up, activation, seed_up, cast_d, full, bias_up)
    del dh, dy8
    # dW_down = MVUE(dy^T) h, dW_up = MVUE(d_gate_up^T) x
    d_down = _weight_gradient((packed_dy, E_dy, cast_dy[0]), h, out_dtype, into_down)
    d_up = _weight_gradient((packed, E, cast_d[0]), x, out_dtype, into_up)
    # dx = d_gate_up8 (M.W_up)
    dx = compute_sparse_mm_float8(d8, cast_d[0], up, None, dy.dtype) if need_x else None
    return tuple([dy.new_empty(0) if t is None else t for t in (dx, d_up, d_down, db_up, db_down)])


def _fake_backward(dy, gate_up, x, h, up, down, kind, gated, *options) -> tuple[Tensor, ...]:
    seeds, _, need_x, bias_up, bias_down, out_dtype, into_up, into_down, *casts = options
    casts = (casts[:3], casts[3:])
    d_ff = _check_backward(dy, gate_up, (x, h), (up, down), (kind, gated), seeds, casts, out_dtype)
    wanted = (need_x, into_up is None, into_down is None, bias_up, bias_down)
    return empty_gradients(dy, gate_up, (up[0].shape[0], d_ff), wanted, out_dtype)


_op_feed_forward_backward = define_op(
    "feed_forward_float8_backward",
    "(Tensor dy, Tensor gate_up, Tensor[] x, Tensor[] h, Tensor[] up, Tensor[] down, str kind, bool gated, "
    "Tensor? seeds, int rank, bool need_x, bool bias_up, bool bias_down, ScalarType out_dtype, Tensor(a!)? into_up, "
    "Tensor(b!)? into_down, Tensor dy_scale, Tensor(c!)? dy_amax, Tensor(d!)? dy_counts, Tensor d_scale, "
    "Tensor(e!)? d_amax, Tensor(f!)? d_counts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    tags=(torch.Tag.nondeterministic_seeded,),
)
flops.register_feed_forward_float8()


@names_wrong_types
def feed_forward_float8_backward(
    dy: Tensor, saved: tuple[Tensor, _Input, _Input], up: Weight, down: Weight, seeds: Tensor | None,
    activation: tuple[str, bool], casts: tuple[Cast, Cast], options: BackwardOptions,
    into: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, d_up, d_down, db_up, db_down) as `feed_forward_backward` has them.

    dy          (tokens, d_model)
    saved       gate_up, (x, scale) and (h, scale), as `feed_forward_float8` keeps them
    up, down    (packed_t, E_t, scale)
    casts       of dy and of the gradient of gate_up
    """
    for t in into:
        if t is not None:
            check_writable(("into", t))
    arguments = (dy, *saved, up, down, *activation)
    gradients = _op_feed_forward_backward(*arguments, seeds, *options, *into, *casts[0], *casts[1])
    for t in into:
        if t is not None:
            torch.autograd.graph.increment_version(t)
    return gradients
