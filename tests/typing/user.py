"""What a user's typed program looks like. tests/test_typing.py checks it by `mypy --strict`; nobody runs it."""

from pathlib import Path

import torch
from torch import Tensor, nn

import sparse24
from sparse24 import errors, functional, integrations, modules, ops, reference, structure


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


def evaluate(model: nn.Module, folder: Path, optimizer: torch.optim.Optimizer, recipe: sparse24.Recipe) -> None:
    extra = sparse24.load_checkpoint(folder, model, optimizer, recipe)
    state: dict[str, Tensor] = sparse24.load_compressed(folder / "model")
    average = torch.optim.swa_utils.AveragedModel(model)
    followed: int = sparse24.follow(average, like=model)
    loaded: int = sparse24.load_masks(model, recipe.state_dict())
    packed: int = sparse24.refresh(model, search=False)
    print(extra, sorted(state), followed, loaded, packed, sparse24.__version__, sparse24.to_semi_structured(model))


def tune(batches: list[Tensor]) -> float:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    result = sparse24.tune_decay(lambda: Model(64), optimizer_of, batches, probe_step=10)
    decay: float | None = result.decay  # None where no arm came near
    return decay or 6e-5


def watch(model: nn.Module) -> None:
    probe = sparse24.MaskProbe(model, mask_interval=10)
    layer = sparse24.SparseConv1D(64, 64)
    is_sparse: bool = isinstance(layer, modules.SparseLayer)
    print(probe, is_sparse, structure, integrations, reference.transposable_mask(torch.zeros(4, 4)))


def refused(x: Tensor, w: Tensor) -> Tensor | None:
    packed = ops.prune_compress(w)[1:]
    available: sparse24.Availability = sparse24.is_available()
    try:
        y: Tensor = functional.sparse_linear(x, w, *packed)
    except (sparse24.Sparse24DtypeError, sparse24.Sparse24BuildError) as error:
        print(error, available)
    except sparse24.Sparse24Error as error:
        raise errors.Sparse24Error("refused") from error
    except sparse24.Sparse24Warning:
        return None
    else:
        return y
    return None
