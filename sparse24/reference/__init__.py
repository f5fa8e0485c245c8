"""Every op in plain PyTorch: slow, short and plainly right. Tests hold the C++ and CUDA code against it.

It imports torch alone, runs on any device and takes float64 as well; where there is no compiled library, `sparse24.ops`
falls back to it. Masks, packed values, E and MVUE draws have the same bits as the compiled backends: the same
operations on fp32, in the same order.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ..formats import BLOCK, PADDING_NIBBLE, metadata_order, padded_tokens, round_up

# ---- transposable masks ---------------------------------------------------------------------------------------------


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


# ---- packing --------------------------------------------------------------------------------------------------------


def encode_metadata(nibbles: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nibbles [m, k/4] -> E, uint8 in the order of the packed dtype; past m and k it holds the padding nibble."""
    m, groups = nibbles.shape
    order = metadata_order(m, 4 * groups, dtype).to(nibbles.device)
    shape = (order.shape[0], 2 * order.shape[1])
    padded = torch.full(shape, PADDING_NIBBLE, dtype=torch.uint8, device=nibbles.device)
    padded[:m, :groups] = nibbles.to(torch.uint8)
    pairs = padded[:, 0::2] | (padded[:, 1::2] << 4)
    E = torch.empty(pairs.numel(), dtype=torch.uint8, device=nibbles.device)
    E[order.flatten()] = pairs.flatten()
    return E


def decode_metadata(E: Tensor, m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """E, in the order of the packed dtype -> nibbles [m, k/4], uint8."""
    pairs = E[metadata_order(m, k, dtype).to(E.device)]
    return torch.stack([pairs & 0xF, pairs >> 4], -1).flatten(1)[:m, : k // 4]


def pack_rows(w: Tensor, kept: Tensor, dtype: torch.dtype, order: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Pack along rows: w and bool `kept` [m, k] (two a group of four) -> values [m, k/2] and E.

    order  the dtype whose order E has, where it is not that of the values: bytes of 8-bit floats go as uint8
    """
    m, k = w.shape
    positions = kept.reshape(m, k // 4, 4).int().argsort(stable=True, dim=-1, descending=True)[..., :2]
    values = w.reshape(m, k // 4, 4).gather(-1, positions).reshape(m, k // 2).to(dtype)
    return values, encode_metadata(positions[..., 0] | (positions[..., 1] << 2), order or dtype)


def compress(w: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed [rows, cols/2], E, packed_t [rows/2, cols], E_t. Positions come from the mask, never from values."""
    kept = unpack_mask(mask)
    packed, E = pack_rows(w, kept, dtype)
    packed_t, E_t = pack_rows(w.T, kept.T, dtype)
    return packed, E, packed_t.T.contiguous(), E_t


def decompress(
    packed: Tensor, E: Tensor, rows: int, cols: int, transposed: bool = False, order: torch.dtype | None = None
) -> Tensor:
    """The dense [rows, cols], zeros where nothing was kept. `transposed`: packed is packed_t [rows/2, cols]."""
    if transposed:
        return decompress(packed.T, E, cols, rows, order=order).T.contiguous()
    nibbles = decode_metadata(E, rows, cols, order or packed.dtype).long()
    positions = torch.stack([nibbles & 3, nibbles >> 2], -1)
    dense = packed.new_zeros(rows, cols // 4, 4)
    return dense.scatter_(-1, positions, packed.reshape(rows, cols // 4, 2)).reshape(rows, cols)


# ---- MVUE -----------------------------------------------------------------------------------------------------------

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

    The same steps as csrc/compress/mvue_group.h, on whole tensors; that header has the derivation.
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


# ---- activations ----------------------------------------------------------------------------------------------------


def bias_gradient(dy: Tensor) -> Tensor:
    """Sums over tokens: fp32, or float64 for float64 gradients."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


def activation(x: Tensor, kind: str) -> Tensor:
    """One of silu, gelu (erf), gelu_tanh, relu, squared_relu, identity; differentiable; in fp32 or wider.

    At -inf and inf it is the limit, and so is its slope: 0 and 0, inf and 1. PyTorch has NaN in some of these places.
    """
    functional = torch.nn.functional
    wide = x if x.dtype == torch.float64 else x.float()
    infinite = wide.isinf()
    if kind in ("silu", "gelu", "gelu_tanh"):
        finite = wide.masked_fill(infinite, 0)
        if kind == "silu":
            smooth = functional.silu(finite)
        else:
            smooth = functional.gelu(finite, approximate="tanh" if kind == "gelu_tanh" else "none")
        out = torch.where(infinite, functional.relu(wide), smooth)
    elif kind == "identity":
        out = wide.clone()
    else:
        out = functional.relu(wide)
        out = out * out if kind == "squared_relu" else out
    return out


def gated_activation(gu: Tensor, kind: str, gated: bool = True) -> Tensor:
    """h = act(gate) * up for gu = [gate | up] (..., 2*d_ff); with gated=False, act(gu). Differentiable."""
    if not gated:
        return activation(gu, kind).to(gu.dtype)
    gate, up = gu.chunk(2, -1)
    act = activation(gate, kind)
    return (act * up.to(act.dtype)).to(gu.dtype)


def gated_activation_backward(dh: Tensor, gu: Tensor, kind: str, gated: bool = True) -> tuple[Tensor, Tensor]:
    """d_gu and h, in gu's dtype, by autograd in fp32 or wider."""
    wide = torch.float64 if gu.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        leaf = gu.detach().to(wide).requires_grad_()
        h = gated_activation(leaf, kind, gated)
        (d_gu,) = torch.autograd.grad(h, leaf, dh.to(wide))
    return d_gu.to(gu.dtype), h.detach().to(gu.dtype)


# ---- recipe ---------------------------------------------------------------------------------------------------------


def masked_decay(grad: Tensor, w: Tensor, mask: Tensor, decay: float, grad_scale: Tensor | None = None) -> Tensor:
    """grad + decay * (1 - mask) * w: fp32 product, fp32 sum, one rounding to grad's dtype (float64 stays float64)."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    factor = torch.tensor(decay, dtype=wide, device=grad.device)
    if grad_scale is not None:
        factor = factor * grad_scale.to(wide)
    pulled = grad.to(wide) + factor * w.to(wide)
    return torch.where(unpack_mask(mask), grad, pulled.to(grad.dtype))
