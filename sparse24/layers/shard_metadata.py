"""E of a weight from E of its rows: what the ranks of FSDP2 send of the positions, and where it goes in the whole.

Of 16-bit operands, see `formats.metadata_order`. E of the forward form has 128 bytes for each 16 rows and 64 columns,
the columns outermost; 8 rows of them are every other pair of bytes. E of the transposed form has the rows as its k:
64 of them are one contiguous piece, and 8 are one byte of each column. So rows may be cut at any multiple of 8, and
are sent in pieces that do not depend on where they are cut: what is padding in E of some rows is not sent.
"""

from __future__ import annotations

from torch import Tensor

from ..formats import META_BLOCK

PADDING = 0x44  # positions 0 and 1, twice
ROWS = 16  # with 64 columns they fill 128 bytes
STEP = 8  # the fewest rows that have whole bytes both ways


def take_forward(E: Tensor, rows: int, cols: int) -> Tensor:
    """What E of a forward form (rows, cols) has, uint8 [blocks of 64 columns, units of 16 or 8 rows, bytes of a unit].

    E  uint8, 1-D, of `rows` (a multiple of 8) and `cols`
    """
    units = _forward_units(E, cols)
    if rows % ROWS:
        units = _halves(units).reshape(units.shape[0], -1, 64)
        return units[:, : rows // STEP].contiguous()
    return units[:, : rows // ROWS].contiguous()


def put_forward(E: Tensor, received: Tensor, parts: int, cols: int) -> None:
    """Write E of the forward form of a whole weight.

    E         1-D, or in pieces [blocks of 64 columns, bytes] inside that of a fused block
    received  what `take_forward` has returned on each of `parts` ranks, one after the other
    """
    units = _forward_units(E, cols)
    blocks, room, _ = units.shape
    received = received.view(parts, blocks, *received.shape[1:]).transpose(0, 1)
    count, size = parts * received.shape[2], received.shape[3]
    if size == 128:
        if count < room:
            units[:, count:].fill_(PADDING)
        units[:, :count].unflatten(1, received.shape[1:3]).copy_(received)
        return
    whole = units.new_full((blocks, 2 * room, size), PADDING)
    whole[:, :count].unflatten(1, received.shape[1:3]).copy_(received)
    target = _halves(units)
    target.copy_(whole.view(target.shape))


def take_transposed(E_t: Tensor, rows: int) -> Tensor:
    """What E of a transposed form has of `rows` rows: uint8 [blocks of 64 rows, bytes], or [rows / 8, columns]."""
    if rows % META_BLOCK == 0:
        return E_t.view(rows // META_BLOCK, -1)
    eights = _eights(E_t, rows)
    return eights.reshape(-1, eights.shape[4:].numel())[: rows // STEP].contiguous()


def put_transposed(E_t: Tensor, received: Tensor, parts: int, rows: int) -> None:
    """Write E_t of a whole weight of `rows` rows from what `take_transposed` has returned on each of `parts` ranks."""
    if rows // parts % META_BLOCK == 0:
        E_t.view(received.shape).copy_(received)
        return
    target = _eights(E_t, rows)
    whole = E_t.new_full((target.shape[:4].numel(), received.shape[1]), PADDING)
    whole[: received.shape[0]].copy_(received)
    target.copy_(whole.view(target.shape))


def _forward_units(E: Tensor, cols: int) -> Tensor:
    """[blocks of 64 columns, units of 16 rows, 128]; shares memory."""
    return E.view(-(-cols // META_BLOCK), -1, 128)


def _halves(units: Tensor) -> Tensor:
    """Units of 16 rows with their halves of 8 rows outside: [blocks, units, half, 16, 2, 2]; shares memory.

    The bytes of a unit are k/16%2, m%8, k%64/32, m/8%2, k%16/8, from the outermost.
    """
    return units.unflatten(2, (16, 2, 2, 2)).permute(0, 1, 4, 2, 3, 5)


def _eights(E_t: Tensor, rows: int) -> Tensor:
    """E_t with eights of rows (its k) outermost: [blocks of 64, 2, 2, 2, ...columns]; shares memory."""
    return E_t.view(-(-rows // META_BLOCK), -1, 2, 8, 2, 2, 2).permute(0, 4, 2, 6, 1, 3, 5)
