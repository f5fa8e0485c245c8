"""The sparse products: their ops, how they are launched, padded and tuned."""

from .activation import sparse_mm_activation, sparse_mm_gated_activation
from .products import sparse_mm, sparse_mm_grad_input, sparse_mm_grad_weight, tune_gemm

__all__ = [
    "sparse_mm",
    "sparse_mm_activation",
    "sparse_mm_gated_activation",
    "sparse_mm_grad_input",
    "sparse_mm_grad_weight",
    "tune_gemm",
]
