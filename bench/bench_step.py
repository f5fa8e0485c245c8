"""A training step of whole models, 2:4 against torch.compile'd dense; everything that a step pays counted.

python -m bench.bench_step [--csv FOLDER] [--png FOLDER] [--quick] [--only NAMES] [--master fp32] [--eager]
"""

from __future__ import annotations

import time

import torch

from bench.common import Table, arguments, header, time_hot
from sparse24.benchmark import step as steps
from sparse24.benchmark.models import SHAPES

COLUMNS = [
    "weights", "model", "micro-batches", "dense_ms", "sparse_ms", "speedup", "bound", "of bound", "speedup mvue=False",
    "ffn share", "ffn speedup", "dense tokens/s", "sparse tokens/s", "dense MFU", "sparse MFU", "dense GB", "sparse GB",
    "dense host_ms", "sparse host_ms",
]  # fmt: skip
DEFAULT = ("gpt2-124M", "gpt2-774M", "llama-1B", "llama-7B x2", "llama-8B x2")


def peak_gb(build) -> tuple[steps.Trainer, float]:
    """A trainer and the most memory, in GB, that its steps hold."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    trainer = build()
    for _ in range(2):
        trainer.step()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    torch.cuda.synchronize()
    return trainer, (torch.cuda.max_memory_allocated() - before) / 1e9


def measure(table: Table, shape, master, micro_batches: int, compiled: bool, rounds: int) -> None:
    torch.compiler.reset()
    torch.cuda.empty_cache()
    started = time.time()
    settings = dict(master=master, compiled=compiled)
    dense, dense_gb = peak_gb(lambda: steps.Trainer(shape, sparse=False, micro_batches=micro_batches, **settings))
    sparse, sparse_gb = peak_gb(lambda: steps.Trainer(shape, sparse=True, micro_batches=micro_batches, **settings))
    dense_ffn = steps.FeedForward(shape, sparse=False, **settings)
    sparse_ffn = steps.FeedForward(shape, sparse=True, **settings)
    sparse_ffn.micro_batch()
    calls = {
        "dense": dense.step,
        "sparse": steps.with_mvue(sparse, True, sparse.step),
        "no mvue": steps.with_mvue(sparse, False, sparse.step),
    }
    parts = {
        "dense ffn": dense_ffn.micro_batch,
        "sparse ffn": sparse_ffn.micro_batch,
        "repack": sparse_ffn.repack,
        "search": sparse_ffn.search,
        "decay": sparse_ffn.decay,
    }
    for call in (*calls.values(), *parts.values()):
        call()
    built = time.time() - started
    times = time_hot(calls, rounds=rounds, warm_seconds=0.5)
    times |= time_hot(parts, rounds=rounds, warm_seconds=0.1, calls=4)
    between = times["repack"] + (times["search"] - times["repack"]) / steps.MASK_INTERVAL + times["decay"]
    ffn_speedup = micro_batches * times["dense ffn"] / (micro_batches * times["sparse ffn"] + between)
    share = shape.layers * micro_batches * times["dense ffn"] / times["dense"]
    bound, speedup = steps.amdahl(share, ffn_speedup), times["dense"] / times["sparse"]
    tokens, flops = micro_batches * shape.tokens, micro_batches * shape.flops()
    peak = steps.peak_flops()
    host = [steps.host_time_us(call) / 1e3 for call in (dense.step, sparse.step)]
    table.add(
        str(master)[6:], shape.name, micro_batches, times["dense"] / 1e3, times["sparse"] / 1e3, speedup, bound,
        speedup / bound, times["dense"] / times["no mvue"], share, ffn_speedup, tokens / times["dense"] * 1e6,
        tokens / times["sparse"] * 1e6, flops / times["dense"] * 1e6 / peak, flops / times["sparse"] * 1e6 / peak,
        dense_gb, sparse_gb, *host,
    )  # fmt: skip
    print(f"# {shape.name}: {built:.0f} s to build and compile, {time.time() - started:.0f} s in all", flush=True)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small models")
    parser.add_argument("--only", default="", help="models, with commas between")
    parser.add_argument("--master", choices=("bf16", "fp32"), default="bf16", help="dtype of the weights")
    parser.add_argument("--micro-batches", type=int, default=1, help="forward and backward passes a step")
    parser.add_argument("--eager", action="store_true", help="neither arm compiled")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else DEFAULT[:1] if args.quick else DEFAULT
    print(header())
    table = Table("step", COLUMNS)
    master = torch.bfloat16 if args.master == "bf16" else torch.float32
    for name in names:
        measure(table, SHAPES[name], master, args.micro_batches, not args.eager, rounds=5)
        if args.csv:
            table.write(args.csv)
    if args.csv:
        print("wrote", table.write(args.csv))
    if args.png:
        print("wrote", table.plot(args.png, "model", "speedup", "speed over torch.compile'd dense", 1.0))


if __name__ == "__main__":
    main()
