"""A block, attention and feed-forward layer, 2:4 against dense, torch.compile on both sides; everything counted.

Only the feed-forward layer is 2:4, so Amdahl's law bounds the gain: 1 / (1 - share + share / speed-up), with the
share of the dense layer in the dense block and its speed-up measured in the same loop. In that loop too: the block with
PyTorch's own 2:4 training (sparse24/benchmark/pytorch_sparse.py).

    python -m bench.bench_block [--csv FOLDER] [--append] [--png FOLDER] [--quick] [--only NAMES] [--master bf16|fp32]
                                [--no-pytorch]
"""

from __future__ import annotations

from bench.common import arguments, chosen, header, masters, open_table
from sparse24.benchmark import suite


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], select=True)
    parser.add_argument("--no-pytorch", action="store_true", help="without PyTorch's own 2:4 training")
    args = parser.parse_args()
    print(header())
    table = open_table(args, "block", suite.BLOCK_COLUMNS, key=2)
    for label in masters(args):
        shapes = chosen(args, suite.BLOCKS, quick=("llama-7B x2",))
        suite.blocks(table, shapes, [label], pytorch=not args.no_pytorch)
    if args.png:
        print("wrote", table.plot(args.png, "block", "speedup", "speed over torch.compile'd dense", 1.0))


if __name__ == "__main__":
    main()
