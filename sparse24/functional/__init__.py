"""Differentiable functions on packed weights: which product runs where, and what backward keeps."""

from .activations import activation, gated_activation
from .dense import dense_linear
from .feed_forward import gated_mlp, mlp
from .linear import sparse_linear
from .operands import PackedWeight, check_no_transform, pruned_operand
from .sparse_activation import kept_activations, sparse_activation_mlp

__all__ = [
    "PackedWeight",
    "activation",
    "check_no_transform",
    "dense_linear",
    "gated_activation",
    "gated_mlp",
    "kept_activations",
    "mlp",
    "pruned_operand",
    "sparse_activation_mlp",
    "sparse_linear",
]
