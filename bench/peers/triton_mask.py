"""The transposable mask by scoring all 90 patterns, as published implementations do it, in Triton.

Magnitudes of a batch of 4x4 blocks are a matrix [blocks, 16]; its product with the 90 patterns as columns of zeros and
ones gives the scores, and an argmax the masks. 16-bit weights may take tensor cores, where products with ones are exact
and sums are fp32; fp32 weights are multiplied in full fp32, since TF32 would rank rounded magnitudes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse24 import reference

COLUMNS = 128  # a power of two; those past the 90 patterns repeat the first one


def pattern_table(dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """The patterns as columns, `dtype` [16, 128], and as masks, int16 [128]."""
    patterns = reference.patterns()
    patterns = torch.cat([patterns, patterns[:1].expand(COLUMNS - len(patterns), 4, 4)])
    masks = reference.pack_bits(patterns.unsqueeze(0)).view(torch.int16).flatten()
    return patterns.reshape(COLUMNS, 16).t().to(device, dtype).contiguous(), masks.to(device)


CONFIGS = [triton.Config({"BLOCKS": blocks}, num_warps=warps) for blocks in (32, 64, 128) for warps in (2, 4, 8)]


@triton.autotune(CONFIGS, key=["rows", "cols"])
@triton.jit
def search_kernel(w, columns, masks, out, rows, cols, BLOCKS: tl.constexpr, PATTERNS: tl.constexpr):
    """`columns` [16, PATTERNS] sets the dtype of the product."""
    block_cols = cols // 4
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < (rows // 4) * block_cols
    element = tl.arange(0, 16)
    first = (block // block_cols).to(tl.int64) * 4 * cols + (block % block_cols) * 4
    at = first[:, None] + (element // 4 * cols + element % 4)[None, :]
    value = tl.load(w + at, mask=inside[:, None], other=0.0)
    magnitude = tl.abs(value.to(tl.float32)).to(columns.dtype.element_ty)
    pattern = tl.arange(0, PATTERNS)
    ones = tl.load(columns + element[:, None] * PATTERNS + pattern[None, :])
    score = tl.dot(magnitude, ones, input_precision="ieee")
    best = tl.argmax(score, axis=1, tie_break_left=False)
    tl.store(out + block, tl.load(masks + best), mask=inside)


class TritonMaskSearch:
    """Called with a contiguous weight [rows, cols] on a GPU, returns its mask, uint16 [rows/4, cols/4].

    dtype  of the product: the weight's own, or float32
    """

    def __init__(self, dtype: torch.dtype):
        self.columns, self.masks = pattern_table(dtype, "cuda")

    def __call__(self, w: Tensor) -> Tensor:
        rows, cols = w.shape
        out = torch.empty(rows // 4, cols // 4, dtype=torch.int16, device=w.device)
        search_kernel[lambda meta: (triton.cdiv(out.numel(), meta["BLOCKS"]),)](
            w, self.columns, self.masks, out, rows, cols, PATTERNS=COLUMNS
        )
        return out.view(torch.uint16)
