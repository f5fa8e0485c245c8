"""`sparse_activation_mlp` with 8-bit operands in all six products: the formulas at the head of sparse_activation.py.

Each tensor is cast by its own scale, which a read more of it finds ("current scaling"): nothing is kept from step to
step, so these layers have no state in 8 bits either. What is pruned is pruned in 16 bits, and then cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..formats import as_rows
from ..ops import float8
from . import accumulation
from .float8 import computed, made_dtype
from .layer_gradients import Origin, origin_of, parts_of
from .operands import Noise
from .second_derivatives import once_differentiable
from .weight_gradient import as_laid_out


class SparseActivationMLPFloat8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, down, bias_up, bias_down, kind: str, noise: Noise):
        rows = as_rows(computed(x))
        records = noise.input_seed is not None  # else nothing is kept: there will be no backward
        x8, x8_t, x_scale = float8.quantize_current(rows, transposed=records and up.requires_grad)
        up8, _, up_scale = float8.quantize_current(up)
        u = float8.dense_mm_float8(x8, x_scale, up8, up_scale, bias=bias_up, out_dtype=rows.dtype)
        seed = noise.input_seed[0] if records and down.requires_grad else None
        packed_h, E_h, packed_ht, E_ht, h_scale = float8.activation_compress_float8(u, kind, seed)
        down8, _, down_scale = float8.quantize_current(down)
        h = packed_h, E_h, h_scale
        y = float8.sparse_mm_input_float8(*h, down8, down_scale, bias=bias_down, out_dtype=x.dtype)
        # Weights are cast anew in backward, which is a read more, and a byte a weight less to keep.
        casts = x8_t, x_scale, up, up_scale, down, down_scale
        ctx.save_for_backward(u, E_h, packed_ht, E_ht, h_scale, *casts, noise.seed)
        ctx.kind, ctx.rank = kind, noise.rank
        ctx.up, ctx.down = origin_of(up), origin_of(down)
        ctx.bias_dtypes = None if bias_up is None else bias_up.dtype, None if bias_down is None else bias_down.dtype
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, E_h, packed_ht, E_ht, h_scale, x8_t, x_scale, up, up_scale, down, down_scale, seed = ctx.saved_tensors
        need_x, need_up, need_down, need_bias_up, need_bias_down = ctx.needs_input_grad[:5]
        shape, x_dtype, dy = dy.shape, dy.dtype, as_rows(computed(dy))
        need_d = need_x or need_up or need_bias_up
        dx = d_up = d_down = db_up = db_down = None
        dy8, dy8_t, dy_scale = float8.quantize_current(dy, rows=need_d, transposed=need_down)
        if need_down:
            operands = (packed_ht, E_ht, h_scale), (dy8_t, dy_scale)
            d_down = _weight_gradient(float8.grad_weight_of_input_float8_, *operands, down.shape, ctx.down, dy)
            d_down = as_laid_out(d_down, ctx.down.columns)
        if need_bias_down:
            db_down = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtypes[1])
        if need_d:
            if need_up and seed is None:
                seed = ops.draw_seeds(dy, 2, ctx.rank)
            down8_t = _transposed(down, down_scale)
            dh = float8.dense_mm_float8(dy8, dy_scale, down8_t, down_scale, out_dtype=u.dtype)
            packed, packed_t, E_t, scale, db = float8.activation_backward_compress_float8(
                dh, u, ctx.kind, seed[1] if need_up else None, need_bias_up
            )
            db_up = db.to(ctx.bias_dtypes[0]) if need_bias_up else None
            if need_up:
                operands = (packed_t, E_t, scale), (x8_t, x_scale)
                d_up = _weight_gradient(float8.grad_weight_float8_, *operands, up.shape, ctx.up, dy)
                (d_up,) = parts_of(d_up, [ctx.up])
            if need_x:
                du = packed, E_h, scale
                dx = float8.sparse_mm_input_float8(*du, _transposed(up, up_scale), up_scale, out_dtype=x_dtype)
                dx = dx if len(shape) == 2 else dx.view(*shape[:-1], dx.shape[1])
        return dx, d_up, d_down, db_up, db_down, None, None


def _transposed(weight: Tensor, scale: Tensor) -> Tensor:
    """The transpose of a weight in 8 bits, without the padding of its rows."""
    return float8.quantize(weight, scale, rows=False, transposed=True)[1][:, : weight.shape[0]]


def _weight_gradient(product, pruned: tuple, other: tuple, shape: torch.Size, of: Origin, dy: Tensor) -> Tensor | None:
    """dW of `shape`, or None where it was added to what is there. pruned, other: operands with their scales."""
    into = accumulation.target(of.leaf, dy.dtype)
    if into is not None:
        product(*pruned, *other, into, True)
        return None
    out = dy.new_empty(shape, dtype=made_dtype(of.dtype, dy.dtype, full=True))
    product(*pruned, *other, out)
    return out.to(of.dtype)
