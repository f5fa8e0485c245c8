"""Every op in plain PyTorch: slow, short and plainly right. Tests hold the C++ and CUDA code against it.

It imports torch alone, runs on any device and takes float64 as well; where there is no compiled library, `sparse24.ops`
falls back to it. Masks, packed values, E and MVUE draws have the same bits as the compiled backends: the same
operations on fp32, in the same order.
"""

from .activation_packing import activation_backward_compress, activation_compress, kept_activations
from .activations import activation, bias_gradient, gated_activation, gated_activation_backward
from .masks import (
    from_blocks,
    mask_flips,
    mask_gap,
    pack_bits,
    pattern_scores,
    patterns,
    ranked_magnitude,
    to_blocks,
    transposable_mask,
    transposable_mask_by_convolution,
    unpack_mask,
)
from .mvue import mvue_compress, mvue_groups, mvue_probabilities, mvue_uniforms, philox4x32_10
from .packing import compress, decode_metadata, decompress, encode_metadata, pack_rows
from .recipe import masked_decay

__all__ = [
    "activation",
    "activation_backward_compress",
    "activation_compress",
    "bias_gradient",
    "compress",
    "decode_metadata",
    "decompress",
    "encode_metadata",
    "from_blocks",
    "gated_activation",
    "gated_activation_backward",
    "kept_activations",
    "mask_flips",
    "mask_gap",
    "masked_decay",
    "mvue_compress",
    "mvue_groups",
    "mvue_probabilities",
    "mvue_uniforms",
    "pack_bits",
    "pack_rows",
    "pattern_scores",
    "patterns",
    "philox4x32_10",
    "ranked_magnitude",
    "to_blocks",
    "transposable_mask",
    "transposable_mask_by_convolution",
    "unpack_mask",
]
