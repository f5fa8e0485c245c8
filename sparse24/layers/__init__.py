"""Modules with a dense weight and its packed forms. Only this room writes a layer's buffers."""

from .modules import (
    ACTIVATIONS,
    DENSE,
    DTYPES,
    SPARSE,
    SparseGatedMLP,
    SparseLayer,
    SparseLinear,
    check_module,
    check_switch,
    decay_factor_of,
    distributed_rank,
    mask_of,
    state_of,
)

__all__ = [
    "ACTIVATIONS",
    "DENSE",
    "DTYPES",
    "SPARSE",
    "SparseGatedMLP",
    "SparseLayer",
    "SparseLinear",
    "check_module",
    "check_switch",
    "decay_factor_of",
    "distributed_rank",
    "mask_of",
    "state_of",
]
