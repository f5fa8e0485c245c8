"""Trains arms of the study one after the other and writes a row each: loss, time, what the masks did.

    python -m bench.quality.study TOKENS --arms "relu2 dense seed=0" "relu2 2:4 wide=1.5 seed=0" --out FOLDER

10.6 million parameters in blocks (384 wide, 6 layers, d_ff 1536 times the arm's `wide`), batches of 32,768 tokens, one
pass over TOKENS: nothing is seen twice, so capacity counts. AdamW (0.9, 0.95), warm-up, cosine to a tenth, clip 1. All
arms see the same batches in the same order. Several processes may work on one list: an arm belongs to the process that
makes its file first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import sparse24
from bench.quality.arms import Arm, mvue_of, parse
from bench.quality.model import SmallGPT, matrices_and_others, to_device
from bench.quality.text import CONTEXT, VOCABULARY
from sparse24.benchmark.timing import header

WIDTH, LAYERS, BATCH = 384, 6, 64
VALID_BATCHES = 24
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, CONTEXT + 1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = max(100, steps // 20)
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16)


def make(arm: Arm, steps: int) -> tuple[SmallGPT, torch.optim.Optimizer, sparse24.Recipe | None]:
    torch.manual_seed(arm.seed)
    d_ff = round(4 * arm.wide * WIDTH / 64) * 64
    model = SmallGPT(VOCABULARY, CONTEXT, WIDTH, LAYERS, d_ff, arm.activation).to(DEVICE)
    if arm.sparse:
        settings = {"precision": arm.precision} if arm.precision else {}
        sparse24.sparsify(model, backend="sparse", dtype=torch.bfloat16, **settings)
    fused = DEVICE.type == "cuda"
    optimizer = torch.optim.AdamW(matrices_and_others(model), lr=arm.lr, betas=(0.9, 0.95), fused=fused)
    recipe = None
    if arm.sparse:
        recipe = sparse24.Recipe(
            model, optimizer, steps, decay=arm.decay, mask_interval=arm.interval, dense_fraction=arm.dense,
            mvue=mvue_of(arm), method=arm.method,
        )  # fmt: skip
        if arm.mvue == "h":
            for name, layer in recipe.layers.items():
                layer.set_mvue("input" if name.endswith("down_proj") else "output")
    return model, optimizer, recipe


def batches(rows: np.ndarray, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(steps):
        yield to_device(rows[step * BATCH : (step + 1) * BATCH], DEVICE)


@torch.no_grad()
def validate(forward, valid: dict[str, np.ndarray]) -> dict[str, float]:
    losses = {}
    for source, rows in valid.items():
        with autocast():
            losses[source] = sum(float(forward(*batch)) for batch in batches(rows, VALID_BATCHES)) / VALID_BATCHES
    return losses | {"mean": sum(losses.values()) / len(losses)}


def train(arm: Arm, train_rows: np.ndarray, valid: dict[str, np.ndarray], steps: int) -> dict:
    """One arm, from its seed to its validation loss."""
    torch._dynamo.reset()
    model, optimizer, recipe = make(arm, steps)
    forward = torch.compile(model, dynamic=False)
    curve, start = [], time.perf_counter()
    for step, batch in enumerate(batches(train_rows, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, arm.lr)
        with autocast():
            loss = forward(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            curve.append((step, round(float(loss.detach()), 4)))
    losses = validate(forward, valid)
    return {
        "arm": arm.name, "group": arm.group, "seed": arm.seed, "steps": steps, "tokens": steps * BATCH * CONTEXT,
        "block_parameters": model.block_parameters(), "seconds": round(time.perf_counter() - start, 1), **losses,
        "flip_rate": recipe.metrics().get("flip_rate", 0.0) if recipe else 0.0, "curve": curve,
        "events": [str(event) for event in recipe.events] if recipe else [],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, a JSON file an arm")
    parser.add_argument("--fraction", type=float, default=1.0, help="part of the training rows that each arm sees")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no arm that would end later")
    args = parser.parse_args()
    rows = load(args.tokens / "train.bin")
    valid = {path.name.split("_valid")[0]: load(path) for path in sorted(args.tokens.glob("*_valid.bin"))}
    steps = int(len(rows) * args.fraction) // BATCH
    args.out.mkdir(parents=True, exist_ok=True)
    begin, longest = time.perf_counter(), 0.0
    for name in args.arms:
        if time.perf_counter() - begin + 1.1 * longest > args.seconds:
            break
        path = args.out / f"{name.replace(' ', '_').replace('/', '-').replace('=', '-').replace(':', '-')}.json"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            continue  # another process has it
        arm_begin = time.perf_counter()
        result = train(parse(name), rows, valid, steps) | {"made_by": header()}
        with os.fdopen(handle, "w") as file:
            json.dump(result, file)
        longest = max(longest, time.perf_counter() - arm_begin)
        print({key: value for key, value in result.items() if key not in ("curve", "made_by")}, flush=True)


if __name__ == "__main__":
    main()
