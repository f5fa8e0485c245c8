"""A training step of whole models, 2:4 against dense, torch.compile on both sides; everything that a step pays counted.

Forward, backward, fused AdamW; the 2:4 side under a Recipe: decay, re-packing, mask searches. SDPA attention, random
weights. Compiled block by block. "bound" is Amdahl's, from the layer's share and speed-up measured in the same run;
tokens/s, model FLOP utilisation of the dense peak (the 2:4 side counted as dense), peak memory, host time.

    python -m bench.bench_step [--csv FOLDER] [--append] [--png FOLDER] [--quick] [--all] [--only NAMES]
                               [--master bf16|fp32] [--micro-batches N] [--many NAMES] [--eager]
"""

from __future__ import annotations

from bench.common import arguments, chosen, header, masters, open_table
from sparse24.benchmark import suite
from sparse24.benchmark.models import SHAPES

DEFAULT = ("llama-7B x2", "llama-3B", "gpt2-774M", "gpt2-124M")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], select=True)
    parser.add_argument("--all", action="store_true", help="every model, some minutes; default: " + ", ".join(DEFAULT))
    parser.add_argument("--micro-batches", type=int, default=1, help="forward and backward passes a step")
    parser.add_argument("--many", default="", help="models, with commas between, to time with 8 micro-batches too")
    parser.add_argument("--eager", action="store_true", help="neither side compiled")
    args = parser.parse_args()
    print(header())
    models = [SHAPES[name] for name in (SHAPES if args.all or args.only else DEFAULT)]
    table = open_table(args, "step", suite.STEP_COLUMNS, key=4)
    for label in ("bf16",) if args.master is None else masters(args):
        for shape in chosen(args, models, quick=("llama-7B x2",)):
            for count in (args.micro_batches, *[suite.MANY] * (shape.name in args.many.split(","))):
                suite.training_step(table, shape, label, count, not args.eager)
    if args.png:
        print("wrote", table.plot(args.png, "model", "speedup", "speed over torch.compile'd dense", 1.0))


if __name__ == "__main__":
    main()
