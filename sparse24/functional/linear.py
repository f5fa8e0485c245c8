"""A 2:4 linear layer, straight-through to the dense master weight.

The autograd function says, line by line, which of the sparse products it runs; it saves what its backward needs and
nothing else, and computes only gradients that somebody asked for. It cannot be differentiated twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import Sparse24Error
from ..formats import as_rows
from ..ops.arguments import names_wrong_types
from . import accumulation
from .operands import (
    OUTPUT,
    KeptInput,
    Noise,
    PackedWeight,
    as_constants,
    cast_as_autocast_does,
    check_bias,
    check_no_transform,
    decay_term,
    kept_input,
    kept_weights,
    load_for_backward,
    noise_of,
    pruned_operand,
    save_for_backward,
    transposed_form,
)
from .second_derivatives import once_differentiable
from .weight_gradient import GradTarget, as_laid_out, bias_gradient, lies_by_columns, weight_gradient


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, form: PackedWeight, noise: Noise, decay):
        # y = x (M.W)^T: W is K-major, x row-major, y row-major.
        y = ops.sparse_mm(x, form.packed, form.E, weight.shape[0], bias=bias)
        needs_x = weight.requires_grad
        decay = decay if needs_x else None
        kept = kept_input(x, noise.input_seed) if needs_x else KeptInput()
        save_for_backward(ctx, (*kept, noise.seed, decay), kept_weights(form, (weight,), decay is not None))
        ctx.packed_dtype, ctx.in_features, ctx.weight_dtype = form.packed.dtype, weight.shape[1], weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.prunes_output, ctx.rank = noise.operands[0] == OUTPUT, noise.rank
        ctx.leaf, ctx.columns = accumulation.leaf_of(weight), lies_by_columns(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (*kept, seed, decay), (weights,) = load_for_backward(ctx)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if need_x:
            # dx = dy (M.W): packed along out_features, so W^T is an MN-major operand and nothing is transposed.
            dx = ops.sparse_mm_grad_input(dy, *transposed_form(weights, ctx.packed_dtype), ctx.in_features)
        if need_weight or need_bias:
            dy = as_rows(dy)
        if need_weight:
            # dW = MVUE(dy^T) x or dy^T MVUE(x) [+ decay (1 - M).W], for every entry of the dense weight.
            if ctx.prunes_output and seed is None:
                seed = ops.draw_seed(dy, ctx.rank)
            x, *packed_x = kept
            into = accumulation.target(ctx.leaf, dy.dtype)
            dw, db = weight_gradient(
                dy, KeptInput(None if x is None else as_rows(x), *packed_x),
                GradTarget(ctx.weight_dtype, into, decay_term(weights, decay)),
                seed if ctx.prunes_output else None, ctx.bias_dtype if need_bias else None,
            )  # fmt: skip
            dw = as_laid_out(dw, ctx.columns)
        elif need_bias:
            db = bias_gradient(dy, ctx.bias_dtype)
        return dx, dw, db, None, None, None


@names_wrong_types
def sparse_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    E: Tensor,
    packed_t: Tensor,
    E_t: Tensor,
    bias: Tensor | None = None,
    *,
    mvue: bool | str | None = True,
    seed: Tensor | None = None,
    rank: int = 0,
    mask: Tensor | None = None,
    decay: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """y = x W^T + bias with W 2:4 sparse; gradients of W go, unmasked, to the dense `weight`.

    x                       (..., in_features); under autocast it is cast as `F.linear` casts it
    weight                  (out_features, in_features), the dense master; only its gradient is computed, and its value
                            read by backward alone, for `decay` or an empty packed_t
    packed, E, packed_t, E_t  from `ops.compress` of it
    bias                    (out_features,) or None
    mvue                    which operand of dW = dy^T x is pruned 2:4 without bias, so that it is a sparse product.
                            True or "output": dy, in backward (the paper). "input": x, in forward, and what backward
                            keeps is its packed form, 1.125 bytes an element in 16 bits. False: none, a dense dW
    seed                    int64 (2,), or None: drawn from torch's generator, in backward and fresh for every call, or
                            for "input" in forward
    rank                    of this process: mixed into a drawn seed, so that ranks draw different noise
    mask                    of the weight, needed where packed_t and E_t are empty: backward then packs them anew, which
                            keeps 1.125 bytes a weight less and costs a pass over the weight. Needed for `decay` too
    decay                   one float32 on x's device, or None: backward adds decay * (1 - mask) * weight to the
                            gradient of the weight, in the product that makes it. `Recipe(decay_in="backward")` sets it
    training                whether the layer is being trained: for mvue="input" under no_grad, see `noise_of`

    Source: arXiv 2404.01847. Not differentiable twice.
    """
    if weight.dim() != 2:
        raise Sparse24Error(f"weight must be 2-D, (out_features, in_features), got shape {tuple(weight.shape)}")
    check_no_transform(x)
    x, bias = cast_as_autocast_does(x, bias)
    check_bias(x, bias)
    form = as_constants(PackedWeight(packed, E, packed_t, E_t, () if mask is None else (mask,)))
    noise = noise_of(x, (pruned_operand(mvue),), seed, rank, weight.requires_grad, training)
    return _SparseLinear.apply(x, weight, bias, form, noise, decay)
