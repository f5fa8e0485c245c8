"""From how many tokens a call on does a 2:4 feed-forward layer pay? One micro-batch a step, everything counted.

python -m bench.bench_tokens [--csv FOLDER] [--append] [--png FOLDER] [--quick] [--only NAMES] [--master bf16|fp32]
"""

from __future__ import annotations

from bench.common import arguments, chosen, header, masters, open_table
from sparse24.benchmark import suite

LAYERS = [
    suite.ffn_shape("768 x 3072", 0, 768, 3072, gated=False),
    suite.ffn_shape("1600 x 4288", 0, 1600, 4288),
    suite.ffn_shape("2048 x 8192", 0, 2048, 8192),
    suite.ffn_shape("4096 x 11008", 0, 4096, 11008),
]
TOKENS = (1024, 2048, 4096, 8192, 16384)


def main() -> None:
    args = arguments(__doc__.splitlines()[0], select=True).parse_args()
    print(header())
    table = open_table(args, "tokens", suite.TOKENS_COLUMNS, key=3)
    for label in ("bf16",) if args.master is None else masters(args):
        for layer in chosen(args, LAYERS, quick=("4096 x 11008",)):
            first = len(table.rows)
            suite.tokens_sweep(table, [(layer.name, layer.d_model, layer.d_ff, layer.gated)], TOKENS, [label])
            even = suite.break_even([(row[2], row[5]) for row in table.rows[first:]])
            print(f"# {layer.name}, {label}: break-even at {'none' if even is None else f'{even:.0f}'} tokens")
    if args.png:
        print("wrote", table.plot(args.png, ("layer", "tokens"), "speedup", "speed over torch.compile'd dense", 1.0))


if __name__ == "__main__":
    main()
