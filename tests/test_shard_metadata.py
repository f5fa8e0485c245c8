"""E of a whole weight from E of its rows, against E of the weight packed at once."""

import pytest
import torch

from sparse24 import ops
from sparse24.layers.parallel import shard_metadata


def packed_rows(weight, parts):
    return [ops.prune_compress(rows) for rows in weight.chunk(parts)]


def assert_whole(E, E_t, of_parts, rows, cols, parts, dtype):
    """`of_parts`: (E, E_t) of the rows of each rank."""
    forward = torch.cat([shard_metadata.take_forward(e, rows, cols, dtype) for e, _ in of_parts])
    made = torch.full_like(E, 0xFF)
    shard_metadata.put_forward(made, forward, parts, cols, dtype)
    assert torch.equal(made, E)
    transposed = torch.cat([shard_metadata.take_transposed(e, rows, dtype) for _, e in of_parts])
    made = torch.full_like(E_t, 0xFF)
    shard_metadata.put_transposed(made, transposed, parts, parts * rows, dtype)
    assert torch.equal(made, E_t)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("rows", [8, 16, 24, 40, 64, 128, 136])
@pytest.mark.parametrize("cols", [4, 16, 60, 64, 132, 192])
def test_metadata_of_rows_makes_that_of_the_whole_weight(rows, cols, parts):
    """Bytes and padding both; rows are of one rank."""
    weight = torch.randn(parts * rows, cols)
    _, _, E, _, E_t = ops.prune_compress(weight)
    of_parts = [(e, e_t) for _, _, e, _, e_t in packed_rows(weight, parts)]
    assert_whole(E, E_t, of_parts, rows, cols, parts, weight.dtype)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("rows", [8, 24, 32, 96, 128, 136])
@pytest.mark.parametrize("cols", [4, 36, 128, 160])
def test_metadata_of_rows_in_8_bits(rows, cols, parts):
    def metadata(part):
        amax = part.abs().amax().reshape(1)
        forms = ops.empty_packed(*part.shape, ops.float8.E4M3, part.device)
        mask = ops.transposable_mask(part)
        ops.float8.pack_float8_(False, [part], [mask], [[t] for t in forms], [ops.float8.scale_of(amax)], [amax])
        return forms[1], forms[3]

    weight = torch.randn(parts * rows, cols)
    of_parts = [metadata(part) for part in weight.chunk(parts)]
    assert_whole(*metadata(weight), of_parts, rows, cols, parts, ops.float8.E4M3)


def test_what_is_sent_of_whole_blocks_is_one_bit_an_element():
    weight = torch.randn(64, 128)
    _, _, E, _, E_t = ops.prune_compress(weight)
    forward = shard_metadata.take_forward(E, 64, 128, weight.dtype)
    assert forward.numel() == shard_metadata.take_transposed(E_t, 64, weight.dtype).numel() == 64 * 16


def test_pieces_of_a_fused_block_are_written_in_place():
    weight, blocks = torch.randn(64, 128), torch.zeros(2, 2, 512, dtype=torch.uint8)
    _, _, E, *_ = ops.prune_compress(weight)
    sent = [shard_metadata.take_forward(e, 32, 128, weight.dtype) for _, _, e, _, _ in packed_rows(weight, 2)]
    shard_metadata.put_forward(blocks[:, 1], torch.cat(sent), 2, 128, weight.dtype)
    assert torch.equal(blocks[:, 1].reshape(-1), E) and not blocks[:, 0].any()
