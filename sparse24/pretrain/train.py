"""Training of one arm: the loop, its measurements, its checkpoints."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..convert import sparsify
from ..convert.to_sparse_activations import ACTIVATION
from ..errors import Sparse24Error
from ..formats import FORMATS
from ..recipe import Recipe
from ..recipe.probe import MaskProbe
from ..save import verify
from ..save.fitting import check_optimizer
from . import checkpoint, tokens
from .equal_time import SPARSE_KINDS
from .interrupt import StopRequest
from .metrics import MetricsLog, Row
from .model import build_model, build_optimizer, count_parameters, model_config, next_token_loss
from .samples import write_samples
from .saved import differences
from .settings import DTYPES, Settings, kind_of

#: what a checkpoint's state.pt holds, beside version and step
STATE_KEYS = {"step", "data", "seconds", "optimizer", "scaler", "recipe", "probe", "rng_cpu", "rng_device"}


class TrainingDiverged(Sparse24Error):
    """The loss is no longer a finite number."""


class Stopped(Exception):
    """The run was asked to stop, and saved. `signal` is the number of the signal."""

    def __init__(self, signal: int, path: Path):
        super().__init__(f"stopped by signal {signal}; saved {path}")
        self.signal, self.path = signal, path
        self.out = path.parents[2]


def learning_rate(step: int, s: Settings) -> float:
    """Linear warm-up, then a cosine to `min_lr` at the last step. `step` counts from 0."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    done = (step - s.warmup) / max(1, s.steps - 1 - s.warmup)
    return s.min_lr + 0.5 * (s.lr - s.min_lr) * (1 + math.cos(math.pi * done))


def sparsify_settings(s: Settings) -> dict[str, Any]:
    """Arguments of `sparse24.sparsify` for a run; on a GPU values are packed in the dtype of autocast."""
    packs = s.operand != ACTIVATION and s.precision is None
    in_16_bits = packs and s.device.startswith("cuda") and s.dtype != "float32"
    return {
        "backend": s.backend,
        "operand": s.operand,
        "precision": s.precision,
        "dtype": DTYPES[s.dtype] if in_16_bits else None,
        "tokens": s.micro_batch * s.ctx,
        "micro_batches": s.batch // s.micro_batch,
    }


