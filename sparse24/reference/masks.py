"""Transposable masks: the search, the brute force that it must equal, and the paper's own form."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ..formats import BLOCK


def to_blocks(w: Tensor) -> Tensor:
    """[rows, cols] -> [rows/4, cols/4, 4, 4]."""
    rows, cols = w.shape
    return w.reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK).transpose(1, 2)


def from_blocks(blocks: Tensor) -> Tensor:
    """[rows/4, cols/4, 4, 4] -> [rows, cols]."""
    block_rows, block_cols = blocks.shape[:2]
    return blocks.transpose(1, 2).reshape(block_rows * BLOCK, block_cols * BLOCK)


def ranked_magnitude(w: Tensor) -> Tensor:
    """The magnitude that a value is ranked by: above 2^120 (Inf too) it counts as 2^120, NaN as 2^121. fp32 or fp64."""
    wide = w if w.dtype == torch.float64 else w.float()
    return torch.nan_to_num(wide.abs().clamp(max=2.0**120), nan=2.0**121)


@lru_cache(maxsize=1)
def patterns() -> Tensor:
    """The 90 transposable patterns, bool [90, 4, 4]."""
    pairs = [row for row in product((0, 1), repeat=BLOCK) if sum(row) == 2]
    stacks = torch.tensor(list(product(pairs, repeat=BLOCK)), dtype=torch.bool)
    return stacks[(stacks.sum(1) == 2).all(-1)]


def pack_bits(kept: Tensor) -> Tensor:
    """bool [rows/4, cols/4, 4, 4] -> uint16 [rows/4, cols/4], bit 4*i + j for element (i, j)."""
    weights = (1 << torch.arange(16, device=kept.device, dtype=torch.int32)).view(BLOCK, BLOCK)
    return (kept.int() * weights).sum((-1, -2)).to(torch.int32).to(torch.uint16)


def unpack_mask(mask: Tensor) -> Tensor:
    """uint16 [rows/4, cols/4] -> bool [rows, cols]."""
    shifts = torch.arange(16, device=mask.device, dtype=torch.int32)
    bits = (mask.to(torch.int32).unsqueeze(-1) >> shifts) & 1
    return from_blocks(bits.bool().unflatten(-1, (BLOCK, BLOCK)))


def transposable_mask(w: Tensor) -> Tensor:
    """The mask of most magnitude, by Hadamard coordinates; ties as csrc/mask/block_search.h documents them.

    A row's six ways to keep two are half its sum plus or minus half of one of three coordinates, and columns of two
    force the four rows to cancel in pairs: so the best of three pairings of rows, each pair parting along its largest
    coordinate difference, is the best of all 90 patterns.
    """
    a, b, c, d = to_blocks(ranked_magnitude(w)).unbind(-1)  # each [rows/4, cols/4, 4 rows of the block]
    v = torch.stack([(a + b) - (c + d), (a - b) + (c - d), (a - b) - (c - d)], -1)
    halves = torch.tensor([0x3, 0x5, 0x9], device=w.device, dtype=torch.int32)

    def part(i: int, j: int) -> tuple[Tensor, Tensor]:
        """Gain of parting rows i and j, and the bits of the block that these two rows keep."""
        difference = v[..., i, :] - v[..., j, :]
        gain, coordinate = difference[..., 0], torch.zeros_like(difference[..., 0], dtype=torch.int64)
        for other in (1, 2):
            better = difference[..., other].abs() > gain.abs()
            gain = torch.where(better, difference[..., other], gain)
            coordinate = torch.where(better, other, coordinate)
        kept = halves[coordinate]
        kept = torch.where(gain >= 0, kept, kept ^ 0xF)
        return gain.abs(), (kept << (4 * i)) | ((kept ^ 0xF) << (4 * j))

    best, mask = None, None
    for (i, j), (k, m) in (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))):
        (gain_ij, bits_ij), (gain_km, bits_km) = part(i, j), part(k, m)
        gain, bits = gain_ij + gain_km, bits_ij | bits_km
        if best is None:
            best, mask = gain, bits
        else:
            better = gain > best
            best, mask = torch.where(better, gain, best), torch.where(better, bits, mask)
    return mask.to(torch.uint16)


def pattern_scores(w: Tensor) -> Tensor:
    """Kept magnitude of all 90 patterns in float64, [rows/4, cols/4, 90]: brute force, the oracle of the search."""
    blocks = to_blocks(ranked_magnitude(w).double()).flatten(-2)
    return blocks @ patterns().to(w.device).flatten(1).double().T


def transposable_mask_by_convolution(w: Tensor) -> Tensor:
    """The paper's form: a stride-4 convolution with 90 filters, then argmax (arXiv 2404.01847, section on masks)."""
    filters = patterns().to(w.device, torch.float32).unsqueeze(1)
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # TF32 would rank by 10 bits of mantissa
    try:
        scores = torch.nn.functional.conv2d(ranked_magnitude(w)[None, None], filters, stride=BLOCK)[0]
    finally:
        torch.backends.cudnn.allow_tf32 = allow_tf32
    return pack_bits(patterns().to(w.device)[scores.argmax(0)])


def mask_gap(w: Tensor) -> Tensor:
    """L1 gap between the best and the second-best pattern of each block, fp32 [rows/4, cols/4]."""
    top = pattern_scores(w).topk(2, dim=-1).values
    return (top[..., 0] - top[..., 1]).float()


def mask_flips(mask_a: Tensor, mask_b: Tensor) -> Tensor:
    """Number of elements whose kept bit differs, int64 scalar."""
    return (unpack_mask(mask_a) != unpack_mask(mask_b)).sum()
