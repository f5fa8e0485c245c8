"""MVUE pruning in Triton, as published implementations do it: a dense gradient in, a dense pruned one out.

A program takes a tile of token groups by features and loads the four tokens of its groups as four matrices. One uniform
number a group (Triton's own Philox) and systematic sampling give the two picks, by the same probabilities as ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [
    triton.Config({"GROUPS": groups, "FEATURES": features}, num_warps=warps)
    for groups, features in ((4, 128), (8, 128), (16, 64), (4, 256), (32, 32))
    for warps in (4, 8)
]


@triton.jit
def keep(a, passed, next_passed, base):
    """a if a point lies in its interval (some sum reaches it, and the one before does not), at its new magnitude."""
    value = tl.maximum(tl.abs(a), base)
    return tl.where(passed & ~next_passed, tl.where(a < 0, -value, value), 0.0)


@triton.autotune(CONFIGS, key=["tokens", "features", "token_stride"])
@triton.jit
def prune_kernel(
    dy, out, seed, tokens, features, token_stride, feature_stride, GROUPS: tl.constexpr, FEATURES: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    feature = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)[None, :]
    at = 4 * group * token_stride + feature * feature_stride
    inside = (4 * group < tokens) & (feature < features)
    a0 = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    a1 = tl.load(dy + at + token_stride, mask=inside, other=0.0).to(tl.float32)
    a2 = tl.load(dy + at + 2 * token_stride, mask=inside, other=0.0).to(tl.float32)
    a3 = tl.load(dy + at + 3 * token_stride, mask=inside, other=0.0).to(tl.float32)
    b0, b1, b2, b3 = tl.abs(a0), tl.abs(a1), tl.abs(a2), tl.abs(a3)
    left, right = b0 + b1, b2 + b3
    base = tl.minimum(0.5 * (left + right), tl.minimum(right + tl.minimum(b0, b1), left + tl.minimum(b2, b3)))
    u = tl.rand(tl.load(seed), (group * features + feature).to(tl.int32))
    from_right, from_left = u * base, (1.0 - u) * base
    # The second pick: the last element whose sum from the right passes; the first pick: the first one from the left.
    three, two = b3 > from_right, right > from_right
    zero, one = b0 >= from_left, left >= from_left
    tl.store(out + at, keep(a0, zero, b0 < 0, base), mask=inside)
    tl.store(out + at + token_stride, keep(a1, one, zero, base) + keep(a1, ~two, one & ~zero, base), mask=inside)
    tl.store(out + at + 2 * token_stride, keep(a2, two, three, base) + keep(a2, ~one, two & ~three, base), mask=inside)
    tl.store(out + at + 3 * token_stride, keep(a3, three, b3 < 0, base), mask=inside)


def mvue_dense(dy: Tensor, seed: Tensor) -> Tensor:
    """dy [tokens, features], tokens a multiple of 4, pruned along tokens without bias; seed int64 on the same GPU."""
    tokens, features = dy.shape
    out = torch.empty_like(dy)
    prune_kernel[lambda meta: (triton.cdiv(tokens // 4, meta["GROUPS"]), triton.cdiv(features, meta["FEATURES"]))](
        dy, out, seed, tokens, features, *dy.stride()
    )
    return out
