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
from ..ops.feed_forward import BackwardOptions
from ..ops.float8.feed_forward import feed_forward_float8, feed_forward_float8_backward
from . import accumulation
from .layer_gradients import as_autograd_takes, origin_of, parts_of, targets
from .operands import both, cast_as_autocast_does, check_no_transform
from .second_derivatives import once_differentiable
from .weight_gradient import (
    GradTarget,
    as_laid_out,
    bias_gradient,
    dense_weight_gradient,
    lies_by_columns,
    packed_output_gradient,
)


class Cast(NamedTuple):
    """How a tensor is cast: by `scale`, raising `amax` to its largest magnitude. One float32 each.

    amax     None: not noted, as in evaluation
    counts   int64 [3], added to: values clipped, flushed to zero, and seen; None: not counted
    current  the scale is not known yet: it is made from the tensor itself, by a read more
    """

    scale: Tensor
    amax: Tensor | None
    counts: Tensor | None = None
    current: bool = False

    @property
    def noted(self) -> dict[str, Tensor | None]:
        """What a pass takes note of."""
        return dict(amax=self.amax, counts=self.counts)

    def settled(self, x: Tensor) -> Cast:
        """Itself, with a scale that fits x."""
        if not self.current:
            return self
        largest = torch.zeros_like(self.scale)
        float8.quantize(x, self.scale, rows=False, amax=largest)
        return Cast(float8.scale_of(largest), self.amax, self.counts)


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


def computed(x: Tensor) -> Tensor:
    """x as the passes take it: 16 bits on a GPU."""
    return x.to(FORMATS[float8.E4M3].wide_dtype) if x.is_cuda and x.dtype not in HALF_DTYPES else x


def _rows_of(x: Tensor) -> Tensor:
    """x (..., features) as the passes take it, (tokens, features).

    A compiler sees it made before the autograd function, whose forward then multiplies and does nothing else: Dynamo
    before 2.13 makes all that happens in one an output of it. An output of two names (y, and y.to(y.dtype), which is y)
    gets its gradient by the wrong one, and backward gets zeros; sizes in a dynamic graph are not taken at all.
    """
    return as_rows(computed(x))


def _shaped_as(rows: Tensor, x: Tensor) -> Tensor:
    """The product's rows with the leading extents and the dtype of x."""
    y = rows if rows.dim() == x.dim() else rows.view(*x.shape[:-1], rows.shape[-1])
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


def made_dtype(weight: torch.dtype, dy: torch.dtype, full: bool) -> torch.dtype:
    """In which a product makes a weight gradient, before it is cast to the weight's."""
    if full:
        return weight if weight == FORMATS[float8.E4M3].wide_dtype else torch.float32
    return torch.float32 if weight == torch.float32 else dy


