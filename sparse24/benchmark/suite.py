"""The benchmarks of the suite: a feed-forward layer, its tokens, a block, a training step. Each fills a table."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable

import torch

from ..convert import cost_model, rates_on
from . import arms, kernels, pytorch_sparse
from .models import SHAPES, ModelShape
from .timing import Table, host_time_us, time_hot

MASTERS = {"bf16": torch.bfloat16, "fp32 master": torch.float32}
MANY = 8  # micro-batches of the column for gradient accumulation

FFN_COLUMNS = [
    "weights", "layer", "dense_us", "sparse_us", "speedup", "micro_batch_us", "repack_us", "search_us", "decay_us",
    "speedup mvue=False", "speedup 8 micro-batches", "speedup lean", "over PyTorch's 2:4",
    "PyTorch's 2:4 over dense", "estimated", "dense host_us", "sparse host_us", "decay_in backward us",
    "speedup decay in backward",
]  # fmt: skip
COST_COLUMNS = ["weights", "layer", "mvue", "cost", "us", "share"]
TOKENS_COLUMNS = ["weights", "layer", "tokens", "dense_us", "sparse_us", "speedup", "speedup mvue=False", "estimated"]
BLOCK_COLUMNS = [
    "weights", "block", "dense_us", "sparse_us", "speedup", "bound", "of bound", "ffn share", "ffn speedup",
    "speedup mvue=False", "PyTorch's 2:4 over dense",
]  # fmt: skip
STEP_COLUMNS = [
    "weights", "model", "compiled", "micro-batches", "dense_ms", "sparse_ms", "speedup", "bound", "of bound",
    "speedup mvue=False", "ffn share", "ffn speedup", "dense tokens/s", "sparse tokens/s", "dense MFU", "sparse MFU",
    "dense GB", "sparse GB", "dense host_ms", "sparse host_ms", "speedup decay in backward", "PyTorch's 2:4 over dense",
]  # fmt: skip


def ffn_shape(name: str, tokens: int, d_model: int, d_ff: int, gated: bool = True, kind: str = "") -> ModelShape:
    """A feed-forward layer as the model shape that it would be part of; `kind` as of ModelShape, else by `gated`."""
    kind = kind or ("llama" if gated else "gpt2")
    return ModelShape(name, kind, 1, d_model, 1, 1, d_ff, vocab=0, length=tokens, batch=1)


#: feed-forward layers of the suite
LAYERS = [
    ffn_shape("124M-like", 16384, 768, 2048),
    ffn_shape("1.5B-like", 8192, 1600, 4288),
    ffn_shape("llama-7B", 8192, 4096, 11008),
    ffn_shape("llama-8B", 16384, 4096, 14336),
    ffn_shape("gpt2-124M", 16384, 768, 3072, gated=False),
    ffn_shape("gpt2-774M", 16384, 1280, 5120, gated=False),
    ffn_shape("gpt2-1558M", 8192, 1600, 6400, gated=False),
]
BLOCKS = [SHAPES["gpt2-774M"], SHAPES["llama-3B"], SHAPES["llama-7B x2"], SHAPES["llama-8B x2"]]


def free() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    torch.cuda.empty_cache()


def fresh() -> None:
    """Forget compiled code too, so that no measurement runs with another's dynamic shapes."""
    torch.compiler.reset()
    free()


