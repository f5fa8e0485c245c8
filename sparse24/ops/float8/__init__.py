"""8-bit operands: matrices cast by a scale, weights and gradients packed from them, and their products.

A scale is one float32 on the tensor's device, a power of two, with x ~= scale * x8. `quantize`, `activation_quantize`,
`activation_backward_quantize` and `mvue_quantize` are given one: they cast in the same read that does their other work,
and note the largest magnitude for the next scale. `quantize_current` and the ops of 2:4 activations find their own, by
a read more.
Everything is K-major: the tensor cores read 8-bit operands along k only.
"""

from .activation_packing import activation_backward_compress_float8, activation_compress_float8
from .activations import activation_quantize
from .casts import quantize, quantize_current, scale_of
from .dense import dense_mm_float8
from .gradients import activation_backward_quantize, mvue_quantize
from .operands import E4M3
from .products import grad_weight_float8_, sparse_mm_float8
from .pruned_activations import grad_weight_of_input_float8_, sparse_mm_input_float8
from .weights import decompress_float8, empty_packed_float8, pack_float8_

__all__ = [
    "E4M3",
    "activation_backward_compress_float8",
    "activation_backward_quantize",
    "activation_compress_float8",
    "activation_quantize",
    "decompress_float8",
    "dense_mm_float8",
    "empty_packed_float8",
    "grad_weight_float8_",
    "grad_weight_of_input_float8_",
    "mvue_quantize",
    "pack_float8_",
    "quantize",
    "quantize_current",
    "scale_of",
    "sparse_mm_float8",
    "sparse_mm_input_float8",
]
