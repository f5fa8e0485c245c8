"""A dense layer whose weight gradient alone is a 2:4 product: dense weights, no mask.

forward         y = x W^T                dense
input gradient  dx = dy W                dense
weight gradient dW = MVUE(dy)^T x        or, pruning the other operand:  dW = dy^T MVUE(x)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..formats import as_rows
from . import accumulation
from .operands import (
    OUTPUT,
    KeptInput,
    Noise,
    cast_as_autocast_does,
    check_bias,
    check_no_transform,
    kept_input,
    noise_of,
    pruned_operand,
)
from .second_derivatives import once_differentiable
from .weight_gradient import GradTarget, as_laid_out, bias_gradient, lies_by_columns, weight_gradient


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, noise: Noise):
        kept = kept_input(x, noise.input_seed) if weight.requires_grad else KeptInput()
        ctx.save_for_backward(weight, noise.seed, *kept)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.prunes_output, ctx.rank = noise.operands[0] == OUTPUT, noise.rank
        ctx.leaf, ctx.columns = accumulation.leaf_of(weight), lies_by_columns(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, seed, x, *packed_x = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if need_x:
            dx = dy @ weight.to(dy.dtype)
        if need_weight or need_bias:
            dy = as_rows(dy)
        if need_weight:
            if ctx.prunes_output and seed is None:
                seed = ops.draw_seed(dy, ctx.rank)
            kept = KeptInput(None if x is None else as_rows(x), *packed_x)
            target = GradTarget(weight.dtype, accumulation.target(ctx.leaf, dy.dtype))
            seed, bias_dtype = seed if ctx.prunes_output else None, ctx.bias_dtype if need_bias else None
            dw, db = weight_gradient(dy, kept, target, seed, bias_dtype)
            dw = as_laid_out(dw, ctx.columns)
        elif need_bias:
            db = bias_gradient(dy, ctx.bias_dtype)
        return dx, dw, db, None


def dense_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mvue: bool | str | None = True,
    seed: Tensor | None = None,
    rank: int = 0,
    training: bool = False,
) -> Tensor:
    """y = x W^T + bias with a dense weight, and a weight gradient that is a 2:4 product.

    x       (..., in_features), in the dtype of the product: that of the weight, or autocast's
    weight  (out_features, in_features), dense; gets a gradient in its own dtype
    mvue, seed, rank, training   as in `functional.sparse_linear`

    The gradients of x and bias are those of `F.linear`. Not differentiable twice.
    """
    check_no_transform(x)
    x, bias = cast_as_autocast_does(x, bias)
    check_bias(x, bias)
    noise = noise_of(x, (pruned_operand(mvue),), seed, rank, weight.requires_grad, training)
    return _DenseLinear.apply(x, weight, bias, noise)
