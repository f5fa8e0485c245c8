"""S-STE (arXiv 2409.09099): a soft threshold instead of a mask, 2:4 along rows only.

    forward         y = x (beta S(W))^T    sparse product over the packed form of beta S(W)
    input gradient  dx = dy (beta S(W))    dense: the columns of S(W) are not 2:4
    weight gradient dW = MVUE(dy)^T x      sparse, or dense without MVUE; straight through to every entry of W

S shrinks what it keeps by what it drops, so it is continuous in W; the scale beta is found once, when training starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..errors import Sparse24Error
from ..formats import as_rows
from .operands import INPUT, OUTPUT, KeptInput, pruned_operand
from .second_derivatives import once_differentiable
from .weight_gradient import GradTarget, bias_gradient, weight_gradient


def soft_threshold(w: Tensor) -> Tensor:
    """sign(w) * max(|w| - t, 0), t the second smallest magnitude of each group of four along a row; [rows, cols].

    Keeps at most two of four and is continuous in w: an entry that falls out of its group has shrunk to 0 by then.
    """
    groups = w.unflatten(-1, (-1, 4))
    magnitude = groups.abs()
    a, b, c, d = magnitude.split(1, dim=-1)
    threshold = torch.minimum(
        torch.maximum(torch.minimum(a, b), torch.minimum(c, d)), torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    )
    return (groups.sign() * (magnitude - threshold).clamp_min(0)).flatten(-2)


def soft_scale(w: Tensor) -> Tensor:
    """<w, S(w)> / <S(w), S(w)>, fp32 scalar: the scale at which S(w) is nearest to w; 1 where S(w) is all zero."""
    w = w.float()
    soft = soft_threshold(w)
    norm = (soft * soft).sum()
    return torch.where(norm > 0, (w * soft).sum() / norm.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


def row_mask(w: Tensor) -> Tensor:
    """The two largest magnitudes of each group of four along a row, the earlier ones where they tie; exactly two.

    uint16 [rows/4, cols/4], bit 4*i + j, like a transposable mask; but columns may keep any number. NaN counts as Inf.
    """
    magnitude = w.unflatten(-1, (-1, 4)).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    this, other = magnitude.unsqueeze(-1), magnitude.unsqueeze(-2)
    earlier = torch.ones(4, 4, dtype=torch.bool, device=w.device).tril(-1)
    ahead = (other > this) | ((other == this) & earlier)
    kept = (ahead.sum(-1) < 2).flatten(-2)
    return reference.pack_bits(reference.to_blocks(kept))


class _SoftLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, packed, E, mvue, rank):
        y = ops.sparse_mm(x, packed, E, weight.shape[0], bias=bias)
        ctx.save_for_backward(x if weight.requires_grad else None, packed, E)
        ctx.shape, ctx.weight_dtype = tuple(weight.shape), weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mvue, ctx.rank = mvue, rank
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, packed, E = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if need_x:
            dx = dy @ ops.decompress(packed, E, *ctx.shape).to(dy.dtype)
        if need_weight or need_bias:
            dy = as_rows(dy)
        if need_weight:
            seed = ops.draw_seed(dy, ctx.rank) if ctx.mvue else None
            bias_dtype = ctx.bias_dtype if need_bias else None
            dw, db = weight_gradient(dy, KeptInput(as_rows(x)), GradTarget(ctx.weight_dtype), seed, bias_dtype)
        elif need_bias:
            db = bias_gradient(dy, ctx.bias_dtype)
        return dx, dw, db, None, None, None, None


def soft_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    E: Tensor,
    bias: Tensor | None = None,
    *,
    mvue: bool | str | None = True,
    rank: int = 0,
) -> Tensor:
    """y = x V^T + bias, with V = (packed, E) the thresholded and scaled `weight`, whose gradient is straight-through.

    x            (..., in_features), in the dtype of the product
    weight       (out_features, in_features), the dense master; only its gradient is computed
    packed, E    (out_features, in_features/2) and its metadata: V packed along rows
    mvue, rank   as in `functional.sparse_linear`; "input" is not for this method, and refused
    """
    operand = pruned_operand(mvue)
    if operand == INPUT:
        raise Sparse24Error('mvue="input" is not available with S-STE; use mvue="output" or False')
    return _SoftLinear.apply(x, weight, bias, packed, E, operand == OUTPUT, rank)
