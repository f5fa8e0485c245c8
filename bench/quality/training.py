"""One arm of the study, from its seed to its validation loss."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

import sparse24
from bench.quality.arms import Arm, mvue_of
from bench.quality.model import SmallGPT, matrices_and_others
from bench.quality.text import CONTEXT, VOCABULARY

WIDTH, LAYERS, BATCH = 384, 6, 64
VALID_BATCHES = 24
WARM_STEPS = 3  # of a phase, before its step is captured: these compile
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(rows: np.ndarray) -> Tensor:
    """uint16 rows [n, context + 1] as int16: ids are below 2^14. On the device, so that no step waits for a copy."""
    return torch.from_numpy(np.array(rows).view(np.int16)).to(DEVICE)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = max(100, steps // 20)
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def loss_of(forward, ids: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return forward(ids[:, :-1], ids[:, 1:])


def make(arm: Arm, steps: int, captured: bool) -> tuple[SmallGPT, torch.optim.Optimizer, sparse24.Recipe | None]:
    torch.manual_seed(arm.seed)
    d_ff = round(4 * arm.wide * WIDTH / 64) * 64
    model = SmallGPT(VOCABULARY, CONTEXT, WIDTH, LAYERS, d_ff, arm.activation).to(DEVICE)
    if arm.sparse:
        settings = {"precision": arm.precision} if arm.precision else {}
        sparse24.sparsify(model, backend="sparse", dtype=torch.bfloat16, **settings)
    # A graph keeps the numbers that it was captured with, and reads tensors anew.
    lr = torch.tensor(arm.lr, device=DEVICE) if captured else arm.lr
    optimizer = torch.optim.AdamW(
        matrices_and_others(model), lr=lr, betas=(0.9, 0.95), fused=DEVICE.type == "cuda", capturable=captured
    )
    if not arm.sparse:
        return model, optimizer, None
    recipe = sparse24.Recipe(
        model, optimizer, steps, decay=arm.decay, mask_interval=arm.interval, dense_fraction=arm.dense,
        mvue=mvue_of(arm), method=arm.method,
    )  # fmt: skip
    if arm.mvue == "h":
        for name, layer in recipe.layers.items():
            layer.set_mvue("input" if name.endswith("down_proj") else "output")
    return model, optimizer, recipe


class Step:
    """A training step, by itself or as a CUDA graph that holds all of it: the host then costs nothing.

    captured  capture the step of each phase after WARM_STEPS steps of it, and replay it from then on
    """

    def __init__(self, arm: Arm, steps: int, captured: bool):
        self.model, self.optimizer, self.recipe = make(arm, steps, captured)
        self.forward = torch.compile(self.model, dynamic=False)
        self.captured, self.phase, self.warm, self.graph = captured, None, 0, None
        self.ids = torch.zeros(BATCH, CONTEXT + 1, dtype=torch.int64, device=DEVICE)
        self.loss = torch.zeros((), device=DEVICE)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
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
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.forward, self.ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def capture(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
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


def train(arm: Arm, rows: Tensor, valid: dict[str, Tensor], steps: int, captured: bool = False) -> dict:
    torch._dynamo.reset()
    step, curve, start = Step(arm, steps, captured), [], time.perf_counter()
    times, before = [], start
    side = torch.cuda.stream(torch.cuda.Stream()) if captured else nullcontext()  # what is captured begins on one
    with side:
        for i in range(steps):
            step.set_lr(learning_rate(i, steps, arm.lr))
            step(rows[i * BATCH : (i + 1) * BATCH])
            if i % 100 == 0:
                curve.append((i, round(float(step.loss), 4)))
                now = time.perf_counter()
                times, before = [*times, 10 * (now - before)], now
            if i % 1000 == 100:
                print(f"{arm.name}: step {i}, loss {curve[-1][1]}, {times[-1]:.1f} ms a step", flush=True)
        losses = validate(step.forward, valid)
    recipe = step.recipe
    return {
        "arm": arm.name, "group": arm.group, "seed": arm.seed, "steps": steps, "tokens": steps * BATCH * CONTEXT,
        "block_parameters": step.model.block_parameters(), "captured": captured,
        "seconds": round(time.perf_counter() - start, 1), "step_ms": round(median(times), 2), **losses,
        "flip_rate": recipe.metrics().get("flip_rate", 0.0) if recipe else 0.0, "curve": curve,
        "events": [str(event) for event in recipe.events] if recipe else [],
    }  # fmt: skip
