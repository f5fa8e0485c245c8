"""The activations that fused feed-forward blocks know."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}


def activation_kind(activation: Callable[[Tensor], Tensor] | None) -> str | None:
    """Which of our activations a module or function is, told by its values on the CPU; None for another.

    The caller's modes do not matter: autocast, a default device, fake tensors, gradients. Random numbers that the
    activation draws are given back.
    """
    if not callable(activation) or any(True for _ in getattr(activation, "parameters", tuple)()):
        return None
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        x = torch.linspace(-6, 6, 49, device="cpu", dtype=torch.float32)
        try:
            values = activation(x.clone())
        except Exception:  # noqa: BLE001 - anything that is not a function of one tensor is not ours
            return None
        for kind, ours in ACTIVATIONS.items():
            if isinstance(values, Tensor) and values.shape == x.shape and torch.allclose(values, ours(x), 1e-6, 1e-6):
                return kind
    return None
