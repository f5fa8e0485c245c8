"""A plain dense network that computes what a 2:4 model should: weights, masks and a phase, and nothing of sparse24.

The mask of a block is found by trying all 90 patterns; training is written out: a straight-through gradient, masked
decay, one SGD step. Slow, short, and independent of what it checks.
"""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    def __init__(self, width=16, hidden=32):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, width=16, hidden=64):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def make_net() -> nn.Sequential:
    """One block that is not fused, one that is."""
    return nn.Sequential(Plain(), Gated())


LAYERS = ("0.fc1", "0.fc2", "1.gate_proj", "1.up_proj", "1.down_proj")

_ROWS = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
PATTERNS = torch.tensor(
    [
        rows
        for rows in itertools.product(_ROWS, repeat=4)
        if all(sum(column) == 2 for column in zip(*rows, strict=True))
    ],
    dtype=torch.float64,
).flatten(1)  # [90, 16]


def blocks_of(matrix: Tensor) -> Tensor:
    """[rows, cols] -> [rows * cols / 16, 16], the 4x4 blocks."""
    rows, cols = matrix.shape
    return matrix.reshape(rows // 4, 4, cols // 4, 4).transpose(1, 2).reshape(-1, 16)


def best_mask(weight: Tensor) -> Tensor:
    """The pattern of each block that keeps the most magnitude, as bool [rows, cols]."""
    rows, cols = weight.shape
    chosen = PATTERNS[(blocks_of(weight.detach().abs().double()) @ PATTERNS.t()).argmax(1)]
    return chosen.reshape(rows // 4, cols // 4, 4, 4).transpose(1, 2).reshape(rows, cols).bool()


def as_good(mask: Tensor, weight: Tensor) -> bool:
    """Whether each block of `mask` keeps as much as the best pattern does, up to the rounding of a float32 sum."""
    magnitude = weight.detach().abs().double()
    kept, best = (blocks_of(magnitude * m).sum(1) for m in (mask, best_mask(weight)))
    return bool((kept >= best * (1 - 1e-6)).all())


class Twin:
    """weights by the names of a state_dict, masks by layer, a phase."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.masks: dict[str, Tensor] = {}
        self.phase = "sparse"
        self.search()

    def copy(self) -> Twin:
        return copy.deepcopy(self)

    def search(self) -> None:
        self.masks = {name: best_mask(self.weights[f"{name}.weight"]) for name in LAYERS}

    def follow(self, other: Twin) -> None:
        self.masks, self.phase = dict(other.masks), other.phase

    def __call__(self, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        w = dict(self.weights if weights is None else weights)
        if self.phase == "sparse":
            for name in LAYERS:
                full = w[f"{name}.weight"]
                w[f"{name}.weight"] = full + (full * self.masks[name] - full).detach()  # straight through
        x = F.linear(torch.relu(F.linear(x, w["0.fc1.weight"], w["0.fc1.bias"])), w["0.fc2.weight"], w["0.fc2.bias"])
        gate, up = F.linear(x, w["1.gate_proj.weight"]), F.linear(x, w["1.up_proj.weight"])
        return F.linear(F.silu(gate) * up, w["1.down_proj.weight"])

    def train(self, x: Tensor, lr: float, decay: float) -> None:
        """One step of SGD on the mean square of the output's distance from x turned round."""
        w = {name: tensor.clone().requires_grad_() for name, tensor in self.weights.items()}
        F.mse_loss(self(x, w), x.flip(-1)).backward()
        for name, tensor in w.items():
            gradient = tensor.grad
            layer = name.removesuffix(".weight")
            if self.phase == "sparse" and layer in self.masks:
                gradient = gradient + decay * torch.where(self.masks[layer], 0.0, tensor.detach())
            self.weights[name] = (tensor - lr * gradient).detach()


class Plan:
    """Counts as a recipe should: phases, and when masks are searched."""

    def __init__(self, total: int, dense_fraction: float, interval: int):
        self.total, self.interval, self.step, self.frozen = total, interval, 0, False
        self.dense_from = total - round(total * dense_fraction)

    def phase(self) -> str:
        return "dense" if self.step >= self.dense_from < self.total else "sparse"

    def finish_step(self, twin: Twin) -> None:
        """What belongs to a step after the weights have moved."""
        self.step += 1
        if self.phase() == "sparse" and self.step % self.interval == 0 and not self.frozen:
            twin.search()
        twin.phase = self.phase()
