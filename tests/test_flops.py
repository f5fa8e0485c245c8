"""FLOPs that torch's counter sees: a 2:4 product counts what it multiplies, half of the dense one."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparse24
from sparse24 import SparseGatedMLP, SparseLinear, functional
from sparse24.layers import float8


def flops(module, x, *, backward):
    with FlopCounterMode(display=False) as counter:
        y = module(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tokens", [(64,), (4, 32)])
def test_all_three_products_count_half(tokens):
    sparse, dense = SparseLinear(32, 48), nn.Linear(32, 48)
    x = torch.randn(*tokens, 32, requires_grad=True)
    assert flops(sparse, x, backward=False) == flops(dense, x, backward=False) // 2
    assert flops(sparse, x, backward=True) == flops(dense, x, backward=True) // 2


def test_a_dense_weight_gradient_counts_in_full():
    sparse, dense = SparseLinear(32, 48, mvue=False), nn.Linear(32, 48)
    x = torch.randn(64, 32, requires_grad=True)
    assert flops(sparse, x, backward=True) == flops(dense, x, backward=True) * 4 // 6


def test_fused_blocks_count_as_their_layers():
    block, x = SparseGatedMLP(32, 64), torch.randn(64, 32, requires_grad=True)
    one_by_one = sum(flops(layer, torch.randn(64, layer.in_features), backward=False) for layer in block.children())
    assert flops(block, x, backward=False) == one_by_one == 64 * 3 * 32 * 64
    assert flops(block, x, backward=True) == 3 * one_by_one


@pytest.mark.parametrize("precision", ["fp8-hybrid", "fp8"])
def test_8_bit_products_count_half_too(precision):
    sparse, dense = SparseLinear(64, 128, precision=precision), nn.Linear(64, 128)
    x = torch.randn(64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert flops(sparse, x, backward=False) == flops(dense, x, backward=False) // 2
    assert sparse._sparse24.precision == precision


@pytest.mark.parametrize("precision", ["fp8-hybrid", "fp8"])
def test_fused_blocks_of_8_bits_count_as_those_of_16(precision):
    block, x = SparseGatedMLP(32, 64, precision=precision), torch.randn(64, 32, requires_grad=True)
    forward = 64 * 3 * 32 * 64
    for _ in range(2):  # by single ops, and by one op each way once a step has told the scales
        assert flops(block, x, backward=False) == forward and flops(block, x, backward=True) == 3 * forward
        float8.update_scales([layer for layer in block.children() if isinstance(layer, SparseLinear)])


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_of_the_products_around_a_pruned_activation_four_of_six_count_half(precision):
    up, down = (torch.randn(shape, requires_grad=True) for shape in ((128, 32), (32, 128)))
    x, once = torch.randn(64, 32, requires_grad=True), 64 * 32 * 128

    def function(x):
        return functional.sparse_activation_mlp(x, up, down, precision=precision)

    assert flops(function, x, backward=False) == (2 + 1) * once
    assert flops(function, x, backward=True) == (2 * 2 + 4) * once


def test_masked_densify_counts_as_dense():
    model, x = nn.Sequential(nn.Linear(32, 48)), torch.randn(8, 32)
    expected = flops(model, x, backward=False)
    sparse24.sparsify(model, include=("0",))
    assert flops(model, x, backward=False) == expected // 2
    sparse24.densify(model, masked=True)
    assert flops(model, x, backward=False) == expected
