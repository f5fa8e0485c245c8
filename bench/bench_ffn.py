"""A whole feed-forward layer, forward and backward, sparse against torch.compile'd dense; all that a step pays counted.

The 2:4 side pays, each step: re-packing of its weights, 1/40 of a mask search, MVUE, masked decay. Arms alternate on a
hot chip. One micro-batch a step, and a column for eight. Two tables: bf16 weights and gradients; fp32 master weights
under bf16 autocast, where both sides pay for their casts. The dense side has gate and up as one layer. Beside them
what PyTorch itself offers: greedy packing, cuSPARSELt forward and for the input gradient, a dense weight gradient.
The last two columns have masked decay inside the products of backward (`decay_in="backward"`), in place of its pass.
`ffn_costs` has the GPU's time of the 2:4 side by what it is for.

    python -m bench.bench_ffn [--csv FOLDER] [--append] [--png FOLDER] [--quick] [--only NAMES] [--master bf16|fp32]
                              [--no-costs]
"""

from __future__ import annotations

from bench.common import arguments, chosen, header, masters, open_table
from sparse24.benchmark import suite


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], select=True)
    parser.add_argument("--no-costs", action="store_true", help="without the table of costs")
    args = parser.parse_args()
    print(header())
    table = open_table(args, "ffn", suite.FFN_COLUMNS, key=2)
    costs = None if args.no_costs else open_table(args, "ffn_costs", suite.COST_COLUMNS, key=2)
    layers = chosen(args, suite.LAYERS, quick=("124M-like", "llama-7B"))
    for label in masters(args):
        suite.feed_forwards(table, layers, [label], costs)
    if args.png:
        print("wrote", table.plot(args.png, "layer", "speedup", "speed over torch.compile'd dense", 1.0))


if __name__ == "__main__":
    main()
