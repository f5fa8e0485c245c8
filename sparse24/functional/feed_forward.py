"""Differentiable functions on packed weights, straight-through to the dense master weights.

Each autograd function says, line by line, which of the sparse products it runs; it saves what its backward needs and
nothing else, and computes only gradients that somebody asked for. None can be differentiated twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import ops
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import HALF_DTYPES, as_rows
from . import accumulation

#: whether this torch has mm and addmm with a wider result than operands
_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype") and hasattr(torch.ops.aten.addmm, "dtype_out")


#: a factor, weights stacked along out_features, and the mask of each: `decay` of `ops.sparse_mm_grad_weight`
_DecayTerm = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


class PackedWeight(NamedTuple):
    """A weight (out_features, in_features) packed both ways, as `ops.compress` returns it.

    With an empty packed_t, backward packs along out_features itself, from the weight and `masks`: one mask, or one of
    each weight whose rows are stacked here. That is the lean form. A decay needs `masks` too.
    """

    packed: Tensor
    E: Tensor
    packed_t: Tensor
    E_t: Tensor
    masks: tuple[Tensor, ...] = ()


def _cast_as_autocast_does(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, inputs and biases in its dtype, as `F.linear` would cast them."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)


def check_no_transform(x: Tensor) -> None:
    """vmap, functional gradients and forward mode have no rule here; say so, instead of PyTorch's words to authors."""
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if dual or torch._C._are_functorch_transforms_active():
        raise Sparse24Error(
            "2:4 layers do not work under torch.func transforms (vmap, grad, jvp, ...) nor in forward-mode "
            "differentiation; use backward(), or sparse24.densify(model) for such a computation"
        )


def _constant(values: Tensor) -> Tensor:
    """Packed values made from a recording weight: their gradient is the straight-through one, not this path."""
    return values.detach() if values.requires_grad else values


def _for_backward(form: PackedWeight, weights: tuple[Tensor, ...], decays: bool) -> tuple[Tensor, ...]:
    """What backward needs later: packed_t and E_t, unless lean; then weights and masks, if lean or with a decay."""
    lean = _is_lean(form)
    packed = () if lean else (form.packed_t, form.E_t)
    if not lean and not decays:
        return packed
    if len(form.masks) != len(weights):
        why = "packed_t is empty, so backward packs it anew" if lean else "backward adds a decay to pruned weights"
        remedy = "pass masks, or packed_t and E_t from ops.compress" if lean else "pass masks"
        raise Sparse24Error(
            f"{why} and needs the mask of each of {len(weights)} weights, got {len(form.masks)}; {remedy}"
        )
    return *packed, *weights, *form.masks


