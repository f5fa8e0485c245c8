"""The paper's own way to train a feed-forward layer, run on this GPU beside ours: sm_80 products in fp16.

Sizes    those of the published GPT-2 runs: 8 sequences of 1024 tokens a micro-batch, 8 micro-batches a step and GPU,
         exact GELU, no biases, fp32 weights under fp16 autocast.
Paper    composed as the authors' released code is: CUTLASS' sparse kernels for sm_80 in fp16 for all three products,
         whose outputs lie column-major; Triton kernels that pack weights both ways and output gradients by MVUE, and
         that search masks by their 90 patterns; all eager. Each part is a re-writing (bench/peers) with less to do than
         theirs: masks are read as bits, MVUE draws one number a group. The search alone does more, in fp32 for TF32.
         Masked decay is by our kernel. The released extension refuses GPUs other than 8.x, and so do PyTorch's
         kernels: where they do, the same template of CUTLASS without that check takes their place.
Ours     the library's kernels for this GPU; and, in a process of its own with its own dense and paper's arm, those for
         sm_80 (SPARSE24_ARCH).
Counted  an optimizer step with one micro-batch, and with eight: re-packing, 1/40 of a search, masked decay.
Checked  before timing: the paper's products are those of the masked weight and of the pruned gradient.

    python -m bench.peers.cutlass_products        # first, where nvcc is; a minute; carry build/peers to the GPU
    python -m bench.bench_paper_peer [--csv FOLDER] [--append] [--png FOLDER] [--quick] [--only NAMES]
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.common import Table, arguments, chosen, header, open_table, time_hot
from sparse24 import ops
from sparse24.benchmark import arms, suite
from sparse24.benchmark.models import ModelShape, compile_to_time
from sparse24.convert import sparse_layers, sparsify

TOKENS, MICRO_BATCHES = 8 * 1024, 8
LAYERS = [
    suite.ffn_shape(f"gpt2-{name}", TOKENS, width, 4 * width, gated=False)
    for name, width in (("124M", 768), ("350M", 1024), ("774M", 1280), ("1558M", 1600))
]
EAGER, COMPILED, PAPER, OURS = "dense, eager", "dense, compiled", "paper, sm_80 fp16", "2:4"
COLUMNS = [
    "layer", "arm", "step_us", "speedup", "speedup 8 micro-batches", "over the paper's", "micro_batch_us", "repack_us",
    "search_us", "decay_us",
]  # fmt: skip
#: fp16 rounds operands, outputs and their reference by 2^-11 each; a wrong layout is off by the whole
CLOSE = 4 * 2**-11

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]


def paper_multiply() -> Multiply | None:
    """The product of packed values, metadata and a dense matrix; None, and words, where there is none here."""
    values, meta = (torch.zeros(128, n, device=DEVICE, dtype=t) for n, t in ((64, torch.float16), (8, torch.int16)))
    x = torch.zeros(128, 128, device=DEVICE, dtype=torch.float16)
    try:
        from bench.peers import cutlass_products, triton_mask, triton_pack  # noqa: F401
    except ImportError as error:
        print(f"# no paper's arm: {error}")
        return None
    for name, multiply in (
        ("torch._sparse_semi_structured_mm", getattr(torch, "_sparse_semi_structured_mm", None)),
        ("bench.peers.cutlass_products", cutlass_products.sparse_mm),
    ):
        try:
            if multiply is None:
                raise RuntimeError("this torch has no such function")
            multiply(values, meta, x)
            torch.cuda.synchronize()
        except (RuntimeError, OSError, subprocess.CalledProcessError, NotImplementedError) as error:
            print(f"# {name} does not run here: {str(error).splitlines()[0]}")
            continue
        print(f"# the paper's products: {name}")
        return multiply
    return None


class PlainMLP(nn.Module):
    """As the published GPT-2 has it: no biases, exact GELU."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.c_fc = nn.Linear(d_model, d_ff, bias=False)
        self.c_proj = nn.Linear(d_ff, d_model, bias=False)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class _PaperLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.save_for_backward(x)
        ctx.layer, ctx.dtype = layer, weight.dtype
        return layer.multiply(*layer.packed, x.t()).t()

    @staticmethod
    def backward(ctx, dy):
        from bench.peers.triton_pack import pack_by_mvue

        (x,), layer = ctx.saved_tensors, ctx.layer
        dx = layer.multiply(*layer.packed_t, dy.t()).t() if ctx.needs_input_grad[0] else None
        dw = layer.multiply(*pack_by_mvue(dy.t(), layer.seed), x)
        return dx, dw.to(ctx.dtype), None


class PaperLinear(nn.Module):
    """A linear layer over the weight of a dense one; what it multiplies with is renewed by `repack` and `search`."""

    def __init__(self, dense: nn.Linear, multiply: Multiply):
        super().__init__()
        from bench.peers.triton_mask import TritonMaskSearch

        self.weight, self.multiply = dense.weight, multiply
        self.searches = TritonMaskSearch(torch.float32)
        self.seed = torch.tensor([1], device=self.weight.device)
        self.search()
        self.repack()

    @torch.no_grad()
    def search(self) -> None:
        self.mask = self.searches(self.weight)

    @torch.no_grad()
    def repack(self) -> None:
        from bench.peers.triton_pack import pack_by_mask

        self.packed = pack_by_mask(self.weight, self.mask)
        self.packed_t = pack_by_mask(self.weight.t(), self.mask, transposed=True)

    @torch.no_grad()
    def decay(self) -> None:
        ops.masked_decay_(self.weight.grad, self.weight, self.mask, arms.DECAY)

    def forward(self, x: Tensor) -> Tensor:
        return _PaperLinear.apply(x.to(torch.float16), self.weight, self)


