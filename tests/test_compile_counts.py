"""How often torch.compile compiles 2:4 layers: in each phase as often as the dense twin, whatever the number of blocks.

Torch compiles a forward at most eight times and then runs it eagerly, so each compilation needs a reason. In 8 bits the
first step is one: it looks at each tensor before it casts it, as no scale is known.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import sparse24
from sparse24 import Recipe
from sparse24.benchmark.models import MLP, GatedMLP

BLOCKS = {"model": 2, "block": 12}  # of a whole model each block is traced
CASES = [(GatedMLP, True, precision, how) for precision in (None, "fp8-hybrid", "fp8") for how in BLOCKS]
CASES += [(MLP, True, "fp8", "block"), (GatedMLP, False, "fp8", "block")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, feed_forward: type):
        super().__init__()
        self.mix, self.norm, self.mlp = nn.Linear(64, 64), nn.LayerNorm(64), feed_forward(64, 128)

    def forward(self, x):
        return x + self.mlp(self.norm(self.mix(x)))


class Counted:
    """Blocks of one class, compiled as one model or one by one; `train` and `evaluate` return all compilations so far.

    The first half of `steps` is sparse, and masks are searched after each of them.
    """

    def __init__(self, model: nn.Module, how: str, *, sparse: bool, steps: int = 6, **settings):
        if sparse:
            sparse24.sparsify(model, include=("*.mlp.*",), **settings)
        counter = self.counter = CompileCounterWithBackend("eager")
        self.model = self.forward = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if sparse:
            self.recipe = Recipe(model, self.optimizer, total_steps=steps, mask_interval=1, dense_fraction=0.5)
        if how == "model":
            self.forward = torch.compile(model, backend=counter, fullgraph=True)
        for block in model if how == "block" else ():
            block.compile(backend=counter, fullgraph=True)

    def train(self, steps: int = 1) -> int:
        self.model.train()
        for _ in range(steps):
            x = torch.randn(4, 64, requires_grad=True)  # as embeddings give it
            self.forward(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.counter.frame_count

    def evaluate(self) -> int:
        self.model.eval()
        with torch.no_grad():
            self.forward(torch.randn(4, 64))
        return self.counter.frame_count


def stack(feed_forward: type, how: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(feed_forward) for _ in range(BLOCKS[how])))


@pytest.mark.fault(53)
@pytest.mark.parametrize("feed_forward, fuse, precision, how", CASES)
def test_a_phase_compiles_as_often_as_the_dense_twin(feed_forward, fuse, precision, how):
    model = stack(feed_forward, how)
    twin = Counted(copy.deepcopy(model), how, sparse=False)
    trains = twin.train(2)
    evaluates = twin.evaluate() - trains
    assert (trains, evaluates) == (1, 1)
    torch._dynamo.reset()  # modules of one class count together

    sparse = Counted(model, how, sparse=True, precision=precision, fuse=fuse)
    first = 0 if precision is None else trains
    assert sparse.train() == trains
    assert sparse.train() == first + trains
    assert sparse.evaluate() == first + trains + evaluates
    assert sparse.train() == first + trains + evaluates
    assert sparse.recipe.phase == "dense"
    assert sparse.train(3) == first + 2 * trains + evaluates
    assert sparse.evaluate() == first + 2 * (trains + evaluates)
    assert not counters["graph_break"]


@pytest.mark.parametrize("precision", ["fp8-hybrid", "fp8"])
def test_a_first_step_that_runs_eagerly_spares_its_compilation(precision):
    """As docs/fp8.md has it. A training that begins anew compiles that step once, for all times that follow."""
    training = Counted(stack(GatedMLP, "block"), "block", sparse=True, precision=precision)
    early = training.recipe.state_dict()
    with torch.compiler.set_stance("force_eager"):
        assert training.train() == 0
    assert training.train() == 1
    for _ in range(2):
        training.recipe.load_state_dict(early)
        assert training.train(2) == 2
