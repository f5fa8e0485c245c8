"""Modules with a dense weight and its packed forms. Only this room writes a layer's buffers."""

from .gated_mlp import SparseGatedMLP
from .modules import ACTIVATIONS, DENSE, DTYPES, SPARSE, SparseLayer, SparseLinear, check_switch, distributed_rank

__all__ = [
    "ACTIVATIONS",
    "DENSE",
    "DTYPES",
    "SPARSE",
    "SparseGatedMLP",
    "SparseLayer",
    "SparseLinear",
    "check_switch",
    "distributed_rank",
]
