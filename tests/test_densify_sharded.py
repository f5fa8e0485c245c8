"""densify under FSDP2: blocks and layers that fully_shard was called on are dense again, and sharded still."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from rounding import MANY_SUMS
from tiny_models import Gated
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import sparse24
from sparse24 import Sparse24Error


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "kind, settings",
    [(Block, {"operand": "activation"}), (Block, {}), (Gated, {}), (Block, {"fuse": False})],
    ids=["activations", "weights", "gated weights", "layers"],
)
@pytest.mark.fault(113)
def test_what_was_sharded_becomes_dense_and_stays_sharded(kind, settings):
    model = nn.Sequential(kind(), kind())
    x = torch.randn(8, next(model.parameters()).shape[1])
    dense, mesh = model(x).detach(), init_device_mesh("cpu", (1,))
    sparse24.sparsify(model, **settings)
    shards = model if "fuse" not in settings else [block.fc1 for block in model]
    for module in (*shards, model):
        fully_shard(module, mesh=mesh)
    pruned = model(x)
    pruned.sum().backward()
    assert not torch.equal(pruned, dense)
    again = sparse24.sparsify(model, **settings)
    assert not again and {reason for _, reason in again.skipped} == {"already sparse"}
    assert len(sparse24.densify(model)) >= 2
    torch.testing.assert_close(model(x), dense, **MANY_SUMS)
    model(x).sum().backward()
    for module in shards:
        assert isinstance(module, FSDPModule) and type(module).__mro__[2] in (kind, nn.Linear)
    assert len({type(module) for module in shards}) == 1
    if "fuse" not in settings:
        sparse24.sparsify(model, **settings)
        torch.testing.assert_close(model(x), pruned, **MANY_SUMS)


@pytest.mark.fault(113)
def test_other_classes_around_ours_are_refused_with_the_remedy():
    model = nn.Sequential(Block())
    sparse24.sparsify(model, operand="activation")
    model[0].__class__ = type("Theirs", (type(model[0]),), {})
    with pytest.raises(Sparse24Error, match="Theirs was wrapped after sparsify, by .*take that off"):
        sparse24.densify(model)
