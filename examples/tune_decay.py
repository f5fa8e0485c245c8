"""Finding the decay factor by short runs: prints the table, draws mu against decay.

    python examples/tune_decay.py [--probe-step 60] [--out .]

Use the model, data, optimizer and warm-up of the real run, and a probe step inside that warm-up.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import sparse24
from sparse24.recipe.tune import TuneResult


def make_model() -> nn.Module:
    """Called under the same seed for each arm."""
    return nn.ModuleList(sparse24.SparseGatedMLP(32, 64) for _ in range(2))


def make_optimizer(model: nn.Module):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=100)  # the run's warm-up


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x
    for block in model:
        y = y + block(y)
    return nn.functional.mse_loss(y, x.roll(1, -1))


def main(probe_step: int = 60, out: str = ".") -> TuneResult:
    batches = [torch.randn(64, 32, generator=torch.Generator().manual_seed(i)) for i in range(50)]
    result = sparse24.tune_decay(
        make_model,
        make_optimizer,
        batches,
        grid=(0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        probe_step=probe_step,
        mask_interval=5,
        loss=loss,
        path=Path(out) / "tune.json",  # run again, and finished arms are not repeated
        say=print,
    )
    print(result)
    result.plot(Path(out) / "tune.png")
    if result:
        print(f"python -m sparse24 pretrain --decay {result.decay:g}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probe-step", type=int, default=60)
    parser.add_argument("--out", default=".")
    arguments = parser.parse_args()
    main(arguments.probe_step, arguments.out)
