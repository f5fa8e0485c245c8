"""What FSDP2 sends of packed weights, what is held of them between passes, and where they are received."""

import functools

import pytest
import torch
from packed_gather_runs import SETTINGS, WIDTH, data, gated, in_8_bits, made, plain, policy, shard
from torch import nn

import sparse24
from sparse24 import Recipe
from sparse24.benchmark.communication import CountBytes
from sparse24.layers.state import PACKED_BUFFERS, state_of


def _bytes(rank, sparse):
    torch.manual_seed(0)
    model = nn.Sequential(*(sparse24.SparseGatedMLP(128, 256) for _ in range(2)))
    if not sparse:
        sparse24.densify(model)
    shard(model, mp_policy=policy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = sparse and Recipe(model, optimizer, **SETTINGS, dense_fraction=0)
    held = []
    model[1].register_forward_pre_hook(lambda module, args: held.append(_held(recipe)), prepend=False)
    with CountBytes() as count:
        model(torch.randn(8, 128)).square().mean().backward()
    return count.bytes["gather"], held, _held(recipe), sum(m.numel() for m in recipe and recipe._search.masks or [])


def _held(recipe):
    """Bytes of each packed form of the first block's down layer and of the second's."""
    layers = list(recipe.layers.values())[2::3] if recipe else []
    return [[layer._buffers[name].untyped_storage().nbytes() for name in PACKED_BUFFERS] for layer in layers]


def test_a_step_gathers_0_56_of_dense_bytes_and_holds_one_block(two):
    sparse, dense = (two.run(functools.partial(_bytes, sparse=which)) for which in (True, False))
    elements = 2 * 3 * 128 * 256
    for (sent, during, after, masks), (dense_sent, *_) in zip(sparse, dense, strict=True):
        assert dense_sent == 2 * 2 * elements  # 16 bits, in forward and in backward
        assert sent == 2 * 1.125 * elements
        values, positions = 128 * 256, 128 * 256 // 8
        assert during == [[[0, 0, 0, 0], [values, positions, 0, 0]]]  # the first block's are free, and one direction
        assert after == [[0, 0, 0, 0], [0, 0, 0, 0]] and masks == elements / 8 / 2


def _received_in_place(rank, make):
    """Of each layer of a block that runs forward, whether FSDP2 has copied values to where products read them."""
    model, found = shard(made(make), mp_policy=policy()), []
    Recipe(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **SETTINGS, dense_fraction=0)

    def look(block, args):
        for layer in (module for module in block.modules() if isinstance(module, sparse24.SparseLinear)):
            received = state_of(layer).shards.param.all_gather_outputs[0]
            found.append(received.data_ptr() == layer._buffers[PACKED_BUFFERS[0]].data_ptr())

    model[1].register_forward_pre_hook(look)
    model(data(0, 128 if make is in_8_bits else WIDTH))
    return found


@pytest.mark.parametrize("make", [gated, plain, in_8_bits])
def test_values_are_received_where_products_read_them(two, make):
    for found in two.run(functools.partial(_received_in_place, make=make)):
        assert found == [True] * (2 if make is plain else 3)
