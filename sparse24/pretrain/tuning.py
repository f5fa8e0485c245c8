"""`python -m sparse24 tune`: finds the decay for a run of `pretrain`, with its text, model and schedule."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import Sparse24Error
from ..files import locked, read_json, write_text_atomically
from ..formats import FORMATS
from ..recipe import tune_decay
from . import tokens
from .job import writable
from .model import build_model, build_optimizer, model_config, next_token_loss
from .settings import DTYPES, Settings, flag_of, require, resolve
from .train import learning_rate, sparsify_settings


def tune(
    settings: Settings,
    grid: Sequence[float] = (),
    probe_step: int | None = None,
    say: Callable[[str], None] = print,
) -> Any:
    """Try each decay of `grid` for `probe_step` steps of the run that `settings` describe; see `sparse24.tune_decay`.

    grid        decays to try; empty: 0, and 1e-6 to 1e-2 in steps of about a factor of three
    probe_step  inside the warm-up; default: its end, at least three mask searches

    Writes tune.json and tune.png into `settings.out`; a run that was stopped goes on where it was. Returns what
    `tune_decay` does. Raises Sparse24Error for bad values and input.
    """
    s = resolve(settings)
    require(not isinstance(s.lr, tuple), "lr", "must be one rate here", settings.lr, "tune for each rate by itself")
    probe_step = probe_step or max(s.warmup, 3 * s.mask_interval)
    require(
        probe_step <= s.steps,
        "probe_step",
        f"must not exceed --steps ({s.steps})",
        probe_step,
        "choose a step inside the warm-up",
    )
    out = Path(s.out).expanduser() if s.out else Path("runs") / f"tune-{s.model}-{s.preset}"
    with writable(out), locked(out):
        data = tokens.prepare(s, say)
        same_run(out / "config.json", {"settings": s.to_json(), "data": data.digest, "tuned": True})
        config = model_config(s, "sparse", data.tokenizer.vocab_size, data.tokenizer.end_of_text)
        result = tune_decay(
            lambda: build_model(config, s.seed).to(s.device).train(),
            lambda model: with_schedule(build_optimizer(model, s), s),
            lambda: batches(s, data, probe_step),
            **({"grid": tuple(grid)} if grid else {}),
            probe_step=probe_step,
            loss=lambda model, batch: autocast_loss(model, batch, s),
            split=lambda batch: list(zip(*(ids.split(s.micro_batch) for ids in batch), strict=True)),
            make_scaler=lambda: torch.amp.GradScaler(
                torch.device(s.device).type, enabled=FORMATS[DTYPES[s.dtype]].wants_loss_scaling
            ),
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
        say(f"use it with: {command(settings, result.decay)}")
    return result


def same_run(path: Path, wanted: dict[str, Any]) -> None:
    """Runs in the folder must be of this model, text and schedule."""
    wanted = json.loads(json.dumps(wanted))
    if path.exists():
        try:
            found = read_json(path)
        except (OSError, Sparse24Error):
            found = None
        if found != wanted:
            raise Sparse24Error(f"--out {path.parent} holds a run with other settings or text; name another folder")
    write_text_atomically(path, json.dumps(wanted, indent=2) + "\n")


def with_schedule(optimizer: torch.optim.Optimizer, s: Settings):
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(min(step, s.steps - 1), s) / s.lr
    )
    return optimizer, schedule


def batches(s: Settings, data: tokens.TokenData, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = tokens.Batches(data.train, s.ctx, s.batch, s.seed)
    for step in range(count):
        yield tuple(torch.from_numpy(ids).to(s.device) for ids in order(step))


def autocast_loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], s: Settings) -> torch.Tensor:
    dtype = DTYPES[s.dtype]
    with torch.autocast(torch.device(s.device).type, dtype, enabled=dtype != torch.float32):
        return next_token_loss(model, *batch)


def command(settings: Settings, decay: float) -> str:
    """The run of `pretrain` that `settings` describe, with this decay, as a line for a shell."""
    words = ["python", "-m", "sparse24", "pretrain"]
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        if value == field.default or field.name in ("out", "decay"):
            continue
        option = flag_of(field.name)
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            for item in value if isinstance(value, tuple) else (value,):
                words += [option, str(item)]
    return shlex.join([*words, "--decay", f"{decay:g}"])