class FeedForwardTimes:
    """Times of one feed-forward layer, every part by itself, in microseconds; from one interleaved run."""

    def __init__(self, shape: ModelShape, master: torch.dtype, *, rounds: int, warm: float, extra: bool = True):
        fresh()
        settings = dict(master=master)
        self.dense = arms.feed_forward_arm(shape, sparse=False, compiled=True, one_gate=True, **settings)
        self.sparse = sparse = arms.feed_forward_arm(shape, sparse=True, compiled=False, **settings)
        sparse.micro_batch()
        calls: dict[str, Callable] = {
            "dense": self.dense.micro_batch,
            "sparse": sparse.with_mvue(True, sparse.micro_batch),
            "no mvue": sparse.with_mvue(False, sparse.micro_batch),
            "decay": sparse.decay,
            "repack": sparse.repack,
            "search": sparse.search,
        }
        if extra:
            calls["dense sum"] = self.dense.accumulate
            calls["sparse sum"] = sparse.with_mvue(True, sparse.accumulate)
            self.lean = arms.feed_forward_arm(shape, sparse=True, compiled=False, lean=True, **settings)
            calls |= {"lean": self.lean.micro_batch, "lean repack": self.lean.repack}
            calls["decay in backward"] = sparse.with_decay(calls["sparse"])
            calls |= _pytorch_calls(pytorch_sparse.feed_forward_arm, shape, master)
        # Several in a row, as in a model of many layers; of large ones one covers the host's next.
        calls_in_a_row = 4 if shape.tokens * shape.ffn_weights() < 1e12 else 2
        self.times = time_hot(calls, rounds=rounds, warm_seconds=warm, calls=calls_in_a_row)
        self.between = arms.between_us(self.times)

    def step_us(self, arm: str, micro_batches: int = 1) -> float:
        """One optimizer step of "dense", "sparse" or "no mvue"."""
        first = self.times[arm] + (0.0 if arm == "dense" else self.between)
        return first + (micro_batches - 1) * self.times.get(f"{arm} sum", 0.0)

    def lean_speedup(self) -> float:
        """Of a step with one packed form of each weight."""
        between = self.between - self.times["repack"] + self.times["lean repack"]
        return self.times["dense"] / (self.times["lean"] + between)

    def decay_in_backward_us(self) -> float:
        """A step whose decay is inside the products of weight gradients, and no pass of its own."""
        return self.times["decay in backward"] + self.between - self.times["decay"]

    def speedup(self, arm: str = "sparse", micro_batches: int = 1) -> float:
        return self.step_us("dense", micro_batches) / self.step_us(arm, micro_batches)


def _pytorch_calls(make: Callable[..., arms.Arm], shape: ModelShape, master: torch.dtype) -> dict[str, Callable]:
    """The calls of an arm of PyTorch's own 2:4 training; none, and a note, where it fails: the other columns stay."""
    try:
        arm = make(shape, master=master)
        arm.micro_batch()
    except Exception as error:
        _note(error)
        return {}
    return {"pytorch": arm.micro_batch, "pytorch pack": lambda: pytorch_sparse.repack(arm.module)}


def _note(error: Exception) -> None:
    first = (str(error).splitlines() or [""])[0]
    print(f"# PyTorch's own 2:4 training: {type(error).__name__}: {first}", flush=True)


def _pytorch_us(times: dict[str, float]) -> float:
    """A step of it with one micro-batch; NaN where there is none."""
    return times.get("pytorch", float("nan")) + times.get("pytorch pack", float("nan"))


def rates_here() -> cost_model.Rates:
    """The cost model's rates on the current GPU."""
    return rates_on(torch.device("cuda")) if torch.cuda.is_available() else cost_model.H200


def estimate(shape: ModelShape, master: torch.dtype, mvue: bool = True, micro_batches: int = 1) -> float:
    """The speed-up that `sparsify` expects."""
    training = cost_model.Training(shape.tokens, micro_batches, master.itemsize, mvue)
    return cost_model.feed_forward(shape.d_model, shape.d_ff, shape.gated, training, rates_here()).speedup


def feed_forwards(
    table: Table, layers: Iterable[ModelShape], masters: Iterable[str], costs: Table | None = None, rounds: int = 6
) -> None:
    """The table `ffn`, and with `costs` where the GPU's time goes."""
    for label in masters:
        for shape in layers:
            master = MASTERS[label]
            run = FeedForwardTimes(shape, master, rounds=rounds, warm=0.7)
            times, total = run.times, run.step_us("sparse")
            theirs = _pytorch_us(times)
            run.sparse.set_mvue(True)
            hosts = [host_time_us(arm.micro_batch) for arm in (run.dense, run.sparse)]
            row = (
                label, shape.name, times["dense"], total, run.speedup(), times["sparse"], times["repack"],
                times["search"], times["decay"], run.speedup("no mvue"), run.speedup(micro_batches=MANY),
                run.lean_speedup(),
                theirs / total, times["dense"] / theirs, estimate(shape, master), *hosts, run.decay_in_backward_us(),
                times["dense"] / run.decay_in_backward_us(),
            )  # fmt: skip
            table.add(*row)
            if costs is not None:
                add_costs(costs, label, shape.name, run)


