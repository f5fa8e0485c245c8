"""Differentiable activations, and what a feed-forward layer's backward makes of one in a single read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.arguments import names_wrong_types
from .operands import check_no_transform
from .second_derivatives import once_differentiable
from .weight_gradient import bias_gradient


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, kind, gated):
        ctx.save_for_backward(gate_up)
        ctx.kind, ctx.gated = kind, gated
        return ops.gated_activation(gate_up, kind) if gated else ops.activation(gate_up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        (gate_up,) = ctx.saved_tensors
        backward = ops.gated_activation_backward if ctx.gated else ops.activation_backward
        return backward(dh, gate_up, ctx.kind), None, None


@names_wrong_types
def gated_activation(gate_up: Tensor, kind: str = "silu") -> Tensor:
    """h = act(gate) * up for gate_up = [gate | up] (..., 2*d_ff); saves gate_up alone. Kinds as
    `ops.gated_activation`.
    """
    check_no_transform(gate_up)
    return _Activation.apply(gate_up, kind, True)


@names_wrong_types
def activation(x: Tensor, kind: str = "gelu_tanh") -> Tensor:
    """act(x), saving x alone; kinds as `ops.gated_activation`, "squared_relu" among them."""
    check_no_transform(x)
    return _Activation.apply(x, kind, False)


class ActivationGradient(NamedTuple):
    """What the second product of backward needs of the activation.

    d_gate_up  gradient of the up product         packed  its MVUE form (packed, E), or None
    h          made again, or None                db      sums of d_gate_up, the gradient of the up bias, or None
    """

    d_gate_up: Tensor
    packed: tuple[Tensor, Tensor] | None
    h: Tensor | None
    db: Tensor | None


def activation_gradient(
    dh: Tensor,
    gate_up: Tensor,
    kind: str,
    gated: bool,
    *,
    seed: Tensor | None,
    make_h: bool,
    bias_dtype: torch.dtype | None,
) -> ActivationGradient:
    """All of it from one read where it is wanted; seed None: no MVUE form, bias_dtype None: no gradient of a bias."""
    db = h = None
    if seed is None:
        backward = ops.gated_activation_backward if gated else ops.activation_backward
        results = backward(dh, gate_up, kind, recompute_h=make_h)
        d_gate_up, h = results if make_h else (results, None)
        if bias_dtype is not None:
            db = bias_gradient(d_gate_up, bias_dtype)
        return ActivationGradient(d_gate_up, None, h, db)
    backward = ops.gated_activation_backward_mvue if gated else ops.activation_backward_mvue
    results = backward(dh, gate_up, kind, seed, recompute_h=make_h, bias_grad=bias_dtype is not None)
    if make_h:
        h = results[3]
    if bias_dtype is not None:
        db = results[-1].to(bias_dtype)
    return ActivationGradient(results[0], results[1:3], h, db)
