"""Operands of the sparse products: what their tests share."""

from __future__ import annotations

import torch

from sparse24 import ops
from sparse24.formats import BLOCK, round_up

# (tokens, in_features, out_features): smallest, one tile and a bit, tall, wide, sizes that need padding, one
# real layer.
SHAPES = [
    (1, 16, 8), (8, 64, 64), (31, 64, 128), (65, 128, 64), (256, 128, 256), (300, 1024, 48), (257, 48, 1024),
    (100, 768, 3072), (1000, 320, 192), (5, 4, 4), (33, 20, 12), (64, 36, 100), (2, 8, 24),
]  # fmt: skip


def compute_dtypes(device):
    return [torch.bfloat16, torch.float16] if device == "cuda" else [torch.float32, torch.bfloat16]


def small_integers(*shape, dtype, device, low=-3, high=4):
    return torch.randint(low, high, shape).to(device, dtype)


def layer(tokens, in_features, out_features, dtype, device, integers=False):
    make = small_integers if integers else lambda *s, dtype, device: torch.randn(s).to(device, dtype)
    x = make(tokens, in_features, dtype=dtype, device=device)
    w = make(out_features, in_features, dtype=dtype, device=device)
    dy = make(tokens, out_features, dtype=dtype, device=device)
    mask, *packed = ops.prune_compress(w, dtype)
    return x, w.masked_fill(~ops.unpack_mask(mask), 0), dy, packed


def dense_gradient(packed_dy, E_dy, tokens):
    return ops.decompress(packed_dy, E_dy, 2 * packed_dy.shape[0], packed_dy.shape[1], transposed=True)[:tokens]


def packed_rows(x):
    """x pruned along its features, two of each four neighbours kept at random: the dense rows, packed and E."""
    tokens, features = x.shape
    rows = round_up(tokens, BLOCK)  # masks are of 4x4 blocks; E has whole blocks of rows in any case
    kept = torch.rand(rows, features // BLOCK, BLOCK).argsort(-1) < 2
    bits = (kept.view(rows // BLOCK, BLOCK, -1, BLOCK).transpose(1, 2).reshape(rows // BLOCK, -1, BLOCK * BLOCK)).long()
    mask = (bits << torch.arange(BLOCK * BLOCK)).sum(-1).to(torch.uint16).to(x.device)
    whole = x.new_zeros(rows, features)
    whole[:tokens] = x
    packed, E, *_ = ops.compress(whole, mask, x.dtype)
    return x.masked_fill(~kept.view(rows, features)[:tokens].to(x.device), 0), packed[:tokens], E
