"""Whole feed-forward layers as one autograd function: the products of three linear layers, in fewer passes.

Which product runs where is said line by line. Backward keeps what it needs and nothing else, and computes only
gradients that somebody asked for. None can be differentiated twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import as_rows
from ..ops.arguments import names_wrong_types
from ..ops.feed_forward import BackwardOptions, feed_forward, feed_forward_backward
from . import accumulation
from .activations import activation_gradient
from .layer_gradients import as_autograd_takes, origin_of, parts_of, targets
from .operands import (
    INPUT,
    OUTPUT,
    KeptInput,
    KeptWeights,
    Noise,
    PackedWeight,
    as_constants,
    both,
    cast_as_autocast_does,
    check_bias,
    check_no_transform,
    decay_term,
    is_lean,
    kept_input,
    kept_weights,
    load_for_backward,
    noise_of,
    pruned_operand,
    save_for_backward,
    transposed_form,
)
from .second_derivatives import once_differentiable
from .weight_gradient import GradTarget, as_laid_out, bias_gradient, packed_output_gradient, weight_gradient

_BOTH_OUTPUTS = (OUTPUT, OUTPUT)


class _Plan(NamedTuple):
    """A layer without its parameters: packed forms, the activation, and the noise of (down, up)."""

    up: PackedWeight
    down: PackedWeight
    kind: str
    gated: bool
    noise: Noise


class _Kept(NamedTuple):
    """What `_FeedForward` saves, in order. Where inputs are pruned, their packed forms are kept in place of x and h."""

    gate_up: Tensor
    x: Tensor | None
    packed_x: Tensor | None
    E_x: Tensor | None
    h: Tensor | None
    packed_h: Tensor | None
    E_h: Tensor | None
    seed: Tensor | None
    input_seed: Tensor | None
    decay: Tensor | None


def _needed_inputs(ctx, x: Tensor, h: Tensor, plan: _Plan) -> tuple[KeptInput, KeptInput]:
    """What backward keeps of x and of h. Lean layers make h again, in the pass that reads gate_up anyway."""
    _, _, _, needs_down = ctx.needs_input_grad[:4]
    operands, seed = plan.noise.operands, plan.noise.input_seed
    seed_down, seed_up = (seed[0], seed[1]) if seed is not None else (None, None)
    keeps_x, keeps_h = any(ctx.needs_input_grad[6:]), needs_down and not is_lean(plan.down)
    of_x = kept_input(x, seed_up if operands[1] == INPUT else None) if keeps_x else KeptInput()
    of_h = kept_input(h, seed_down if operands[0] == INPUT else None) if keeps_h else KeptInput()
    return of_x, of_h


class _FeedForward(torch.autograd.Function):
    """Eight kernels a micro-batch: the up product makes the activation too, and a consumer reads each array once.

    The weight of the up product is one parameter and None, or two (gate, up) whose rows lie one after the other in one
    packed buffer. No *weights: without gradients Dynamo takes such a forward for one that has no ctx, if the numbers of
    its parameters and arguments are the same.
    """

    @staticmethod
    def forward(ctx, x, bias_up, bias_down, down_weight, plan: _Plan, decay, first_weight, second_weight):
        up, down, kind, gated, noise = plan
        up_weights = (first_weight,) if second_weight is None else (first_weight, second_weight)
        forms = (up.packed, up.E), (down.packed, down.E)
        y, gate_up, h = feed_forward(x, *forms, kind, gated, bias_up, bias_down)
        ctx.by_one_op = _trains_plainly(ctx.needs_input_grad, plan, decay, down_weight.dtype, up_weights)
        if ctx.by_one_op:
            ctx.save_for_backward(gate_up, x, h, up.packed_t, up.E_t, down.packed_t, down.E_t, noise.seed)
        else:
            of_x, of_h = _needed_inputs(ctx, x, h, plan)
            decays = decay is not None
            save_for_backward(
                ctx, _Kept(gate_up, *of_x, *of_h, noise.seed, noise.input_seed, decay),
                kept_weights(down, (down_weight,), decays), kept_weights(up, up_weights, decays),
            )  # fmt: skip
        ctx.kind, ctx.gated, ctx.operands, ctx.rank = kind, gated, noise.operands, noise.rank
        ctx.packed_dtype = down.packed.dtype
        ctx.bias_dtypes = None if bias_up is None else bias_up.dtype, None if bias_down is None else bias_down.dtype
        ctx.down, *ctx.ups = [origin_of(weight) for weight in (down_weight, *up_weights)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return (_backward_by_one_op if ctx.by_one_op else _backward)(ctx, dy)


def _trains_plainly(needs: tuple[bool, ...], plan: _Plan, decay, dtype: torch.dtype, up_weights) -> bool:
    """Whether backward is the usual one, which is one op: both weights trained, in one dtype, by pruned output
    gradients, from what forward has made and packed.
    """
    if decay is not None or plan.noise.operands != _BOTH_OUTPUTS or is_lean(plan.down) or is_lean(plan.up):
        return False
    first, second = both(up_weights)
    if first.dtype != dtype or not (needs[3] and needs[6]):
        return False
    return second is None or (needs[7] and second.dtype == dtype)


def _backward_by_one_op(ctx, dy: Tensor) -> tuple:
    gate_up, x, h, *forms, seed = ctx.saved_tensors
    needs, shape, dy = ctx.needs_input_grad[:3], dy.shape, as_rows(dy)
    into = targets(ctx.down, ctx.ups, dy.dtype)
    out_dtype = torch.float32 if ctx.down.dtype == torch.float32 else dy.dtype
    made = feed_forward_backward(
        dy, (as_rows(gate_up), as_rows(x), as_rows(h)), forms[:2], forms[2:], seed, (ctx.kind, ctx.gated),
        BackwardOptions(ctx.rank, *needs, out_dtype), into,
    )  # fmt: skip
    dx, *others = as_autograd_takes(ctx, made, needs, into)
    if dx is not None and len(shape) != 2:
        dx = dx.view(*shape[:-1], dx.shape[1])
    return dx, *others[:3], None, None, *others[3:]


def _backward(ctx, dy: Tensor) -> tuple:
    """Any other, from single ops."""
    tensors, (down, up) = load_for_backward(ctx)
    kept = _Kept(*tensors)
    need_x, need_bias_up, need_bias_down, need_down = ctx.needs_input_grad[:4]
    need_up = any(ctx.needs_input_grad[6:])
    shape, dy = dy.shape, as_rows(dy)
    seed_down, seed_up = _seeds(ctx, kept.seed, dy) if need_down or need_up else (None, None)

    dh = _grad_input(dy, down, ctx.packed_dtype)  # dh = dy (M.W_down)
    made = activation_gradient(
        dh, as_rows(kept.gate_up), ctx.kind, ctx.gated, seed=seed_up if need_up else None,
        make_h=need_down and kept.h is None and kept.packed_h is None,
        bias_dtype=ctx.bias_dtypes[0] if need_bias_up else None,
    )  # fmt: skip
    dx = d_down = db_down = None
    bias_dtype = ctx.bias_dtypes[1] if need_bias_down else None
    if need_down:
        d_down, db_down = _down_gradient(
            ctx, dy, _input_of_down(ctx, kept, made.h), down, kept.decay, seed_down, bias_dtype
        )
    elif need_bias_down:
        db_down = bias_gradient(dy, bias_dtype)
    d_ups = _up_gradients(ctx, made, kept, up) if need_up else [None] * len(ctx.ups)
    if need_x:  # dx = d_gate_up (M.W_up)
        dx = _grad_input(made.d_gate_up, up, ctx.packed_dtype)
        if len(shape) != 2:
            dx = dx.view(*shape[:-1], dx.shape[1])
    return dx, made.db, db_down, d_down, None, None, *both(d_ups)


def _grad_input(dy: Tensor, weights: KeptWeights, dtype: torch.dtype) -> Tensor:
    # Widths are those of the tensors: torch 2.11 cannot compile a ctx with sizes in it that vary.
    packed_t, E_t = transposed_form(weights, dtype)
    return ops.sparse_mm_grad_input(dy, packed_t, E_t, packed_t.shape[1])


def _seeds(ctx, seed: Tensor | None, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Seeds of the pruned output gradients of (down, up); None where it is not the output that is pruned."""
    if OUTPUT not in ctx.operands:
        return None, None
    if seed is None:
        seed = ops.draw_seeds(dy, 2, ctx.rank)
    (down, up), (operand_down, operand_up) = seed.unbind(), ctx.operands
    return down if operand_down == OUTPUT else None, up if operand_up == OUTPUT else None


