"""The sparse products: their ops, how they are launched, padded and tuned."""

from .activation import sparse_mm_activation, sparse_mm_gated_activation
from .decay import DecayTerm
from .products import sparse_mm, sparse_mm_grad_input
from .pruned_activations import sparse_mm_grad_input_output, sparse_mm_input
from .tuned_products import tune_gemm
from .weight_gradient import sparse_mm_grad_weight, sparse_mm_grad_weight_input

__all__ = [
    "DecayTerm",
    "sparse_mm",
    "sparse_mm_activation",
    "sparse_mm_gated_activation",
    "sparse_mm_grad_input",
    "sparse_mm_grad_input_output",
    "sparse_mm_grad_weight",
    "sparse_mm_grad_weight_input",
    "sparse_mm_input",
    "tune_gemm",
]
