"""The model changes under a living recipe: blocks replaced, converted, wrapped, removed, cast."""

import copy
import warnings

import pytest
import torch
from plain_twin import Gated, Plain
from tiny_recipes import kept
from torch import nn

import sparse24
from sparse24 import Recipe, Sparse24Error, Sparse24Warning
from sparse24.convert import sparse_layers


@pytest.fixture(autouse=True)
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        yield


def made(optimizer=torch.optim.AdamW, blocks=(Plain, Gated, Plain), **settings):
    torch.manual_seed(0)
    model = nn.Sequential(*(block() for block in blocks))
    sparse24.sparsify(model)
    optimizer = optimizer(model.parameters(), 1e-2)
    settings = dict(total_steps=30, mask_interval=2, decay=1e-2, dense_fraction=0) | settings
    return model, optimizer, Recipe(model, optimizer, **settings)


def train(model, optimizer, steps=4):
    for step in range(steps):
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def replace_dense(model):
    model[1] = Gated()


def replace_sparse(model):
    model[1] = Gated()
    sparse24.sparsify(model)


def replace_layer(model):
    model[0].fc1 = nn.Linear(16, 32)


def drop_layer(model):
    model[1].up_proj = None


def remove_the_first(model):
    del model[0]


def remove_the_last(model):
    model.pop(-1)


def remove_an_attribute(model):
    del model[1].up_proj


def replace_by_copy(model):
    model[2] = copy.deepcopy(model[2])


@pytest.mark.parametrize(
    "change, gone",
    [
        (replace_dense, "1.gate_proj, 1.up_proj, 1.down_proj"),
        (replace_sparse, "1.gate_proj, 1.up_proj, 1.down_proj"),
        (replace_layer, "0.fc1"),
        (drop_layer, "1.up_proj"),
        (replace_by_copy, "2.fc1, 2.fc2"),
        (remove_the_first, "0.fc1, 0.fc2"),
        (remove_the_last, "2.fc1, 2.fc2"),
        (remove_an_attribute, "1.up_proj"),
    ],
)
@pytest.mark.fault(77)
def test_layers_that_are_no_longer_in_the_model_are_named_and_the_remedy_works(change, gone):
    model, optimizer, recipe = made()
    train(model, optimizer)
    change(model)
    before = [p.detach().clone() for p in model.parameters()]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer.add_param_group({"params": [p for p in model.parameters() if id(p) not in held]})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(Sparse24Error, match=f"changed under its recipe: {gone} .*no longer in the model"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and recipe.step == 4
    if change in (drop_layer, remove_an_attribute):
        return
    optimizer.zero_grad()
    recipe.detach()
    recipe = Recipe(model, optimizer, total_steps=30, mask_interval=2, decay=1e-2, dense_fraction=0)
    recipe.start_at(4)
    masks = [kept(layer) for layer in sparse_layers(model).values()]
    train(model, optimizer, 6)
    assert recipe.step == 10 and sparse24.verify(model) and set(recipe.layers) == set(sparse_layers(model))
    assert any(not torch.equal(mask, kept(la)) for mask, la in zip(masks, sparse_layers(model).values(), strict=True))


@pytest.mark.fault(77)
def test_layers_that_are_converted_later_and_trained_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(Plain(), Plain())
    sparse24.sparsify(model, include=("0.*",))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = Recipe(model, optimizer, total_steps=30)
    train(model, optimizer, 2)
    sparse24.sparsify(model)
    with pytest.raises(Sparse24Error, match=r"1.fc1, 1.fc2 \(2 sparse layers\) are trained without it"):
        train(model, optimizer, 1)
    optimizer.zero_grad()
    recipe.detach()
    Recipe(model, optimizer, total_steps=30).start_at(2)
    train(model, optimizer, 2)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def swap_places(model):
    model[0], model[2] = model[2], model[0]


def wrap(model):
    model[1] = Around(model[1])


def wrap_compiled(model):
    model[1] = torch.compile(model[1], backend="eager")


def attach_an_average(model):
    model[0].average = copy.deepcopy(model)


def remove_a_dense_one(model):
    model.insert(0, nn.Identity())
    del model[0]


@pytest.mark.parametrize("change", [swap_places, wrap, wrap_compiled, attach_an_average, remove_a_dense_one])
def test_what_leaves_the_layers_in_their_model_is_no_error(change):
    model, optimizer, recipe = made()
    train(model, optimizer)
    change(model)
    train(model, optimizer)
    assert recipe.step == 8
    assert all(layer.is_packed() for layer in recipe.layers.values())


@pytest.mark.fault(56)
def test_a_model_cast_in_mid_run_is_told_of_the_optimizers_state():
    """torch's AdamW refuses such a step of a dense model too; the remedy makes both go on."""
    model, optimizer, recipe = made()
    train(model, optimizer)
    masks = [kept(layer) for layer in sparse_layers(model).values()]
    model.to(torch.bfloat16)
    assert all(torch.equal(mask, kept(la)) for mask, la in zip(masks, sparse_layers(model).values(), strict=True))
    with pytest.warns(Sparse24Warning, match=r"cast to torch.bfloat16 after steps in torch.float32, .*exp_avg"):
        with pytest.raises(RuntimeError, match="dtype"):
            train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    sparse24.refresh(model)  # the refused step has applied its weight decay
    train(model, optimizer, 3)
    assert recipe.step == 7 and sparse24.verify(model)


def test_a_model_cast_under_an_optimizer_without_state_goes_on():
    model, optimizer, recipe = made(torch.optim.SGD)
    train(model, optimizer)
    model.to(torch.bfloat16)
    train(model, optimizer, 3)
    assert recipe.step == 7 and sparse24.verify(model)
