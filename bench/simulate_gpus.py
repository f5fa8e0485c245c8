"""What 8, 64 and 512 GPUs leave of a step's gain: Llama 8B under FSDP2, from measured kernel times and assumed links.

    python -m bench.simulate_gpus [--tokens 8192] [--csv FOLDER]

Times of a block are those of one GPU (bench/results: block.csv, ffn.csv, ffn_fp8.csv, gemm.csv), in proportion to the
tokens. Links are not measured: `Links` has what is assumed of them. Forward and backward walk over the blocks; while
one computes, the next one's weights are gathered and, in backward, the last one's gradients are reduced. What a block's
collectives take longer than its computing is exposed, and so are the first gather and the last reduction.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from . import measured
from .common import Table

# Llama 8B
LAYERS, D_MODEL, D_FF, KV_SHARE, VOCAB = 32, 4096, 14336, 0.25, 128256
FFN_WEIGHTS = 3 * D_MODEL * D_FF
OTHER_WEIGHTS = 2 * D_MODEL**2 + 2 * int(D_MODEL**2 * KV_SHARE)
HEAD_WEIGHTS = 2 * VOCAB * D_MODEL
MEASURED_TOKENS = 16384  # of the blocks and layers in the CSVs
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Links:
    """Assumptions on the links. Rates in bytes a second and GPU, times in seconds.

    nvlink, network  what a ring of NCCL reaches inside a host of `host` GPUs, and across hosts with a card of 400 Gb/s
                     a GPU: 0.8 of 450 GB/s and of 400 GB/s, eight rings of a card each
    hop              from one GPU of the ring to the next
    """

    host: int = 8
    nvlink: float = 0.8 * 450e9
    network: float = 0.8 * 400e9
    hop: float = 1.5e-6

    def ring_seconds(self, whole_bytes: float, gpus: int) -> float:
        """A gather that leaves `whole_bytes` on each GPU, or a reduction that begins with as many."""
        if gpus == 1:
            return 0.0
        rate = self.nvlink if gpus <= self.host else min(self.nvlink, self.network)
        return (gpus - 1) * (whole_bytes / gpus / rate + self.hop)


@dataclass(frozen=True)
class Arm:
    """What a block costs a GPU.

    block_us    forward and backward of a block, for MEASURED_TOKENS
    step_us     of a block once a step, over the whole weight (packing): on every GPU, or divided among them
    gather      bytes a weight of the feed-forward layer that a gather brings, in each of the two passes
    extra       bytes a weight of it that are gathered once a step beside, with nothing to hide behind
    divides     packing is of a GPU's own rows
    """

    name: str
    block_us: float
    step_us: float = 0.0
    gather: float = 2.0
    extra: float = 0.0
    divides: bool = False


def _row(name: str, key: str, value: str, device: str) -> dict[str, str]:
    return next(row for row in measured.read(name, device) if row[key] == value)


def measured_arms(device: str = "") -> list[Arm]:
    """Arms of Llama 8B from the CSVs of a device; those in 8 bits where it has them."""
    block = _row("block", "block", "llama-8B", device)
    ffn = _row("ffn", "layer", "llama-8B", device)
    rest = float(block["dense_us"]) * (1 - float(block["ffn share"]))
    dense = float(ffn["dense_us"])
    repack = float(ffn["repack_us"]) + (float(ffn["search_us"]) - float(ffn["repack_us"])) / 40 + float(ffn["decay_us"])
    sparse = float(ffn["sparse_us"]) - repack
    arms = [
        Arm("dense bf16", rest + dense),
        Arm("2:4 bf16, dense weights gathered", rest + sparse, repack, extra=4.0),
        Arm("2:4 bf16, packed weights gathered", rest + sparse, repack, gather=1.125, divides=True),
    ]
    if not (measured.RESULTS / device / "ffn_fp8.csv").exists():
        return arms
    fp8 = _row("ffn_fp8", "layer", "llama-8B", device)
    scale = dense / float(fp8["bf16 dense us"])  # of another day: only its ratios are taken
    pack = float(fp8["fp8 repack us"])
    arms.append(Arm("FP8 dense, FP8 gathered", rest + scale * float(fp8["FP8 dense tensorwise us"]), gather=1.0))
    for mode in ("fp8-hybrid", "fp8"):
        once = scale * 1.5 * pack  # of gated layers it left out one of three weights
        layer = scale * (float(fp8[f"{mode} us"]) - pack)
        arms.append(Arm(f"2:4 {mode}, packed weights gathered", rest + layer, once, gather=0.625, divides=True))
    return arms


def head_us(tokens: int, device: str = "") -> float:
    """The product with the vocabulary, three times, at the rate of the measured products of this model."""
    rates = [float(row["dense TFLOP/s"]) for row in measured.read("gemm", device) if row["layer"] == "llama-8B"]
    return 3 * 2.0 * tokens * D_MODEL * VOCAB / (sum(rates) / len(rates) * 1e6)


def optimizer_us(gpus: int, bandwidth: float = 4.1e12) -> float:
    """AdamW over a GPU's share: weight, gradient and two moments in fp32 read, three of them written."""
    weights = LAYERS * (FFN_WEIGHTS + OTHER_WEIGHTS) + HEAD_WEIGHTS
    return 1e6 * 28 * weights / gpus / bandwidth


