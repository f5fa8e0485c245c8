"""Models cut by tensor-parallel plans, and the same training of parts and of the whole, for several test files."""

import pytest
import torch
from rounding import MANY_SUMS, ORDER
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import sparse24
from sparse24 import Recipe

STEPS, WIDTH, HIDDEN, TOKENS = 6, 16, 128, 8
SETTINGS = dict(total_steps=STEPS, mask_interval=2, dense_fraction=0, decay=1e-2)


class Gated(nn.Module):
    """A feed-forward layer as Llama has it."""

    def __init__(self, bias=False, hidden=HIDDEN):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, hidden, bias), nn.Linear(WIDTH, hidden, bias)
        self.down_proj = nn.Linear(hidden, WIDTH, bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Norm and feed-forward layer, as sequence parallelism cuts them. Input and output [batch, length, WIDTH]."""

    def __init__(self, bias=False, hidden=HIDDEN):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), Gated(bias, hidden)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def plain_plan():
    layers = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    return layers | {"mlp.down_proj": RowwiseParallel()}


def sequence_plan():
    """The norm on its part of the sequence; the feed-forward layer on all of it."""
    return {
        "norm": SequenceParallel(use_local_output=True),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }


def data(step):
    return torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


def dense_model(bias=False, hidden=HIDDEN):
    torch.manual_seed(0)
    return nn.Sequential(Block(bias, hidden), Block(bias, hidden))


def train(model, recipe, optimizer, part=lambda x: x):
    losses = []
    for step in range(STEPS):
        x = part(data(step))
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def one_process(bias=False, hidden=HIDDEN, **settings):
    model = dense_model(bias, hidden)
    sparse24.sparsify(model, precision=settings.pop("precision", None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, **{"mvue": False, **SETTINGS, **settings})
    return model, recipe, train(model, recipe, optimizer)


def parallel_model(order, mesh, plan=plain_plan, bias=False, hidden=HIDDEN, **convert):
    model = dense_model(bias, hidden)
    if order == "sparsify first":
        sparse24.sparsify(model, **convert)
    for block in model:
        parallelize_module(block, mesh, plan())
    if order == "plan first":
        sparse24.sparsify(model, **convert)
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def numbers(model, recipe, losses):
    state = recipe.state_dict()
    return {
        "losses": losses,
        "masks": {name: mask.tolist() for name, mask in state["masks"].items()},
        "flips": state["monitor"]["flips"].tolist(),
        "rates": recipe.monitor.layer_rates(),
        "gaps": {k: v for k, v in recipe.metrics().items() if k.startswith("gap")},
        "fingerprint": recipe.fingerprint(),
        "weights": {name: whole(p.detach()).tolist() for name, p in model.named_parameters()},
    }


def assert_same_training(found, model, recipe, losses):
    """Masks, flips and gaps to the bit; losses and weights up to the order of the sum over ranks."""
    expected = numbers(model, recipe, losses)
    assert found["masks"] == expected["masks"] and found["flips"] == expected["flips"]
    assert found["rates"] == expected["rates"] and found["fingerprint"] == expected["fingerprint"]
    # the difference of two sums of magnitudes, a few hundredths of either: so much more of their error
    assert found["gaps"] == pytest.approx(expected["gaps"], rel=1e-3)
    assert found["losses"] == pytest.approx(expected["losses"], rel=ORDER)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(weight), **MANY_SUMS)
