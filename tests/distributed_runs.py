"""A small training that ranks share: its model, its data and its settings."""

import torch
from tiny_models import MLP

import sparse24

WORLD, STEPS = 2, 6
SETTINGS = dict(total_steps=STEPS, mask_interval=2, dense_fraction=0, decay=1e-2)


def data(step):
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(step))


def sparse_model(seed=0):
    torch.manual_seed(seed)
    model = MLP()
    sparse24.sparsify(model)
    return model