def add_costs(table: Table, label: str, name: str, run: FeedForwardTimes) -> None:
    """Kernels of a micro-batch by what they are for, beside what a step adds."""
    for mvue in (True, False):
        found = kernels.costs(run.sparse.with_mvue(mvue, run.sparse.micro_batch))
        times = run.times
        found["pack"] = times["repack"]
        found["search / 40"] = (times["search"] - times["repack"]) / arms.MASK_INTERVAL
        found["decay"] = times["decay"]
        total = sum(found.values())
        for cost, time_us in sorted(found.items(), key=lambda item: -item[1]):
            table.add(label, name, str(mvue), cost, time_us, time_us / total)


def tokens_sweep(
    table: Table, sizes: Iterable[tuple[str, int, int, bool]], counts: Iterable[int], masters: Iterable[str],
    rounds: int = 5,
) -> None:  # fmt: skip
    """The table `tokens`: layers (name, d_model, d_ff, gated) at several numbers of tokens a call."""
    counts = list(counts)
    for label in masters:
        for name, d_model, d_ff, gated in sizes:
            for count in counts:
                shape = ffn_shape(name, count, d_model, d_ff, gated)
                run = FeedForwardTimes(shape, MASTERS[label], rounds=rounds, warm=0.3, extra=False)
                table.add(
                    label, name, count, run.times["dense"], run.step_us("sparse"), run.speedup(),
                    run.speedup("no mvue"), estimate(shape, MASTERS[label]),
                )  # fmt: skip


def break_even(points: list[tuple[int, float]]) -> float | None:
    """Tokens at which the speed-up crosses 1, between measured points (tokens, speed-up) in order; None: it does not.

    Linear in the logarithm of the tokens between the last point behind and the first of those ahead that follow.
    """
    points = sorted(points)
    if not points or points[-1][1] <= 1:
        return None
    last_behind = max((i for i, (_, speedup) in enumerate(points) if speedup <= 1), default=-1)
    if last_behind < 0:
        return float(points[0][0])
    (low, below), (high, above) = points[last_behind], points[last_behind + 1]
    part = (1 - below) / (above - below)
    return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))


def blocks(
    table: Table, shapes: Iterable[ModelShape], masters: Iterable[str], rounds: int = 6, pytorch: bool = True
) -> None:
    """The table `block`: attention and feed-forward layer, with the bound that Amdahl's law sets."""
    for label in masters:
        for shape in shapes:
            fresh()
            settings = dict(master=MASTERS[label], compiled=True)
            dense, sparse = (arms.block_arm(shape, sparse=s, **settings) for s in (False, True))
            dense_ffn, sparse_ffn = (arms.feed_forward_arm(shape, sparse=s, **settings) for s in (False, True))
            sparse.micro_batch()
            peer = _pytorch_calls(pytorch_sparse.block_arm, shape, MASTERS[label]) if pytorch else {}
            times = time_hot(
                {
                    "dense": dense.micro_batch,
                    "sparse": sparse.with_mvue(True, sparse.micro_batch),
                    "no mvue": sparse.with_mvue(False, sparse.micro_batch),
                    "dense ffn": dense_ffn.micro_batch,
                    "sparse ffn": sparse_ffn.micro_batch,
                    "repack": sparse.repack,
                    "search": sparse.search,
                    "decay": sparse.decay,
                    **peer,
                },
                rounds=rounds,
                warm_seconds=0.5,
                calls=3,
            )
            between = arms.between_us(times)
            total = times["sparse"] + between
            share, ffn = times["dense ffn"] / times["dense"], times["dense ffn"] / (times["sparse ffn"] + between)
            bound, speedup = arms.amdahl(share, ffn), times["dense"] / total
            row = (
                label, shape.name.split(" ")[0], times["dense"], total, speedup, bound, speedup / bound, share, ffn,
                times["dense"] / (times["no mvue"] + between), times["dense"] / _pytorch_us(times),
            )  # fmt: skip
            table.add(*row)


