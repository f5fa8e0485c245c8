"""What a user's typed program looks like. tests/test_typing.py checks it by `mypy --strict`; nobody runs it."""

from pathlib import Path

import torch
from torch import Tensor, nn

import sparse24
from sparse24 import ops


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = sparse24.SparseGatedMLP(width, 4 * width, activation="silu")
        self.head = sparse24.SparseLinear(width, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mlp(x))
        return out


def train(model: nn.Module, batches: list[Tensor], path: Path) -> dict[str, float]:
    report = sparse24.sparsify(model, include=("*mlp*",), exclude=("*head*",), tokens=8192)
    names: list[str] = report.converted
    reasons: list[str] = [skipped.reason for skipped in report.skipped]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    recipe = sparse24.Recipe(model, optimizer, total_steps=len(batches), decay=6e-5, dense_fraction=1 / 6)
    for batch in batches:
        model(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sparse24.save_checkpoint(path, model, optimizer, recipe)
    sparse24.export(model, path / "model.safetensors", masked=False)
    dense: list[str] = sparse24.densify(model)
    print(names, reasons, dense, bool(sparse24.verify(model)), recipe.phase)
    metrics: dict[str, float] = recipe.metrics()
    return metrics


def products(w: Tensor, x: Tensor) -> Tensor:
    mask, packed, E, packed_t, E_t = ops.prune_compress(w, dtype=torch.bfloat16)
    flips: Tensor = ops.mask_flips(mask, mask)
    y: Tensor = ops.sparse_mm(x, packed, E, w.shape[0])
    dx: Tensor = ops.sparse_mm_grad_input(y, packed_t, E_t, w.shape[1])
    return dx + flips


def ready() -> str:
    found = sparse24.is_available()
    return found.arch if found else found.reason
