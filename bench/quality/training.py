"""One arm of the study, from its seed to its validation loss."""

from __future__ import annotations

import gc
import importlib.util
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

import sparse24
from bench.quality.arms import SIZES, Arm, mvue_of
from bench.quality.model import SmallGPT, optimizers
from bench.quality.text import CONTEXT, VOCABULARY
from sparse24.benchmark import float8_dense
from sparse24.errors import Sparse24Error

BATCH = 64  # rows of a micro-batch
VALID_BATCHES = 24
VALID_FROM, VALID_POINTS = 0.6, 16  # of a run's steps: where losses lie that another arm's last one is compared with
WARM_STEPS = 3  # of a phase, before its step is captured: these compile
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(rows: np.ndarray) -> Tensor:
    """uint16 rows [n, context + 1] as int16: ids are below 2^14. On the device, so that no step waits for a copy."""
    return torch.from_numpy(np.array(rows).view(np.int16)).to(DEVICE)


def outside_gib() -> float:
    """GPU memory that is in use and not for this process's tensors: its context, and all that other processes have."""
    if DEVICE.type == "cpu":
        return 0.0
    gc.collect()  # a model that was compiled lies in circles of references, and a large one fits once only
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return round((total - free - torch.cuda.memory_reserved()) / 2**30, 2)


