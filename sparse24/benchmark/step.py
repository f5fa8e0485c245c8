"""Training steps of whole models, dense and 2:4, under the same compiler settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from .. import packing
from ..convert import sparse_layers, sparsify
from ..recipe import Recipe
from .models import Decoder, ModelShape, feed_forward

#: dense bf16 tensor-core peak by a part of the GPU's name, FLOP/s (NVIDIA data sheets, without sparsity)
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "H800": 989e12, "H20": 148e12}
MASK_INTERVAL = 40
DECAY = 6e-5


def peak_flops() -> float:
    """The GPU's dense bf16 peak; NaN where the table has none."""
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), float("nan"))


def mixed_precision(master: torch.dtype, device: str) -> Callable:
    """bf16 autocast for fp32 master weights; nothing for bf16 ones."""
    return (lambda: torch.autocast(device, torch.bfloat16)) if master == torch.float32 else nullcontext


class Trainer:
    """A model, its optimizer and one batch: `step()` is one optimizer step.

    sparse         2:4 feed-forward layers under a Recipe
    master         torch.bfloat16: weights and gradients in bf16; torch.float32: fp32 weights under bf16 autocast
    micro_batches  forward and backward passes a step
    compiled       torch.compile of each block
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        sparse: bool,
        master: torch.dtype,
        micro_batches: int = 1,
        compiled: bool = True,
        device: str = "cuda",
    ):
        self.shape, self.micro_batches = shape, micro_batches
        with torch.device(device):
            self.model = Decoder(shape).to(master)
        if sparse:
            sparsify(self.model, backend="sparse")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.recipe = Recipe(self.model, self.optimizer, 1 << 30, decay=DECAY, dense_fraction=0) if sparse else None
        if compiled:
            self.model.compile_parts()
        if shape.vocab:
            self.batch = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
            self.grad = None
        else:
            size = (shape.batch, shape.length, shape.d_model)
            # Under autocast the residual stream is fp32, as the embedding of a whole model makes it.
            self.batch = torch.randn(size, device=device, dtype=master, requires_grad=True)
            self.grad = torch.randn(size, device=device, dtype=master)
        self.context = mixed_precision(master, device)

    def set_mvue(self, mvue: bool) -> None:
        for layer in sparse_layers(self.model).values():
            layer.mvue = mvue

    def micro_batch(self) -> None:
        with self.context():
            out = self.model(self.batch)
        out.backward(self.grad)
        if self.batch.requires_grad:
            self.batch.grad = None

    def step(self) -> None:
        for _ in range(self.micro_batches):
            self.micro_batch()
        self.optimizer.step()
        self.optimizer.zero_grad()


class FeedForward:
    """One feed-forward layer of a model's shape, alone: what Amdahl's bound is computed from."""

    def __init__(
        self, shape: ModelShape, *, sparse: bool, master: torch.dtype, compiled: bool = True, device: str = "cuda"
    ):
        with torch.device(device):
            self.module = nn.ModuleDict({"mlp": feed_forward(shape)}).to(master)
        if sparse:
            sparsify(self.module, backend="sparse")
        self.layers = list(sparse_layers(self.module).values())
        self.run = self.module["mlp"]
        if compiled:
            self.run.compile(dynamic=False)
        make = dict(device=device, dtype=torch.bfloat16)
        self.x = torch.randn(shape.tokens, shape.d_model, **make, requires_grad=True)
        self.dy = torch.randn(shape.tokens, shape.d_model, **make)
        self.context = mixed_precision(master, device)

    def micro_batch(self) -> None:
        self.x.grad = None
        for p in self.run.parameters():
            p.grad = None
        with self.context():
            y = self.run(self.x)
        y.backward(self.dy)

    def set_mvue(self, mvue: bool) -> None:
        for layer in self.layers:
            layer.mvue = mvue

    def repack(self) -> None:
        packing.pack(self.layers, search=False)

    def search(self) -> None:
        packing.pack(self.layers, search=True)

    def decay(self) -> None:
        from .. import ops

        ops.foreach_masked_decay_(
            [layer.as_kernel_sees(layer.weight.grad) for layer in self.layers],
            [layer.kernel_weight() for layer in self.layers],
            [packing.mask_bits(layer.mask) for layer in self.layers],
            DECAY,
        )


def with_mvue(arm, mvue: bool, call: Callable) -> Callable:
    """`call` with MVUE on or off: one model serves both arms."""

    def run() -> None:
        arm.set_mvue(mvue)
        call()

    return run


def amdahl(share: float, speedup: float) -> float:
    """Speed-up of a whole of which `share` becomes `speedup` times as fast."""
    return 1 / (1 - share + share / speedup)


def host_time_us(call: Callable, calls: int = 5) -> float:
    """Microseconds that the host needs to enqueue a call, the least of a few: the GPU idle at the start of each."""
    best = float("inf")
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * best
