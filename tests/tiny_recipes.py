"""A recipe over a tiny model, and a few steps of it: what the tests of recipes share."""

import torch
from tiny_models import MLP

import sparse24
from sparse24 import Recipe, ops


def kept(layer):
    """bool [out_features, in_features]: what the mask keeps."""
    return ops.unpack_mask(layer.mask)


def make(optimizer=torch.optim.SGD, lr=0.1, model=None, opt=None, **settings):
    """(model, optimizer, recipe) of 9 sparse and 3 dense steps, masks searched every 4; `opt` for the optimizer."""
    torch.manual_seed(0)
    model = MLP() if model is None else model
    sparse24.sparsify(model)
    optimizer = optimizer(model.parameters(), lr=lr, **(opt or {}))
    settings = dict(total_steps=12, mask_interval=4, dense_fraction=0.25) | settings
    return model, optimizer, Recipe(model, optimizer, **settings)


def loss_of(model, step=0):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.flip(-1)).square().mean()


def run(model, optimizer, steps, first=0):
    """Steps on data that depends on the step's number alone."""
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
