"""What PyTorch itself offers for 2:4 training: its greedy tile kernel each step, cuSPARSELt forward and for the input
gradient, a dense weight gradient. The activation is compiled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import ModelShape
from .step import mixed_precision


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, packed, packed_t, algorithms):
        ctx.save_for_backward(x, packed_t)
        ctx.algorithm, ctx.dtype = algorithms[1], weight.dtype
        return torch._cslt_sparse_mm(packed, x.t(), transpose_result=True, alg_id=algorithms[0])

    @staticmethod
    def backward(ctx, dy):
        x, packed_t = ctx.saved_tensors
        dx = torch._cslt_sparse_mm(packed_t, dy.t(), transpose_result=True, alg_id=ctx.algorithm)
        return dx, (dy.t() @ x).to(ctx.dtype), None, None, None


def _swiglu(gu: Tensor) -> Tensor:
    gate, up = gu.chunk(2, -1)
    return F.silu(gate) * up


class PyTorchArm:
    """A gated feed-forward layer, gate and up as one; `repack` is the greedy search and packing of a step.

    Raises RuntimeError where torch or the shape has no such path (rows and columns in multiples of 128).
    """

    def __init__(self, shape: ModelShape, master: torch.dtype):
        make = dict(device="cuda", dtype=master)
        sizes = ((2 * shape.d_ff, shape.d_model), (shape.d_model, shape.d_ff))
        self.weights = [(torch.randn(s, **make) * s[1] ** -0.5).requires_grad_() for s in sizes]
        self.x = torch.randn(shape.tokens, shape.d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.dy = torch.randn(shape.tokens, shape.d_model, device="cuda", dtype=torch.bfloat16)
        self.activation = torch.compile(_swiglu, dynamic=False)
        self.context = mixed_precision(master, "cuda")
        self.repack()
        self.algorithms = []
        for (rows, cols), (packed, packed_t) in zip(sizes, self.packed, strict=True):
            x, dy = (torch.randn(shape.tokens, n, device="cuda", dtype=torch.bfloat16) for n in (cols, rows))
            pairs = ((packed, x), (packed_t, dy))
            self.algorithms.append([torch._cslt_sparse_mm_search(a, b.t(), transpose_result=True) for a, b in pairs])

    def repack(self) -> None:
        self.packed = []
        for weight in self.weights:
            w = weight.detach().to(torch.bfloat16)
            packed, _, packed_t, _, _ = torch._sparse_semi_structured_tile(w, "", False)
            self.packed.append((packed.view(w.shape[0], -1), packed_t.view(w.shape[1], -1)))

    def micro_batch(self) -> None:
        self.x.grad = None
        for weight in self.weights:
            weight.grad = None
        up, down = (
            (weight, *packed, algorithms)
            for weight, packed, algorithms in zip(self.weights, self.packed, self.algorithms, strict=True)
        )
        with self.context():
            y = _Linear.apply(self.activation(_Linear.apply(self.x, *up)), *down)
        y.backward(self.dy)
