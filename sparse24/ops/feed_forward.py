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

from ..errors import Sparse24DtypeError, Sparse24Error
from . import flops
from ._common import define_op
from .activations import check_input, compute_backward_mvue
from .arguments import check_writable, names_wrong_types
from .gemm.activation import compute_sparse_mm_activation, fake_sparse_mm_activation
from .gemm.products import check_grad_input, compute_grad_input, compute_sparse_mm, fake_sparse_mm
from .gemm.weight_gradient import compute_grad_weight
from .mvue import check_seeds, compute_mvue, compute_mvue_and_sum, compute_seeds

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
    """How backward runs, and what of it is wanted beside the gradients of both weights.

    rank                        of this process, for seeds that are drawn
    need_x, bias_up, bias_down  whether these get gradients
    out_dtype                   of new weight gradients: that of dy, or float32
    """

    rank: int
    need_x: bool
    bias_up: bool
    bias_down: bool
    out_dtype: torch.dtype


def _check_backward(dy, saved, up, down, seeds, activation, out_dtype) -> None:
    """All rules at once; what backward makes of its operands fits by itself."""
    (gate_up, x, h), (kind, gated) = saved, activation
    check_grad_input(dy, *down, h.shape[-1], out_dtype)
    check_input(gate_up, kind, gated)
    check_grad_input(gate_up, *up, x.shape[-1], None)
    tokens, d_ff = dy.shape[0], h.shape[-1]
    if not (
        dy.dim() == x.dim() == 2
        and gate_up.shape == (tokens, 2 * d_ff if gated else d_ff)
        and h.shape == (tokens, d_ff)
        and x.shape[0] == tokens
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (dy, gate_up, x, h))
        raise Sparse24Error(f"dy, gate_up, x and h must be rows of the same tokens, of widths that fit, got {shapes}")
    if not (gate_up.dtype == x.dtype == h.dtype == dy.dtype and gate_up.device == x.device == h.device == dy.device):
        kinds = ", ".join(f"{t.dtype} on {t.device}" for t in (dy, gate_up, x, h))
        raise Sparse24DtypeError(f"dy, gate_up, x and h must have the same dtype and device, got {kinds}")
    if seeds is not None:
        check_seeds(seeds, dy)


def _backward(dy, gate_up, x, h, packed_t_up, E_t_up, packed_t_down, E_t_down, seeds, kind, gated, *options):
    rank, need_x, bias_up, bias_down, out_dtype, into_up, into_down = options
    up, down = (packed_t_up, E_t_up), (packed_t_down, E_t_down)
    _check_backward(dy, (gate_up, x, h), up, down, seeds, (kind, gated), out_dtype)
    seed_down, seed_up = (compute_seeds(dy, 2, rank) if seeds is None else seeds).unbind()
    dh = compute_grad_input(dy, *down, h.shape[1], dy.dtype)  # dh = dy (M.W_down)
    d_gate_up, packed, E, _, db_up = compute_backward_mvue(dh, gate_up, kind, gated, seed_up, False, bias_up)
    del dh
    packed_dy, E_dy, *sums = (compute_mvue_and_sum if bias_down else compute_mvue)(dy, seed_down)
    # dW_down = MVUE(dy^T) h, dW_up = MVUE(d_gate_up^T) x
    d_down = compute_grad_weight(packed_dy, E_dy, h, dy.shape[1], out_dtype, into_down)
    d_up = compute_grad_weight(packed, E, x, gate_up.shape[1], out_dtype, into_up)
    # dx = d_gate_up (M.W_up)
    dx = compute_grad_input(d_gate_up, *up, x.shape[1], dy.dtype) if need_x else None
    gradients = (dx, d_up, d_down, db_up, sums[0] if bias_down else None)
    return tuple([dy.new_empty(0) if t is None else t for t in gradients])


def _fake_backward(dy, gate_up, x, h, packed_t_up, E_t_up, packed_t_down, E_t_down, seeds, kind, gated, *options):
    _, need_x, bias_up, bias_down, out_dtype, into_up, into_down = options
    up, down = (packed_t_up, E_t_up), (packed_t_down, E_t_down)
    _check_backward(dy, (gate_up, x, h), up, down, seeds, (kind, gated), out_dtype)
    wanted = (need_x, into_up is None, into_down is None, bias_up, bias_down)
    return empty_gradients(dy, gate_up, (x.shape[1], h.shape[1]), wanted, out_dtype)


def empty_gradients(
    dy: Tensor, gate_up: Tensor, inputs: tuple[int, int], wanted: tuple[bool, ...], out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Room for what a backward gives; `inputs` are the widths of x and of h."""
    (d_model, d_ff), rows = inputs, gate_up.shape[1]
    shapes = ((dy.shape[0], d_model), (rows, d_model), (dy.shape[1], d_ff), rows, dy.shape[1])
    bias_dtype = torch.promote_types(dy.dtype, torch.float32)
    dtypes = (dy.dtype, out_dtype, out_dtype, bias_dtype, bias_dtype)
    return tuple(
        [
            dy.new_empty(shape, dtype=dtype) if want else dy.new_empty(0)
            for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
        ]
    )


_op_feed_forward_backward = define_op(
    "feed_forward_backward",
    "(Tensor dy, Tensor gate_up, Tensor x, Tensor h, Tensor packed_t_up, Tensor E_t_up, Tensor packed_t_down, "
    "Tensor E_t_down, Tensor? seeds, str kind, bool gated, int rank, bool need_x, bool bias_up, bool bias_down, "
    "ScalarType out_dtype, Tensor(a!)? into_up, Tensor(b!)? into_down) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    tags=(torch.Tag.nondeterministic_seeded,),
)
flops.register_feed_forward()


@names_wrong_types
def feed_forward_backward(
    dy: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    seeds: Tensor | None,
    activation: tuple[str, bool],
    options: BackwardOptions,
    into: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, ...]:
    """(dx, d_up, d_down, db_up, db_down): gradients of a layer, empty where they are not wanted or were added.

    dy          (tokens, d_model)
    saved       gate_up, x and h, as rows
    up, down    (packed_t, E_t)
    seeds       int64 (2, 2): of MVUE of dy, and of the gradient of gate_up; None: drawn
    activation  (kind, gated)
    into        gradients of the up and the down weight to add to, in place of new ones

    Gradients of biases are float32.
    """
    for t in into:
        if t is not None:
            check_writable(("into", t))
    gradients = _op_feed_forward_backward(dy, *saved, *up, *down, seeds, *activation, *options, *into)
    for t in into:
        if t is not None:
            torch.autograd.graph.increment_version(t)
    return gradients
