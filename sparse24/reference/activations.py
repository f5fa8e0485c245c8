"""Activations of a feed-forward layer, plain and gated, forward and backward, and the gradient of a bias."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_gradient(dy: Tensor) -> Tensor:
    """Sums over tokens: fp32, or float64 for float64 gradients."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


def activation(x: Tensor, kind: str) -> Tensor:
    """One of silu, gelu (erf), gelu_tanh, relu, squared_relu, identity; differentiable; in fp32 or wider.

    At -inf and inf it is the limit, and so is its slope: 0 and 0, inf and 1. PyTorch has NaN in some of these places.
    """
    functional = torch.nn.functional
    wide = x if x.dtype == torch.float64 else x.float()
    infinite = wide.isinf()
    if kind in ("silu", "gelu", "gelu_tanh"):
        finite = wide.masked_fill(infinite, 0)
        if kind == "silu":
            smooth = functional.silu(finite)
        else:
            smooth = functional.gelu(finite, approximate="tanh" if kind == "gelu_tanh" else "none")
        out = torch.where(infinite, functional.relu(wide), smooth)
    elif kind == "identity":
        out = wide.clone()
    else:
        out = functional.relu(wide)
        out = out * out if kind == "squared_relu" else out
    return out


def gated_activation(gate_up: Tensor, kind: str, gated: bool = True) -> Tensor:
    """h = act(gate) * up for gate_up = [gate | up] (..., 2*d_ff); with gated=False, act(gate_up). Differentiable."""
    if not gated:
        return activation(gate_up, kind).to(gate_up.dtype)
    gate, up = gate_up.chunk(2, -1)
    act = activation(gate, kind)
    return (act * up.to(act.dtype)).to(gate_up.dtype)


def gated_activation_backward(dh: Tensor, gate_up: Tensor, kind: str, gated: bool = True) -> tuple[Tensor, Tensor]:
    """d_gate_up and h, in gate_up's dtype, by autograd in fp32 or wider."""
    wide = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        leaf = gate_up.detach().to(wide).requires_grad_()
        h = gated_activation(leaf, kind, gated)
        (d_gate_up,) = torch.autograd.grad(h, leaf, dh.to(wide))
    return d_gate_up.to(gate_up.dtype), h.detach().to(gate_up.dtype)
