"""E of a weight from E of its rows: what the ranks of FSDP2 send of the positions, and where it goes in the whole.

See `formats.metadata_order`. E of the forward form has the columns outermost, and of each block of them units of rows:
128 bytes for 16 rows in 16 bits, where 8 rows are every other pair of bytes; 16 bytes a row in 8 bits. E of the
transposed form has the rows as its k: 64 of them, in 8 bits 128, are one contiguous piece, and 8 are one byte of each
column. So rows may be cut at any multiple of 8, and are sent in pieces that do not depend on where they are cut: what
is padding in E of some rows is not sent.

`dtype` is that of the packed values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import FORMATS

PADDING = 0x44  # positions 0 and 1, twice
ROWS = 16  # in 16 bits, with 64 columns, they fill 128 bytes
STEP = 8  # the fewest rows that have whole bytes both ways


def take_forward(E: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """What E of a forward form (rows, cols) has, uint8 [blocks of columns, units of rows, bytes of a unit].

    E  uint8, 1-D, of `rows` (a multiple of 8) and `cols`
    """
    units = _forward_units(E, cols, dtype)
    if _is_8_bit(dtype):
        return units[:, :rows].contiguous()
    if rows % ROWS:
        units = _halves(units).reshape(units.shape[0], -1, 64)
        return units[:, : rows // STEP].contiguous()
    return units[:, : rows // ROWS].contiguous()


def put_forward(E: Tensor, received: Tensor, parts: int, cols: int, dtype: torch.dtype) -> None:
    """Write E of the forward form of a whole weight.

    E         1-D, or in pieces [blocks of columns, bytes] inside that of a fused block
    received  what `take_forward` has returned on each of `parts` ranks, one after the other
    """
    units = _forward_units(E, cols, dtype)
    blocks, room, size = units.shape
    received = received.view(parts, blocks, *received.shape[1:]).transpose(0, 1)
    count = parts * received.shape[2]
    if received.shape[3] == size:
        if count < room:
            units[:, count:].fill_(PADDING)
        units[:, :count].unflatten(1, received.shape[1:3]).copy_(received)
        return
    whole = units.new_full((blocks, 2 * room, size // 2), PADDING)
    whole[:, :count].unflatten(1, received.shape[1:3]).copy_(received)
    target = _halves(units)
    target.copy_(whole.view(target.shape))


def take_transposed(E_t: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """What E of a transposed form has of `rows` rows: uint8 [blocks of rows, bytes], or [rows / 8, columns]."""
    tile = FORMATS[dtype].meta_tile_k
    if rows % tile == 0:
        return E_t.view(rows // tile, -1)
    eights, lead = _eights(E_t, rows, dtype)
    return eights.flatten(lead).flatten(0, lead - 1)[: rows // STEP].contiguous()


def put_transposed(E_t: Tensor, received: Tensor, parts: int, rows: int, dtype: torch.dtype) -> None:
    """Write E_t of a whole weight of `rows` rows from what `take_transposed` has returned on each of `parts` ranks."""
    if rows // parts % FORMATS[dtype].meta_tile_k == 0:
        E_t.view(received.shape).copy_(received)
        return
    target, lead = _eights(E_t, rows, dtype)
    whole = E_t.new_full((target.shape[:lead].numel(), received.shape[1]), PADDING)
    whole[: received.shape[0]].copy_(received)
    target.copy_(whole.view(target.shape))


def _is_8_bit(dtype: torch.dtype) -> bool:
    return FORMATS[dtype].bytes == 1


def _forward_units(E: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    """[blocks of columns, units of rows, bytes of a unit]; shares memory."""
    return E.view(-(-cols // FORMATS[dtype].meta_tile_k), -1, 16 if _is_8_bit(dtype) else 128)


def _halves(units: Tensor) -> Tensor:
    """Units of 16 rows with their halves of 8 rows outside: [blocks, units, half, 16, 2, 2]; shares memory.

    The bytes of a unit are k/16%2, m%8, k%64/32, m/8%2, k%16/8, from the outermost.
    """
    return units.unflatten(2, (16, 2, 2, 2)).permute(0, 1, 4, 2, 3, 5)


def _eights(E_t: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(E_t with eights of rows, its k, outermost, and how many dimensions these are); shares memory."""
    blocks = -(-rows // FORMATS[dtype].meta_tile_k)
    if _is_8_bit(dtype):
        return E_t.view(blocks, -1, 16).permute(0, 2, 1), 2
    return E_t.view(blocks, -1, 2, 8, 2, 2, 2).permute(0, 4, 2, 6, 1, 3, 5), 4
