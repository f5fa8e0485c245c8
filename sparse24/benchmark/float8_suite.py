"""2:4 layers of 8-bit products beside their rivals, from interleaved runs: bf16 dense, FP8 dense, 2:4 in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from . import arms, float8_dense
from .models import ModelShape
from .suite import MANY, MASTERS, fresh, peak_gb
from .timing import Table, time_hot

#: 2:4 columns -> `precision` of `sparsify`
PRECISIONS = {"2:4": None, "fp8-hybrid": "fp8-hybrid", "fp8": "fp8"}
DENSE, RIVAL = "bf16 dense", "best FP8 dense"
_RATIOS = [f"{name} over {rival}" for name in ("fp8-hybrid", "fp8") for rival in (DENSE, RIVAL, "2:4")]


def part_columns() -> list[str]:
    """Of the tables `ffn_fp8` and `block_fp8`. Times of a step of one micro-batch; MB that forward keeps."""
    times = [f"{name} us" for name in (DENSE, *float8_dense.variants(), *PRECISIONS)]
    many = [f"{name} over {rival}, {MANY} micro-batches" for name in ("fp8-hybrid", "fp8") for rival in (DENSE, RIVAL)]
    kept = [f"{name} kept MB" for name in (DENSE, *PRECISIONS)]
    return ["weights", "layer", *times, *_RATIOS, *many, "repack us", "fp8 repack us", *kept]


def step_columns() -> list[str]:
    """Of the table `step_fp8`."""
    names = (DENSE, *float8_dense.variants(), *PRECISIONS, "fp8, others FP8 dense")
    ratios = [*_RATIOS, f"fp8, others FP8 dense over {RIVAL}"]
    return ["weights", "model", *(f"{name} ms" for name in names), *ratios, *(f"{name} GB" for name in names)]


class PartTimes:
    """Times in microseconds of a feed-forward layer or a block in all its forms, from one interleaved run.

    make   `feed_forward_arm` or `block_arm`, with all but sparse, precision and fp8_dense settled
    dense  settings of the dense arms alone
    """

    def __init__(self, make: Callable[..., arms.Arm], dense: dict, *, rounds: int, warm: float, calls: int):
        fresh()
        self.arms = {DENSE: make(sparse=False, **dense)}
        for name, variant in float8_dense.variants().items():
            self.arms[name] = make(sparse=False, fp8_dense=variant, **dense)
        for name, precision in PRECISIONS.items():
            self.arms[name] = make(sparse=True, precision=precision)
        calls_of: dict[str, Callable] = {}
        for name, arm in self.arms.items():
            arm.micro_batch()
            if arm.layers:
                arm.repack()  # scales are known from here on, as after a step
                calls_of |= {f"{name} repack": arm.repack, f"{name} search": arm.search, f"{name} decay": arm.decay}
            calls_of |= {name: arm.micro_batch, f"{name} sum": arm.accumulate}
        self.times = time_hot(calls_of, rounds=rounds, warm_seconds=warm, calls=calls)

    def step_us(self, name: str, micro_batches: int = 1) -> float:
        """An optimizer step of one form; of the fastest dense one for "best FP8 dense"."""
        if name == RIVAL:
            return min(self.step_us(variant, micro_batches) for variant in float8_dense.variants())
        parts = {part: self.times.get(f"{name} {part}", 0.0) for part in ("repack", "search", "decay", "sum")}
        once = arms.between_us(parts) if name in PRECISIONS else 0.0
        return self.times[name] + once + (micro_batches - 1) * parts["sum"]

    def row(self) -> list[float]:
        """The cells of `part_columns` but for the first two."""
        names = (DENSE, *float8_dense.variants(), *PRECISIONS)
        pairs = [(name, rival) for name in ("fp8-hybrid", "fp8") for rival in (DENSE, RIVAL, "2:4")]
        ratios = [self.step_us(rival) / self.step_us(name) for name, rival in pairs]
        many = [self.step_us(rival, MANY) / self.step_us(name, MANY) for name, rival in pairs if rival != "2:4"]
        repack = [self.times[f"{name} repack"] for name in ("2:4", "fp8")]
        kept = [kept_mb(self.arms[name]) for name in (DENSE, *PRECISIONS)]
        return [*map(self.step_us, names), *ratios, *many, *repack, *kept]


def kept_mb(arm: arms.Arm) -> float:
    """MB that a forward pass keeps for backward, beside its result."""
    arm.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with arm.context():
        out = arm.module(*arm.inputs)
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    del out
    return kept / 1e6


def feed_forwards(table: Table, layers: Iterable[ModelShape], masters: Iterable[str], rounds: int = 6) -> None:
    """The table `ffn_fp8`. 2:4 layers run eagerly, as one function; dense ones are compiled, gate and up as one."""
    for label in masters:
        for shape in layers:

            def make(*, sparse: bool, shape=shape, label=label, **settings) -> arms.Arm:
                return arms.feed_forward_arm(
                    shape, sparse=sparse, master=MASTERS[label], compiled=not sparse, **settings
                )

            calls = 4 if shape.tokens * shape.ffn_weights() < 1e12 else 2
            run = PartTimes(make, dict(one_gate=True), rounds=rounds, warm=0.7, calls=calls)
            table.add(label, shape.name, *run.row())


def blocks(table: Table, shapes: Iterable[ModelShape], masters: Iterable[str], rounds: int = 6) -> None:
    """The table `block_fp8`. FP8 dense is in all linear layers of the block, 8-bit 2:4 in its feed-forward layer."""
    for label in masters:
        for shape in shapes:

            def make(*, sparse: bool, shape=shape, label=label, **settings) -> arms.Arm:
                return arms.block_arm(shape, sparse=sparse, master=MASTERS[label], compiled=True, **settings)

            run = PartTimes(make, {}, rounds=rounds, warm=0.5, calls=3)
            table.add(label, shape.name.split(" ")[0], *run.row())


def training_step(table: Table, shape: ModelShape, label: str, micro_batches: int = 1, rounds: int = 5) -> None:
    """A row of `step_fp8`: whole models, each linear layer of them in FP8 dense in its columns."""
    fresh()
    forms = {DENSE: dict(sparse=False)}
    forms |= {name: dict(sparse=False, fp8_dense=variant) for name, variant in float8_dense.variants().items()}
    forms |= {name: dict(sparse=True, precision=precision) for name, precision in PRECISIONS.items()}
    first = next(iter(float8_dense.variants().values()))
    forms["fp8, others FP8 dense"] = dict(sparse=True, precision="fp8", fp8_dense=first)
    trainers, gigabytes = {}, {}
    for name, form in forms.items():
        trainers[name], gigabytes[name] = peak_gb(
            lambda form=form: arms.Trainer(shape, master=MASTERS[label], micro_batches=micro_batches, **form)
        )
    times = time_hot({name: trainer.step for name, trainer in trainers.items()}, rounds=rounds, warm_seconds=0.5)
    rival = min(times[variant] for variant in float8_dense.variants())
    over = {DENSE: times[DENSE], RIVAL: rival, "2:4": times["2:4"]}
    ratios = [over[key] / times[name] for name in ("fp8-hybrid", "fp8") for key in (DENSE, RIVAL, "2:4")]
    ratios.append(rival / times["fp8, others FP8 dense"])
    table.add(label, shape.name, *(times[name] / 1e3 for name in forms), *ratios, *gigabytes.values())
