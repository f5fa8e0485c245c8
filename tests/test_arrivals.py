"""Weights that arrive without their masks: by which rule a layer finds others, and when a forward pass says so."""

import copy
import warnings

import pytest
import torch
from tiny_models import MLP
from tiny_recipes import kept, make, run
from torch import nn

import sparse24
from sparse24 import Sparse24Warning, ops
from sparse24.convert import sparse_layers

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(99))


@pytest.fixture(autouse=True)
def no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        yield


def reloaded(into_steps, from_steps):
    """A run of `into_steps` whose model then gets its own weights of `from_steps` back, and the state of that time."""
    model, optimizer, recipe = make()
    run(model, optimizer, from_steps)
    best, state = copy.deepcopy(model.state_dict()), recipe.state_dict()
    run(model, optimizer, into_steps - from_steps, first=from_steps)
    model.load_state_dict(best)
    return model, state


@pytest.mark.fault(80)
@pytest.mark.parametrize("into_steps, how", [(9, "in the sparse phase"), (8, "under other masks")])
def test_weights_of_other_masks_or_phase_are_told_of_by_name(into_steps, how):
    model, state = reloaded(into_steps, 2)
    with pytest.warns(Sparse24Warning, match=rf"fc1.*\(2 sparse layers\).*{how}.*load_masks") as caught:
        model(X)
    assert len(caught) == 1
    model(X)  # once
    model, state = reloaded(into_steps, 2)
    sparse24.load_masks(model, state)
    model(X)  # the remedy, and no word


@pytest.mark.fault(80)
def test_weights_of_the_same_masks_are_not_told_of():
    model, _ = reloaded(3, 2)
    model(X)
    fresh = MLP()
    sparse24.sparsify(fresh)
    fresh.load_state_dict(MLP().state_dict())
    fresh(X)


def test_searching_masks_on_purpose_needs_no_word():
    model, _ = reloaded(8, 2)
    sparse24.refresh(model, search=True)
    model(X)
    model, _ = reloaded(9, 2)
    sparse24.Recipe(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
    model(X)


@pytest.mark.fault(57)
@pytest.mark.parametrize("door", ["load_state_dict", "assign", "parameter"])
@pytest.mark.parametrize("trained", [True, False])
def test_weights_arrive_by_one_rule(door, trained):
    """The mask of a training stays; a mask that belongs to the weights is searched anew."""
    model = MLP()
    sparse24.sparsify(model)
    if trained:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparse24.Recipe(model, optimizer, total_steps=12)
        run(model, optimizer, 1)
    before = {name: layer.mask.clone() for name, layer in sparse_layers(model).items()}
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    if door == "parameter":
        for name, layer in sparse_layers(model).items():
            layer.weight = nn.Parameter(weights[f"{name}.weight"])
    else:
        model.load_state_dict(weights, assign=door == "assign")
    for name, layer in sparse_layers(model).items():
        searched = ops.transposable_mask(layer.kernel_weight()).view(torch.uint8)
        assert torch.equal(layer.mask, before[name] if trained else searched)
    assert sparse24.verify(model)


@pytest.mark.fault(80)
def test_a_partial_state_dict_concerns_the_layers_that_it_has():
    saved, *_ = made_elsewhere()
    model = MLP()
    sparse24.sparsify(model)
    masks = {name: kept(layer) for name, layer in sparse_layers(model).items()}
    with torch.no_grad():
        model.fc2.weight.add_(0.3 * torch.randn(model.fc2.weight.shape))
        with pytest.warns(Sparse24Warning, match="packed anew"):
            model(X)
    partial = type(saved)((key, value) for key, value in saved.items() if key.startswith("fc1"))
    partial._metadata = saved._metadata
    model.load_state_dict(partial, strict=False)
    with pytest.warns(Sparse24Warning, match=r"weights of fc1 \(1 sparse layers\) were saved"), torch.no_grad():
        model(X)
    assert torch.equal(masks["fc2"], kept(model.fc2)), "nothing has arrived there"


def made_elsewhere():
    """The state_dict of a model whose masks are not those of its weights."""
    model, optimizer, recipe = make(lr=1.0, mask_interval=50, dense_fraction=0)
    run(model, optimizer, 6)
    return model.state_dict(), recipe