def peak_gb(build: Callable[[], arms.Trainer]) -> tuple[arms.Trainer, float]:
    """A trainer and the most memory, in GB, that its steps hold."""
    free()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    trainer = build()
    for _ in range(2):
        trainer.step()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    torch.cuda.synchronize()
    return trainer, (torch.cuda.max_memory_allocated() - before) / 1e9


def _pytorch_step_over_dense(shape: ModelShape, rounds: int, **settings) -> float:
    """How many times as fast as dense PyTorch's own 2:4 training steps; NaN, and a note, where it fails.

    In a loop of the two, before there is a third model: two of them fit a GPU that the main loop's two fit.
    """
    try:
        theirs = pytorch_sparse.Trainer(shape, **settings)
        theirs.step()
        dense = arms.Trainer(shape, sparse=False, **settings)
        times = time_hot({"dense": dense.step, "pytorch": theirs.step}, rounds=rounds, warm_seconds=0.5)
    except Exception as error:  # out of memory, say
        _note(error)
        return float("nan")
    return times["dense"] / times["pytorch"]


def training_step(
    table: Table, shape: ModelShape, label: str, micro_batches: int = 1, compiled: bool = True, rounds: int = 5,
    pytorch: bool = True,
) -> None:  # fmt: skip
    """A row of the table `step`."""
    started = time.time()
    fresh()
    settings = dict(master=MASTERS[label], compiled=compiled)
    peer = float("nan")
    if pytorch:
        peer = _pytorch_step_over_dense(shape, rounds, micro_batches=micro_batches, **settings)
        free()
    ffns = [arms.feed_forward_arm(shape, sparse=s, **settings) for s in (False, True)]
    for arm in ffns:
        arm.micro_batch()
    parts = {
        "dense ffn": ffns[0].micro_batch, "sparse ffn": ffns[1].micro_batch, "repack": ffns[1].repack,
        "search": ffns[1].search, "decay": ffns[1].decay,
    }  # fmt: skip
    times = time_hot(parts, rounds=rounds, warm_seconds=0.5, calls=4)
    del ffns, arm, parts  # the models fill the GPU
    trainers = []
    for sparse in (False, True):
        trainer, gigabytes = peak_gb(
            lambda sparse=sparse: arms.Trainer(shape, sparse=sparse, micro_batches=micro_batches, **settings)
        )
        trainers.append((trainer, gigabytes))
    (dense, dense_gb), (sparse, sparse_gb) = trainers
    times |= time_hot(
        {
            "dense": dense.step,
            "sparse": sparse.with_mvue(True, sparse.step),
            "no mvue": sparse.with_mvue(False, sparse.step),
        },
        rounds=rounds,
        warm_seconds=0.5,
    )
    ffn = micro_batches * times["dense ffn"] / (micro_batches * times["sparse ffn"] + arms.between_us(times))
    share = shape.layers * micro_batches * times["dense ffn"] / times["dense"]
    bound, speedup = arms.amdahl(share, ffn), times["dense"] / times["sparse"]
    tokens, flops, peak = micro_batches * shape.tokens, micro_batches * shape.flops(), arms.peak_flops()
    sparse.set_mvue(True)
    hosts = [host_time_us(trainer.step, 3) / 1e3 for trainer in (dense, sparse)]
    del sparse, trainer, trainers  # a GPU holds two of these models, not three
    free()
    decayed = arms.Trainer(shape, sparse=True, micro_batches=micro_batches, decay_in="backward", **settings)
    again = time_hot({"dense": dense.step, "decayed": decayed.step}, rounds=rounds, warm_seconds=0.5)
    row = (
        label, shape.name, str(compiled), micro_batches, times["dense"] / 1e3, times["sparse"] / 1e3, speedup, bound,
        speedup / bound, times["dense"] / times["no mvue"], share, ffn, tokens / times["dense"] * 1e6,
        tokens / times["sparse"] * 1e6, flops / times["dense"] * 1e6 / peak, flops / times["sparse"] * 1e6 / peak,
        dense_gb, sparse_gb, *hosts, again["dense"] / again["decayed"], peer,
    )  # fmt: skip
    table.add(*row)
    print(f"# {shape.name}: {time.time() - started:.0f} s", flush=True)
