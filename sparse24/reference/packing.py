"""Packing by a mask, E, and back to dense."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import DEFAULT_DTYPE, PADDING_NIBBLE, metadata_order
from .masks import unpack_mask


def encode_metadata(nibbles: Tensor, dtype: torch.dtype = DEFAULT_DTYPE) -> Tensor:
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


def decode_metadata(E: Tensor, m: int, k: int, dtype: torch.dtype = DEFAULT_DTYPE) -> Tensor:
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
