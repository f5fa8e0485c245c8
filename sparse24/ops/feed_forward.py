"""A whole feed-forward layer by one op for its forward pass and one for its backward.

Each computes what the single ops do one after another, with their bits and their errors. Torch's dispatcher calls
Python once in place of four times, and compilers see one node: each call costs the host about as much as a launch, and
for small layers the host is slower than the GPU. Layers with another backward (lean, inputs pruned, dense weight
gradients, decay) are put together from the single ops, in `functional`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import flops
from ._common import define_op
from .activation import compute_backward_mvue, empty_bias_grad, fake_backward_mvue
from .arguments import check_writable, names_wrong_types
from .gemm.activation import compute_sparse_mm_activation, fake_sparse_mm_activation
from .gemm.products import compute_grad_input, compute_sparse_mm, fake_grad_input, fake_sparse_mm
from .gemm.weight_gradient import compute_grad_weight
from .mvue import compute_mvue, compute_mvue_and_sum

# ---- forward --------------------------------------------------------------------------------------------------------


def _forward(x, packed_up, E_up, packed_down, E_down, kind, gated, bias_up, bias_down) -> tuple[Tensor, ...]:
    # gate_up = x (M.W_up)^T, h = act(gate) * up; y = h (M.W_down)^T
    gate_up, h = compute_sparse_mm_activation(x, packed_up, E_up, packed_up.shape[0], kind, gated, bias_up)
    return compute_sparse_mm(h, packed_down, E_down, packed_down.shape[0], bias_down, None), gate_up, h


def _fake_forward(x, packed_up, E_up, packed_down, E_down, kind, gated, bias_up, bias_down) -> tuple[Tensor, ...]:
    gate_up, h = fake_sparse_mm_activation(x, packed_up, E_up, packed_up.shape[0], kind, gated, bias_up)
    return fake_sparse_mm(h, packed_down, E_down, packed_down.shape[0], bias_down, None), gate_up, h


_op_feed_forward = define_op(
    "feed_forward",
    "(Tensor x, Tensor packed_up, Tensor E_up, Tensor packed_down, Tensor E_down, str kind, bool gated, "
    "Tensor? bias_up, Tensor? bias_down) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)


@names_wrong_types
def feed_forward(
    x: Tensor,
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    kind: str,
    gated: bool,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gate_up, h) of a layer whose forward weights are (packed, E): `sparse_mm_activation`, then `sparse_mm`."""
    return _op_feed_forward(x, *up, *down, kind, gated, bias_up, bias_down)


# ---- backward -------------------------------------------------------------------------------------------------------


class BackwardOptions(NamedTuple):
    """What of backward is wanted, beside the gradients of both weights.

    need_x, bias_up, bias_down  whether these get gradients
    out_dtype                   of new weight gradients: None, that of dy, or float32
    """

    need_x: bool
    bias_up: bool
    bias_down: bool
    out_dtype: torch.dtype | None


def _backward(dy, gate_up, x, h, packed_t_up, E_t_up, packed_t_down, E_t_down, seeds, kind, gated, *options):
    need_x, bias_up, bias_down, out_dtype, into_up, into_down = options
    seed_down, seed_up = seeds.unbind()
    dh = compute_grad_input(dy, packed_t_down, E_t_down, h.shape[1], None)  # dh = dy (M.W_down)
    d_gate_up, packed, E, _, db_up = compute_backward_mvue(dh, gate_up, kind, gated, seed_up, False, bias_up)
    del dh
    packed_dy, E_dy, db_down = (compute_mvue_and_sum if bias_down else _mvue)(dy, seed_down)
    # dW_down = MVUE(dy^T) h, dW_up = MVUE(d_gate_up^T) x
    d_down = compute_grad_weight(packed_dy, E_dy, h, dy.shape[1], out_dtype, into_down)
    d_up = compute_grad_weight(packed, E, x, d_gate_up.shape[1], out_dtype, into_up)
    # dx = d_gate_up (M.W_up)
    dx = compute_grad_input(d_gate_up, packed_t_up, E_t_up, x.shape[1], None) if need_x else dy.new_empty(0)
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, d_up, d_down, db_up, db_down))


def _mvue(dy: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, None]:
    return *compute_mvue(dy, seed), None


def _fake_backward(dy, gate_up, x, h, packed_t_up, E_t_up, packed_t_down, E_t_down, seeds, kind, gated, *options):
    need_x, bias_up, bias_down, out_dtype, into_up, into_down = options
    dh = fake_grad_input(dy, packed_t_down, E_t_down, h.shape[1], None)
    d_gate_up = fake_backward_mvue(dh, gate_up, kind, gated, seeds[1], False, False)[0]
    none, dtype = dy.new_empty(0), out_dtype or x.dtype
    return (
        fake_grad_input(d_gate_up, packed_t_up, E_t_up, x.shape[1], None) if need_x else none,
        dy.new_empty((gate_up.shape[1], x.shape[1]), dtype=dtype) if into_up is None else none,
        dy.new_empty((dy.shape[1], h.shape[1]), dtype=dtype) if into_down is None else none,
        empty_bias_grad(gate_up) if bias_up else none,
        empty_bias_grad(dy) if bias_down else none,
    )


_op_feed_forward_backward = define_op(
    "feed_forward_backward",
    "(Tensor dy, Tensor gate_up, Tensor x, Tensor h, Tensor packed_t_up, Tensor E_t_up, Tensor packed_t_down, "
    "Tensor E_t_down, Tensor seeds, str kind, bool gated, bool need_x, bool bias_up, bool bias_down, "
    "ScalarType? out_dtype, Tensor(a!)? into_up, Tensor(b!)? into_down) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
flops.register_feed_forward()


@names_wrong_types
def feed_forward_backward(
    dy: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    seeds: Tensor,
    activation: tuple[str, bool],
    options: BackwardOptions,
    into: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, ...]:
    """(dx, d_up, d_down, db_up, db_down): gradients of a layer, empty where they are not wanted or were added.

    dy          (tokens, d_model)
    saved       gate_up, x and h, as rows
    up, down    (packed_t, E_t)
    seeds       int64 (2, 2): of MVUE of dy, and of the gradient of gate_up
    activation  (kind, gated)
    into        gradients of the up and the down weight to add to, in place of new ones
    """
    written = [t for t in into if t is not None]
    check_writable(*(("into", t) for t in written))
    gradients = _op_feed_forward_backward(dy, *saved, *up, *down, seeds, *activation, *options, *into)
    for t in written:
        torch.autograd.graph.increment_version(t)
    return gradients
