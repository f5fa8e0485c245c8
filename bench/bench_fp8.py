"""8-bit 2:4 layers beside bf16 dense, FP8 dense and 16-bit 2:4: feed-forward layers, blocks and training steps.

All arms of a row alternate on a hot chip, and a step pays everything that it needs: casts, scales, re-packing, 1/40 of
a mask search, MVUE, masked decay. FP8 dense is torchao's, tensorwise and rowwise, under torch.compile where torchao is
installed; else `torch._scaled_mm` with casts that torch.compile fuses, and named so.

    python -m bench.bench_fp8 [--what ffn,block,step] [--csv FOLDER] [--append] [--png FOLDER] [--quick]
                              [--only NAMES] [--master bf16|fp32]
"""

from __future__ import annotations

from bench.common import arguments, chosen, header, masters, open_table
from sparse24.benchmark import float8_suite, suite
from sparse24.benchmark.models import SHAPES

#: the layers of the suite, and one of a width between
LAYERS = [*suite.LAYERS, suite.ffn_shape("2048 x 8192", 16384, 2048, 8192)]
STEPS = [SHAPES[name] for name in ("llama-8B x2", "llama-7B x2", "gpt2-774M")]
PARTS = ("ffn", "block", "step")


def parts(args) -> list[str]:
    """What to measure. Exits for a part that there is not."""
    names = args.what.split(",")
    if missing := [name for name in names if name not in PARTS]:
        raise SystemExit(f"error: no part {', '.join(missing)}; there are {', '.join(PARTS)}")
    return names


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], select=True)
    parser.add_argument("--what", default="ffn", help="ffn, block, step, with commas between")
    args = parser.parse_args()
    print(header())
    labels = ("bf16",) if args.master is None else masters(args)
    for part in parts(args):
        columns = float8_suite.step_columns() if part == "step" else float8_suite.part_columns()
        table = open_table(args, f"{part}_fp8", columns, key=2)
        if part == "ffn":
            float8_suite.feed_forwards(table, chosen(args, LAYERS, quick=("llama-7B", "llama-8B")), labels)
        elif part == "block":
            float8_suite.blocks(table, chosen(args, suite.BLOCKS, quick=("llama-8B x2",)), labels)
        else:
            for label in labels:
                for shape in chosen(args, STEPS, quick=("llama-8B x2",)):
                    float8_suite.training_step(table, shape, label)
        if args.png:
            print("wrote", table.plot(args.png, tuple(columns[:2]), "fp8 over best FP8 dense", "speed-up", 1.0))


if __name__ == "__main__":
    main()
