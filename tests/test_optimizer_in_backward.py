"""Optimizers that step in hooks of gradients, each for one parameter, while backward runs on."""

import warnings

import pytest
import torch
from tiny_models import Gated
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24.convert import sparse_layers


def fused(model):
    """Blocks run as one function."""


def hooked(model):
    """Layers run one by one, since somebody watches one; gate and up lie in one buffer all the same."""
    for block in model:
        block.gate_proj.register_forward_hook(lambda *_: None)


def dense_phase(model):
    for layer in sparse_layers(model).values():
        layer.enter("dense")


def trained(change, kind, options, *, in_backward, recomputes=False):
    """A model after four steps."""
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), Gated())
    sparse24.sparsify(model, mvue=False)
    change(model)
    optimizers = {p: kind([p], 0.01, **options) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    if in_backward:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
    for number in range(4):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(number))
        y = checkpoint(model, x, use_reentrant=False) if recomputes else model(x)
        (y - x).square().mean().backward()
        if not in_backward:
            for p in model.parameters():
                step(p)
    assert sparse24.verify(model)
    return model


@pytest.mark.fault(107)
@pytest.mark.filterwarnings("ignore:the weight of a sparse layer was written since it was packed")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("change", [fused, hooked, dense_phase])
@pytest.mark.parametrize("kind, options", [(torch.optim.SGD, {}), (torch.optim.AdamW, dict(fused=True))])
def test_optimizers_in_backward_train_as_those_behind_it(kind, options, change, recomputes):
    """The layers are packed at the end of the pass, which reads what was packed before it."""
    inside, behind = (
        trained(change, kind, options, in_backward=where, recomputes=recomputes) for where in (True, False)
    )
    assert all(map(torch.equal, inside.parameters(), behind.parameters()))


@pytest.mark.fault(107)
def test_beside_a_recipe_they_are_told_of():
    """The recipe counts the steps of its own optimizer, and these are not; so it says, and packs."""
    model = nn.Sequential(Gated())
    sparse24.sparsify(model, mvue=False)
    hooked(model)
    recipe = sparse24.Recipe(model, torch.optim.SGD(model.parameters(), 0.01), 10)
    optimizers = {p: torch.optim.SGD([p], 0.01) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with pytest.warns(sparse24.Sparse24Warning, match="its steps are not counted and get no decay"):
        model(torch.randn(16, 32)).square().mean().backward()
    assert sparse24.verify(model) and recipe.step == 0
    recipe.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.randn(16, 32)).square().mean().backward()
    assert sparse24.verify(model)
