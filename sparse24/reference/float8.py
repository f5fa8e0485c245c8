"""8-bit floating point in plain PyTorch: casts, packing along k and MVUE, with the bits of the compiled backends.

A scale is the factor of dequantisation, x ~= scale * x8, and a power of two: dividing by it is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats import E4M3, padded_tokens, round_up
from .activation_packing import kept_activations, pruned_activation_gradient, rounded_activation
from .masks import unpack_mask
from .mvue import mvue_groups, mvue_uniforms
from .packing import decompress, encode_metadata, pack_rows

NAN = 0x7F  # of both formats, as Inf and NaN are written


def _coded(codes: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 codes of `dtype`, with NAN where `like` is not finite."""
    return torch.where(like.isfinite(), codes, NAN).to(torch.uint8).view(dtype)


def to_float8(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x / scale to nearest even; what is finite and too large becomes the largest value, Inf and NaN become NaN."""
    largest = torch.finfo(dtype).max
    scaled = (x.float() / scale).clamp(-largest, largest)
    return _coded(scaled.to(dtype).view(torch.uint8), x, dtype)


def to_float8_random(x: Tensor, scale: Tensor, bits: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x / scale rounded up or down at random so that the mean is right; `bits` are 16 random ones, int64.

    The magnitude is moved to where the format's exponent and mantissa begin at a fixed bit of fp32. The random bits,
    and a half so that 0 and 65535 are alike, are added below it; what is above is the code.
    """
    numbers = torch.finfo(dtype)
    bias = 1 - round(math.log2(numbers.smallest_normal))
    dropped = 23 + round(math.log2(numbers.eps))  # of fp32's mantissa
    spare = dropped - 16
    last = torch.tensor(numbers.max, device=x.device).to(dtype).view(torch.uint8)
    largest = (last.int() << dropped).view(torch.float32)
    moved = torch.minimum((x.float() / scale).abs() * 2.0 ** (bias - 127), largest)
    code = (moved.view(torch.int32).long() + ((bits << spare) | (1 << (spare - 1)))) >> dropped
    return _coded(code | (x.float().signbit().long() << 7), x, dtype)


def transpose_padded(x8: Tensor) -> Tensor:
    """[tokens, features] -> [features, padded tokens], zeros past the end."""
    tokens, features = x8.shape
    out = torch.zeros((features, padded_tokens(tokens, x8.dtype)), dtype=torch.uint8, device=x8.device)
    out[:, :tokens] = x8.view(torch.uint8).T
    return out.view(x8.dtype)


def amax(x: Tensor) -> Tensor:
    """The largest finite magnitude, fp32 [1]."""
    magnitude = torch.where(x.isfinite(), x.float().abs(), 0.0)
    return magnitude.amax().reshape(1) if x.numel() else magnitude.new_zeros(1)


def cast_counts(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """int64 [3]: finite values beyond the range of `dtype`, others that become zero without being it, all values."""
    finite = x[x.isfinite()].float()
    clipped = (finite / scale).abs() > torch.finfo(dtype).max
    flushed = (finite != 0) & (to_float8(finite, scale, dtype).float() == 0)
    return torch.stack([clipped.sum(), flushed.sum(), torch.tensor(x.numel(), device=x.device)])


def pack_float8(w: Tensor, mask: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """packed [rows, cols/2], E, packed_t [cols, rows/2], E_t: both along k, values w / scale rounded once."""
    w8, kept = to_float8(w, scale, dtype).view(torch.uint8), unpack_mask(mask)
    packed, E = pack_rows(w8, kept, torch.uint8, dtype)
    packed_t, E_t = pack_rows(w8.T, kept.T, torch.uint8, dtype)
    return packed.view(dtype), E, packed_t.contiguous().view(dtype), E_t


def decompress_float8(packed: Tensor, E: Tensor, scale: Tensor, m: int, k: int) -> Tensor:
    """fp32 [m, k], zeros where nothing was kept."""
    dense = decompress(packed.view(torch.uint8), E, m, k, order=packed.dtype)
    return dense.view(packed.dtype).float() * scale


def mvue_pack_float8(dy: Tensor, seed: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dy [tokens, features] pruned along tokens without bias, and rounded without: [features, padded_tokens/2] and E.

    A kept value is rounded by the 16 random bits of the neighbouring feature's draw, the second one of a group by their
    complement.
    """
    tokens, features = dy.shape
    padded, wide = padded_tokens(tokens, dtype), round_up(features, 4)
    rows = dy.new_zeros(padded, features)
    rows[:tokens] = dy
    groups = rows.float().reshape(padded // 4, 4, features).transpose(1, 2)
    uniforms = mvue_uniforms(padded // 4, wide, seed)
    positions, values = mvue_groups(groups, uniforms[:, :features])
    bits = ((uniforms * 2.0**17).long() - 1) // 2
    bits = bits.unflatten(1, (-1, 2)).flip(-1).flatten(1)[:, :features]
    bits = torch.stack([bits, ~bits & 0xFFFF], -1)
    codes = to_float8_random(values.to(dy.dtype), scale, bits, dtype).view(torch.uint8)
    packed = codes.transpose(0, 1).reshape(features, padded // 2).view(dtype)
    nibbles = positions[..., 0] | (positions[..., 1] << 2)
    return packed, encode_metadata(nibbles.T.contiguous(), dtype)


def scale_of(amax: Tensor, margin: float = 2.0, dtype: torch.dtype = E4M3) -> Tensor:
    """The smallest power of two by which amax * margin fits into `dtype`; 1 for an amax of 0. fp32, shape of amax."""
    largest = torch.finfo(dtype).max
    mantissa, exponent = torch.frexp(amax.float() * (margin / largest))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 126)
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(mantissa), exponent), 1.0)


def activation_compress(u: Tensor, kind: str, seed: Tensor | None) -> tuple[Tensor, ...]:
    """packed, E, packed_t, E_t and scale of h = act(u), pruned along features: cast by the scale of h."""
    h, kept = rounded_activation(u, kind), kept_activations(u)
    return _pack_pruned(torch.where(kept, h, 0), kept, scale_of(amax(h)), seed)


def activation_backward_compress(dh: Tensor, u: Tensor, kind: str, seed: Tensor | None) -> tuple[Tensor, ...]:
    """packed, packed_t, E_t and scale of du = dh act'(u), pruned as h was; and du itself."""
    du, kept = pruned_activation_gradient(dh, u, kind)
    packed, _, packed_t, E_t, scale = _pack_pruned(du, kept, scale_of(amax(du)), seed)
    return packed, packed_t, E_t, scale, du


def _pack_pruned(pruned: Tensor, kept: Tensor, scale: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
    packed, E = pack_rows(to_float8(pruned, scale).view(torch.uint8), kept, torch.uint8, E4M3)
    if seed is None:
        along_tokens = pruned.new_empty(0, dtype=E4M3), E.new_empty(0)
    else:
        along_tokens = mvue_pack_float8(pruned, seed, scale, E4M3)
    return packed.view(E4M3), E, *along_tokens, scale
