"""E of a whole weight from E of its rows, against E of the weight packed at once."""

import pytest
import torch

from sparse24 import ops
from sparse24.layers import shard_metadata


def packed_rows(weight, parts):
    return [ops.prune_compress(rows) for rows in weight.chunk(parts)]


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("rows", [8, 16, 24, 40, 64, 128, 136])
@pytest.mark.parametrize("cols", [4, 16, 60, 64, 132, 192])
def test_metadata_of_rows_makes_that_of_the_whole_weight(rows, cols, parts):
    """Bytes and padding both; rows are of one rank."""
    weight = torch.randn(parts * rows, cols)
    _, _, E, _, E_t = ops.prune_compress(weight)
    of_parts = packed_rows(weight, parts)
    forward = torch.cat([shard_metadata.take_forward(e, rows, cols) for _, _, e, _, _ in of_parts])
    made = torch.full_like(E, 0xFF)
    shard_metadata.put_forward(made, forward, parts, cols)
    assert torch.equal(made, E)
    transposed = torch.cat([shard_metadata.take_transposed(e, rows) for *_, e in of_parts])
    made = torch.full_like(E_t, 0xFF)
    shard_metadata.put_transposed(made, transposed, parts, parts * rows)
    assert torch.equal(made, E_t)


def test_what_is_sent_of_whole_blocks_is_one_bit_an_element():
    weight = torch.randn(64, 128)
    _, _, E, _, E_t = ops.prune_compress(weight)
    assert shard_metadata.take_forward(E, 64, 128).numel() == shard_metadata.take_transposed(E_t, 64).numel() == 64 * 16


def test_pieces_of_a_fused_block_are_written_in_place():
    weight, blocks = torch.randn(64, 128), torch.zeros(2, 2, 512, dtype=torch.uint8)
    _, _, E, *_ = ops.prune_compress(weight)
    sent = torch.cat([shard_metadata.take_forward(e, 32, 128) for _, _, e, _, _ in packed_rows(weight, 2)])
    shard_metadata.put_forward(blocks[:, 1], sent, 2, 128)
    assert torch.equal(blocks[:, 1].reshape(-1), E) and not blocks[:, 0].any()
