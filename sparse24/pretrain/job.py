"""The main job: prepare the text, train each arm, write tables and plots."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._version import __version__
from ..convert.to_sparse_activations import ACTIVATION
from ..errors import Sparse24Error
from ..files import empty, locked, refusals_named, write_text_atomically
from . import metrics, plots, summary, tokens
from .equal_time import ffn_width
from .interrupt import StopRequest
from .saved import differences, load_config
from .settings import Settings, kind_of, resolve
from .train import Trainer

OUR_FILES = (
    "config.json", "metrics.csv", "summary.json", "summary.md", "samples.txt", "loss.png", "flip_rate.png",
    "flips_against_gap.png",
)  # fmt: skip
OUR_FOLDERS = ("checkpoint", "tensorboard")


def pretrain(
    settings: Settings,
    say: Callable[[str], None] = print,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Run the job; returns what summary.json holds.

    settings  as the user gave them; what is left out comes from the preset
    say       takes a line of progress
    on_step   is called after each optimizer step with the number of finished ones

    Raises Sparse24Error for bad values, input or checkpoints, TrainingDiverged for a loss that is not finite, and
    Stopped after Ctrl-C or SIGTERM, when all is saved.
    """
    s = resolve(settings)
    out = Path(s.out).expanduser() if s.out else new_run_folder(s)
    refuse_mixed_runs(out, s)
    with StopRequest() as stop, determinism(s.deterministic), writable(out), locked(out):
        refuse_mixed_runs(out, s)  # once more: another process may have begun before this one had the lock
        data = tokens.prepare(s, say)
        with metrics.board_errors_without_traceback(), refusals_named(out, "make room, then --resume"):
            begin(out, s, data)
            results, written = run_arms(s, data, out, stop, say, on_step)
    say("")
    say(summary.table(results))
    say("")
    for line in summary.words(results, s):
        say(line)
    say("")
    say(f"pictures: {out / 'loss.png'}, {out / 'flip_rate.png'}; tables: {out / 'summary.md'}, {out / 'metrics.csv'}")
    return written


# ---- the output folder ---------------------------------------------------------------------------------------------


def new_run_folder(s: Settings) -> Path:
    """runs/gpt2-tiny-<time>: a run without --out never meets another one."""
    return Path("runs") / f"{s.model}-{s.preset}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def refuse_mixed_runs(out: Path, s: Settings) -> None:
    """Raises Sparse24Error where `out` has another run, or has none of these settings for --resume."""
    folder = out / "checkpoint"
    there = (out / "config.json").exists() or (folder.is_dir() and any(folder.iterdir()))
    if there and not s.resume and not s.overwrite:
        raise Sparse24Error(
            f"--out {out} already holds a run; --resume goes on with it, --overwrite replaces it, else name another"
        )
    if s.resume:
        changed = differences(load_config(out)["settings"], s.to_json())
        if changed:
            raise Sparse24Error(
                f"--resume: the run in {out} has other settings: {'; '.join(changed)}; "
                f"leave these options out to take the saved ones, or use another --out"
            )


@contextlib.contextmanager
def writable(out: Path):
    """Make the folder and test it before any work is done; remove it if the run ends before it has written anything."""
    fresh = not out.exists()
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as e:
            raise Sparse24Error(f"--out {out} cannot be written ({e.strerror or e}); name a folder that can") from e
        yield
    finally:
        if fresh and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def begin(out: Path, s: Settings, data: tokens.TokenData) -> None:
    """Remove what --overwrite replaces, and only files of ours, then write config.json."""
    if s.overwrite:
        for name in OUR_FILES:
            (out / name).unlink(missing_ok=True)
        for name in OUR_FOLDERS:
            empty(out / name)
    if s.resume and (before := load_config(out)["data"]) != data.digest:
        raise Sparse24Error(
            f"--resume: the text has changed since the run in {out} began (digest {before}, now {data.digest}); "
            f"give the same --data and --valid, or start a run in another --out"
        )
    asked = s.to_json() | {"resume": False, "overwrite": False}
    about = {"sparse24": __version__, "data": data.digest, "settings": asked}
    write_text_atomically(out / "config.json", json.dumps(about, indent=2) + "\n")


