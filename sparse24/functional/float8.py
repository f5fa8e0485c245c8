"""2:4 layers whose products multiply 8-bit operands, differentiable and straight-through to the dense weights.

    "fp8-hybrid"  forward and input gradient in e4m3, the weight gradient in 16 bits
    "fp8"         all three

Each tensor is cast once, in the pass that reads it anyway, by the scale of the step before. In "fp8" backward keeps the
transposed 8-bit forms in place of x and h: half of their bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..formats import FORMATS, HALF_DTYPES, as_rows
from ..ops import float8
from . import accumulation
from .operands import both, cast_as_autocast_does, check_no_transform, once_differentiable
from .weight_gradient import (
    GradTarget,
    as_laid_out,
    bias_gradient,
    dense_weight_gradient,
    is_column_major,
    packed_output_gradient,
)


class Cast(NamedTuple):
    """How a tensor is cast: by `scale`, raising `amax` to its largest magnitude. One float32 each.

    amax     None: not noted, as in evaluation
    current  the scale is not known yet: it is made from the tensor itself, by a read more
    counts   int64 [3], added to: values clipped, flushed to zero, and seen; None: not counted
    """

    scale: Tensor
    amax: Tensor | None
    current: bool = False
    counts: Tensor | None = None

    @property
    def noted(self) -> dict[str, Tensor | None]:
        """What a pass takes note of."""
        return dict(amax=self.amax, counts=self.counts)

    def saved(self) -> tuple[Tensor | None, ...]:
        """The tensors, for backward, which makes `Cast.of` them again."""
        return self.scale, self.amax, self.counts

    @staticmethod
    def of(saved: tuple[Tensor | None, ...], current: bool) -> Cast:
        return Cast(saved[0], saved[1], current, saved[2])

    def settled(self, x: Tensor) -> Cast:
        """Itself, with a scale that fits x."""
        if not self.current:
            return self
        largest = torch.zeros_like(self.scale)
        float8.quantize(x, self.scale, rows=False, amax=largest)
        return Cast(float8.scale_of(largest), self.amax, False, self.counts)


class Float8Weight(NamedTuple):
    """A weight (out_features, in_features) packed both ways, as `ops.float8.pack_float8_` writes it."""

    packed: Tensor
    E: Tensor
    packed_t: Tensor
    E_t: Tensor
    scale: Tensor


class LinearPlan(NamedTuple):
    """What a linear layer runs with, beside the tensors that get gradients. x, dy: how they are cast."""

    weight: Float8Weight
    x: Cast
    dy: Cast
    full: bool
    mvue: bool = True
    rank: int = 0
    seed: Tensor | None = None


class FeedForwardPlan(NamedTuple):
    """The same of a feed-forward layer: x, h, dy and d_gate_up are cast. seed: int64 (2, 2), down and up, or None."""

    up: Float8Weight
    down: Float8Weight
    x: Cast
    h: Cast
    dy: Cast
    d_gate_up: Cast
    kind: str
    gated: bool
    full: bool
    mvue: bool = True
    rank: int = 0
    seed: Tensor | None = None


def _computed(x: Tensor) -> Tensor:
    """x as the passes take it: 16 bits on a GPU."""
    return x.to(FORMATS[float8.E4M3].wide_dtype) if x.is_cuda and x.dtype not in HALF_DTYPES else x


def _rows_of(x: Tensor) -> Tensor:
    """x (..., features) as the passes take it, (tokens, features).

    Made before the autograd function, whose forward then multiplies and does nothing else: Dynamo before 2.13 makes
    all that happens in one an output of it. An output of two names (y, and y.to(y.dtype), which is y) gets its gradient
    by the wrong one, and backward gets zeros; sizes in a dynamic graph are not taken at all.
    """
    return as_rows(_computed(x))


def _shaped_as(rows: Tensor, x: Tensor) -> Tensor:
    """The product's rows with the leading extents and the dtype of x."""
    y = rows.view(*x.shape[:-1], rows.shape[-1])
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _product(x8: Tensor, cast: Cast, weight: Float8Weight, like: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, in the dtype of `like`."""
    packed, E, _, _, scale = weight
    rows = packed.shape[0]
    return float8.sparse_mm_float8(x8, cast.scale, packed, E, scale, rows, bias=bias, out_dtype=like.dtype)


def _product_t(dy8: Tensor, cast: Cast, weight: Float8Weight, like: Tensor) -> Tensor:
    """dy W."""
    _, _, packed_t, E_t, scale = weight
    return float8.sparse_mm_float8(dy8, cast.scale, packed_t, E_t, scale, packed_t.shape[0], out_dtype=like.dtype)


class _Pruned(NamedTuple):
    """An output gradient for the weight gradient: pruned, (packed, E), or dense where nothing is pruned."""

    packed: Tensor | None
    E: Tensor | None
    dense: Tensor | None
    cast: Cast


def _weight_gradient(dy: _Pruned, kept: Tensor, scale: Tensor, shape, target: GradTarget) -> Tensor | None:
    """dW of `shape`, or None where it was added to what is there.

    kept  the layer's input: 16 bits (tokens, in), or 8 bits and transposed (in, padded tokens) and then cast by `scale`
    """
    dtype, into, _ = target
    if kept.dtype == float8.E4M3:
        wide = dtype if dtype == FORMATS[kept.dtype].wide_dtype else torch.float32
        out = kept.new_empty(shape, dtype=wide) if into is None else into
        float8.grad_weight_float8_(dy.packed, dy.E, dy.cast.scale, kept, scale, out, into is not None)
        return out.to(dtype) if into is None else None
    if dy.packed is None:
        return dense_weight_gradient(dy.dense, kept, dtype, into)
    return packed_output_gradient((dy.packed, dy.E), kept, target)


def _cast_gradient(dy: Tensor, cast: Cast, full: bool, seed: Tensor | None, bias: bool) -> tuple:
    """dy as (what the weight gradient takes, dy8, gradient of a bias or None)."""
    if seed is None:
        dy8, _ = float8.quantize(dy, cast.scale, **cast.noted)
        return _Pruned(None, None, dy, cast), dy8, bias_gradient(dy, torch.float32) if bias else None
    packed, E, dy8, db = float8.mvue_quantize(dy, seed, cast.scale, float8=full, bias_grad=bias, **cast.noted)
    return _Pruned(packed, E, None, cast), dy8, db if bias else None


def _cast_input(x: Tensor, cast: Cast, full: bool, needed: bool) -> tuple[Tensor, Tensor | None]:
    """x8, and what backward keeps of x for the weight gradient."""
    x8, x8_t = float8.quantize(x, cast.scale, transposed=full and needed, **cast.noted)
    return x8, (x8_t if full else x) if needed else None


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, plan):
        cast_x = plan.x.settled(rows)
        x8, kept = _cast_input(rows, cast_x, plan.full, weight.requires_grad)
        y = _product(x8, cast_x, plan.weight, rows, bias)
        ctx.save_for_backward(kept, *plan.weight[2:], cast_x.scale, plan.seed, *plan.dy.saved())
        ctx.current = plan.dy.current
        ctx.full, ctx.mvue, ctx.rank = plan.full, plan.mvue, plan.rank
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.leaf, ctx.columns = accumulation.leaf_of(weight), is_column_major(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept, packed_t, E_t, w_scale, x_scale, seed, *saved_dy = ctx.saved_tensors
        weight = Float8Weight(packed_t, E_t, packed_t, E_t, w_scale)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dy = as_rows(_computed(dy))
        cast_dy = Cast.of(saved_dy, ctx.current).settled(dy)
        if seed is None and ctx.mvue and need_weight:
            seed = ops.draw_seed(dy, ctx.rank)
        pruned, dy8, db = _cast_gradient(dy, cast_dy, ctx.full, seed if need_weight and ctx.mvue else None, need_bias)
        dx = dw = None
        if need_x:
            dx = _product_t(dy8, cast_dy, weight, dy)
        if need_weight:
            target = GradTarget(ctx.weight_dtype, accumulation.target(ctx.leaf, dy.dtype))
            dw = as_laid_out(_weight_gradient(pruned, kept, x_scale, ctx.weight_shape, target), ctx.columns)
        return dx, dw, db.to(ctx.bias_dtype) if need_bias else None, None


class _Float8FeedForward(torch.autograd.Function):
    """x8 -> gate_up -> h8 -> y, and back: each array is read once by its consumer, the activation's gradient is never
    stored in 16 bits.
    """

    @staticmethod
    def forward(ctx, plan, rows, bias_up, bias_down, down_weight, first_weight, second_weight):
        up_weights = (first_weight,) if second_weight is None else (first_weight, second_weight)
        need_up, need_down = any(w.requires_grad for w in up_weights), down_weight.requires_grad
        cast_x = plan.x.settled(rows)
        x8, kept_x = _cast_input(rows, cast_x, plan.full, need_up)
        gate_up = _product(x8, cast_x, plan.up, rows, bias_up)
        cast_h = plan.h
        if cast_h.current:
            activation = ops.gated_activation if plan.gated else ops.activation
            cast_h = cast_h.settled(activation(gate_up, plan.kind))
        h, h8, h8_t = float8.activation_quantize(
            gate_up, plan.kind, cast_h.scale, gated=plan.gated, keep_h=need_down and not plan.full,
            transposed=need_down and plan.full, **cast_h.noted,
        )  # fmt: skip
        y = _product(h8, cast_h, plan.down, rows, bias_down)
        kept_h = (h8_t if plan.full else h) if need_down else None
        casts = (cast_x.scale, cast_h.scale, *plan.dy.saved(), *plan.d_gate_up.saved())
        ctx.current = plan.dy.current
        ctx.save_for_backward(kept_x, gate_up, kept_h, plan.seed, *casts, *plan.up[2:], *plan.down[2:])
        ctx.kind, ctx.gated, ctx.full, ctx.mvue, ctx.rank = plan.kind, plan.gated, plan.full, plan.mvue, plan.rank
        ctx.weights = [(w.shape, w.dtype) for w in (down_weight, *up_weights)]
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (bias_up, bias_down)]
        ctx.leaves = [accumulation.leaf_of(w) for w in (down_weight, *up_weights)]
        ctx.columns = [is_column_major(w) for w in (down_weight, *up_weights)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept_x, gate_up, kept_h, seed, *rest = ctx.saved_tensors
        x_scale, h_scale = rest[:2]
        up, down = (Float8Weight(*w[:2], *w) for w in (rest[8:11], rest[11:]))
        _, need_x, need_bias_up, need_bias_down, need_down, *need_ups = ctx.needs_input_grad
        dy = as_rows(_computed(dy))
        cast_dy, cast_d = Cast.of(rest[2:5], ctx.current).settled(dy), Cast.of(rest[5:8], ctx.current)
        need_up = any(need_ups)
        if seed is None and ctx.mvue and (need_down or need_up):
            seed = ops.draw_seeds(dy, 2, ctx.rank)
        seeds = seed if ctx.mvue and seed is not None else (None, None)

        pruned, dy8, db_down = _cast_gradient(dy, cast_dy, ctx.full, seeds[0] if need_down else None, need_bias_down)
        dh = _product_t(dy8, cast_dy, down, dy)
        d_up, d8, db_up = _activation_gradient(ctx, dh, gate_up, cast_d, seeds[1] if need_up else None, need_bias_up)
        cast_d = d_up.cast
        down_shape, down_dtype = ctx.weights[0]
        dw_down = dx = None
        if need_down:
            target = GradTarget(down_dtype, accumulation.target(ctx.leaves[0], dy.dtype))
            dw_down = as_laid_out(_weight_gradient(pruned, kept_h, h_scale, down_shape, target), ctx.columns[0])
        if need_x:
            dx = _product_t(d8, cast_d, up, dy)
        dw_ups = _stacked_gradients(ctx, d_up, kept_x, x_scale, dy.dtype) if need_up else [None]
        biases = [
            db.to(dtype) if need else None
            for db, dtype, need in zip((db_up, db_down), ctx.bias_dtypes, (need_bias_up, need_bias_down), strict=True)
        ]
        return None, dx, *biases, dw_down, *both(dw_ups)


def _activation_gradient(ctx, dh: Tensor, gate_up: Tensor, cast: Cast, seed: Tensor | None, bias: bool) -> tuple:
    """The gradient of gate_up, as `_cast_gradient` gives one."""
    if seed is None or cast.current:
        backward = ops.gated_activation_backward if ctx.gated else ops.activation_backward
        d_gate_up = backward(dh, gate_up, ctx.kind)
        return _cast_gradient(d_gate_up, cast.settled(d_gate_up), ctx.full, seed, bias)
    packed, E, d8, db = float8.activation_backward_quantize(
        dh, gate_up, ctx.kind, seed, cast.scale, gated=ctx.gated, float8=ctx.full, bias_grad=bias, **cast.noted
    )
    return _Pruned(packed, E, None, cast), d8, db if bias else None


def _stacked_gradients(ctx, dy: _Pruned, kept_x: Tensor, x_scale: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """Gradients of the weights that are stacked in the up product, from one product."""
    shapes, dtypes = zip(*ctx.weights[1:], strict=True)
    rows = [shape[0] for shape in shapes]
    target = GradTarget(dtypes[0], accumulation.stacked_target(ctx.leaves[1:], dtype))
    dw = _weight_gradient(dy, kept_x, x_scale, (sum(rows), shapes[0][1]), target)
    if dw is None:
        return [None] * len(rows)
    return [as_laid_out(part, columns) for part, columns in zip(dw.split(rows), ctx.columns[1:], strict=True)]


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearPlan) -> Tensor:
    """y = x W^T + bias by 8-bit products; the gradient of W goes, unmasked, to the dense `weight`.

    x       (..., in_features), any floating dtype; y has it too
    weight  (out_features, in_features), the dense master; only its gradient is computed
    plan    the packed weight, scales, and which products are 8-bit

    Errors as `sparse_linear`. Not differentiable twice.
    """
    check_no_transform(x)
    x, bias = cast_as_autocast_does(x, bias)
    return _shaped_as(_Float8Linear.apply(_rows_of(x), weight, bias, plan), x)


def float8_feed_forward(
    x: Tensor, up: tuple[Tensor, ...], down: Tensor, plan: FeedForwardPlan, *,
    bias_up: Tensor | None = None, bias_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A whole feed-forward layer by 8-bit products: `gated_mlp` where plan.gated, with up = (gate, up), else `mlp`."""
    check_no_transform(x)
    x, bias_up, bias_down = cast_as_autocast_does(x, bias_up, bias_down)
    return _shaped_as(_Float8FeedForward.apply(plan, _rows_of(x), bias_up, bias_down, down, *both(up)), x)