@dataclass(frozen=True)
class Step:
    """Milliseconds of a training step: its computing, and what of its collectives is exposed."""

    computing: float
    exposed: float
    collectives: float

    @property
    def total(self) -> float:
        return self.computing + self.exposed


def simulate(arm: Arm, gpus: int, tokens: int, links: Links, fixed_us: float) -> Step:
    """A step of `tokens` a GPU. fixed_us: head and optimizer, in which nothing of the blocks is hidden.

    Forward is a third of a block's time. Gradients are reduced in fp32.
    """
    block = arm.block_us * tokens / MEASURED_TOKENS
    forward, backward = block / 3, 2 * block / 3
    gather = 1e6 * links.ring_seconds(arm.gather * FFN_WEIGHTS + 2.0 * OTHER_WEIGHTS, gpus)
    reduce = 1e6 * links.ring_seconds(4.0 * (FFN_WEIGHTS + OTHER_WEIGHTS), gpus)
    once = 1e6 * links.ring_seconds(arm.extra * FFN_WEIGHTS, gpus) if arm.extra else 0.0
    hidden = LAYERS - 1  # gathers behind the block before, reductions beside the block after
    exposed = gather + hidden * max(0.0, gather - forward)
    exposed += gather + hidden * max(0.0, gather + reduce - backward) + reduce + LAYERS * once
    computing = LAYERS * (block + arm.step_us / (gpus if arm.divides else 1)) + fixed_us
    collectives = LAYERS * (2 * gather + reduce + once)
    return Step(computing / 1e3, exposed / 1e3, collectives / 1e3)


def rows(tokens: int = 8192, device: str = "", links: Links | None = None) -> list[list]:
    """gpus, arm, step ms, exposed ms, speed-up over dense, and what is left of one GPU's gain."""
    arms, links, found = measured_arms(device), links or Links(), []
    gains: dict[str, float] = {}
    for gpus in (1, *GPUS):
        fixed = head_us(tokens, device) + optimizer_us(max(gpus, 8))  # one GPU has no room for all of it
        steps = {arm.name: simulate(arm, gpus, tokens, links, fixed) for arm in arms}
        for arm in arms:
            step = steps[arm.name]
            speedup = steps["dense bf16"].total / step.total
            if gpus == 1:
                gains[arm.name] = speedup - 1
                continue
            kept = (speedup - 1) / gains[arm.name] if gains[arm.name] else math.nan
            found.append([gpus, tokens, arm.name, step.total, step.collectives, step.exposed, speedup, kept])
    return found


COLUMNS = ["gpus", "tokens a GPU", "arm", "step_ms", "collectives_ms", "exposed_ms", "speedup", "gain kept"]


def markdown(device: str = "") -> str:
    """The table of docs/when-it-pays.md: 8192 and 2048 tokens a GPU."""
    header = [
        "GPUs", "tokens a GPU", "arm", "step, ms", "collectives, ms", "exposed, ms", "over dense bf16", "gain kept",
    ]  # fmt: skip
    lines = []
    for tokens in (8192, 2048):
        for gpus, _, arm, total, collectives, exposed, speedup, kept in rows(tokens, device):
            share = "-" if math.isnan(kept) else f"{100 * kept:.0f} %"
            numbers = [f"{total:.0f}", f"{collectives:.0f}", f"{exposed:.1f}", f"{speedup:.2f}x", share]
            lines.append([str(gpus), f"{tokens:,}", arm, *numbers])
    return measured.markdown(header, lines, left=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of a GPU and step")
    parser.add_argument("--device", default="", help="folder of bench/results with its measurements")
    parser.add_argument("--csv", type=Path, default=None, help="folder for the table as CSV")
    args = parser.parse_args()
    table = Table("simulated_gpus", COLUMNS, 3, args.csv)
    for row in rows(args.tokens, args.device):
        table.add(*row)


if __name__ == "__main__":
    main()
