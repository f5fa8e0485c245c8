"""A small GPT in the style of the speedruns: squared ReLU, RMS norm, Muon for matrices, AdamW for the rest.

    python examples/muon_speedrun.py [--steps 60] [--width 64] [--layers 2] [--operand weight|activation|none]

The text is made up: each token follows from the one before it, but for some noise, so that a few steps show progress.
What is 2:4 in the feed-forward layers is the weights (with Muon the recipe puts masked decay beside the update, see
docs/optimizers.md) or the activations, for which there is no recipe (docs/sparse-activations.md).
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import sparse24

VOCABULARY, LENGTH, BATCH = 64, 64, 16


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = FeedForward(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(F.rms_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return self.head(F.rms_norm(self.blocks(x), x.shape[-1:]))


def text(step: int, device: torch.device) -> torch.Tensor:
    """int64 [BATCH, LENGTH + 1], a function of `step` alone."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    noisy = torch.rand(BATCH, LENGTH + 1, generator=generator) < 0.1
    for i in range(1, LENGTH + 1):
        ids[:, i] = torch.where(noisy[:, i], ids[:, i], (5 * ids[:, i - 1] + 3) % VOCABULARY)
    return ids.to(device)


def main(steps: int = 60, width: int = 64, layers: int = 2, operand: str = "weight") -> list[float]:
    """The losses of all steps."""
    torch.manual_seed(0)
    device = torch.device("cuda" if sparse24.is_available("cuda") else "cpu")
    model = GPT(width, layers).to(device)
    if operand != "none":
        print(sparse24.sparsify(model, backend="sparse", operand=operand))
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    optimizers = [muon, torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    if operand == "weight":
        sparse24.Recipe(model, optimizers, total_steps=steps, mask_interval=10, preset="equal-time")
    schedules = [torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.1, total_iters=steps) for one in optimizers]

    losses = []
    for step in range(steps):
        ids = text(step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        for one, schedule in zip(optimizers, schedules, strict=True):
            one.step()
            schedule.step()
            one.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {sum(losses[-20:]) / 20:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--operand", choices=("weight", "activation", "none"), default="weight", help="none: dense")
    main(**vars(parser.parse_args()))
