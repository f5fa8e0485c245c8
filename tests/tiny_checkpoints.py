"""A small training with every kind of layer, and comparing what it left: what the tests of checkpoints share."""

import torch
from tiny_models import MLP
from torch import nn

import sparse24
from sparse24 import Recipe, SparseGatedMLP
from sparse24.files import seal
from sparse24.layers.modules import SparseLayer
from sparse24.save.folders import STATE

STEPS = 12


class Net(nn.Module):
    """A block that runs as one function, dropout, and a plain FFN layer by layer."""

    def __init__(self):
        super().__init__()
        self.gated, self.drop, self.plain = SparseGatedMLP(16, 64), nn.Dropout(0.1), MLP()

    def forward(self, x):
        return self.plain(self.drop(self.gated(x)))


def make(seed=0, model=None, **settings):
    torch.manual_seed(seed)
    model = Net() if model is None else model
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = dict(total_steps=STEPS, mask_interval=4, dense_fraction=0.25, decay=1e-3) | settings
    return model, optimizer, Recipe(model, optimizer, **settings)


def run(model, optimizer, first, last, scaler=None, batches=1):
    """Steps on data that depends on the step's number alone; what a skipped step does comes from the scaler."""
    for step in range(first, last):
        for batch in range(batches):
            x = torch.randn(16, 16, generator=torch.Generator().manual_seed(100 * step + batch))
            loss = (model(x) - x.flip(-1)).square().mean() * (float("inf") if scaler and step == 5 else 1.0)
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()


def assert_same(ours, theirs):
    """Models equal in weights, phases, masks, and in the packed forms that they multiply with."""
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), (_, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        if isinstance(a, SparseLayer):
            assert a.phase == b.phase and torch.equal(a.mask, b.mask), name
            for (buffer, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
                assert a.phase == "dense" or torch.equal(x, y), f"{name}.{buffer}"
    assert str(sparse24.verify(ours)) == str(sparse24.verify(theirs))


def rewrite(path, **changes):
    """A checkpoint with another state, as whoever wrote it on purpose would leave it."""
    state = torch.load(path / STATE, weights_only=True)
    for key, value in changes.items():
        if value is ...:
            del state[key]
        else:
            state[key] = value(state[key]) if callable(value) else value
    torch.save(state, path / STATE)
    seal(path)
