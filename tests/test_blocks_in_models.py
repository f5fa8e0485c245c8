"""Blocks that prune their activation, in models that share their layers or use them past the block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rounding import MANY_SUMS
from torch import nn

import sparse24
from sparse24 import Sparse24Error
from sparse24.layers.fused.sparse_activation import activation_blocks
from sparse24.testing import assert_same_bits


class Block(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 64), nn.Linear(64, 16)
        self.act_fn = act or nn.ReLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def by_hand(block, x):
    """Two of each four of ReLU's values, by sorting; there are no ties but zeros."""
    h = F.relu(block.up_proj(x))
    groups = h.unflatten(-1, (-1, 4))
    return block.down_proj(h * torch.zeros_like(groups).scatter(-1, groups.topk(2).indices, 1).flatten(-2))


def masked(layer, x):
    return F.linear(x, torch.where(sparse24.ops.unpack_mask(layer.mask), layer.weight, 0), layer.bias)


def sharing(*names, kind=Block, **second):
    model = nn.Sequential(kind(), kind(**second))
    for name in names:
        setattr(model[1], name, getattr(model[0], name))
    return model


# -- shared layers ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(111)
@pytest.mark.parametrize("names", [["down_proj"], ["up_proj"], ["up_proj", "down_proj"]], ids="+".join)
def test_blocks_that_share_layers_all_prune(names):
    model, x = sharing(*names), torch.randn(5, 16)
    report = sparse24.sparsify(model, operand="activation")
    own = [f"1.{name}" for name in ("up_proj", "down_proj") if name not in names]
    assert report.converted == ["0.up_proj", "0.down_proj", *own] and report.fused == {"0": "", "1": ""}
    torch.testing.assert_close(model(x), by_hand(model[1], by_hand(model[0], x)), **MANY_SUMS)
    again = dict(sparse24.sparsify(model, operand="activation").skipped)
    assert again == dict.fromkeys([*report.converted, *([] if own else ["1"])], "already sparse")
    assert sparse24.densify(model) == ["0", "1"]


@pytest.mark.fault(111)
def test_a_block_that_shares_all_its_layers_and_stays_dense_is_reported_by_its_own_name():
    model = sharing("up_proj", "down_proj", act=nn.GELU())
    report = sparse24.sparsify(model, operand="activation")
    assert report.converted == ["0.up_proj", "0.down_proj"]
    ((name, reason),) = report.skipped
    assert name == "1" and "act_fn is gelu" in reason and list(activation_blocks(model)) == ["0"]


@pytest.mark.fault(111)
def test_a_layer_that_has_another_name_before_that_in_its_block_goes_by_the_first():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            block = Block()
            self.first, self.block = block.up_proj, block

    for settings in ({}, {"operand": "activation"}):
        assert sparse24.sparsify(Named(), **settings).converted == ["first", "block.down_proj"]


@pytest.mark.fault(111)
@pytest.mark.parametrize("kind", [Block, Gated])
@pytest.mark.parametrize("shared", ["down_proj", "up_proj"])
def test_weights_of_blocks_that_share_a_layer_are_all_2_4(kind, shared):
    model, x = sharing(shared, kind=kind), torch.randn(5, 16)
    report = sparse24.sparsify(model)
    assert len(report.converted) == 2 * len(list(model[0].children())[:-1]) - 1
    joint = kind is Gated and shared == "up_proj"
    assert [not why for why in report.fused.values()] == [True, not joint]
    assert not joint or "shares up_proj with another block" in report.fused["1"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = sparse24.Recipe(model, optimizer, 20, mask_interval=2, dense_fraction=0)
    for _ in range(3):
        assert_computes_with_masks(model, x)
        model(x).square().mean().backward()
        optimizer.step()
    assert recipe.step == 3 and sparse24.verify(model)


def assert_computes_with_masks(model, x):
    y = x
    for block in model:
        up = masked(block.up_proj, y)
        gated = isinstance(block, Gated)
        h = F.silu(masked(block.gate_proj, y)) * up if gated else F.relu(up)
        y = masked(block.down_proj, h)
    torch.testing.assert_close(model(x), y, **MANY_SUMS)


@pytest.mark.fault(82)
@pytest.mark.parametrize("names", [["up_proj"], ["gate_proj", "up_proj"]], ids="+".join)
def test_a_block_whose_gate_or_up_becomes_another_2_4_layer_multiplies_with_that(names):
    """Its own buffer holds the forms of the layers before."""
    model, x = nn.Sequential(Gated(), Gated()), torch.randn(5, 16)
    sparse24.sparsify(model)
    for name in names:
        setattr(model[1], name, getattr(model[0], name))
    assert_computes_with_masks(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    sparse24.refresh(model)
    assert_computes_with_masks(model, x)


# -- layers called past their block -----------------------------------------------------------------------------------


class Around(nn.Module):
    def __init__(self, count=1):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.mlp, self.other = Block(), Block(nn.GELU())


class CallsLayers(Around):
    def forward(self, x):
        return self.mlp.down_proj(torch.relu(self.mlp.up_proj(x)))


class CallsInAMethod(Around):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.run, x, use_reentrant=False)

    def run(self, x):
        block = self.mlp
        down = block.down_proj
        return down(torch.relu(block.up_proj(x)))


class CallsBoth(Around):
    def forward(self, x):
        return self.mlp(x) if self.training else self.mlp.down_proj(torch.relu(self.mlp.up_proj(x)))


class ReadsWeights(Around):
    def forward(self, x):
        return F.linear(torch.relu(self.mlp.up_proj(x)), self.mlp.down_proj.weight)


class CallsInALoop(Around):
    def forward(self, x):
        for _, block in enumerate(self.blocks):
            x = block.down_proj(torch.relu(block.up_proj(x)))
        return self.mlp(x)


class CallsTheBlock(Around):
    """The layers of others, or for other ends."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x.to(block.down_proj.weight.dtype))
        x = self.mlp(x) + self.other.down_proj(torch.relu(self.other.up_proj(x)))
        return x + 0 * self.mlp.down_proj.weight.square().sum()

    def look(self, x):
        return self.mlp.down_proj(x)


@pytest.mark.fault(112)
@pytest.mark.parametrize("kind", [CallsLayers, CallsInAMethod, CallsBoth, ReadsWeights, CallsInALoop])
def test_a_block_whose_layers_are_called_past_it_is_left_dense_with_the_reason(kind):
    model = nn.Sequential(kind())
    block = "0.blocks.0" if kind is CallsInALoop else "0.mlp"
    dense = model(torch.ones(2, 16))
    with pytest.raises(Sparse24Error, match=f"the forward of {kind.__name__} multiplies with its down_proj past"):
        sparse24.sparsify(model, operand="activation", include=f"{block}.*")
    assert not activation_blocks(model)
    assert_same_bits(model(torch.ones(2, 16)), dense)
    report = sparse24.sparsify(model, operand="activation")  # and the others are converted
    assert "let it call the block" in dict(report.skipped)[f"{block}.down_proj"]
    assert block not in activation_blocks(model) and len(activation_blocks(model)) == 1


@pytest.mark.fault(112)
def test_layers_of_other_blocks_and_methods_that_no_forward_uses_are_no_reason():
    model = nn.Sequential(CallsTheBlock(2))
    sparse24.sparsify(model, operand="activation")
    assert list(activation_blocks(model)) == ["0.blocks.0", "0.blocks.1", "0.mlp"]
