"""Every config of the sparse GEMM at some sixty products: what the library's choice of a config is judged by.

Products are of GPT-2, Llama (whole and as shards of tensor-parallel ones), BERT and ViT, from 512 to 65,536 tokens.
Rows are pass, m, n, k, dense cuBLAS' TFLOP/s, config and its TFLOP/s. `tests/cpp/gemm_config_test.cpp` reads the CSV
and holds the choice to within 3 % of the best. One pass over them differs from the next by 4 % a row, since clocks move
with the chip's temperature and power: rows are medians of three.

    python -m bench.bench_gemm_sweep [--csv FOLDER] [--append]
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from bench.common import arguments, header, heat, open_table
from sparse24 import _library, ops
from sparse24.formats import FORWARD, GRAD_INPUT, GRAD_WEIGHT, GemmProblem, SparseOperand
from sparse24.ops.gemm import launch as gemm_launch

SWEEPS = 3
PASSES = ("forward", "grad_input", "grad_weight")
#: (tokens, in_features, out_features, passes)
LAYERS = [
    (512, 768, 3072, "fig"), (4096, 768, 3072, "fig"), (16384, 768, 3072, "fig"), (16384, 3072, 768, "fig"),
    (65536, 768, 3072, "fg"), (16384, 1024, 4096, "fig"), (2048, 4096, 1024, "fig"), (16384, 1280, 5120, "fig"),
    (16384, 5120, 1280, "fig"), (1024, 1600, 6400, "fg"), (8192, 1600, 6400, "fig"), (8192, 6400, 1600, "fig"),
    (12608, 1024, 4096, "fig"), (8192, 2048, 16384, "fg"), (8192, 8192, 2048, "fig"), (4096, 3072, 8192, "fig"),
    (512, 4096, 11008, "fg"), (2048, 4096, 11008, "fig"), (8192, 4096, 11008, "fig"), (8192, 11008, 4096, "fig"),
    (16384, 4096, 14336, "fig"), (16384, 14336, 4096, "fg"), (32768, 4096, 3584, "fig"), (8192, 8192, 7168, "fig"),
    (4096, 3584, 8192, "fig"),
]  # fmt: skip


def products(tokens: int, in_features: int, out_features: int, passes: str):
    """(packed operand, dense operand, output, problem, dense product) of each pass."""
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    x, dy = torch.randn(tokens, in_features, **bf16), torch.randn(tokens, out_features, **bf16)
    w = torch.randn(out_features, in_features, **bf16)
    _, packed, E, packed_t, E_t = ops.prune_compress(w)
    y, dx, dw = (torch.empty(*shape, **bf16) for shape in (dy.shape, x.shape, w.shape))
    problem = gemm_launch.problem_of
    if "f" in passes:
        mnk = (out_features, tokens, in_features)
        yield SparseOperand(packed, E), x, y, problem(FORWARD, mnk, x, y), lambda: torch.mm(x, w.T, out=y)
    if "i" in passes:
        mnk = (in_features, tokens, out_features)
        yield SparseOperand(packed_t, E_t), dy, dx, problem(GRAD_INPUT, mnk, dy, dx), lambda: torch.mm(dy, w, out=dx)
    if "g" in passes:
        pruned = SparseOperand(*ops.mvue_compress(dy, torch.tensor([1, 2], device="cuda")))
        mnk = (out_features, in_features, tokens)
        yield pruned, x, dw, problem(GRAD_WEIGHT, mnk, x, dw), lambda: torch.mm(dy.T, x, out=dw)


def median_times(candidates: dict, rounds: int) -> dict:
    """Microseconds of a call, candidates in turn; each runs once untimed before it is timed."""
    events = {name: [] for name in candidates}
    for _ in range(rounds):
        torch.cuda._sleep(1_000_000)  # the host is ahead, so that its costs stay outside
        for name, run in candidates.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            run()
            start.record()
            run()
            run()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: sorted(start.elapsed_time(end) for start, end in pairs)[len(pairs) // 2] * 500
        for name, pairs in events.items()
    }


def sweep(library) -> dict[GemmProblem, dict]:
    """{"dense" or config: TFLOP/s} of one pass over all products."""
    rates = {}
    for layer in LAYERS:
        for lhs, rhs, out, problem, dense in products(*layer):
            candidates = {"dense": dense}
            for config in library.sparse_gemm_configs(problem, _library.CUDA, 0):
                candidates[config] = partial(gemm_launch.run, problem, lhs, rhs, out, config=config)
            heat(0.05)
            tflop = 2 * problem.m * problem.n * problem.k / 1e6
            times = median_times(candidates, rounds=5 if tflop < 5e5 else 3)
            rates[problem] = {candidate: tflop / time for candidate, time in times.items()}
    return rates


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    columns = ["pass", "m", "n", "k", "dense TFLOP/s", "config", "TFLOP/s"]
    table = open_table(args, "gemm_sweep", columns, key=4)
    library = _library.binding()
    heat(1.5)
    sweeps = [sweep(library) for _ in range(SWEEPS)]
    for problem, first in sweeps[0].items():
        rate = {name: statistics.median(each[problem][name] for each in sweeps) for name in first}
        dense = rate.pop("dense")
        for config, sparse in rate.items():
            text = library.sparse_gemm_config(problem, config, _library.CUDA, 0)
            table.add(PASSES[problem[0]], problem.m, problem.n, problem.k, dense, text, sparse)


if __name__ == "__main__":
    main()
