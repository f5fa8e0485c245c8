"""Training steps under FSDP2, dense and 2:4: what `python -m sparse24 bench --distributed` times under torchrun.

Weights are fp32 and sharded, products bf16, blocks compiled one by one, AdamW, random tokens. An arm is built, warmed
up, timed and thrown away, and the arms take turns for several rounds, since a GPU has no room for all of them at once.
A step's time is that of the slowest rank; the table has medians over all rounds.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..convert import sparsify
from ..errors import Sparse24Error
from ..recipe import Recipe
from .arms import DECAY, peak_flops
from .communication import CountBytes, exposed_ms
from .models import Decoder, ModelShape, rotary_table
from .timing import Table

#: arm -> (kind, precision or scaling)
ARMS = {
    "dense": ("dense", None),
    "FP8 dense tensorwise": ("torchao", "tensorwise"),
    "FP8 dense rowwise": ("torchao", "rowwise"),
    "2:4": ("2:4", None),
    "2:4 fp8-hybrid": ("2:4", "fp8-hybrid"),
    "2:4 fp8": ("2:4", "fp8"),
}


def _llama(name: str, layers: int, d_model: int, heads: int, d_ff: int, tied: bool = True) -> ModelShape:
    """One of Llama 3's sizes: 8 heads of keys and values, its vocabulary, one sequence of 8192 tokens a GPU."""
    return ModelShape(
        name, "llama", layers=layers, d_model=d_model, heads=heads, kv_heads=8, d_ff=d_ff, vocab=128256, length=8192,
        batch=1, tied=tied,
    )  # fmt: skip


MODELS = {
    "tiny": ModelShape(
        "tiny", "llama", layers=2, d_model=64, heads=4, kv_heads=2, d_ff=128, vocab=512, length=64, batch=1, tied=False
    ),
    "llama-1B": _llama("llama-1B", layers=16, d_model=2048, heads=32, d_ff=8192),
    "llama-3B": _llama("llama-3B", layers=28, d_model=3072, heads=24, d_ff=8192),
    "llama-8B": _llama("llama-8B", layers=32, d_model=4096, heads=32, d_ff=14336, tied=False),
}
COLUMNS = [
    "model", "gpus", "tokens a GPU", "arm", "step_ms", "speedup", "tokens/s a GPU", "MFU", "peak GB",
    "gathered MB", "reduced MB", "exposed_ms", "power W", "steps",
]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is timed. tokens: of a GPU and step; layers 0: as many as the model has; arms (): all that can run."""

    model: str = "llama-8B"
    layers: int = 0
    tokens: int = 8192
    arms: tuple[str, ...] = ()
    warm: int = 30
    steps: int = 50
    rounds: int = 2
    compiled: bool = True

    def shape(self) -> ModelShape:
        """Raises Sparse24Error, naming the option, for what cannot be timed."""
        if self.model not in MODELS:
            raise Sparse24Error(f"--model must be one of {', '.join(MODELS)}, got {self.model!r}")
        for name in ("tokens", "warm", "steps", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise Sparse24Error(f"--{name} must be at least 1, got {value}")
        shape = MODELS[self.model]
        length = min(shape.length, self.tokens)
        if self.tokens % length:
            raise Sparse24Error(
                f"--tokens must be a multiple of {length}, a whole sequence of {self.model}, got {self.tokens}"
            )
        if not 0 <= self.layers <= shape.layers:
            raise Sparse24Error(f"--layers must be from 1 to {shape.layers}, those of {self.model}, got {self.layers}")
        return shape.of(layers=self.layers or shape.layers, length=length, batch=self.tokens // length)

    def chosen(self) -> list[str]:
        """The arms, dense first. Raises Sparse24Error for unknown ones, and for torchao's where it is missing."""
        has_torchao = importlib.util.find_spec("torchao") is not None
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise Sparse24Error(f"--arms has {', '.join(unknown)}; there are {', '.join(ARMS)}")
        if not has_torchao and any(ARMS[arm][0] == "torchao" for arm in self.arms):
            raise Sparse24Error("the FP8 dense arms are torchao's, which is not installed: pip install torchao")
        possible = [arm for arm in ARMS if has_torchao or ARMS[arm][0] != "torchao"]
        return [arm for arm in possible if not self.arms or arm in self.arms]


# -- an arm -------------------------------------------------------------------------------------------------------