def most_reserved_gib() -> float:
    return round(torch.cuda.max_memory_reserved() / 2**30, 1) if DEVICE.type == "cuda" else 0.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = max(100, steps // 20)
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def loss_of(forward, ids: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return forward(ids[:, :-1], ids[:, 1:])


def check(arm: Arm) -> None:
    """Raises Sparse24Error where what an arm is trained with is not installed."""
    if arm.precision and not arm.sparse and importlib.util.find_spec("torchao") is None:
        raise Sparse24Error(
            f"{arm.spelled!r} has the 8-bit dense layers of torchao, which is not installed: pip install torchao"
        )


def make(arm: Arm, steps: int, captured: bool) -> tuple[SmallGPT, list[torch.optim.Optimizer], sparse24.Recipe | None]:
    check(arm)
    torch.manual_seed(arm.seed)
    width, layers = SIZES[arm.size].width, SIZES[arm.size].layers
    model = SmallGPT(VOCABULARY, CONTEXT, width, layers, arm.d_ff(width), arm.activation).to(DEVICE)
    settings = {"precision": arm.precision} if arm.precision else {}
    if arm.has_recipe:
        sparse24.sparsify(model, backend="sparse", dtype=torch.bfloat16, **settings)
    elif arm.sparse:
        sparse24.sparsify(model, backend="sparse", operand=arm.operand, **settings)
    elif arm.precision:
        for block in model.blocks:
            float8_dense.convert(block.mlp, "tensorwise")
    # A graph keeps the numbers that it was captured with, and reads tensors anew.
    lr = torch.tensor(arm.lr, device=DEVICE) if captured else arm.lr
    each = optimizers(model, arm.optimizer, lr, captured)
    if not arm.has_recipe:
        return model, each, None
    recipe = sparse24.Recipe(
        model, each, steps, decay=arm.decay, mask_interval=arm.interval, dense_fraction=arm.dense,
        mvue=mvue_of(arm), method=arm.method,
    )  # fmt: skip
    if arm.mvue == "h":
        for name, layer in recipe.layers.items():
            layer.set_mvue("input" if name.endswith("down_proj") else "output")
    return model, each, recipe


class Step:
    """A training step of one or more micro-batches, by itself or as a CUDA graph of all of it: the host costs nothing.

    captured  capture the step of each phase after WARM_STEPS steps of it, and replay it from then on
    """

    def __init__(self, arm: Arm, steps: int, captured: bool):
        captured = captured and arm.optimizer == "adamw"  # torch's Muon keeps its learning rate on the host
        self.model, self.optimizers, self.recipe = make(arm, steps, captured)
        self.forward = torch.compile(self.model, dynamic=False)
        self.captured, self.phase, self.warm, self.graph = captured, None, 0, None
        self.micro_batches = arm.micro_batches
        self.ids = torch.zeros(arm.micro_batches * BATCH, CONTEXT + 1, dtype=torch.int64, device=DEVICE)
        self.loss = torch.zeros((), device=DEVICE)

    def set_lr(self, lr: float) -> None:
        for group in (group for each in self.optimizers for group in each.param_groups):
            if self.captured:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def __call__(self, rows: Tensor) -> None:
        phase = self.recipe.phase if self.recipe else "dense"
        if phase != self.phase:
            self.phase, self.warm, self.graph = phase, WARM_STEPS, None
        self.ids.copy_(rows)
        if not self.captured or self.warm > 0:
            self.warm -= 1
            self.run()
            return
        if self.graph is None:
            self.capture()
        if self.recipe is None:
            self.graph.replay()
        else:
            self.recipe.replay(self.graph)

    def run(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss.zero_()
        for ids in self.ids.split(BATCH):
            loss = loss_of(self.forward, ids) / self.micro_batches
            loss.backward()
            self.loss.add_(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for each in self.optimizers:
            each.step()

    def capture(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with self.recipe.capturing() if self.recipe else nullcontext(), torch.cuda.graph(self.graph):
            self.run()


@torch.no_grad()
def validate(forward, valid: dict[str, Tensor]) -> dict[str, float]:
    losses = {}
    for source, rows in valid.items():
        batches = [rows[i * BATCH : (i + 1) * BATCH].long() for i in range(VALID_BATCHES)]
        losses[source] = sum(float(loss_of(forward, ids)) for ids in batches) / VALID_BATCHES
    return losses | {"mean": sum(losses.values()) / len(losses)}


class Clock:
    """Times of a run's steps, phase by phase. Validation is left out, and compiling is what a median does not see."""

    def __init__(self):
        self.begin, self.steps, self.times = time.perf_counter(), Counter(), {}

    def lap(self, phase: str, steps: int) -> float:
        """ms a step of the `steps` since the last lap."""
        now = time.perf_counter()
        ms, self.begin = 1e3 * (now - self.begin) / steps, now
        self.times.setdefault(phase, []).append(ms)
        return ms

    @contextmanager
    def stopped(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def median(self, phase: str | None = None) -> float:
        """ms a step, of a phase or of all; of all too where no lap ended in the phase."""
        laps = self.times.get(phase) or [ms for each in self.times.values() for ms in each]
        return round(median(laps), 2)

    def phases(self) -> list[tuple[str, int, float]]:
        """Each phase in its turn: its name, its steps, ms a step."""
        return [(phase, steps, self.median(phase)) for phase, steps in self.steps.items()]


def validation_steps(steps: int) -> set[int]:
    """After so many steps, besides the last, the validation loss is taken."""
    at = (VALID_FROM + (1 - VALID_FROM) * i / VALID_POINTS for i in range(VALID_POINTS))
    return {round(steps * part) for part in at} - {0, steps}


def train(arm: Arm, rows: Tensor, valid: dict[str, Tensor], batches: int, captured: bool = False) -> dict:
    """batches  of BATCH rows that there are to train on: as many steps, or fewer where a step takes several"""
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps, size, every = batches // arm.micro_batches, arm.micro_batches * BATCH, 100 // arm.micro_batches
    step, curve, valid_curve, start = Step(arm, steps, captured), [], [], time.perf_counter()
    clock, validated = Clock(), validation_steps(steps)
    side = torch.cuda.stream(torch.cuda.Stream()) if captured else nullcontext()  # what is captured begins on one
    with side:
        for i in range(steps):
            step.set_lr(learning_rate(i, steps, arm.lr))
            step(rows[i * size : (i + 1) * size])
            clock.steps[step.phase] += 1
            if i % every == 0:
                curve.append((i, round(float(step.loss), 4)))
                ms = clock.lap(step.phase, every if i else 1)
                if i % (10 * every) == every:
                    print(f"{arm.name}: step {i}, loss {curve[-1][1]}, {ms:.1f} ms a step", flush=True)
            if i + 1 in validated:
                float(step.loss)  # what was enqueued before is no part of what validation takes
                with clock.stopped():
                    valid_curve.append((i + 1, round(validate(step.forward, valid)["mean"], 5)))
        losses = validate(step.forward, valid)
    recipe = step.recipe
    return {
        "arm": arm.name, "group": arm.group, "seed": arm.seed, "steps": steps, "tokens": steps * size * CONTEXT,
        "block_parameters": step.model.block_parameters(), "captured": step.captured,
        "seconds": round(time.perf_counter() - start, 1), "step_ms": clock.median(),
        "phases": clock.phases(), "gib": most_reserved_gib(), **losses,
        "flip_rate": recipe.metrics().get("flip_rate", 0.0) if recipe else 0.0, "curve": curve,
        "valid_curve": [*valid_curve, (steps, losses["mean"])],
        "events": [str(event) for event in recipe.events] if recipe else [],
    }  # fmt: skip
