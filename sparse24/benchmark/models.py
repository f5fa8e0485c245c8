"""Small GPT-2 and Llama models in plain PyTorch, for timing: the shapes of the real ones, random weights, no downloads.

Attention is torch's scaled_dot_product_attention, causal (flash attention on a GPU). Feed-forward layers are written as
transformers writes them, gate and up as two layers, so that `sparsify` treats them as it treats the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: compilations of one forward: more than all arms of a measurement need
MOST_COMPILATIONS = 64


@dataclass(frozen=True)
class ModelShape:
    """A decoder: `kind` "gpt2" (LayerNorm, biases, GELU), "llama" (RMSNorm, rotary positions, SwiGLU), or of a
    feed-forward layer alone "relu2" (squared ReLU, no gate, no biases).

    vocab 0 leaves out embedding and head: a stack of layers. tokens = batch x length of one micro-batch. tied: the head
    is the embedding.
    """

    name: str
    kind: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_ff: int
    vocab: int
    length: int
    batch: int
    tied: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def gated(self) -> bool:
        return self.kind == "llama"

    def ffn_weights(self) -> int:
        """Weights of one feed-forward layer."""
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    def flops(self) -> float:
        """Floating-point operations of forward and backward on one micro-batch, all products counted as dense.

        Six for each weight and token, and causal attention's two products over half of the square, times three.
        """
        attention = 2 * self.d_model**2 + 2 * self.d_model**2 * self.kv_heads // self.heads
        weights = self.layers * (attention + self.ffn_weights()) + self.vocab * self.d_model
        scores = self.layers * self.d_model * self.length  # 2 products x 2 x length/2 a token and feature
        return self.tokens * (6.0 * weights + 6.0 * scores)

    def of(self, **changes) -> ModelShape:
        return replace(self, **changes)


SHAPES = {
    row[0]: ModelShape(*row)
    for row in (
        ("gpt2-124M", "gpt2", 12, 768, 12, 12, 3072, 50304, 1024, 16),
        ("gpt2-350M", "gpt2", 24, 1024, 16, 16, 4096, 50304, 1024, 16),
        ("gpt2-774M", "gpt2", 36, 1280, 20, 20, 5120, 50304, 1024, 16),
        ("gpt2-1558M", "gpt2", 48, 1600, 25, 25, 6400, 50304, 1024, 8),
        ("llama-1B", "llama", 16, 2048, 32, 8, 8192, 32000, 2048, 8),
        ("llama-3B", "llama", 28, 3072, 24, 8, 8192, 32000, 2048, 4),
        ("llama-7B x2", "llama", 2, 4096, 32, 32, 11008, 0, 2048, 4),
        ("llama-8B x2", "llama", 2, 4096, 32, 8, 14336, 0, 2048, 8),
    )
}


class GatedMLP(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DenseGatedMLP(nn.Module):
    """The same with gate and up as one layer: the faster way to write a dense one."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class MLP(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.c_fc = nn.Linear(d_model, d_ff)
        self.c_proj = nn.Linear(d_ff, d_model)
        self.act = nn.GELU("tanh")

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class SquaredReLUMLP(nn.Module):
    """As in Nemotron and in speedruns of small GPTs."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


FEED_FORWARDS = {"gpt2": MLP, "llama": GatedMLP, "relu2": SquaredReLUMLP}


def feed_forward(shape: ModelShape) -> nn.Module:
    return FEED_FORWARDS[shape.kind](shape.d_model, shape.d_ff)


def rotary_table(length: int, width: int) -> Tensor:
    """cos and sin, [2, length, width]."""
    angles = torch.outer(
        torch.arange(length).float(),
        10000.0 ** (-torch.arange(0, width, 2).float() / width),
    ).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table[0].to(x.dtype), table[1].to(x.dtype)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Attention(nn.Module):
    """x [batch, length, d_model] -> the same; grouped keys and values where kv_heads < heads."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.heads, self.kv_heads, self.width = shape.heads, shape.kv_heads, shape.d_model // shape.heads
        bias = shape.kind == "gpt2"
        self.qkv = nn.Linear(shape.d_model, (shape.heads + 2 * shape.kv_heads) * self.width, bias)
        self.out = nn.Linear(shape.d_model, shape.d_model, bias)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        batch, length, d_model = x.shape
        q, k, v = (
            self.qkv(x)
            .view(batch, length, -1, self.width)
            .transpose(1, 2)
            .split([self.heads, self.kv_heads, self.kv_heads], 1)
        )
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, d_model))


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        norm = nn.RMSNorm if shape.kind == "llama" else nn.LayerNorm
        self.norm1, self.norm2 = norm(shape.d_model), norm(shape.d_model)
        self.attention = Attention(shape)
        self.mlp = feed_forward(shape)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), table)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """ids [batch, length] -> mean cross-entropy of the next ids; without vocab, x -> x."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        rotary = rotary_table(shape.length, shape.d_model // shape.heads) if shape.kind == "llama" else None
        self.register_buffer("table", rotary, persistent=False)
        if shape.vocab:
            self.embedding = nn.Embedding(shape.vocab, shape.d_model)
            self.positions = nn.Embedding(shape.length, shape.d_model) if shape.kind == "gpt2" else None
            self.norm = (nn.RMSNorm if shape.kind == "llama" else nn.LayerNorm)(shape.d_model)
            self.head = nn.Linear(shape.d_model, shape.vocab, bias=False)
            nn.init.normal_(self.embedding.weight, std=0.02)
            if shape.tied:
                self.head.weight = self.embedding.weight

    def loss(self, x: Tensor, ids: Tensor) -> Tensor:
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())

    def forward(self, ids: Tensor) -> Tensor:
        x = ids
        if self.shape.vocab:
            x = self.embedding(ids)
            if self.positions is not None:
                x = x + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, self.table)
        return self.loss(x, ids) if self.shape.vocab else x

    def compile_parts(self) -> None:
        """torch.compile block by block: one graph serves all layers. The loss is a graph of its own."""
        for block in self.blocks:
            compile_to_time(block)
        if self.shape.vocab:
            self.loss = torch.compile(self.loss, dynamic=False)


def compile_to_time(module: nn.Module) -> None:
    """torch.compile a module that is timed beside others, in place, for the shapes that it is called with.

    Torch counts compilations by the code of a forward, whichever module runs it: all arms whose blocks are of one class
    count together. Beyond its limit of 8 the next arm would be timed eagerly, with no more than a line in the log. Here
    the limit is higher, and an error.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MOST_COMPILATIONS)
    settings.fail_on_recompile_limit_hit = True
    module.compile(dynamic=False)