# ---- the arms ------------------------------------------------------------------------------------------------------


def run_arms(
    s: Settings,
    data: tokens.TokenData,
    out: Path,
    stop: StopRequest,
    say: Callable[[str], None],
    on_step: Callable[[int], None] | None,
) -> tuple[dict[str, summary.Result], dict[str, Any]]:
    """Train what has not been trained before; returns the arms' results and the summary that was written last."""
    results = summary.finished_results(out) if s.resume else {}
    for arm, own in s.runs.items():
        if arm in results:
            say(f"{arm}: finished before")
        else:
            results[arm] = run_arm(arm, own, data, out, stop, say, on_step)
        written = summary.write_summary(out, s, results, machine(s))
    draw(out, s, results)
    return results, written


def run_arm(
    arm: str,
    s: Settings,
    data: tokens.TokenData,
    out: Path,
    stop: StopRequest,
    say: Callable[[str], None],
    on_step: Callable[[int], None] | None,
) -> summary.Result:
    """Train one arm, or the rest of it; pictures are drawn whatever ends it."""
    reset_peak_memory(s.device)
    trainer = Trainer(s, arm, data, out, say, on_step)
    introduce(trainer, say)
    try:
        with stop.deferred():
            trainer.run(stop)
    finally:
        draw(out, s)
    if trainer.recipe and trainer.recipe.block_flips.searches:
        trainer.recipe.plot_flips_against_gap(out / "flips_against_gap.png")
    rows = metrics.read_rows(out / "metrics.csv", arm)
    return summary.arm_result(
        arm, rows, s, parameters=trainer.parameters, seconds=trainer.seconds, ffn_width=ffn_width(s, kind_of(arm)),
        peak_memory_mib=peak_memory_mib(s.device), samples=trainer.samples(),
    )  # fmt: skip


@contextlib.contextmanager
def determinism(wanted: bool):
    """Deterministic kernels within the context, where torch has them."""
    import torch

    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def introduce(trainer: Trainer, say: Callable[[str], None]) -> None:
    s = trainer.settings
    say(f"{trainer.arm}: {s.model}, {trainer.parameters / 1e6:.2f} M parameters, on {s.device} in {s.dtype}")
    if trainer.report is not None:
        what = "read 2:4 activations" if trainer.report.operand == ACTIVATION else "are 2:4"
        layers = f"{len(trainer.report.converted)} FFN layers {what}, {len(trainer.report.skipped)} skipped"
        phases = trainer.recipe.phases.sparse_steps if trainer.recipe else s.steps
        say(f"{trainer.arm}: {layers}; {phases} of {s.steps} steps are sparse")


def draw(out: Path, s: Settings, results: dict[str, summary.Result] | None = None) -> None:
    """Draw both plots from what has been measured so far; with `results`, only the best arm of each kind."""
    kept = {result["arm"] for result in summary.best(results).values()} if results else None
    rows = [r for r in metrics.read_rows(out / "metrics.csv") if kept is None or r["arm"] in kept]
    with contextlib.suppress(OSError):
        plots.plot_loss(rows, out / "loss.png", summary.title(s), s)
        plots.plot_flip_rate(rows, out / "flip_rate.png", summary.title(s), s.mask_interval)


def reset_peak_memory(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # of the arm before
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: str) -> float | None:
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**20 if device.startswith("cuda") else None


def machine(s: Settings) -> dict[str, Any]:
    import torch

    device = (
        torch.cuda.get_device_name(s.device)
        if s.device.startswith("cuda")
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {"device": device, "dtype": s.dtype, "torch": torch.__version__, "sparse24": __version__}
