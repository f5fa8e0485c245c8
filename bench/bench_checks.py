"""What looking costs a training step: whether weights were written, copies followed, blocks changed, the model altered.

Each forward pass of a sparse layer or block looks at what may have changed since it was packed or fused, and so does
the recipe around a step. A model of gated blocks takes steps in turns with those looks and without, when compiled two
models; all mask, pack and decay. "host" has products of no size, so that its time is that of the host; "llama-1B" those
of a real model, whose time is the GPU's. Differences are those of neighbours in time; on a CPU time is that of the
process, which others disturb less. "alone" is what an eager block calls in each pass, called by itself: microseconds.
Compiled models have fewer blocks, for each is compiled by itself, twice.

    python -m bench.bench_checks [--csv FOLDER] [--append] [--rounds 15]        # on a CPU: "host" only
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

import sparse24
from bench.common import arguments, header, open_table
from sparse24.layers import forward
from sparse24.layers.fused import feedforward
from sparse24.layers.state import state_of
from sparse24.layers.watch.watched_weight import WatchedWeight
from sparse24.recipe.writes import WriteWatch

STEPS = 4  # of a timing


class Case(NamedTuple):
    name: str
    tokens: int
    d_model: int
    d_ff: int
    blocks: int
    compiled: bool


def cases() -> list[Case]:
    all_cases = [Case("host", 16, 64, 128, 24, False), Case("host", 16, 64, 128, 6, True)]
    if torch.cuda.is_available():
        all_cases += [Case("llama-1B", 8192, 2048, 8192, 4, False), Case("llama-1B", 8192, 2048, 8192, 2, True)]
    return all_cases


class Block(nn.Module):
    def __init__(self, d_model: int, d_ff: int, **where):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(d_model, d_ff, bias=False, **where) for _ in range(2))
        self.down_proj = nn.Linear(d_ff, d_model, bias=False, **where)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@contextlib.contextmanager
def no_looks():
    """Without what looks for changes in forward passes."""
    nothing = lambda *args: None  # noqa: E731
    with (
        mock.patch.object(feedforward, "_is_unchanged", lambda *args: True),
        mock.patch.object(feedforward, "check_weight_is_packed", nothing),
        mock.patch.object(forward, "check_weight_is_packed", nothing),
        mock.patch.object(WatchedWeight, "look_in_forward", nothing),
        mock.patch.object(WriteWatch, "before_step", nothing),
        mock.patch.object(WriteWatch, "after_step", nothing),
    ):
        yield


class Training:
    def __init__(self, case: Case, device: str):
        torch.manual_seed(0)
        where = dict(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        self.model = nn.Sequential(*(Block(case.d_model, case.d_ff, **where) for _ in range(case.blocks)))
        sparse24.sparsify(self.model, backend="sparse")
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        settings = dict(total_steps=10**6, mask_interval=10**6, dense_fraction=0)
        self.optimizer, self.recipe = optimizer, sparse24.Recipe(self.model, optimizer, **settings)
        self.forward = torch.compile(self.model) if case.compiled else self.model
        self.x = torch.randn(case.tokens, case.d_model, **where)

    def time(self) -> float:
        """Milliseconds a step."""
        on_gpu = self.x.is_cuda
        wait, clock = (torch.cuda.synchronize, time.perf_counter) if on_gpu else (lambda: None, time.process_time)
        wait()
        start = clock()
        for _ in range(STEPS):
            self.forward(self.x).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        wait()
        return 1e3 * (clock() - start) / STEPS

    def alone(self, calls: int = 200) -> float:
        """Microseconds a block of looking, without the pass around it."""
        blocks = [(block, state_of(block), list(feedforward.ffn_layers(block))) for block in self.model]
        start = time.process_time()
        for _ in range(calls):
            for block, state, layers in blocks:
                feedforward._is_unchanged(block, state, layers)
                for layer in layers:
                    feedforward.check_weight_is_packed(layer)
        return 1e6 * (time.process_time() - start) / calls / len(blocks)


def measure(case: Case, rounds: int) -> tuple[float, ...]:
    """Medians of milliseconds a step with looks and of what they add, the interquartile range of that, and `alone`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    looking = Training(case, device)
    other = Training(case, device) if case.compiled else looking  # what is compiled without looks stays so
    with_looks, differences = [], []
    looking.time()
    with no_looks():
        other.time()
    for turn in range(rounds):
        if turn % 2:
            one = looking.time()
        with no_looks():
            none = other.time()
        if not turn % 2:
            one = looking.time()
        with_looks.append(one)
        differences.append(one - none)
    low, middle, high = statistics.quantiles(differences, n=4)
    return statistics.median(with_looks), middle, high - low, looking.alone()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(header() if torch.cuda.is_available() else {"device": "cpu", "torch": torch.__version__})
    columns = ["case", "how", "step_ms", "looks_ms", "spread_ms", "us a block", "over the step, %", "alone us a block"]
    table = open_table(args, "checks", columns, key=2)
    for case in cases():
        torch._dynamo.reset()
        step, looks, spread, alone = measure(case, args.rounds)
        how = "compiled" if case.compiled else "eager"
        table.add(case.name, how, step, looks, spread, 1e3 * looks / case.blocks, 100 * looks / step, alone)


if __name__ == "__main__":
    main()