class StepClock:
    """Time of each step in milliseconds; on a GPU by events, which do not make the step wait."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: Any) -> None:
        self.spans.append((start, self.mark()))

    def read(self) -> list[float]:
        """Times of the steps since the last read; on a GPU it waits for the last of them."""
        if self.cuda and self.spans:
            self.spans[-1][1].synchronize()
        times = [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in self.spans]
        self.spans.clear()
        return times


class Trainer:
    """One arm: a dense model, whatever its width, or one with 2:4 FFNs under the recipe."""

    def __init__(
        self,
        settings: Settings,
        arm: str,
        data: tokens.TokenData,
        out: Path,
        say: Callable[[str], None] = lambda line: None,
        on_step: Callable[[int], None] | None = None,
    ):
        """Build the model and go to the newest checkpoint in `out`, if `settings.resume`.

        Raises Sparse24Error when the checkpoint is corrupt or of another run.
        """
        s = self.settings = settings
        self.arm, self.data, self.out, self.say, self.on_step = arm, data, out, say, on_step
        self.device = torch.device(s.device)
        self.dtype = DTYPES[s.dtype]
        self.batches = tokens.Batches(data.train, s.ctx, s.batch, s.seed)
        self.checkpoints = out / "checkpoint" / arm
        self.step, self.seconds, self.report = 0, 0.0, None

        config = model_config(s, arm, data.tokenizer.vocab_size, data.tokenizer.end_of_text)
        self.model = build_model(config, s.seed).to(self.device).train()
        self.recipe = self.probe = None
        self.is_sparse = kind_of(arm) in SPARSE_KINDS
        if self.is_sparse:
            self.report = self.make_sparse()
        self.optimizer = build_optimizer(self.model, s)
        if self.is_sparse and s.operand != ACTIVATION:
            self.recipe = Recipe(
                self.model, self.optimizer, total_steps=s.steps, decay=s.decay, mask_interval=s.mask_interval,
                dense_fraction=s.dense_fraction, mvue=s.mvue, method=s.method, decay_schedule=s.decay_schedule,
                dense_at=s.dense_at, track_blocks=True, preset=s.recipe or "paper",
            )  # fmt: skip
        elif not self.is_sparse:
            with contextlib.suppress(Sparse24Error):  # no probe of a model whose widths no mask fits
                self.probe = MaskProbe(self.model, mask_interval=s.mask_interval)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=FORMATS[self.dtype].wants_loss_scaling)
        torch.manual_seed(s.seed)  # from here on a run's draws depend on nothing before
        if s.resume:
            self.restore()
        if s.compile:
            torch.compiler.reset()  # models of one class share torch's limit, and later arms would run eagerly
        self.forward = torch.compile(self.model) if s.compile else self.model
        # steps before times count: caches and compilers warm up at the start of a process and of a phase
        self.cold = min(5, max(1, s.steps // 10))

    def make_sparse(self) -> Any:
        report = sparsify(self.model, **sparsify_settings(self.settings))
        if not report.converted:
            reasons = "; ".join(sorted({reason for _, reason in report.skipped})) or "none was found"
            raise Sparse24Error(
                f"--ffn {kind_of(self.arm)}: no FFN layer can be 2:4 here ({reasons}); use --ffn dense, or --device cpu"
            )
        return report

    # ---- checkpoint --------------------------------------------------------------------------------------------

    def save(self) -> Path:
        state = {
            "arm": self.arm,
            "data": self.data.digest,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "recipe": self.recipe.state_dict() if self.recipe else None,
            "probe": self.probe.state_dict() if self.probe else None,
            # the only generators a run draws from; the data order needs none, it follows from (seed, step)
            "rng_cpu": torch.get_rng_state(),
            "rng_device": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        return checkpoint.save(
            self.checkpoints, self.step, self.model, state, self.settings.to_json(), self.data.tokenizer
        )

    def restore(self) -> None:
        found = checkpoint.load(self.checkpoints)
        if found is None:
            self.say(f"{self.arm}: no checkpoint yet, starting at step 0")
            return
        state = found.state
        lacking = sorted(STATE_KEYS - state.keys())
        if lacking:
            raise Sparse24Error(f"checkpoint {found.path} lacks {', '.join(lacking)}; start anew with --overwrite")
        changed = differences(found.settings, self.settings.to_json())
        if state["data"] != self.data.digest:
            changed.append("the text of --data or --valid is not the same")
        if changed:
            raise Sparse24Error(
                f"checkpoint {found.path} is of another run: {'; '.join(changed)}; "
                f"give the values it was made with, or another --out"
            )
        check_optimizer(found.path, state["optimizer"], self.optimizer)
        try:
            checkpoint.load_weights(self.model, found)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.recipe:
                self.recipe.load_state_dict(state["recipe"])
            if self.probe:
                self.probe.load_state_dict(state["probe"])
            torch.set_rng_state(state["rng_cpu"])
            if state["rng_device"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng_device"], self.device)
        except (KeyError, TypeError, RuntimeError) as e:
            raise Sparse24Error(f"checkpoint {found.path} is not whole ({e!r}); start anew with --overwrite") from e
        self.step, self.seconds = state["step"], state["seconds"]
        self.say(f"{self.arm}: goes on at step {self.step} from {found.path}")

    # ---- one step and one evaluation ---------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, ids) -> torch.Tensor:
        ids = torch.from_numpy(ids)
        return ids.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else ids

    def train_step(self) -> dict[str, Any]:
        """One optimizer step. The loss and the gradient norm stay on the device, not to make it wait."""
        s = self.settings
        inputs, targets = self.batches(self.step)
        micro_steps = s.batch // s.micro_batch
        lr, phase = learning_rate(self.step, s), self.phase
        loss_sum = torch.zeros((), device=self.device)
        micro_batches = (self.to_device(ids).chunk(micro_steps) for ids in (inputs, targets))
        for x, y in zip(*micro_batches, strict=True):
            with self.autocast():
                loss = next_token_loss(self.forward, x, y) / micro_steps
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        limit = s.clip if s.clip > 0 else math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)  # the recipe's hooks run in here, after clipping
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        timed, self.cold = self.cold == 0, max(0, self.cold - 1)
        if self.phase != phase:
            self.cold = 2
        return {"step": self.step, "phase": phase, "loss": loss_sum, "grad_norm": grad_norm, "lr": lr, "timed": timed,
                "bytes": int(self.data.token_bytes[targets].sum())}  # fmt: skip

    @property
    def phase(self) -> str:
        """Of the next step: "sparse" or "dense"."""
        if self.recipe is None:
            return "sparse" if self.is_sparse else "dense"
        return self.recipe.phase

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Loss and bits per byte on the fixed validation slice, and whether the weights in use are 2:4."""
        s = self.settings
        loss_sum, count, text_bytes = 0.0, 0, 0
        self.model.eval()
        for x, y in tokens.validation_batches(self.data.valid, s.ctx, s.micro_batch, s.eval_tokens):
            with self.autocast():
                loss_sum += next_token_loss(self.forward, self.to_device(x), self.to_device(y)).item() * y.size
            count += y.size
            text_bytes += int(self.data.token_bytes[y].sum())
        self.model.train()
        row = {"valid_loss": loss_sum / count, "valid_bits_per_byte": loss_sum / math.log(2) / max(1, text_bytes)}
        if self.recipe and self.phase == "sparse":
            row["verified"] = float(bool(verify(self.model)))
        return row

    # ---- the loop ----------------------------------------------------------------------------------------------

    def run(self, stop: StopRequest) -> None:
        """Train to the last step, with rows to metrics.csv and TensorBoard and checkpoints on the way.

        Raises TrainingDiverged at a loss that is not finite (the last good checkpoint stays) and Stopped after a
        signal (everything is saved).
        """
        s = self.settings
        log = MetricsLog(self.out, self.arm, self.step)
        bar = progress_bar(self)
        clock, pending = StepClock(self.device), []
        try:
            if self.step == 0:
                log.write([{"step": 0, "phase": self.phase, **self.evaluate()}])
            while self.step < s.steps:
                start = clock.mark()
                pending.append(self.train_step())
                clock.add(start)
                if self.probe:  # outside the clock: a dense run without it would not do this
                    self.probe.after_step(self.step)
                if self.on_step:
                    self.on_step(self.step)
                last = self.step == s.steps
                evaluates = last or self.step % s.eval_interval == 0
                saves = last or self.step % s.save_interval == 0
                if stop or evaluates or saves or self.step % s.mask_interval == 0 or self.step % s.log_interval == 0:
                    rows, extra = self.read_out(pending, clock)
                    if evaluates:
                        rows[-1] |= self.evaluate()
                    log.write(rows, extra)
                    bar.set_postfix_str(describe(rows[-1]), refresh=False)
                    bar.update(len(rows))
                if stop or saves:
                    path = self.save()
                if stop:
                    raise Stopped(stop.signal, path)
        finally:
            bar.close()
            log.close()

    def read_out(self, pending: list[dict[str, Any]], clock: StepClock) -> tuple[list[Row], dict[str, float]]:
        """Rows of the steps since the last read. Raises TrainingDiverged, naming the first step that is not finite."""
        s, rows = self.settings, []
        for item, step_ms in zip(pending, clock.read(), strict=True):
            loss, grad_norm = item["loss"].item(), item["grad_norm"].item()
            # a scaled fp16 step may have an infinite gradient: the scaler then skips the update
            if not math.isfinite(loss) or not (math.isfinite(grad_norm) or self.scaler.is_enabled()):
                self.diverged(item["step"], loss, grad_norm)
            row = {"step": item["step"], "phase": item["phase"], "loss": loss, "grad_norm": grad_norm, "lr": item["lr"]}
            row["bits_per_byte"] = loss * s.batch * s.ctx / math.log(2) / max(1, item["bytes"])
            self.seconds += step_ms / 1e3
            if item["timed"]:
                row |= {"step_ms": step_ms, "tokens_per_s": 1e3 * s.batch * s.ctx / step_ms}
            rows.append(row)
        pending.clear()
        watcher = self.recipe or self.probe
        extra = dict(watcher.metrics()) if watcher else {}
        if self.recipe and rows[-1]["phase"] == "dense":
            extra = {}  # masks are not searched any more
        rows[-1] |= {k: extra.pop(k) for k in ("flip_rate", "flip_rate_per_step", "mask_age", "decay") if k in extra}
        return rows, {k: v for k, v in extra.items() if k not in ("phase", "step")}

    def diverged(self, step: int, loss: float, grad_norm: float) -> None:
        kept = checkpoint.complete(self.checkpoints)
        where = f"the last good checkpoint is {kept[-1][1]}" if kept else "no checkpoint was written before"
        raise TrainingDiverged(
            f"{self.arm}: loss {loss} and gradient norm {grad_norm} at step {step} must be finite; {where}; "
            f"start anew with a lower --lr (now {self.settings.lr:g}) or a longer --warmup (now {self.settings.warmup})"
        )

    def samples(self) -> list[str]:
        """Continuations of the beginnings of evenly spread validation windows."""
        s, tokenizer = self.settings, self.data.tokenizer
        if s.samples == 0:
            return []
        length = min(16, s.ctx // 2)
        windows = tokens.validation_batches(self.data.valid, s.ctx, s.samples, s.samples * s.ctx)
        prompts = torch.from_numpy(windows[0][0][:, :length]).contiguous().to(self.device)
        with self.autocast():
            ids = write_samples(self.model, prompts, s.sample_tokens, s.ctx, tokenizer.vocab_size, s.seed)
        return [f"{tokenizer.decode(row[:length])}[>]{tokenizer.decode(row[length:])}" for row in ids.tolist()]

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)


def progress_bar(trainer: Trainer):
    from tqdm import tqdm

    # in a log file a line every 20 seconds is enough
    return tqdm(total=trainer.settings.steps, initial=trainer.step, desc=f"{trainer.arm:6s}", unit="step",
                dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 20.0)  # fmt: skip


def describe(row: Row) -> str:
    parts = [f"loss {row['loss']:.3f}", f"{row['bits_per_byte']:.3f} bits/byte"]
    if row.get("tokens_per_s"):
        parts.append(f"{row['tokens_per_s']:,.0f} tok/s")
    if row.get("flip_rate") is not None:
        parts.append(f"flips {row['flip_rate']:.4f}")
    return ", ".join([*parts, f"{row['phase']} phase"])
