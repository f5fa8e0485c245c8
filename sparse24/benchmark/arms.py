"""The arms that are timed: a feed-forward layer, a block, a whole training step, each dense or 2:4.

Both sides run under the same compiler settings. What a training step adds to a 2:4 part is timed separately:
re-packing, masked decay, and a mask search every 40 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from .. import ops
from ..convert import sparse_layers, sparsify
from ..layers import float8, mask_of, packing
from ..layers.state import state_of
from ..layers.watch.unseen import Lookout
from ..recipe import Recipe
from . import float8_dense
from .models import Block, Decoder, DenseGatedMLP, ModelShape, compile_to_time, feed_forward

#: dense bf16 tensor-core peak by a part of the GPU's name, FLOP/s (NVIDIA data sheets, without sparsity, fp32 sums)
PEAK_FLOPS = {
    "H200": 989e12, "GH200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "3090": 71e12,
    "4090": 165.2e12,
}  # fmt: skip
MASK_INTERVAL = 40
DECAY = 6e-5


def peak_flops() -> float:
    """The GPU's dense bf16 peak; NaN where the table has none."""
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), float("nan"))


def amdahl(share: float, speedup: float) -> float:
    """Speed-up of a whole of which `share` becomes `speedup` times as fast."""
    return 1 / (1 - share + share / speedup)


def mixed_precision(master: torch.dtype, device: str) -> Callable:
    """bf16 autocast for fp32 master weights; nothing for bf16 ones."""
    return (lambda: torch.autocast(device, torch.bfloat16)) if master == torch.float32 else nullcontext


class Untouched(Lookout):
    """An arm writes no weights, so none of its layers compares them with what is packed after the first pass. In every
    16th pass of a training without a recipe some would, and wait for the device. A `Trainer` has what its recipe says.
    """

    def has_turn(self, layer, trains: bool) -> bool:
        return False


