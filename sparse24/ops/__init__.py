"""The ops of sparse24: masks, packing, sparse products, activations and what the recipe does to weights and gradients.

Each is a `torch.library` op with an implementation for CPU and CUDA and a fake one for `torch.compile`. None is
differentiable: outputs that depend on a tensor with `requires_grad` raise when backward reaches them, and name the
differentiable function in `sparse24.functional`. Layouts and data formats: docs/design.md, section "Data".
"""

from ..formats import metadata_bytes, padded_tokens
from . import flops
from .activation_packing import activation_backward_compress, activation_compress
from .activations import (
    activation,
    activation_backward,
    activation_backward_mvue,
    column_major_copy,
    gated_activation,
    gated_activation_backward,
    gated_activation_backward_mvue,
)
from .gemm.activation import sparse_mm_activation, sparse_mm_gated_activation
from .gemm.products import sparse_mm, sparse_mm_grad_input
from .gemm.pruned_activations import sparse_mm_grad_input_output, sparse_mm_input
from .gemm.tuned_products import tune_gemm
from .gemm.weight_gradient import sparse_mm_grad_weight, sparse_mm_grad_weight_input
from .mask import foreach_mask_flips, is_transposable, mask_flips, mask_gap, transposable_mask, unpack_mask
from .mvue import draw_seed, draw_seeds, mvue_compress
from .packing import compress, decompress, empty_packed, is_valid_metadata, prune_compress
from .packing_lists import compress_, compress_transposed, prune_compress_
from .recipe import foreach_masked_decay_, masked_decay_

flops.register()

__all__ = [
    "activation",
    "activation_backward",
    "activation_backward_compress",
    "activation_backward_mvue",
    "activation_compress",
    "column_major_copy",
    "compress",
    "compress_",
    "compress_transposed",
    "decompress",
    "draw_seed",
    "draw_seeds",
    "empty_packed",
    "foreach_mask_flips",
    "foreach_masked_decay_",
    "gated_activation",
    "gated_activation_backward",
    "gated_activation_backward_mvue",
    "is_transposable",
    "is_valid_metadata",
    "mask_flips",
    "mask_gap",
    "masked_decay_",
    "metadata_bytes",
    "mvue_compress",
    "padded_tokens",
    "prune_compress",
    "prune_compress_",
    "sparse_mm",
    "sparse_mm_activation",
    "sparse_mm_gated_activation",
    "sparse_mm_grad_input",
    "sparse_mm_grad_input_output",
    "sparse_mm_grad_weight",
    "sparse_mm_grad_weight_input",
    "sparse_mm_input",
    "transposable_mask",
    "tune_gemm",
    "unpack_mask",
]
