"""`python -m sparse24 tune`: the decay factor for a run of `pretrain`, found on its own text, model and schedule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import sparse24

from ..errors import Sparse24Error
from . import tokens
from .job import writable
from .model import build_model, build_optimizer, model_config, next_token_loss
from .settings import Settings, require, resolve
from .summary import replace
from .train import learning_rate, sparsify_settings


def tune(
    settings: Settings,
    grid: Sequence[float] = (),
    probe_step: int | None = None,
    say: Callable[[str], None] = print,
) -> Any:
    """Probe each decay of `grid` for `probe_step` steps of the run that `settings` describe; see `sparse24.tune_decay`.

    grid        decays to try; empty: a decade's thirds from 1e-6 to 1e-2
    probe_step  inside the warm-up; default: its end, at least three mask searches

    Writes tune.json and tune.png into `settings.out`; a run that was stopped goes on where it was. Returns what
    `tune_decay` does. Raises Sparse24Error for bad values and input.
    """
    s = resolve(settings)
    probe_step = probe_step or max(s.warmup, 3 * s.mask_interval)
    require(
        probe_step <= s.steps,
        "probe_step",
        f"must not exceed --steps ({s.steps})",
        probe_step,
        "probe inside the warm-up",
    )
    out = Path(s.out).expanduser() if s.out else Path("runs") / f"tune-{s.model}-{s.preset}"
    with writable(out):
        data = tokens.prepare(s, say)
        same_run(out / "config.json", {"settings": s.to_json(), "data": data.digest, "tuned": True})
        config = model_config(s, "sparse", data.tokenizer.vocab_size, data.tokenizer.end_of_text)
        result = sparse24.tune_decay(
            lambda: build_model(config, s.seed).to(s.device).train(),
            lambda model: with_schedule(build_optimizer(model, s), s),
            lambda: batches(s, data, probe_step),
            **({"grid": tuple(grid)} if grid else {}),
            probe_step=probe_step,
            loss=lambda model, batch: accumulated_loss(model, batch, s),
            mask_interval=s.mask_interval,
            clip=s.clip or None,
            seed=s.seed,
            sparsify_settings=sparsify_settings(s),
            recipe_settings={"mvue": s.mvue},
            path=out / "arms.json",
            say=say,
        )
        result.save(out / "tune.json")
        result.plot(out / "tune.png")
    say("")
    say(str(result))
    say(f"picture: {out / 'tune.png'}; table: {out / 'tune.json'}")
    if result.decay is not None:
        say(f"use it with: python -m sparse24 pretrain --decay {result.decay:g}")
    return result


def same_run(path: Path, wanted: dict[str, Any]) -> None:
    """Probes in the folder must be of this model, text and schedule."""
    wanted = json.loads(json.dumps(wanted))
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if found != wanted:
            raise Sparse24Error(f"--out {path.parent} holds a run with other settings or text; name another folder")
    replace(path, json.dumps(wanted, indent=2) + "\n")


def with_schedule(optimizer: torch.optim.Optimizer, s: Settings):
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(min(step, s.steps - 1), s) / s.lr
    )
    return optimizer, schedule


def batches(s: Settings, data: tokens.TokenData, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = tokens.Batches(data.train, s.ctx, s.batch, s.seed)
    for step in range(count):
        yield tuple(torch.from_numpy(ids).to(s.device) for ids in order(step))


def accumulated_loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], s: Settings) -> torch.Tensor:
    """Mean loss of the batch, with the gradients of all micro-batches but the last accumulated already."""
    parts = list(zip(*(ids.split(s.micro_batch) for ids in batch), strict=True))
    dtype, before = getattr(torch, s.dtype), 0.0
    for i, (x, y) in enumerate(parts):
        with torch.autocast(torch.device(s.device).type, dtype, enabled=dtype != torch.float32):
            loss = next_token_loss(model, x, y) / len(parts)
        if i + 1 < len(parts):
            loss.backward()
            before = before + loss.detach()
    return loss + before
