"""A plain feed-forward layer whose activation is the 2:4 operand: dense weights, and two of each four of h kept.

    forward    u = x W1^T               dense        h' = the two largest of each four of act(u)
               y = h' W2^T              h' sparse
    backward   dh = dy W2               dense        du' = dh act'(u) where h' was kept
               dW2 = dy^T MVUE(h')      h' sparse    dW1 = MVUE(du')^T x    du' sparse
               dx = du' W1              du' sparse

So four of six products are sparse. Behind a ReLU most of h is zero, and of what is not the two largest of four keep
nearly all. This is the exact gradient of the pruned function, up to MVUE, which is unbiased, and which keeps a group of
four tokens as it is where at most two are not zero. There is nothing to search, pack or schedule between steps.

Source: arXiv 2503.16672, which prunes activations behind a squared ReLU by size; the unbiased pruning along tokens in
place of theirs is that of arXiv 2404.01847.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import BLOCK, REFERENCE_DTYPES, WEIGHT_DTYPES, as_rows, names
from ..ops.activation_packing import PRUNED_KINDS
from ..ops.arguments import names_wrong_types
from . import accumulation
from .layer_gradients import origin_of, parts_of
from .operands import (
    INPUT,
    OUTPUT,
    KeptInput,
    Noise,
    cast_as_autocast_does,
    check_bias,
    check_no_transform,
    noise_of,
)
from .second_derivatives import once_differentiable
from .sparse_activation_float8 import SparseActivationMLPFloat8
from .weight_gradient import GradTarget, as_laid_out, bias_gradient, packed_output_gradient, weight_gradient

#: of the products: 16 or 8 bits
PRECISIONS = (None, "fp8")
#: of the (down, up) product: h is pruned in forward, the gradient of u in backward
_OPERANDS = (INPUT, OUTPUT)


class _SparseActivationMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, down, bias_up, bias_down, kind: str, noise: Noise):
        rows, w_up, w_down = as_rows(x), up.to(x.dtype), down.to(x.dtype)
        u = F.linear(rows, w_up, bias_up)
        seed = noise.input_seed[0] if noise.input_seed is not None and down.requires_grad else None
        packed_h, E_h, packed_ht, E_ht = ops.activation_compress(u, kind, seed)
        y = ops.sparse_mm_input(packed_h, E_h, w_down, bias=bias_down)
        kept_x = rows if up.requires_grad else None
        ctx.save_for_backward(u, E_h, packed_ht, E_ht, kept_x, w_up, w_down, noise.seed)
        ctx.kind, ctx.rank = kind, noise.rank
        ctx.up, ctx.down = origin_of(up), origin_of(down)
        ctx.bias_dtypes = None if bias_up is None else bias_up.dtype, None if bias_down is None else bias_down.dtype
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, E_h, packed_ht, E_ht, x, w_up, w_down, seed = ctx.saved_tensors
        need_x, need_up, need_down, need_bias_up, need_bias_down = ctx.needs_input_grad[:5]
        shape, dy = dy.shape, as_rows(dy)
        dx = d_up = d_down = db_up = db_down = None
        if need_down:
            target = GradTarget(ctx.down.dtype, accumulation.target(ctx.down.leaf, dy.dtype))
            d_down, _ = weight_gradient(dy, KeptInput(None, packed_ht, E_ht), target, None)
            d_down = as_laid_out(d_down, ctx.down.columns)
        if need_bias_down:
            db_down = bias_gradient(dy, ctx.bias_dtypes[1])
        if need_x or need_up or need_bias_up:
            if need_up and seed is None:
                seed = ops.draw_seeds(dy, 2, ctx.rank)
            packed, *packed_t, db = ops.activation_backward_compress(
                dy @ w_down, u, ctx.kind, seed[1] if need_up else None, need_bias_up
            )
            db_up = db.to(ctx.bias_dtypes[0]) if need_bias_up else None
            if need_up:
                target = GradTarget(ctx.up.dtype, accumulation.target(ctx.up.leaf, dy.dtype))
                (d_up,) = parts_of(packed_output_gradient(tuple(packed_t), x, target), [ctx.up])
            if need_x:
                dx = ops.sparse_mm_grad_input_output(packed, E_h, w_up)
                dx = dx if len(shape) == 2 else dx.view(*shape[:-1], dx.shape[1])
        return dx, d_up, d_down, db_up, db_down, None, None


@names_wrong_types
def sparse_activation_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str = "squared_relu",
    *,
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    seed: Tensor | None = None,
    rank: int = 0,
    training: bool = False,
    precision: str | None = None,
) -> Tensor:
    """y = h' W_down^T + b_down, where h' is act(x W_up^T + b_up), pruned to the two largest of each four features.

    x           (..., d_model); under autocast it is cast as `F.linear` casts it
    up, down    dense weights (d_ff, d_model) and (d_model, d_ff), d_ff a multiple of 4; each gets a gradient in its
                own dtype
    activation  "squared_relu" or "relu": others make no zeros
    bias_up, bias_down  (d_ff,), (d_model,) or None
    seed        int64 (2, 2): the pairs that h' (first) and its gradient (second) are pruned by along tokens, for the
                weight gradients of down and up; or None, to draw them
    rank        of this process: mixed into drawn seeds, so that ranks draw different noise
    training    whether the layer is being trained: for passes under no_grad, see `noise_of`
    precision   None: products of x's dtype. "fp8": of float8_e4m3fn operands, each tensor cast by its own scale

    Kept for backward are x, the product of up (before the activation), and h' packed along tokens: with 16 bits 3.25
    bytes an element of h, where a dense layer keeps 4, and 2.75 with 8, which keep x in half of its bytes. Not
    differentiable twice.

    Raises Sparse24Error for an activation that makes no zeros, a d_ff that is no multiple of 4, and an x or weights
    that do not fit one another; Sparse24DtypeError for dtypes that do not.
    Source: arXiv 2503.16672 and 2404.01847; see the head of the file.
    """
    check_no_transform(x)
    check_pruned_precision(precision)
    _check_operands(x, up, down, activation)
    if precision is not None:
        _check_can_be_cast(x=x, up=up, down=down)
    _check_bias(bias_up, "bias_up", up)
    _check_bias(bias_down, "bias_down", down)
    x, bias_up, bias_down = cast_as_autocast_does(x, bias_up, bias_down)
    check_bias(x, bias_up)
    check_bias(x, bias_down)
    noise = noise_of(x, _OPERANDS, seed, rank, up.requires_grad or down.requires_grad, training)
    function = _SparseActivationMLP if precision is None else SparseActivationMLPFloat8
    return function.apply(x, up, down, bias_up, bias_down, activation, noise)


def check_pruned_precision(precision: str | None) -> None:
    if precision not in PRECISIONS:
        raise Sparse24Error(
            f"precision must be None or 'fp8' where activations are pruned, got {precision!r}; 'fp8-hybrid' is for 2:4 "
            "weights"
        )


def _check_operands(x: Tensor, up: Tensor, down: Tensor, activation: str) -> None:
    if activation not in PRUNED_KINDS:
        raise Sparse24Error(
            f"activation must be {' or '.join(PRUNED_KINDS)}, got {activation!r}: other activations make no zeros, so "
            "pruning them to 2:4 would lose half of h"
        )
    if x.dim() == 0:
        raise Sparse24Error("x must be (..., d_model), got a tensor without dimensions; give it one of features")
    if up.dim() != 2 or down.dim() != 2 or up.shape[0] != down.shape[1]:
        raise Sparse24Error(
            f"up must be (d_ff, d_model) and down (d_out, d_ff), got {tuple(up.shape)} and {tuple(down.shape)}"
        )
    if x.shape[-1] != up.shape[1]:
        raise Sparse24Error(
            f"x must have {up.shape[1]} features in its last dimension, as up has, got shape {tuple(x.shape)}"
        )
    for name, t in (("x", x), ("up", up), ("down", down)):
        if not t.is_floating_point():
            raise Sparse24DtypeError(f"{name} must be of floating point, got {t.dtype}; cast it first")
        if t.device != x.device:
            raise Sparse24Error(f"{name} is on {t.device} but x is on {x.device}; move one of them")


def _check_can_be_cast(**operands: Tensor) -> None:
    """To 8 bits, where they are."""
    for name, t in operands.items():
        slow = t.dtype in REFERENCE_DTYPES and t.device.type == "cpu"
        if t.dtype not in WEIGHT_DTYPES and not slow:
            raise Sparse24DtypeError(
                f"{name} must be {names(WEIGHT_DTYPES)} for precision='fp8', got {t.dtype}; cast it first"
            )


def _check_bias(bias: Tensor | None, name: str, weight: Tensor) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise Sparse24Error(f"{name} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


# ---- layer by layer --------------------------------------------------------------------------------------------------


@names_wrong_types
def kept_activations(u: Tensor) -> Tensor:
    """Bool like u (..., d_ff): the two of each four neighbouring features that `sparse_activation_mlp` keeps.

    For layers that run one by one: `torch.where(kept_activations(u), act(u), 0)` is the same function, by plain ops
    that differentiate and trace as any. Raises Sparse24Error for a d_ff that is no multiple of 4.
    """
    if not torch.jit.is_tracing() and (u.dim() == 0 or u.shape[-1] % BLOCK):  # a trace would warn of the question
        raise Sparse24Error(
            f"u must have features in multiples of {BLOCK}, got shape {tuple(u.shape)}; keep such a layer's "
            "activations dense. Where ranks divide the features, each needs whole groups"
        )
    return reference.kept_activations(u)