def check(layer: PaperLinear) -> None:
    """Raises AssertionError where a product is not what it stands for."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as unpacked

    from bench.peers.triton_pack import pack_by_mvue

    w = (layer.weight * ops.unpack_mask(layer.mask)).to(torch.float16)
    rows, cols = w.shape
    x, dy = (torch.randn(256, n, device=w.device, dtype=torch.float16) for n in (cols, rows))
    pruned = pack_by_mvue(dy.t(), layer.seed)
    for what, made, exact in (
        ("y", layer.multiply(*layer.packed, x.t()), w.double() @ x.double().t()),
        ("dx", layer.multiply(*layer.packed_t, dy.t()), w.double().t() @ dy.double().t()),
        ("dW", layer.multiply(*pruned, x), unpacked(pruned[0].contiguous(), pruned[1]).double() @ x.double()),
    ):
        error = ((made.double() - exact).norm() / exact.norm()).item()
        assert error < CLOSE, f"the paper's {what} of a {rows} x {cols} weight is off by {error:.1e}"


class Arm(arms.Arm):
    """A feed-forward layer with fp32 weights under fp16 autocast: `kind` is one of the names above."""

    def __init__(self, shape: ModelShape, kind: str, multiply: Multiply | None = None):
        with torch.device(DEVICE):
            module = PlainMLP(shape.d_model, shape.d_ff)
        x = torch.randn(shape.tokens, shape.d_model, device=DEVICE, dtype=torch.float16, requires_grad=True)
        super().__init__(module, (x,), sparse=False, master=torch.float32)
        self.context, self.paper = lambda: torch.autocast(x.device.type, torch.float16), []
        self.d_out = torch.randn_like(x)  # by rows, as a residual's gradient is, however the output lies
        if kind == COMPILED:
            compile_to_time(self.module)
        elif kind == PAPER:
            for name in ("c_fc", "c_proj"):
                setattr(self.module, name, PaperLinear(getattr(self.module, name), multiply))
            self.paper = [self.module.c_fc, self.module.c_proj]
            check(self.module.c_fc)
        elif kind == OURS:
            sparsify(self.root, backend="sparse", dtype=torch.float16)
            self.module, self.layers = self.root["part"], list(sparse_layers(self.root).values())

    def first(self) -> None:
        """The first micro-batch of a step; gradients stay."""
        for p in self.module.parameters():
            p.grad = None
        self.accumulate()

    def repack(self) -> None:
        if self.layers:
            super().repack()
        for layer in self.paper:
            layer.repack()

    def search(self) -> None:
        """And packing, as `arms.between_us` has it."""
        if self.layers:
            super().search()
        for layer in self.paper:
            layer.search()
            layer.repack()

    def decay(self) -> None:
        if self.layers:
            super().decay()
        for layer in self.paper:
            layer.decay()


def measure(shape: ModelShape, kinds: list[str], multiply: Multiply | None) -> dict[str, dict[str, float]]:
    """Microseconds of each arm by part, all arms in one loop."""
    suite.fresh()
    calls = {}
    for kind, arm in {kind: Arm(shape, kind, multiply) for kind in kinds}.items():
        calls |= {(kind, "first"): arm.first, (kind, "more"): arm.accumulate}
        if kind in (PAPER, OURS):
            calls |= {(kind, part): getattr(arm, part) for part in ("decay", "repack", "search")}
    times = time_hot(calls, rounds=10, warm_seconds=0.5)
    return {kind: {part: us for (own, part), us in times.items() if own == kind} for kind in kinds}


def step_us(times: dict[str, float], micro_batches: int) -> float:
    between = arms.between_us(times) if "repack" in times else 0.0
    return times["first"] + (micro_batches - 1) * times["more"] + between


def add_rows(table: Table, shape: ModelShape, times: dict[str, dict[str, float]], names: dict[str, str]) -> None:
    """A row for each arm that has a name there."""
    for kind, name in names.items():
        if kind not in times:
            continue
        one, many = ([step_us(times[k], n) if k in times else math.nan for k in (kind, COMPILED, PAPER)]
                     for n in (1, MICRO_BATCHES))  # fmt: skip
        parts = [times[kind].get(part, math.nan) for part in ("repack", "search", "decay")]
        table.add(
            shape.name, name, one[0], one[1] / one[0], many[1] / many[0], one[2] / one[0], times[kind]["first"], *parts
        )


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def as_sm80() -> None:
    """The same in a process whose kernels of ours are those for sm_80, chosen once a process; words where it fails."""
    command = [sys.executable, "-m", "bench.bench_paper_peer", *sys.argv[1:], "--append"]
    done = subprocess.run(command, env=os.environ | {"SPARSE24_ARCH": "sm80"})
    if done.returncode:
        print("# ours for sm_80 was not measured: see above; this build may have no kernels for it")


def main() -> None:
    args = arguments(__doc__.splitlines()[0], select=True).parse_args()
    forced = os.environ.get("SPARSE24_ARCH")
    if not forced:
        print(header())
    multiply = paper_multiply()
    table = open_table(args, "paper_peer", COLUMNS, key=2)
    kinds = [COMPILED, *([PAPER] if multiply else []), OURS]
    names = {OURS: f"2:4, as {forced}"} if forced else {kind: kind for kind in (EAGER, *kinds)}
    for shape in chosen(args, LAYERS, quick=("gpt2-124M", "gpt2-1558M")):
        times = measure(shape, kinds if forced else [EAGER, *kinds], multiply)
        add_rows(table, shape, times, names)
    if not forced and is_hopper():
        as_sm80()
    if args.png:
        print("wrote", table.plot(args.png, ("layer", "arm"), "speedup", "speed over torch.compile'd dense", 1.0))


if __name__ == "__main__":
    main()
