"""Host time of a feed-forward layer: what forward and backward keep Python and the launches busy, eager and compiled.

A stack of blocks of almost no size, so that the device never decides. The clock stops when the calls have returned,
before the device is waited for, in steps behind the first two, in which a recipe has all layers compare their weights
with what is packed. "dense" is the same block before sparsify, under the same compiler; the two take turns, step by
step, so that what else keeps the host busy falls on both. "refresh" packs all weights anew, by lists of weights:
microseconds a block. The aim is 250 microseconds a block eager and 150 compiled;
measure it alone on a quiet core. On a CPU the kernels' own time is in it: an upper bound.

    python -m bench.bench_host [--csv FOLDER] [--append] [--quick] [--only "gated bf16"] [--rounds 41] [--profile]
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import sparse24
from bench.common import arguments, chosen, header, open_table

BLOCKS, TOKENS, D_MODEL, D_FF = 24, 64, 64, 128
FIRST_STEPS = 3
WARM_UP = 5  # rounds that make caches, graphs and buffers
AIM_US = {"eager": 250, "compiled": 150}


class Plain(nn.Module):
    def __init__(self, **where):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D_MODEL, D_FF, **where), nn.Linear(D_FF, D_MODEL, **where)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, **where):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D_MODEL, D_FF, bias=False, **where) for _ in range(2))
        self.down_proj = nn.Linear(D_FF, D_MODEL, bias=False, **where)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Case(NamedTuple):
    name: str
    block: type
    precision: str


CASES = [
    Case(f"{kind} {precision}", block, precision)
    for kind, block in (("plain", Plain), ("gated", Gated))
    for precision in ("bf16", "fp8-hybrid", "fp8")
]


class Stack:
    """Blocks one after another under a recipe, and their forward and backward."""

    def __init__(self, case: Case, sparse: bool, compiled: bool, device: str):
        torch.manual_seed(0)
        where = dict(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        self.model = nn.Sequential(*(case.block(**where) for _ in range(BLOCKS)))
        self.forward, self.optimizer = self.model, None
        if sparse:
            sparse24.sparsify(
                self.model, backend="sparse", precision=None if case.precision == "bf16" else case.precision
            )
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
            self.recipe = sparse24.Recipe(self.model, self.optimizer, total_steps=10**6, dense_fraction=0)
        if compiled:
            self.forward = torch.compile(self.model)
        self.x = torch.randn(TOKENS, D_MODEL, **where).requires_grad_()
        self.dy = torch.randn(TOKENS, D_MODEL, **where)
        on_gpu = device == "cuda"
        # A CPU runs the kernels too; the time of the process is what others disturb least.
        self.wait = torch.cuda.synchronize if on_gpu else lambda: None
        self.clock = time.perf_counter if on_gpu else time.process_time
        for _ in range(FIRST_STEPS if sparse else 0):
            self.step()
            self.optimizer.step()

    def step(self) -> None:
        self.forward(self.x).backward(self.dy)

    def refresh(self) -> None:
        sparse24.refresh(self.model)

    def host_us(self, run: Callable[[], None]) -> float:
        """Microseconds a block until `run` returns."""
        self.model.zero_grad()
        self.x.grad = None
        self.wait()
        start = self.clock()
        run()
        return 1e6 * (self.clock() - start) / BLOCKS


def medians_us(rounds: int, *runs: tuple[Stack, Callable[[], None]]) -> list[float]:
    """Of each run of a stack, by turns."""
    for _ in range(WARM_UP):
        for stack, run in runs:
            stack.host_us(run)
    times = [[stack.host_us(run) for stack, run in runs] for _ in range(rounds)]
    runs[0][0].wait()
    return [statistics.median(of_run) for of_run in zip(*times, strict=True)]


def profile(stack: Stack) -> None:
    """Where the time of twenty eager steps goes, by function."""
    medians_us(1, (stack, stack.step))
    with cProfile.Profile() as found:
        for _ in range(20):
            stack.step()
    pstats.Stats(found).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], select=True)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--profile", action="store_true", help="functions of the eager case, in place of the table")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(header() if device == "cuda" else {"device": "cpu", "torch": torch.__version__})
    cases = chosen(args, CASES, ("plain bf16", "gated bf16"))
    if args.profile:
        for case in cases:
            profile(Stack(case, True, False, device))
        return
    columns = ["case", "how", "sparse us", "dense us", "aim us", "refresh us"]
    table = open_table(args, "host", columns, key=2)
    for case in cases:
        for how, aim in AIM_US.items():
            torch._dynamo.reset()
            sparse, dense = (Stack(case, is_sparse, how == "compiled", device) for is_sparse in (True, False))
            sparse_us, dense_us = medians_us(args.rounds, (sparse, sparse.step), (dense, dense.step))
            (refresh_us,) = medians_us(args.rounds, (sparse, sparse.refresh))  # behind it layers look at their weights
            table.add(case.name, how, sparse_us, dense_us, aim, refresh_us)


if __name__ == "__main__":
    main()
