"""A whole gated FFN, forward and backward, sparse against torch.compile'd dense; everything that a step pays counted.

The sparse side pays, each step: re-packing of both weights, 1/40 of a mask search, MVUE, masked decay. Arms alternate
on a hot chip, one micro-batch a step. Two tables: bf16 weights and gradients; fp32 master weights under bf16 autocast,
where both sides pay for their casts.

    python -m bench.bench_ffn [--csv FOLDER] [--png FOLDER]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.common import Table, arguments, header, time_hot
from sparse24 import functional, ops

#: (name, tokens, d_model, d_ff)
SHAPES = [
    ("124M-like", 16384, 768, 2048),
    ("1.5B-like", 8192, 1600, 4288),
    ("llama-7B", 8192, 4096, 11008),
    ("llama-8B", 16384, 4096, 14336),
]
MASK_INTERVAL = 40


def dense_ffn(x, w1, w2):
    gate, up = F.linear(x, w1).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w2)


class Arm:
    """Weights and one training micro-batch of an FFN: forward, backward into .grad."""

    def __init__(self, tokens, d_model, d_ff, master):
        make = dict(device="cuda", dtype=master)
        self.w1 = (torch.randn(2 * d_ff, d_model, **make) * d_model**-0.5).requires_grad_()
        self.w2 = (torch.randn(d_model, d_ff, **make) * d_ff**-0.5).requires_grad_()
        self.x = torch.randn(tokens, d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.dy = torch.randn(tokens, d_model, device="cuda", dtype=torch.bfloat16)
        self.autocast = torch.autocast("cuda", torch.bfloat16, enabled=master == torch.float32, cache_enabled=False)

    def clear(self):
        self.x.grad = self.w1.grad = self.w2.grad = None


class Dense(Arm):
    def __init__(self, *args):
        super().__init__(*args)
        self.compiled = torch.compile(dense_ffn)

    def step(self):
        self.clear()
        with self.autocast:
            y = self.compiled(self.x, self.w1, self.w2)
        y.backward(self.dy)


class Sparse(Arm):
    def __init__(self, *args, mvue=True):
        super().__init__(*args)
        self.mvue = mvue
        packed = [ops.prune_compress(w.detach(), torch.bfloat16) for w in (self.w1, self.w2)]
        self.lists = [[self.w1.detach(), self.w2.detach()], *map(list, zip(*packed, strict=True))]
        self.packed1, self.packed2 = (functional.PackedWeight(*p[1:]) for p in packed)

    def micro_batch(self):
        self.clear()
        with self.autocast:
            y = functional.gated_mlp(self.x, self.w1, self.packed1, self.w2, self.packed2, mvue=self.mvue)
        y.backward(self.dy)

    def decay(self):
        ops.foreach_masked_decay_([self.w1.grad, self.w2.grad], self.lists[0], self.lists[1], 6e-5)

    def repack(self):
        ops.compress_(*self.lists)

    def search(self):
        ops.prune_compress_(*self.lists)


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    columns = [
        "weights",
        "layer",
        "dense_us",
        "sparse_us",
        "speedup",
        "micro_batch_us",
        "repack_us",
        "search_us",
        "decay_us",
    ]
    table = Table("ffn", [*columns, "speedup mvue=False"])
    for label, master in (("bf16", torch.bfloat16), ("fp32 master", torch.float32)):
        for name, *shape in SHAPES:
            torch.compiler.reset()
            dense, sparse, no_mvue = Dense(*shape, master), Sparse(*shape, master), Sparse(*shape, master, mvue=False)
            sparse.micro_batch()
            times = time_hot(
                {
                    "dense": dense.step,
                    "sparse": sparse.micro_batch,
                    "no_mvue": no_mvue.micro_batch,
                    "decay": sparse.decay,
                    "repack": sparse.repack,
                    "search": sparse.search,
                },
                rounds=8,
                warm_seconds=1.0,
                calls=4,  # as in a model of several layers, where the host runs ahead
            )
            between = ((MASK_INTERVAL - 1) * times["repack"] + times["search"]) / MASK_INTERVAL + times["decay"]
            total = times["sparse"] + between
            table.add(
                label, name, times["dense"], total, times["dense"] / total, times["sparse"], times["repack"],
                times["search"], times["decay"], times["dense"] / (times["no_mvue"] + between),
            )  # fmt: skip
            del dense, sparse, no_mvue
            torch.cuda.empty_cache()
    if args.csv:
        print("wrote", table.write(args.csv))
    if args.png:
        print("wrote", table.plot(args.png, "layer", "speedup", "speed over torch.compile'd dense", 1.0))


if __name__ == "__main__":
    main()
