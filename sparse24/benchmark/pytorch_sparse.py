"""PyTorch's own 2:4 training, to compare with: the same arms as in `arms` (a feed-forward layer, a block, a trainer).

After each optimizer step torch's greedy tile kernel packs; cuSPARSELt multiplies in forward and for the input gradient;
the weight gradient is dense. It is made as fast as torch's parts allow. Gate and up are one product. All that the dense
arm compiles is compiled, without graph breaks: a product by cuSPARSELt is one opaque op of a graph; casts, biases,
activations, norms and residuals are fused around it. Packing runs eagerly. cuSPARSELt's algorithm is searched once for
each shape; cuSPARSELt plans again at each call, on the host.

Rows and columns must be multiples of 128. Otherwise, and where torch lacks a part, making an arm or its first run
raises RuntimeError.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import arms
from .models import DenseGatedMLP, GatedMLP, ModelShape, compile_to_time

torch.library.define(
    "sparse24_benchmark::cusparselt_mm", "(Tensor packed, Tensor x, int rows, int algorithm) -> Tensor"
)


@torch.library.impl("sparse24_benchmark::cusparselt_mm", ("cpu", "cuda"))
def _(packed, x, rows, algorithm):
    return torch._cslt_sparse_mm(packed, x.contiguous().t(), transpose_result=True, alg_id=algorithm)


@torch.library.register_fake("sparse24_benchmark::cusparselt_mm")
def _(packed, x, rows, algorithm):
    return x.new_empty(x.shape[0], rows)


def cusparselt_mm(packed: Tensor, x: Tensor, rows: int, algorithm: int) -> Tensor:
    """x [tokens, cols] by a packed weight [rows, cols]: [tokens, rows]."""
    return torch.ops.sparse24_benchmark.cusparselt_mm(packed, x, rows, algorithm)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, packed, packed_t, algorithm, algorithm_t):
        ctx.save_for_backward(x, packed_t)
        ctx.algorithm, ctx.dtype = algorithm_t, weight.dtype
        return cusparselt_mm(packed, x, weight.shape[0], algorithm)

    @staticmethod
    def backward(ctx, dy):
        x, packed_t = ctx.saved_tensors
        dx = cusparselt_mm(packed_t, dy, x.shape[1], ctx.algorithm)
        return dx, (dy.t() @ x).to(ctx.dtype), None, None, None, None


class SemiStructuredLinear(nn.Module):
    """A linear layer over the parameters of a dense one, for calls of `tokens` rows; each step ends with `repack`."""

    def __init__(self, dense: nn.Linear, tokens: int):
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("packed_t", None, persistent=False)
        self.repack()
        rows, cols = self.weight.shape
        self.algorithm = search(self.packed, tokens, rows, cols)
        self.algorithm_t = search(self.packed_t, tokens, cols, rows)

    @torch.no_grad()
    def repack(self) -> None:
        """Greedy search and packing, both ways."""
        w = self.weight.to(torch.bfloat16)
        packed, _, packed_t, _, _ = torch._sparse_semi_structured_tile(w, "", False)
        self.packed, self.packed_t = packed.view(w.shape[0], -1), packed_t.view(w.shape[1], -1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).to(torch.bfloat16)
        y = _Linear.apply(rows, self.weight, self.packed, self.packed_t, self.algorithm, self.algorithm_t)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


_algorithms: dict[tuple[int, int, int], int] = {}


def search(packed: Tensor, tokens: int, rows: int, cols: int) -> int:
    """cuSPARSELt's choice of an algorithm by measurement; its default where the choice computes something else."""
    if (tokens, rows, cols) not in _algorithms:
        x = torch.randn(tokens, cols, device=packed.device, dtype=torch.bfloat16)
        found = torch._cslt_sparse_mm_search(packed, x.t(), transpose_result=True)
        expected, y = (cusparselt_mm(packed, x, rows, algorithm) for algorithm in (0, found))
        wrong = not (y - expected).norm() <= 0.01 * expected.norm()
        if wrong:
            print(f"# cuSPARSELt's algorithm {found} is wrong for {rows} x {tokens} x {cols}: its default is taken")
        _algorithms[tokens, rows, cols] = 0 if wrong else found
    return _algorithms[tokens, rows, cols]


@torch.no_grad()
def converted(mlp: nn.Module, tokens: int) -> nn.Module:
    """A feed-forward layer of `models`, with its weights, 2:4 by torch's means; gate and up become one layer."""
    if isinstance(mlp, GatedMLP):
        gate, up, down = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        with torch.device(up.device):
            mlp = DenseGatedMLP(up.shape[1], up.shape[0]).to(up.dtype)
        mlp.gate_up_proj.weight.copy_(torch.cat([gate, up]))
        mlp.down_proj.weight.copy_(down)
    for name, layer in list(mlp.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(mlp, name, SemiStructuredLinear(layer, tokens))
    return mlp


def repack(module: nn.Module) -> None:
    """What each optimizer step ends with."""
    for layer in module.modules():
        if isinstance(layer, SemiStructuredLinear):
            layer.repack()


def feed_forward_arm(
    shape: ModelShape, *, master: torch.dtype, compiled: bool = True, device: str = "cuda"
) -> arms.Arm:
    """As `arms.feed_forward_arm`."""
    arm = arms.feed_forward_arm(shape, sparse=False, master=master, compiled=False, device=device)
    arm.root["part"] = arm.module = converted(arm.module, shape.tokens)
    if compiled:
        compile_to_time(arm.module)
    return arm


def block_arm(shape: ModelShape, *, master: torch.dtype, compiled: bool = True, device: str = "cuda") -> arms.Arm:
    """As `arms.block_arm`."""
    arm = arms.block_arm(shape, sparse=False, master=master, compiled=False, device=device)
    arm.module.mlp = converted(arm.module.mlp, shape.tokens)
    if compiled:
        compile_to_time(arm.module)
    return arm


class Trainer(arms.Trainer):
    """As `arms.Trainer`, dense but for its feed-forward layers, which are packed anew after each step."""

    def __init__(self, shape: ModelShape, *, compiled: bool = True, **settings):
        super().__init__(shape, sparse=False, compiled=False, **settings)
        for block in self.module.blocks:
            block.mlp = converted(block.mlp, shape.tokens)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)  # of gate and up as one
        if compiled:
            self.module.compile_parts()

    def step(self) -> None:
        super().step()
        repack(self.module)