class Arm:
    """A model or a part of one, dense or 2:4, with an input and a gradient of its output.

    sparse    convert its feed-forward layers
    master    torch.bfloat16: weights and gradients in bf16; torch.float32: fp32 weights under bf16 autocast
    compiled  torch.compile, for either side
    precision  of the 2:4 layers, as `sparsify` takes it
    fp8_dense  the layers that stay dense train in FP8: a variant of `float8_dense`
    operand    as `sparsify` takes it
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple,
        *,
        sparse: bool,
        master: torch.dtype,
        device: str = "cuda",
        lean: bool = False,
        precision: str | None = None,
        fp8_dense: str | None = None,
        operand: str = "weight",
    ):
        self.root = nn.ModuleDict({"part": module})
        if sparse:
            sparsify(self.root, backend="sparse", lean=lean, precision=precision, operand=operand)
        if fp8_dense:
            float8_dense.convert(self.root, fp8_dense)
        self.module = self.root["part"]
        self.layers, lookout = list(sparse_layers(self.root).values()), Untouched()
        for layer in self.layers:
            state_of(layer).lookout = lookout
        self.inputs, self.context = inputs, mixed_precision(master, device)
        self.d_out = None

    def set_mvue(self, mvue: bool) -> None:
        for layer in self.layers:
            layer.set_mvue(mvue)

    def accumulate(self) -> None:
        """Forward and backward; gradients of weights are added to what is there."""
        with self.context():
            out = self.module(*self.inputs)
        if out.dim() and (self.d_out is None or self.d_out.dtype != out.dtype):
            self.d_out = torch.randn_like(out)
        out.backward(self.d_out)
        for tensor in self.inputs:
            if tensor is not None and tensor.requires_grad:
                tensor.grad = None

    def micro_batch(self) -> None:
        """Forward and backward of the only micro-batch of a step."""
        self.clear()
        self.accumulate()

    def clear(self) -> None:
        for p in self.module.parameters():
            p.grad = None

    def with_mvue(self, mvue: bool, call: Callable) -> Callable:
        """`call` with MVUE on or off: one arm, and one set of weights, serves both."""

        def run() -> None:
            self.set_mvue(mvue)
            call()

        return run

    def with_decay(self, call: Callable) -> Callable:
        """`call` with masked decay inside the products of its backward, as `Recipe(decay_in="backward")` has it."""
        factor = torch.full((1,), DECAY, device=self.layers[0].weight.device)

        def run() -> None:
            for layer in self.layers:
                layer.set_decay(factor)
            call()
            for layer in self.layers:
                layer.set_decay(None)

        return run

    # -- what a step adds to the 2:4 side ---------------------------------------------------------------------------

    def repack(self) -> None:
        float8.update_scales(self.layers)
        packing.pack(self.layers, search=False)

    def search(self) -> None:
        float8.update_scales(self.layers)
        packing.pack(self.layers, search=True)

    def decay(self) -> None:
        ops.foreach_masked_decay_(
            [layer.as_kernel_sees(layer.weight.grad) for layer in self.layers],
            [layer.kernel_weight() for layer in self.layers],
            [packing.mask_bits(mask_of(layer)) for layer in self.layers],
            DECAY,
        )


def between_us(times: dict[str, float]) -> float:
    """What a step adds, from the times of `repack`, `search` and `decay`."""
    return times["repack"] + (times["search"] - times["repack"]) / MASK_INTERVAL + times["decay"]


def feed_forward_arm(
    shape: ModelShape,
    *,
    sparse: bool,
    master: torch.dtype,
    compiled: bool,
    device: str = "cuda",
    one_gate: bool = False,
    lean: bool = False,
    precision: str | None = None,
    fp8_dense: str | None = None,
    operand: str = "weight",
) -> Arm:
    """One feed-forward layer. one_gate: the dense side with gate and up as one layer, which is the faster way."""
    with torch.device(device):
        gated = shape.gated and one_gate and not sparse
        module = (DenseGatedMLP(shape.d_model, shape.d_ff) if gated else feed_forward(shape)).to(master)
    x = torch.randn(shape.tokens, shape.d_model, device=device, dtype=torch.bfloat16, requires_grad=True)
    forms = dict(lean=lean, precision=precision, fp8_dense=fp8_dense, operand=operand)
    arm = Arm(module, (x,), sparse=sparse, master=master, device=device, **forms)
    if compiled:
        compile_to_time(arm.module)
    return arm


def block_arm(
    shape: ModelShape, *, sparse: bool, master: torch.dtype, compiled: bool, device: str = "cuda", **precision
) -> Arm:
    """One block: attention and feed-forward layer. Under autocast its residual stream is fp32. precision, fp8_dense as
    of `Arm`.
    """
    with torch.device(device):
        stack = Decoder(shape.of(layers=1, vocab=0)).to(master)
    x = torch.randn(shape.batch, shape.length, shape.d_model, device=device, dtype=master, requires_grad=True)
    module: Block = stack.blocks[0]
    arm = Arm(module, (x, stack.table), sparse=sparse, master=master, device=device, **precision)
    if compiled:
        compile_to_time(arm.module)
    return arm


class Trainer(Arm):
    """A whole model with its optimizer: `step()` is one optimizer step, under a Recipe on the 2:4 side.

    decay_in  of that Recipe; nothing clips or scales gradients here
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
        decay_in: str = "step",
        precision: str | None = None,
        fp8_dense: str | None = None,
    ):
        with torch.device(device):
            model = Decoder(shape).to(master)
        if shape.vocab:
            batch = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
        else:
            size = (shape.batch, shape.length, shape.d_model)
            batch = torch.randn(size, device=device, dtype=master, requires_grad=True)
        precisions = dict(precision=precision, fp8_dense=fp8_dense)
        super().__init__(model, (batch,), sparse=sparse, master=master, device=device, **precisions)
        self.micro_batches = micro_batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        settings = dict(decay=DECAY, dense_fraction=0, decay_in=decay_in, micro_batches=micro_batches)
        self.recipe = Recipe(self.root, self.optimizer, 1 << 30, **settings) if sparse else None
        if compiled:
            model.compile_parts()

    def step(self) -> None:
        for _ in range(self.micro_batches):
            self.accumulate()
        self.optimizer.step()
        self.optimizer.zero_grad()
