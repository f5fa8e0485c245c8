"""Differentiable functions on packed weights: which product runs where, and what backward keeps."""

from .feed_forward import PackedWeight, activation, check_no_transform, gated_activation, gated_mlp, mlp, sparse_linear

__all__ = [
    "PackedWeight",
    "activation",
    "check_no_transform",
    "gated_activation",
    "gated_mlp",
    "mlp",
    "sparse_linear",
]
