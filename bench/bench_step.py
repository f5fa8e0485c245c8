"""A training step of whole models, 2:4 against dense, torch.compile on both sides; everything that a step pays counted.

Forward, backward, fused AdamW; the 2:4 side under a Recipe: decay, re-packing, mask searches. SDPA attention, random
weights. Compiled block by block. "bound" is Amdahl's, from the layer's share and speed-up measured in the same run;
tokens/s, model FLOP utilisation of the dense peak (the 2:4 side counted as dense), peak memory, host time. The last
column is PyTorch's own 2:4 training over dense, from a loop of these two (sparse24/benchmark/pytorch_sparse.py).

    python -m bench.bench_step [--csv FOLDER] [--append] [--png FOLDER] [--quick] [--all] [--only NAMES]
                               [--master bf16|fp32] [--micro-batches N] [--many NAMES] [--eager] [--no-pytorch]
"""

from __future__ import annotations

from bench.common import arguments, chosen, header, masters, open_table
from sparse24.benchmark import suite
from sparse24.benchmark.models import SHAPES, ModelShape

#: what runs unless names are given, the most telling first: a run that is cut short has those, and `--append` the rest
DEFAULT = [
    ("bf16", "llama-7B x2"),
    ("bf16", "llama-8B x2"),
    ("bf16", "llama-3B"),
    ("bf16", "gpt2-774M"),
    ("bf16", "llama-1B"),
    ("fp32 master", "llama-7B x2"),
    ("fp32 master", "llama-8B x2"),
    ("bf16", "gpt2-1558M"),
    ("fp32 master", "llama-1B"),
    ("fp32 master", "gpt2-774M"),
    ("bf16", "gpt2-350M"),
    ("bf16", "gpt2-124M"),
]
# All of these fit 80 GB. Two models are there at a time: weights and AdamW's states of both (6 bytes a weight, 12 with
# fp32 masters; the 2:4 side's packed forms), activations and logits of the one that steps. The most are 65 GB of
# llama-3B; with fp32 masters it would be 106, so it is left to larger devices (`--only llama-3B --master fp32`).


def cases(args) -> list[tuple[str, ModelShape]]:
    """(dtype of the weights, model): DEFAULT, or the models that are named, in bf16 where `--master` does not say."""
    if args.only or args.all or args.quick:
        labels = ("bf16",) if args.master is None else masters(args)
        return [(label, shape) for label in labels for shape in chosen(args, list(SHAPES.values()), ("llama-7B x2",))]
    return [(label, SHAPES[name]) for label, name in DEFAULT if label in masters(args)]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], select=True)
    parser.add_argument("--all", action="store_true", help="every model; without names or this: the list in this file")
    parser.add_argument("--micro-batches", type=int, default=1, help="forward and backward passes a step")
    parser.add_argument("--many", default="", help="models, with commas between, to time with 8 micro-batches too")
    parser.add_argument("--eager", action="store_true", help="neither side compiled")
    parser.add_argument("--no-pytorch", action="store_true", help="without PyTorch's own 2:4 training")
    args = parser.parse_args()
    print(header())
    table = open_table(args, "step", suite.STEP_COLUMNS, key=4)
    for label, shape in cases(args):
        for count in (args.micro_batches, *[suite.MANY] * (shape.name in args.many.split(","))):
            suite.training_step(table, shape, label, count, not args.eager, pytorch=not args.no_pytorch)
    if args.png:
        print("wrote", table.plot(args.png, ("weights", "model"), "speedup", "speed over torch.compile'd dense", 1.0))


if __name__ == "__main__":
    main()
