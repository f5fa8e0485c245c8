"""MVUE: 2:4 pruning without bias, and the random numbers that it draws."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import padded_tokens, round_up
from .packing import encode_metadata

_LOW32 = 0xFFFFFFFF


def philox4x32_10(counter: list[Tensor], key0: Tensor, key1: Tensor) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    for turn in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps modulo 2^64: the right bits all the same
        round_key0 = (key0 + turn * 0x9E3779B9) & _LOW32
        round_key1 = (key1 + turn * 0xBB67AE85) & _LOW32
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW32) ^ c1 ^ round_key0,
            product1 & _LOW32,
            ((product0 >> 32) & _LOW32) ^ c3 ^ round_key1,
            product0 & _LOW32,
        )
    return [c0, c1, c2, c3]


def mvue_uniforms(groups: int, features: int, seed: Tensor) -> Tensor:
    """The uniform of every group, fp32 [groups, features]: (k + 1/2) 2^-16, a function of seed and position alone.

    One Philox call serves the eight groups of 8 tokens by 4 features: its counter is (feature // 4, token // 8, second
    seed number), its key the first seed number. Word 2*g + f//2 of its result has the k of token group g, features f
    and f + 1 (f even), in its lower and upper half.
    """
    device = seed.device
    octets, quads = round_up(groups, 2) // 2, round_up(features, 4) // 4
    quad = torch.arange(quads, device=device).expand(octets, quads)
    octet = torch.arange(octets, device=device).unsqueeze(1).expand(octets, quads)
    key, stream = seed[0], seed[1]
    zeros = torch.zeros_like(quad)
    words = philox4x32_10(
        [quad, octet, zeros + (stream & _LOW32), zeros + ((stream >> 32) & _LOW32)],
        key & _LOW32,
        (key >> 32) & _LOW32,
    )
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)  # [octets, quads, 8]
    k = halves.unflatten(-1, (2, 4)).transpose(1, 2).reshape(2 * octets, 4 * quads)[:groups, :features]
    return (2 * k + 1).float() * 2.0**-17


def mvue_probabilities(groups: Tensor) -> Tensor:
    """Analytic inclusion probabilities [..., 4] of gradients [..., 4] (float64): min(1, c |a|), with sum 2."""
    a = groups.double().abs()
    total, top = a.sum(-1, keepdim=True), a.amax(-1, keepdim=True)
    level = 2 * a / total
    heavy = torch.where(a == top, 1.0, a / (total - top))
    p = torch.where(top > total / 2, heavy, level)
    two_or_fewer = (a != 0).sum(-1, keepdim=True) <= 2
    return torch.where(two_or_fewer, (a != 0).double(), p)


def mvue_groups(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Prune groups a [..., 4] fp32 with uniforms u [...]: positions int64 [..., 2], values fp32 [..., 2].

    The same steps as csrc/pack/mvue_group.h, on whole tensors; that header has the derivation.
    """
    total = (a[..., 0].abs() + a[..., 1].abs()) + (a[..., 2].abs() + a[..., 3].abs())
    finite = a.isfinite().all(-1)
    tiny = (total < 2.0**-100) & (a.view(torch.int32) & 0xFFFF != 0).any(-1)
    huge = total.isinf() & finite
    up = torch.where(tiny, 2.0**64, torch.where(huge, 2.0**-8, 1.0))
    down = torch.where(tiny, 2.0**-64, torch.where(huge, 2.0**8, 1.0))
    positions, values = _draw(a * up.unsqueeze(-1), u)
    values = values * down.unsqueeze(-1)

    # Groups with Inf or NaN: what is not finite first, then the lower index; values as they are.
    nonfinite_first = (~a.isfinite()).int().argsort(stable=True, dim=-1, descending=True)[..., :2].sort(-1).values
    positions = torch.where(finite.unsqueeze(-1), positions, nonfinite_first)
    return positions, torch.where(finite.unsqueeze(-1), values, a.gather(-1, nonfinite_first))


def _times_down(u: Tensor, base: Tensor) -> Tensor:
    """u base in fp32, rounded towards zero; the product is exact in fp64."""
    exact = u.double() * base.double()
    nearest = exact.float()
    return torch.where(nearest.double() > exact, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


def _draw(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic sampling of two of four a [..., 4]: positions [..., 2] and what is kept [..., 2]."""
    b = a.abs()
    b0, b1, b2, b3 = b.unbind(-1)
    left, right = b0 + b1, b2 + b3
    # Half the sum, or the sum of all but the largest: the smallest sum of three.
    base = torch.minimum(
        0.5 * (left + right), torch.minimum(right + torch.minimum(b0, b1), left + torch.minimum(b2, b3))
    )
    from_right = _times_down(u, base)
    from_left = ((1 - 2.0**-22) * base.double() - from_right.double()).float()  # exact in fp64: rounded once
    second = torch.where(b3 > from_right, 3, torch.where(right > from_right, 2, 1))
    first = torch.where(b0 >= from_left, 0, torch.where(left >= from_left, 1, 2))
    positions = torch.stack([first, second], -1)
    picked = a.gather(-1, positions)
    return positions, torch.maximum(picked.abs(), base.unsqueeze(-1)).copysign(picked)


def mvue_compress(dy: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """dy [tokens, features] pruned along tokens without bias: packed [padded_tokens/2, features] and E."""
    tokens, features = dy.shape
    padded = padded_tokens(tokens)
    rows = dy.new_zeros(padded, features)
    rows[:tokens] = dy
    groups = rows.float().reshape(padded // 4, 4, features).transpose(1, 2)  # [token groups, features, 4]
    positions, values = mvue_groups(groups, mvue_uniforms(padded // 4, features, seed))
    packed = values.to(dy.dtype).transpose(1, 2).reshape(padded // 2, features)
    nibbles = positions[..., 0] | (positions[..., 1] << 2)  # [token groups, features]
    return packed, encode_metadata(nibbles.T.contiguous())
