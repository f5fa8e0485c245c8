"""The study's model: a small GPT whose feed-forward layers, plain or gated, are as wide as an arm says."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS = {"relu2": SquaredReLU, "gelu": lambda: nn.GELU(approximate="tanh")}


class FeedForward(nn.Module):
    def __init__(self, width: int, d_ff: int, activation: str):
        super().__init__()
        self.up_proj = nn.Linear(width, d_ff, bias=False)
        self.act = ACTIVATIONS[activation]()
        self.down_proj = nn.Linear(d_ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU, its layers named as in Llama."""

    def __init__(self, width: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, d_ff, bias=False)
        self.up_proj = nn.Linear(width, d_ff, bias=False)
        self.act_fn = nn.SiLU()
        self.down_proj = nn.Linear(d_ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def feed_forward(width: int, d_ff: int, activation: str) -> nn.Module:
    return GatedFeedForward(width, d_ff) if activation == "swiglu" else FeedForward(width, d_ff, activation)


class Attention(nn.Module):
    def __init__(self, width: int, head: int = 64):
        super().__init__()
        self.heads = width // head
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, d_ff: int, activation: str):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp = feed_forward(width, d_ff, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class SmallGPT(nn.Module):
    """Token and position embeddings, blocks, tied head; `forward` gives the mean cross-entropy in nats."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, d_ff: int, activation: str):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, d_ff, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what is added to the residual stream starts smaller, as GPT-2 has it
                shrink = math.sqrt(2 * layers) if name.endswith(("attention.out.weight", "down_proj.weight")) else 1
                nn.init.normal_(parameter, 0, 0.02 / shrink)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def block_parameters(self) -> int:
        return sum(p.numel() for p in self.blocks.parameters())


def matrices_and_others(model: nn.Module) -> list[dict]:
    """Parameter groups of AdamW: weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def optimizers(model: SmallGPT, name: str, lr: float | Tensor, captured: bool) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of blocks and AdamW for the rest."""
    groups, muon = matrices_and_others(model), []
    if name == "muon":
        inside = {id(p) for p in model.blocks.parameters()}
        matrices = [p for p in groups[0]["params"] if id(p) in inside]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in inside]
        muon = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    on_gpu = groups[0]["params"][0].is_cuda
    return [*muon, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=on_gpu, capturable=captured)]


def to_device(rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint16 rows [n, context + 1] -> int64 inputs and targets."""
    ids = torch.from_numpy(rows.astype("int64")).to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]
