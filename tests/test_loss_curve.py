"""32 steps of a small transformer FFN: the losses are those stored, which plain PyTorch in float64 made.

    python tests/test_loss_curve.py      writes tests/data/loss_curve.json anew

The curve covers sparse steps with masks searched every 4, masked decay, AdamW, and a dense end. Ours may stray twice as
far from it as plain PyTorch does in the same dtype on the same device.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse24
from sparse24 import reference
from sparse24.testing import assert_as_accurate

STORED = Path(__file__).parent / "data" / "loss_curve.json"
STEPS, SPARSE_STEPS, INTERVAL, DECAY, WIDTH, D_FF, TOKENS = 32, 24, 4, 1e-3, 64, 128, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, D_FF), nn.Linear(D_FF, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class PlainSparse(nn.Linear):
    """Multiplies with weight * mask; the gradient reaches all of the weight."""

    kept = None

    def forward(self, x):
        weight = self.weight
        if self.kept is not None:
            weight = weight + (weight * self.kept - weight).detach()
        return nn.functional.linear(x, weight, self.bias)


def model_of(device, dtype) -> nn.Sequential:
    """The same weights everywhere: drawn in bfloat16's grid on the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    return model.to(device, dtype)


def batch(step, device, dtype):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(-8, 9, (TOKENS, WIDTH), generator=generator) / 8
    return x.to(device, dtype), x.roll(1, -1).to(device, dtype)


def losses_of(model, optimizer, device, dtype, before=None, after=None) -> torch.Tensor:
    losses = []
    for step in range(STEPS):
        x, y = batch(step, device, dtype)
        loss = (model(x) - y).square().mean(dtype=torch.promote_types(dtype, torch.float32))
        loss.backward()
        if before:
            before(step)
        optimizer.step()
        if after:
            after(step + 1)
        optimizer.zero_grad()
        losses.append(loss.detach().double().cpu())
    return torch.stack(losses)


def plain_losses(device, dtype) -> torch.Tensor:
    """By dense products with masked weights, and the recipe written out."""
    model = model_of(device, dtype)
    layers = [layer for block in model for layer in (block.up, block.down)]
    for layer in layers:
        layer.__class__ = PlainSparse

    def search():
        for layer in layers:
            mask = reference.transposable_mask(layer.weight.detach().cpu())
            layer.kept = reference.unpack_mask(mask).to(device)

    def decay(step):
        for layer in layers if step < SPARSE_STEPS else ():
            layer.weight.grad += DECAY * torch.where(layer.kept, 0, layer.weight.detach())

    def after(taken):
        if taken == SPARSE_STEPS:
            for layer in layers:
                layer.kept = None
        elif taken < SPARSE_STEPS and taken % INTERVAL == 0:
            search()

    search()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return losses_of(model, optimizer, device, dtype, decay, after)


def our_losses(device, dtype) -> torch.Tensor:
    model = model_of(device, dtype)
    sparse24.sparsify(model, include=("*up", "*down"), backend="sparse", mvue=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = dict(total_steps=STEPS, mask_interval=INTERVAL, decay=DECAY, dense_fraction=1 - SPARSE_STEPS / STEPS)
    recipe = sparse24.Recipe(model, optimizer, **settings)
    losses = losses_of(model, optimizer, device, dtype)
    assert recipe.phase == "dense" and recipe.step == STEPS
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_are_those_of_plain_pytorch_in_float64(device, dtype):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("a GPU's sparse products take 16 bits")
    stored = torch.tensor(json.loads(STORED.read_text())["losses"], dtype=torch.float64)
    ours, plain = our_losses(device, dtype), plain_losses(device, dtype)
    assert stored[-1] < stored[0] / 3
    assert_as_accurate(ours, plain.to(dtype), stored)


def test_the_stored_curve_is_what_float64_makes():
    stored = torch.tensor(json.loads(STORED.read_text())["losses"], dtype=torch.float64)
    again = plain_losses("cpu", torch.float64)
    # Sums of another order differ in the last places, which 32 steps of AdamW make larger: 2^-20 is far above that
    # (rounding is 2^-53) and far below what one flipped block of a mask changes.
    assert ((again - stored).abs() <= 2.0**-20 * stored).all()


if __name__ == "__main__":
    made = plain_losses("cpu", torch.float64).tolist()
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(json.dumps({"steps": STEPS, "losses": made}, indent=1) + "\n")
