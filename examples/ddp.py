"""DistributedDataParallel: sparsify, wrap, then make the recipe.

    torchrun --nproc-per-node 2 examples/ddp.py [--steps 20]

Each rank searches the same masks from the same weights, so nothing is sent for them; the noise of MVUE differs by rank.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparse24


class Block(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def main(steps: int = 20) -> sparse24.Recipe:
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    model = nn.Sequential(Block(), Block()).to(device)
    report = sparse24.sparsify(model, backend="sparse")
    wrapped = DistributedDataParallel(model)  # hands rank 0's weights to all; hence the recipe comes after
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    recipe = sparse24.Recipe(wrapped, optimizer, total_steps=steps, mask_interval=5, check_ranks_every=5)
    for _ in range(steps):
        x = torch.sign(torch.randn(64, 64, device=device))
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.mse_loss(wrapped(x + 0.3 * torch.randn_like(x)), x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        print(report, recipe, f"loss {loss.item():.4f}", sep="\n")
    dist.destroy_process_group()
    return recipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
