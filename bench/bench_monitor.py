"""What watching the flip rate costs: a training step of GPT-2 124M with the monitor and without, interleaved.

One model and recipe; between the timings only the counting is switched. Everything else, the mask search included, runs
in both. A step is 8 x 1024 tokens under bf16 autocast, PyTorch eager, fused AdamW. Time is that of whole intervals of
40 steps, host and all, since what counting could cost is waiting for the device.

    counted      flips counted at each search, and read by the monitor
    metrics      also recipe.metrics() after each search: flip rates and quantiles of the gaps
    blocks       also flips per 4x4 block (track_blocks=True)

The last columns bound it from above: the milliseconds of counting (and reading) alone on an idle device, host and
device one after the other, over the time of an interval.

    python -m bench.bench_monitor [--csv FOLDER] [--append] [--rounds 5]
"""

from __future__ import annotations

import statistics
import time

import torch

import sparse24
from bench.common import arguments, header, open_table
from sparse24.recipe.block_flips import BlockFlips

INTERVAL, SEQUENCES, LENGTH = 40, 8, 1024


class Training:
    """GPT-2 124M on random tokens; `interval` takes 40 steps, the last of which searches the masks."""

    def __init__(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
        self.model = GPT2LMHeadModel(config).cuda().train()
        sparse24.sparsify(self.model, backend="sparse")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.recipe = sparse24.Recipe(
            self.model, self.optimizer, total_steps=1_000_000, mask_interval=INTERVAL, dense_fraction=0
        )
        self.count = self.recipe._search._count
        self.ids = torch.randint(0, 50257, (SEQUENCES, LENGTH), device="cuda")

    def step(self) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def interval(self, mode: str) -> float:
        """Milliseconds a step over one interval."""
        self.recipe._search._count = (lambda step, progress: None) if mode == "none" else self.count
        self.recipe.block_flips = BlockFlips() if mode == "blocks" else None
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(INTERVAL):
            self.step()
        if mode in ("metrics", "blocks"):
            self.recipe.metrics()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / INTERVAL

    def alone(self, mode: str) -> float:
        """Milliseconds of what `mode` adds to an interval, by itself; nothing overlaps."""
        self.recipe.block_flips = BlockFlips() if mode == "blocks" else None
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            if mode != "none":
                self.count(self.recipe.step + 1)
            if mode in ("metrics", "blocks"):
                self.recipe._search._gaps = None
                self.recipe.metrics()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)


MODES = ("none", "counted", "metrics", "blocks")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(header())
    training = Training()
    for mode in MODES:
        training.interval(mode)
    times = {mode: [] for mode in MODES}
    for turn in range(args.rounds):
        for mode in MODES if turn % 2 == 0 else reversed(MODES):
            times[mode].append(training.interval(mode))
    columns = ["mode", "step_ms", "over none, %", "spread, %", "alone_ms", "alone over interval, %"]
    table = open_table(args, "monitor", columns)
    base = statistics.median(times["none"])
    for mode, values in times.items():
        # Ratios of neighbours in time, so that a chip that warms up does not enter.
        ratio = statistics.median(value / other for value, other in zip(values, times["none"], strict=True)) - 1
        alone = training.alone(mode)
        spread = 100 * (max(values) - min(values)) / base
        table.add(mode, statistics.median(values), 100 * ratio, spread, alone, 100 * alone / (INTERVAL * base))


if __name__ == "__main__":
    main()