class Arm:
    """A sharded model with its optimizer; `step()` is one optimizer step."""

    def __init__(self, shape: ModelShape, name: str, device: torch.device, *, compiled: bool):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.kind, self.variant = ARMS[name]
        with torch.device("meta"):
            self.model = Decoder(shape)
        self._convert()
        if compiled:
            self.model.compile_parts()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*self.model.blocks, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self._make_weights(shape, device)
        self.ids = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        settings = dict(decay=DECAY, dense_fraction=0)
        self.recipe = Recipe(self.model, self.optimizer, 1 << 30, **settings) if self.kind == "2:4" else None

    def _convert(self) -> None:
        """The layers that the arm changes; the head stays as it is in all of them."""
        if self.kind == "2:4":
            sparsify(self.model, backend="sparse", precision=self.variant)
        elif self.kind == "torchao":
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            config = Float8LinearConfig.from_recipe_name(self.variant)
            if self.variant == "tensorwise":
                config = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
            convert_to_float8_training(self.model.blocks, config=config)

    @torch.no_grad()
    def _make_weights(self, shape: ModelShape, device: torch.device) -> None:
        self.model.to_empty(device=device)
        torch.manual_seed(0)
        self.model.table.copy_(rotary_table(shape.length, shape.d_model // shape.heads))
        for p in self.model.parameters():
            nn.init.ones_(p) if p.dim() == 1 else nn.init.normal_(p, std=0.02)

    def step(self) -> None:
        self.model(self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.variant == "tensorwise":
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(self.model)


@dataclass
class Times:
    """What the rounds of an arm have found. Milliseconds a step; bytes, exposed time and memory of the worst rank."""

    steps_ms: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    gathered: float = math.nan
    reduced: float = math.nan
    exposed_ms: float = math.nan
    peak_bytes: float = math.nan


def run_round(arm: Arm, plan: Plan, times: Times, device: torch.device) -> None:
    """One turn of an arm: warm up, count bytes, look for what is exposed, then time."""
    for _ in range(plan.warm):
        arm.step()
    with torch.compiler.set_stance("force_eager"), CountBytes() as count:  # compilers do not see through the mode
        arm.step()
    times.gathered, times.reduced = float(count.bytes["gather"]), float(count.bytes["reduce"])
    times.exposed_ms = _largest(exposed_ms(arm.step), device)
    arm.step()
    with Power(device) as power:
        times.steps_ms += timed_steps(arm.step, plan.steps, device)
    times.watts += power.watts
    if device.type == "cuda":  # of the timed steps, which reset it
        times.peak_bytes = _largest(torch.cuda.max_memory_allocated(), device)


def timed_steps(step: Callable[[], None], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each step on the slowest rank: CUDA events on a GPU, the clock on a CPU."""
    dist.barrier()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        mine = [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
    else:
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        mine = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    slowest = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.tolist()


def _largest(value: float, device: torch.device) -> float:
    """Over all ranks."""
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


class Power:
    """Within it, `watts` are readings of this rank's GPU by nvidia-smi, five a second; none where it is missing."""

    def __init__(self, device: torch.device):
        self.watts: list[float] = []
        self._tool = shutil.which("nvidia-smi") if device.type == "cuda" else None
        self._index = str(device.index or 0)

    def __enter__(self) -> Power:
        self._process = None
        if self._tool:
            query = [
                self._tool,
                "--query-gpu=power.draw",
                "--format=csv,noheader,nounits",
                "-lms",
                "200",
                "-i",
                self._index,
            ]
            self._process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *error) -> None:
        if self._process is None:
            return
        self._process.terminate()
        for line in self._process.communicate()[0].splitlines():
            try:
                self.watts.append(float(line))
            except ValueError:  # the last line may be cut
                continue


# -- the table ----------------------------------------------------------------------------------------------------


def row(shape: ModelShape, name: str, times: Times, dense_ms: float, gpus: int) -> list:
    """A row of the table, in the order of COLUMNS."""
    step_ms = statistics.median(times.steps_ms)
    peak = peak_flops() if torch.cuda.is_available() else math.nan
    return [
        f"{shape.name} {shape.layers} layers", gpus, shape.tokens, name, step_ms, dense_ms / step_ms,
        shape.tokens / step_ms * 1e3, shape.flops() / (step_ms / 1e3) / peak, times.peak_bytes / 1e9,
        times.gathered / 1e6, times.reduced / 1e6, times.exposed_ms,
        statistics.median(times.watts) if times.watts else math.nan, len(times.steps_ms),
    ]  # fmt: skip


def start() -> tuple[torch.device, bool]:
    """(this rank's device, whether the process group was made here). Raises Sparse24Error outside of torchrun."""
    if "RANK" not in os.environ:
        raise Sparse24Error(
            "bench --distributed runs under torchrun: torchrun --nproc-per-node 2 -m sparse24 bench --distributed"
        )
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device, False
    dist.init_process_group("nccl" if gpu else "gloo")
    return device, True


def run(plan: Plan, folder: Path | None, name: str) -> Table:
    """Time the arms, print the table on rank 0 and, with a folder, write it as NAME.csv."""
    shape, arms = plan.shape(), plan.chosen()
    device, made_here = start()
    is_first = dist.get_rank() == 0
    times = {arm: Times() for arm in arms}
    try:
        for turn in range(plan.rounds):
            for arm in arms:
                built = Arm(shape, arm, device, compiled=plan.compiled)
                run_round(built, plan, times[arm], device)
                if is_first:
                    print(f"# round {turn + 1}: {arm} {statistics.median(times[arm].steps_ms):.2f} ms", flush=True)
                if built.recipe is not None:
                    built.recipe.detach()
                del built
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        table = Table(name, COLUMNS, 4, folder if is_first else None, quiet=not is_first)
        dense = times.get("dense")
        dense_ms = statistics.median(dense.steps_ms) if dense else math.nan
        for arm in arms:
            table.add(*row(shape, arm, times[arm], dense_ms, dist.get_world_size()))
        return table
    finally:
        if made_here:
            dist.destroy_process_group()
