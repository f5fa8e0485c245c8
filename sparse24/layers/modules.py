"""`sparse24.modules`: the classes of sparse layers and their constants, gathered from the files of this room."""

from .checks import DTYPES, check_module, distributed_rank
from .fused.activations import ACTIVATIONS
from .gated_mlp import SparseGatedMLP
from .linear import SparseLinear
from .sparse_layer import SparseLayer
from .state import DENSE, SPARSE, decay_factor_of, mask_of, state_of

__all__ = [
    "ACTIVATIONS",
    "DENSE",
    "DTYPES",
    "SPARSE",
    "SparseGatedMLP",
    "SparseLayer",
    "SparseLinear",
    "check_module",
    "decay_factor_of",
    "distributed_rank",
    "mask_of",
    "state_of",
]