def _input_of_down(ctx, kept: _Kept, made_h: Tensor | None) -> KeptInput:
    """h as it was kept, or as lean layers make it again, and then prune it if that is wanted."""
    if made_h is None:
        return KeptInput(None if kept.h is None else as_rows(kept.h), kept.packed_h, kept.E_h)
    return kept_input(as_rows(made_h), kept.input_seed[0] if ctx.operands[0] == INPUT else None)


def _down_gradient(ctx, dy, h: KeptInput, weights: KeptWeights, decay, seed, bias_dtype):
    """dW_down = MVUE(dy^T) h or dy^T MVUE(h) [+ decay], and the gradient of the bias."""
    of = ctx.down
    target = GradTarget(of.dtype, accumulation.target(of.leaf, dy.dtype), decay_term(weights, decay))
    d_down, db_down = weight_gradient(dy, h, target, seed, bias_dtype)
    return as_laid_out(d_down, of.columns), db_down


def _up_gradients(ctx, made, kept: _Kept, weights: KeptWeights) -> list[Tensor | None]:
    """dW_up = MVUE(d_gate_up^T) x or d_gate_up^T MVUE(x) [+ decay], for each of the parameters."""
    d_gate_up, ups = made.d_gate_up, ctx.ups
    into = accumulation.stacked_target([of.leaf for of in ups], d_gate_up.dtype)
    target = GradTarget(ups[0].dtype, into, decay_term(weights, kept.decay))
    x = KeptInput(None if kept.x is None else as_rows(kept.x), kept.packed_x, kept.E_x)
    if made.packed is not None:
        d_up = packed_output_gradient(made.packed, x.x, target)
    else:
        d_up, _ = weight_gradient(d_gate_up, x, target, None)
    return parts_of(d_up, ups)