def _weight_gradient(dy: _Pruned, kept: Tensor, scale: Tensor, target: GradTarget) -> Tensor | None:
    """dW, or None where it was added to what is there.

    kept  the layer's input: 16 bits (tokens, in), or 8 bits and transposed (in, padded tokens) and then cast by `scale`
    """
    dtype, into, _ = target
    if kept.dtype == float8.E4M3:
        made = made_dtype(dtype, kept.dtype, full=True)
        out = kept.new_empty((dy.packed.shape[0], kept.shape[0]), dtype=made) if into is None else into
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
        ctx.save_for_backward(kept, *plan.weight[2:], cast_x.scale, plan.seed, *plan.dy[:3])
        ctx.current, ctx.full, ctx.mvue, ctx.rank = plan.dy.current, plan.full, plan.mvue, plan.rank
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.leaf, ctx.columns = accumulation.leaf_of(weight), lies_by_columns(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept, packed_t, E_t, w_scale, x_scale, seed, *saved_dy = ctx.saved_tensors
        weight = Float8Weight(packed_t, E_t, packed_t, E_t, w_scale)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dy = as_rows(computed(dy))
        cast_dy = Cast(*saved_dy, ctx.current).settled(dy)
        if seed is None and ctx.mvue and need_weight:
            seed = ops.draw_seed(dy, ctx.rank)
        pruned, dy8, db = _cast_gradient(dy, cast_dy, ctx.full, seed if need_weight and ctx.mvue else None, need_bias)
        dx = dw = None
        if need_x:
            dx = _product_t(dy8, cast_dy, weight, dy)
        if need_weight:
            target = GradTarget(ctx.weight_dtype, accumulation.target(ctx.leaf, dy.dtype))
            dw = as_laid_out(_weight_gradient(pruned, kept, x_scale, target), ctx.columns)
        return dx, dw, db.to(ctx.bias_dtype) if need_bias else None, None


class _Float8FeedForward(torch.autograd.Function):
    """x8 -> gate_up -> h8 -> y, and back: each array is read once by its consumer, the activation's gradient is never
    stored in 16 bits.
    """

    @staticmethod
    def forward(ctx, plan, x, bias_up, bias_down, down_weight, first_weight, second_weight):
        up_weights = (first_weight,) if second_weight is None else (first_weight, second_weight)
        needs = any(w.requires_grad for w in up_weights), down_weight.requires_grad
        run = _forward_by_parts if plan.x.current or plan.h.current else _forward_by_one_op
        y, *kept = run(plan, _rows_of(x), (bias_up, bias_down), needs)
        ctx.save_for_backward(*kept, plan.seed, *plan.dy[:3], *plan.d_gate_up[:3], *plan.up[2:], *plan.down[2:])
        ctx.down, *ctx.ups = [origin_of(w) for w in (down_weight, *up_weights)]
        ctx.by_one_op = _trains_plainly(ctx, plan)
        ctx.current = plan.dy.current, plan.d_gate_up.current
        ctx.kind, ctx.gated, ctx.full, ctx.mvue, ctx.rank = plan.kind, plan.gated, plan.full, plan.mvue, plan.rank
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (bias_up, bias_down)]
        return _shaped_as(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate_up, x, x_scale, h, h_scale, seed, *rest = ctx.saved_tensors
        saved, casts, weights = (gate_up, (x, x_scale), (h, h_scale)), (rest[:3], rest[3:6]), (rest[6:9], rest[9:])
        backward = _backward_by_one_op if ctx.by_one_op else _backward_by_parts
        dx, *others = backward(ctx, as_rows(computed(dy)), saved, seed, casts, weights)
        return None, dx if dx is None else _shaped_as(dx, dy), *others


def _forward_by_one_op(plan: FeedForwardPlan, rows: Tensor, biases: tuple, needs: tuple[bool, bool]) -> tuple:
    """y, and what backward keeps: gate_up, then x and h with their scales, in 16 bits or in 8 bits and transposed."""
    up, down = ((weight.packed, weight.E, weight.scale) for weight in (plan.up, plan.down))
    keeps, casts = (plan.full, *needs), (plan.x[:3], plan.h[:3])
    y, gate_up, x8_t, h = feed_forward_float8(rows, up, down, (plan.kind, plan.gated), biases, keeps, casts)
    x = x8_t if plan.full else rows
    return y, gate_up, x if needs[0] else None, plan.x.scale, h if needs[1] else None, plan.h.scale


def _forward_by_parts(plan: FeedForwardPlan, rows: Tensor, biases: tuple, needs: tuple[bool, bool]) -> tuple:
    """The same by single ops, for tensors whose scale is made from themselves."""
    need_up, need_down = needs
    cast_x, cast_h = plan.x.settled(rows), plan.h
    x8, kept_x = _cast_input(rows, cast_x, plan.full, need_up)
    gate_up = _product(x8, cast_x, plan.up, rows, biases[0])
    if cast_h.current:
        activation = ops.gated_activation if plan.gated else ops.activation
        cast_h = cast_h.settled(activation(gate_up, plan.kind))
    h, h8, h8_t = float8.activation_quantize(
        gate_up, plan.kind, cast_h.scale, gated=plan.gated, keep_h=need_down and not plan.full,
        transposed=need_down and plan.full, **cast_h.noted,
    )  # fmt: skip
    y = _product(h8, cast_h, plan.down, rows, biases[1])
    kept_h = (h8_t if plan.full else h) if need_down else None
    return y, gate_up, kept_x, cast_x.scale, kept_h, cast_h.scale


def _trains_plainly(ctx, plan: FeedForwardPlan) -> bool:
    """Whether backward is the usual one, which is one op: all weights trained, in one dtype, by pruned output gradients
    whose scales are known.
    """
    if not plan.mvue or plan.dy.current or plan.d_gate_up.current:
        return False
    weights = (ctx.down, *ctx.ups)
    return all(ctx.needs_input_grad[4 : 4 + len(weights)]) and all(of.dtype == ctx.down.dtype for of in weights)


def _backward_by_one_op(ctx, dy: Tensor, saved: tuple, seed: Tensor | None, casts: tuple, weights: tuple) -> tuple:
    needs, into = ctx.needs_input_grad[1:4], targets(ctx.down, ctx.ups, dy.dtype)
    options = BackwardOptions(ctx.rank, *needs, made_dtype(ctx.down.dtype, dy.dtype, ctx.full))
    made = feed_forward_float8_backward(dy, saved, *weights, seed, (ctx.kind, ctx.gated), casts, options, into)
    return as_autograd_takes(ctx, made, needs, into)


def _backward_by_parts(ctx, dy: Tensor, saved: tuple, seed: Tensor | None, casts: tuple, weights: tuple) -> tuple:
    """Any other, from single ops."""
    gate_up, (x, x_scale), (h, h_scale) = saved
    up, down = (Float8Weight(*w[:2], *w) for w in weights)
    _, need_x, need_bias_up, need_bias_down, need_down, *need_ups = ctx.needs_input_grad
    of_dy, of_d = (Cast(*cast, current) for cast, current in zip(casts, ctx.current, strict=True))
    cast_dy, need_up = of_dy.settled(dy), any(need_ups)
    if seed is None and ctx.mvue and (need_down or need_up):
        seed = ops.draw_seeds(dy, 2, ctx.rank)
    seeds = seed if ctx.mvue and seed is not None else (None, None)
    into_up, into_down = targets(ctx.down, ctx.ups, dy.dtype)

    pruned, dy8, db_down = _cast_gradient(dy, cast_dy, ctx.full, seeds[0] if need_down else None, need_bias_down)
    dh = _product_t(dy8, cast_dy, down, dy)
    d_up, d8, db_up = _activation_gradient(ctx, dh, gate_up, of_d, seeds[1] if need_up else None, need_bias_up)
    dw_down = dw_up = dx = None
    if need_down:
        dw_down = _weight_gradient(pruned, h, h_scale, GradTarget(ctx.down.dtype, into_down))
    if need_x:
        dx = _product_t(d8, d_up.cast, up, dy)
    if need_up:
        dw_up = _weight_gradient(d_up, x, x_scale, GradTarget(ctx.ups[0].dtype, into_up))
    biases = [
        db.to(dtype) if need else None
        for db, dtype, need in zip((db_up, db_down), ctx.bias_dtypes, (need_bias_up, need_bias_down), strict=True)
    ]
    return dx, *biases, as_laid_out(dw_down, ctx.down.columns), *both(parts_of(dw_up, ctx.ups))


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
    rows = _rows_of(x) if torch.compiler.is_compiling() else x  # inside of the function, where autograd notes no view
    return _shaped_as(_Float8FeedForward.apply(plan, rows, bias_up, bias_down, down, *both(up)), x)