def _packed_t(saved: tuple[Tensor, ...], lean: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(packed_t, E_t) from what `_for_backward` has kept."""
    if not lean:
        return saved[0], saved[1]
    return ops.compress_transposed(*_weights_and_masks(saved), dtype)


def _weights_and_masks(saved: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return saved[: len(saved) // 2], saved[len(saved) // 2 :]


def _decay_term(factor: Tensor | None, saved: tuple[Tensor, ...], lean: bool) -> _DecayTerm | None:
    """The decay of a weight gradient, from what `_for_backward` has kept."""
    return None if factor is None else (factor, *_weights_and_masks(saved if lean else saved[2:]))


def _is_lean(form: PackedWeight) -> bool:
    return form.packed.numel() > 0 and form.packed_t.numel() == 0


def _check_bias(x: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.dtype != x.dtype:
        raise Sparse24DtypeError(
            f"x and bias must have the same dtype, got {x.dtype} and {bias.dtype}; cast one, or run under autocast"
        )


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    seed: Tensor | None,
    into: Tensor | None = None,
    decay: _DecayTerm | None = None,
) -> Tensor | None:
    """dW (out, in) in `dtype` from dy (tokens, out) and x (tokens, in): sparse with a seed, dense without.

    Sums are fp32; a fp32 master weight gets them unrounded. `into`: added there instead, and None returned. `decay`:
    masked decay of the weights, added as well.
    """
    if seed is None:
        return dense_weight_gradient(dy, x, dtype, into, decay)
    return _packed_weight_gradient(*ops.mvue_compress(dy, seed), x, dy.shape[1], dtype, into, decay)


def _weight_and_bias_gradient(dy, x, dtype, bias_dtype, seed, into=None, decay=None) -> tuple[Tensor | None, Tensor]:
    """dW and db. Packing dy for dW reads all of it, and adds up its columns on the way."""
    if seed is None:
        return dense_weight_gradient(dy, x, dtype, into, decay), bias_gradient(dy, bias_dtype)
    packed_dy, E_dy, db = ops.mvue_compress(dy, seed, bias_grad=True)
    return _packed_weight_gradient(packed_dy, E_dy, x, dy.shape[1], dtype, into, decay), db.to(bias_dtype)


def _packed_weight_gradient(packed_dy, E_dy, x, out_features, dtype, into=None, decay=None) -> Tensor | None:
    """dW = MVUE(dy^T) x."""
    if into is not None:
        ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out=into, accumulate=True, decay=decay)
        return None
    wide = torch.float32 if dtype == torch.float32 else x.dtype
    return ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=wide, decay=decay).to(dtype)


def dense_weight_gradient(dy, x, dtype, into=None, decay=None) -> Tensor | None:
    """dW = dy^T x, and then its decay."""
    dw = _dense_product(dy, x, dtype, into)
    if decay is not None:
        _add_decay(into if dw is None else dw, decay)
    return dw


def _add_decay(dw: Tensor, decay: _DecayTerm) -> None:
    """dw += factor * (1 - mask) * weight in place, for weights stacked along its rows."""
    factor, weights, masks = decay
    parts = dw.split([w.shape[0] for w in weights]) if len(weights) > 1 else [dw]
    ops.foreach_masked_decay_(parts, weights, masks, 1.0, factor)


def _dense_product(dy, x, dtype, into) -> Tensor | None:
    """dy^T x; on a GPU a fp32 one comes out of the product as it is, without a 16-bit one in between."""
    if into is not None and into.dtype == x.dtype:
        into.addmm_(dy.T, x)
        return None
    if dtype == torch.float32 and _has_wide_products(x):
        if into is None:
            return torch.mm(dy.T, x, out_dtype=torch.float32)
        torch.addmm(into, dy.T, x, out_dtype=torch.float32, out=into)
        return None
    dw = (dy.T @ x).to(dtype)
    if into is None:
        return dw
    into.add_(dw)
    return None


def _has_wide_products(x: Tensor) -> bool:
    """Whether torch multiplies 16-bit operands like `x` to a fp32 result: on a GPU, eagerly."""
    return (
        x.is_cuda and _WIDE_PRODUCTS and x.dtype in HALF_DTYPES and x.numel() > 0 and not torch.compiler.is_compiling()
    )


def _as_laid_out(dw: Tensor | None, columns: bool) -> Tensor | None:
    """dW, row-major, in its weight's layout: as a column-major weight (a Conv1D's) has it, autograd keeps it as it is,
    where it would else copy it element by element.
    """
    return ops.activation(dw, "identity", column_major=True) if columns and dw is not None else dw


def _is_column_major(weight: Tensor) -> bool:
    return weight.stride(0) == 1 and weight.stride(1) > 1


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of columns, in fp32 and rounded once. A product with ones reads dy up to twice as fast as torch's sum."""
    if _has_wide_products(dy):
        return torch.mm(dy.new_ones(1, dy.shape[0]), dy, out_dtype=torch.float32)[0].to(dtype)
    return dy.sum(0, dtype=torch.float32 if dtype == torch.float32 else None).to(dtype)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, form, mvue, seed, rank, decay):
        # y = x (M.W)^T: W is K-major, x row-major, y row-major.
        y = ops.sparse_mm(x, form.packed, form.E, weight.shape[0], bias=bias)
        needs_x = weight.requires_grad
        decay = decay if needs_x else None
        kept = _for_backward(form, (weight,), decay is not None)
        ctx.save_for_backward(x if needs_x else None, seed, decay, *kept)
        ctx.lean, ctx.packed_dtype = _is_lean(form), form.packed.dtype
        ctx.in_features, ctx.weight_dtype = weight.shape[1], weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mvue, ctx.rank = mvue, rank
        ctx.leaf, ctx.columns = accumulation.leaf_of(weight), _is_column_major(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, seed, decay, *kept = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if need_x:
            # dx = dy (M.W): packed along out_features, so W^T is an MN-major operand and nothing is transposed.
            packed_t, E_t = _packed_t(kept, ctx.lean, ctx.packed_dtype)
            dx = ops.sparse_mm_grad_input(dy, packed_t, E_t, ctx.in_features)
        if need_weight or need_bias:
            dy = as_rows(dy)
        if need_weight:
            # dW = MVUE(dy^T) x [+ decay (1 - M).W], for every entry of the dense weight: straight-through.
            if ctx.mvue and seed is None:
                seed = ops.draw_seed(dy, ctx.rank)
            seed = seed if ctx.mvue else None
            into = accumulation.target(ctx.leaf, x.dtype)
            term, x = _decay_term(decay, kept, ctx.lean), as_rows(x)
            if need_bias:
                dw, db = _weight_and_bias_gradient(dy, x, ctx.weight_dtype, ctx.bias_dtype, seed, into, term)
            else:
                dw = weight_gradient(dy, x, ctx.weight_dtype, seed, into, term)
            dw = _as_laid_out(dw, ctx.columns)
        elif need_bias:
            db = bias_gradient(dy, ctx.bias_dtype)
        return dx, dw, db, None, None, None, None, None


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    E: Tensor,
    packed_t: Tensor,
    E_t: Tensor,
    bias: Tensor | None = None,
    *,
    mvue: bool = True,
    seed: Tensor | None = None,
    rank: int = 0,
    mask: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias with W 2:4 sparse; gradients of W go, unmasked, to the dense `weight`.

    x                       (..., in_features); under autocast it is cast as `F.linear` casts it
    weight                  (out_features, in_features), the dense master; only its gradient is computed, and its value
                            read by backward alone, for `decay` or an empty packed_t
    packed, E, packed_t, E_t  from `ops.compress` of it
    bias                    (out_features,) or None
    mvue                    draw the output gradient's 2:4 form for dW (three sparse products); False: dense dW
    seed                    int64 (2,), or None: drawn in backward from torch's generator, fresh for every call
    rank                    of this process: mixed into a drawn seed, so that ranks draw different noise
    mask                    of the weight, needed where packed_t and E_t are empty: backward then packs them anew, which
                            keeps 1.125 bytes a weight less and costs a pass over the weight. Needed for `decay` too
    decay                   one float32 on x's device, or None: backward adds decay * (1 - mask) * weight to the
                            gradient of the weight, in the product that makes it. `Recipe(decay_in="backward")` sets it

    Source: arXiv 2404.01847. Not differentiable twice.
    """
    if weight.dim() != 2:
        raise Sparse24Error(f"weight must be 2-D, (out_features, in_features), got shape {tuple(weight.shape)}")
    check_no_transform(x)
    x, bias = _cast_as_autocast_does(x, bias)
    _check_bias(x, bias)
    form = PackedWeight(_constant(packed), E, _constant(packed_t), E_t, () if mask is None else (mask,))
    return _SparseLinear.apply(x, weight, bias, form, mvue, seed, rank, decay)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gu, kind, gated):
        ctx.save_for_backward(gu)
        ctx.kind, ctx.gated = kind, gated
        return ops.gated_activation(gu, kind) if gated else ops.activation(gu, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        (gu,) = ctx.saved_tensors
        backward = ops.gated_activation_backward if ctx.gated else ops.activation_backward
        return backward(dh, gu, ctx.kind), None, None


def gated_activation(gu: Tensor, kind: str = "silu") -> Tensor:
    """h = act(gate) * up for gu = [gate | up] (..., 2*d_ff); saves gu alone. Kinds as `ops.gated_activation`."""
    check_no_transform(gu)
    return _Activation.apply(gu, kind, True)


def activation(x: Tensor, kind: str = "gelu_tanh") -> Tensor:
    """act(x), saving x alone; kinds as `ops.gated_activation`, "squared_relu" among them."""
    check_no_transform(x)
    return _Activation.apply(x, kind, False)


def _activation_backward(dh, gu, kind, gated, seed, make_h, bias_dtype):
    """d_gu, its MVUE form (packed, E), h and the gradient of the up bias, from one read where they are wanted.

    seed        None: no MVUE form        make_h  make h again        bias_dtype  None: no gradient of a bias
    """
    db = h = None
    if seed is None:
        backward = ops.gated_activation_backward if gated else ops.activation_backward
        results = backward(dh, gu, kind, recompute_h=make_h)
        d_gu, h = results if make_h else (results, None)
        if bias_dtype is not None:
            db = bias_gradient(d_gu, bias_dtype)
        return d_gu, None, h, db
    backward = ops.gated_activation_backward_mvue if gated else ops.activation_backward_mvue
    results = backward(dh, gu, kind, seed, recompute_h=make_h, bias_grad=bias_dtype is not None)
    if make_h:
        h = results[3]
    if bias_dtype is not None:
        db = results[-1].to(bias_dtype)
    return results[0], results[1:3], h, db


class _FeedForward(torch.autograd.Function):
    """Eight kernels a micro-batch: the up product makes the activation too, and a consumer reads each array once.

    `up_weights` are one parameter, or two (gate and up) whose rows lie one after the other in one packed buffer.
    """

    @staticmethod
    def forward(ctx, x, bias_up, bias_down, down_weight, up, down, kind, gated, mvue, seed, rank, decay, *up_weights):
        rows = up.packed.shape[0]
        if gated:  # gu = [gate | up] = x (M.W_up)^T, h = act(gate) * up
            gu, h = ops.sparse_mm_gated_activation(x, up.packed, up.E, rows // 2, kind, bias=bias_up)
        else:
            gu, h = ops.sparse_mm_activation(x, up.packed, up.E, rows, kind, bias=bias_up)
        y = ops.sparse_mm(h, down.packed, down.E, down.packed.shape[0], bias=bias_down)  # y = h (M.W_down)^T
        kept_down = _for_backward(down, (down_weight,), decay is not None)
        kept_up = _for_backward(up, up_weights, decay is not None)
        # h is kept for dW_down. Lean layers make it again from gu, in the pass of backward that reads gu anyway.
        keeps_h = down_weight.requires_grad and not _is_lean(down)
        ctx.save_for_backward(x, gu, h if keeps_h else None, seed, decay, *kept_down, *kept_up)
        ctx.kept_down = len(kept_down)
        ctx.lean_down, ctx.lean_up, ctx.packed_dtype = _is_lean(down), _is_lean(up), down.packed.dtype
        ctx.kind, ctx.gated, ctx.mvue, ctx.rank = kind, gated, mvue, rank
        ctx.d_ff, ctx.down_dtype = h.shape[-1], down_weight.dtype
        ctx.up_rows, ctx.up_dtypes = [w.shape[0] for w in up_weights], [w.dtype for w in up_weights]
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (bias_up, bias_down)]
        ctx.leaves = [accumulation.leaf_of(weight) for weight in (down_weight, *up_weights)]
        ctx.columns = [_is_column_major(weight) for weight in (down_weight, *up_weights)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gu, h, seed, decay, *kept = ctx.saved_tensors
        kept_down, kept_up = kept[: ctx.kept_down], kept[ctx.kept_down :]
        need_x, need_bias_up, need_bias_down, need_down = ctx.needs_input_grad[:4]
        need_up = any(ctx.needs_input_grad[12:])
        x_rows, gu_rows, dy = as_rows(x), as_rows(gu), as_rows(dy)
        if ctx.mvue and seed is None and (need_down or need_up):
            seed = ops.draw_seeds(dy, 2, ctx.rank)
        seed_down, seed_up = (seed[0], seed[1]) if ctx.mvue and seed is not None else (None, None)

        packed_t, E_t = _packed_t(kept_down, ctx.lean_down, ctx.packed_dtype)
        dh = ops.sparse_mm_grad_input(dy, packed_t, E_t, ctx.d_ff)  # dh = dy (M.W_down)
        dx = d_down = db_down = None
        d_gu, packed_dgu, made_h, db_up = _activation_backward(
            dh, gu_rows, ctx.kind, ctx.gated, seed_up if need_up else None, h is None and need_down,
            ctx.bias_dtypes[0] if need_bias_up else None,
        )  # fmt: skip
        h = made_h if h is None else h

        leaf_down, *leaves_up = ctx.leaves
        if need_down:
            h = as_rows(h)
            into = accumulation.target(leaf_down, h.dtype)
            term = _decay_term(decay, kept_down, ctx.lean_down)
            if need_bias_down:
                d_down, db_down = _weight_and_bias_gradient(
                    dy, h, ctx.down_dtype, ctx.bias_dtypes[1], seed_down, into, term
                )
            else:  # dW_down = MVUE(dy^T) h [+ decay]
                d_down = weight_gradient(dy, h, ctx.down_dtype, seed_down, into, term)
            d_down = _as_laid_out(d_down, ctx.columns[0])
        elif need_bias_down:
            db_down = bias_gradient(dy, ctx.bias_dtypes[1])
        d_ups = [None] * len(ctx.up_rows)
        if need_up:
            into, dtype = accumulation.stacked_target(leaves_up, x.dtype), ctx.up_dtypes[0]
            term = _decay_term(decay, kept_up, ctx.lean_up)
            if packed_dgu is not None:  # dW_up = MVUE(d_gu^T) x [+ decay]
                d_up = _packed_weight_gradient(*packed_dgu, x_rows, d_gu.shape[1], dtype, into, term)
            else:
                d_up = dense_weight_gradient(d_gu, x_rows, dtype, into, term)
            if d_up is not None:
                parts = zip(d_up.split(ctx.up_rows), ctx.columns[1:], strict=True)
                d_ups = [_as_laid_out(part, columns) for part, columns in parts]
        if need_x:
            packed_t, E_t = _packed_t(kept_up, ctx.lean_up, ctx.packed_dtype)
            dx = ops.sparse_mm_grad_input(d_gu, packed_t, E_t, x.shape[-1]).view(x.shape)  # dx = d_gu (M.W_up)
        return dx, db_up, db_down, d_down, None, None, None, None, None, None, None, None, *d_ups


def _check_seed_pairs(seed: Tensor | None) -> None:
    if seed is not None and (seed.dtype != torch.int64 or tuple(seed.shape) != (2, 2)):
        raise Sparse24DtypeError(
            f"seed must be int64 of shape (2, 2), one pair for each weight gradient, got {seed.dtype} "
            f"{tuple(seed.shape)}; ops.draw_seeds(x, 2) makes one"
        )


def _feed_forward(
    x, up_weights, up, down_weight, down, kind, gated, bias_up, bias_down, mvue, seed, rank, decay
) -> Tensor:
    check_no_transform(x)
    x, bias_up, bias_down = _cast_as_autocast_does(x, bias_up, bias_down)
    _check_bias(x, bias_up)
    _check_bias(x, bias_down)
    _check_seed_pairs(seed)
    up, down = PackedWeight(*up), PackedWeight(*down)
    up, down = (form._replace(packed=_constant(form.packed), packed_t=_constant(form.packed_t)) for form in (up, down))
    rows = sum(w.shape[0] for w in up_weights)
    if up.packed.shape[0] != rows:
        raise Sparse24Error(f"packed weights of the up product have {up.packed.shape[0]} rows, the parameters {rows}")
    return _FeedForward.apply(
        x, bias_up, bias_down, down_weight, up, down, kind, gated, mvue, seed, rank, decay, *up_weights
    )


def gated_mlp(
    x: Tensor,
    gate_up: Tensor | tuple[Tensor, Tensor],
    packed_gate_up: PackedWeight,
    down: Tensor,
    packed_down: PackedWeight,
    activation: str = "silu",
    *,
    bias_gate_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    mvue: bool = True,
    seed: Tensor | None = None,
    rank: int = 0,
    decay: Tensor | None = None,
) -> Tensor:
    """A whole gated feed-forward layer, (act(x Wg^T) * (x Wu^T)) Wd^T, with both weights 2:4 sparse.

    x               (..., d_model)
    gate_up         dense master (2*d_ff, d_model), gate rows first, or the pair (gate, up) of (d_ff, d_model) each
    packed_gate_up  its (2*d_ff, d_model) packed both ways; one buffer for both halves
    down            dense master (d_model, d_ff), and packed_down its packed form
    seed            int64 (2, 2): one pair for each weight gradient, or None to draw them in backward
    decay           as in `sparse_linear`, for all of the weights; packed forms must have their masks

    Fewer passes than three `sparse_linear` and an activation: gate and up are one product, and backward computes the
    activation's gradient and its MVUE form in one read. Saved for backward are x, the product of gate and up, and h;
    with lean packed forms not h, which backward then makes again.
    """
    weights = gate_up if isinstance(gate_up, tuple) else (gate_up,)
    return _feed_forward(
        x,
        weights,
        packed_gate_up,
        down,
        packed_down,
        activation,
        True,
        bias_gate_up,
        bias_down,
        mvue,
        seed,
        rank,
        decay,
    )


def mlp(
    x: Tensor,
    up: Tensor,
    packed_up: PackedWeight,
    down: Tensor,
    packed_down: PackedWeight,
    activation: str = "gelu_tanh",
    *,
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    mvue: bool = True,
    seed: Tensor | None = None,
    rank: int = 0,
    decay: Tensor | None = None,
) -> Tensor:
    """A whole plain feed-forward layer, act(x Wu^T + bu) Wd^T + bd; arguments as `gated_mlp`, up (d_ff, d_model)."""
    return _feed_forward(
        x, (up,), packed_up, down, packed_down, activation, False, bias_up, bias_down, mvue, seed, rank, decay
    )