def _check_seed_pairs(seed: Tensor | None) -> None:
    if seed is not None and (seed.dtype != torch.int64 or tuple(seed.shape) != (2, 2)):
        raise Sparse24DtypeError(
            f"seed must be int64 of shape (2, 2), one pair for each weight gradient, got {seed.dtype} "
            f"{tuple(seed.shape)}; ops.draw_seeds(x, 2) makes one"
        )


class _Biases(NamedTuple):
    up: Tensor | None
    down: Tensor | None


class _Settings(NamedTuple):
    """Keyword arguments that both functions share."""

    mvue: bool | str | None | tuple
    seed: Tensor | None
    rank: int
    decay: Tensor | None
    training: bool


def _pruned_operands(mvue) -> tuple[str, str]:
    """Of the (down, up) products, from one choice or a pair (up, down)."""
    if isinstance(mvue, tuple):
        if len(mvue) != 2:
            raise Sparse24Error(f"mvue must be one choice, or a pair of them for (up, down), got {mvue!r}")
        return pruned_operand(mvue[1], "mvue[1]"), pruned_operand(mvue[0], "mvue[0]")
    return (pruned_operand(mvue),) * 2


def _feed_forward(
    x: Tensor, weights: tuple[Tensor, ...], forms: tuple, kind: str, gated: bool, biases: _Biases, settings: _Settings
) -> Tensor:
    """`weights` and `forms` of up (one, or gate and up) and down, in this order."""
    *up_weights, down_weight = weights
    check_no_transform(x)
    x, *biases = cast_as_autocast_does(x, *biases)
    for bias in biases:
        check_bias(x, bias)
    _check_seed_pairs(settings.seed)
    up, down = as_constants(forms[0]), as_constants(forms[1])
    rows, needs = 0, down_weight.requires_grad
    for w in up_weights:
        rows, needs = rows + w.shape[0], needs or w.requires_grad
    if up.packed.shape[0] != rows:
        raise Sparse24Error(f"packed weights of the up product have {up.packed.shape[0]} rows, the parameters {rows}")
    noise = noise_of(x, _pruned_operands(settings.mvue), settings.seed, settings.rank, needs, settings.training)
    plan = _Plan(up, down, kind, gated, noise)
    return _FeedForward.apply(x, *biases, down_weight, plan, settings.decay, *both(up_weights))


@names_wrong_types
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
    mvue: bool | str | tuple | None = True,
    seed: Tensor | None = None,
    rank: int = 0,
    decay: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """A whole gated feed-forward layer, (act(x Wg^T) * (x Wu^T)) Wd^T, with both weights 2:4 sparse.

    x               (..., d_model)
    gate_up         dense master (2*d_ff, d_model), gate rows first, or the pair (gate, up) of (d_ff, d_model) each
    packed_gate_up  its (2*d_ff, d_model) packed both ways; one buffer for both halves
    down            dense master (d_model, d_ff), and packed_down its packed form
    mvue            as in `sparse_linear`, for both products, or a pair of choices (up, down)
    seed            int64 (2, 2): one pair for each weight gradient, (down, up), or None to draw them
    decay           as in `sparse_linear`, for all of the weights; packed forms must have their masks

    Fewer passes than three `sparse_linear` and an activation: gate and up are one product, and backward computes the
    activation's gradient and its MVUE form in one read. Saved for backward are x, the product of gate and up, and h;
    with lean packed forms not h, which backward then makes again. An input that is pruned is kept in its packed form.
    """
    weights = gate_up if isinstance(gate_up, tuple) else (gate_up,)
    biases, settings = _Biases(bias_gate_up, bias_down), _Settings(mvue, seed, rank, decay, training)
    return _feed_forward(x, (*weights, down), (packed_gate_up, packed_down), activation, True, biases, settings)


@names_wrong_types
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
    mvue: bool | str | tuple | None = True,
    seed: Tensor | None = None,
    rank: int = 0,
    decay: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """A whole plain feed-forward layer, act(x Wu^T + bu) Wd^T + bd; arguments as `gated_mlp`, up (d_ff, d_model)."""
    biases, settings = _Biases(bias_up, bias_down), _Settings(mvue, seed, rank, decay, training)
    return _feed_forward(x, (up, down), (packed_up, packed_down), activation, False, biases, settings)
