"""Settings of a pre-training run: one dataclass, from which the command line is made too.

A field left at None takes the value of the preset. `resolve` fills these in and checks everything, so that the rest of
the job reads plain numbers, and a bad value is an error before any work is done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..convert.to_sparse_activations import ACTIVATION, OPERANDS
from ..errors import Sparse24Error
from ..formats import DEFAULT_DTYPE, FORMATS, WEIGHT_DTYPES, names
from ..functional.sparse_activation import PRECISIONS as PRUNED_PRECISIONS
from ..layers.float8 import PRECISIONS
from ..options import fitted
from ..recipe.decay import FLOAT32_MAX, SCHEDULES
from ..recipe.methods import METHODS
from ..recipe.phases import PLACES
from ..recipe.presets import PRESETS as RECIPES

ARMS = ("dense", "sparse", "half", "narrow", "wide", ACTIVATION)  # kinds of feed-forward layers
#: our names -> those of transformers
ACTIVATIONS = {"relu2": "relu2", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
COUNTS = (
    "layers", "width", "heads", "ctx", "ffn_width", "steps", "batch", "micro_batch", "mask_interval",
    "eval_interval", "eval_tokens", "log_interval", "save_interval", "tokenizer_bytes",
)  # fmt: skip

# Sizes as published for GPT-2; decay factors as the paper's code has them for these sizes. "tiny" suits two CPU cores:
# some ten minutes for a dense and a 2:4 arm. Short runs search masks more often and decay harder.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        layers=4, width=192, heads=4, ctx=256, vocab_size=2048, batch=8, micro_batch=8, steps=400, lr=2e-3,
        warmup=40, init_std=0.04, decay=6e-4, mask_interval=10, eval_interval=50, eval_tokens=16_384, save_interval=100,
    ),
    # What `make demo` trains: four arms in some five minutes on two CPU cores.
    "demo": dict(
        layers=2, width=128, heads=4, ctx=128, vocab_size=1024, batch=16, micro_batch=16, steps=370, lr=4e-3,
        warmup=50, init_std=0.04, activation="relu2", decay=1e-3, mask_interval=10, dense_fraction=1 / 3,
        eval_interval=100, eval_tokens=32_768, save_interval=250,
    ),
    "124m": dict(
        layers=12, width=768, heads=12, ctx=1024, vocab_size=50_304, batch=64, micro_batch=32, steps=2000, lr=6e-4,
        warmup=None, init_std=0.02, decay=6e-5, mask_interval=40, eval_interval=100,
        eval_tokens=524_288, save_interval=500,
    ),
    "350m": dict(
        layers=24, width=1024, heads=16, ctx=1024, vocab_size=50_304, batch=64, micro_batch=16, steps=2000, lr=3e-4,
        warmup=None, init_std=0.02, decay=2e-4, mask_interval=40, eval_interval=100,
        eval_tokens=524_288, save_interval=500,
    ),
}  # fmt: skip


def option(default: Any, text: str, *, free: bool = False) -> Any:
    """A field with its help text. `free`: may differ when a run is resumed, for it changes no weight."""
    return dataclasses.field(default=default, metadata={"help": text, "free": free})


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. Sizes are in elements, tokens or optimizer steps unless named otherwise."""

    # input and output; a resumed run must have the same text, but it may lie elsewhere
    data: tuple[str, ...] = option(
        (), "Text files or folders (UTF-8). Default: the Python standard library's sources.", free=True
    )
    valid: tuple[str, ...] = option(
        (), "Validation text. Default: a part of the data, split by file or at the tail.", free=True
    )
    valid_fraction: float = option(0.05, "Part of the data set aside when --valid is not given.")
    max_bytes: int | None = option(
        None, "Read at most this many bytes of text. Default: 8 MB of the default input, else all."
    )
    out: str | None = option(None, "Output folder. Default: a new folder under runs/.", free=True)
    cache_dir: str | None = option(None, "Where tokens are cached. Default: ~/.cache/sparse24.", free=True)
    resume: bool = option(False, "Go on with the run in --out, bit for bit.", free=True)
    overwrite: bool = option(False, "Replace the run in --out.", free=True)
    # model
    model: str = option("gpt2", "gpt2 or llama.")
    preset: str = option("tiny", "Sizes and rates to start from: tiny, demo, 124m or 350m.")
    layers: int | None = option(None, "Transformer layers.")
    width: int | None = option(None, "Model width.")
    heads: int | None = option(None, "Attention heads.")
    ctx: int | None = option(None, "Context length in tokens.")
    ffn_width: int | None = option(
        None, "Hidden width of the FFN. Default: 4x width (GPT-2), 8/3x rounded up to 64 (Llama)."
    )
    activation: str | None = option(
        None, "relu2 (squared ReLU), gelu, gelu_tanh, silu or relu. Default: gelu_tanh (GPT-2), silu (Llama)."
    )
    init_std: float | None = option(None, "Standard deviation of the initial weights.")
    dropout: float = option(0.0, "Dropout of GPT-2 (Llama has none).")
    # tokenizer
    tokenizer: str = option("bpe", "bpe (byte-level, trained on the training text) or bytes.")
    vocab_size: int | None = option(None, "Tokens of the BPE.")
    tokenizer_bytes: int = option(32_000_000, "Train the BPE on at most this many bytes.")
    # arms
    ffn: tuple[str, ...] = option(
        (),
        "dense, sparse (2:4), half (dense, half as wide), narrow (dense, as wide as sparse's FFN time pays for), wide "
        "(2:4, as wide as dense's FFN time pays for) or activation (wide, by --operand activation); may be repeated. "
        "Default: sparse.",
        free=True,
    )
    compare: bool = option(False, "Run dense and sparse, same seed and data order, and print the table.", free=True)
    time_ratio: float | None = option(
        None,
        "How many times as fast a 2:4 FFN is as a dense one, for narrow and wide. Default: estimated for an H100.",
    )
    operand: str = option(
        "weight",
        "Of 2:4 FFNs: weight, under the recipe, or activation: dense weights, and the two largest of each four that a "
        "(squared) ReLU makes; there is no recipe then.",
    )
    # the 2:4 recipe
    decay: float | None = option(None, "Decay of pruned weights. `python -m sparse24 tune` finds a good one.")
    mask_interval: int | None = option(None, "Optimizer steps between mask searches.")
    decay_schedule: str | None = option(
        None, "constant, linear (rising) or cosine (falling), over the sparse steps. Default: constant."
    )
    dense_fraction: float | None = option(None, "Part of the steps that is dense. Default: 1/6.")
    dense_at: str | None = option(
        None, "Where: end, start, none, or auto (as the method has it; the paper's: end). Default: auto."
    )
    mvue: bool | str | None = option(  # text only from a named recipe
        None,
        "Prune the weight gradient's products 2:4, without bias. Default: yes, in the operand that --recipe names.",
    )
    method: str | None = option(None, "fst (the paper's), ste, sr-ste, step, s-ste or mvue. Default: fst.")
    recipe: str | None = option(
        None, "Named settings of the recipe: paper, equal-time or fine-tune. Other options override it."
    )
    precision: str | None = option(
        None,
        "fp8-hybrid (8-bit products but for the weight gradient) or fp8 (all; the one for --operand activation). "
        "Default: 16 bits.",
    )
    backend: str = option("sparse", "sparse, or auto: only layers that a GPU should train faster than dense.")
    # optimization
    steps: int | None = option(None, "Optimizer steps.")
    batch: int | None = option(None, "Sequences in an optimizer step.")
    micro_batch: int | None = option(None, "Sequences in a forward pass; gradients are accumulated.")
    lr: float | tuple[float, ...] | str | None = option(
        None, "Peak learning rate; several, as 1.5e-3,3e-3, train each arm with each and keep its best."
    )
    min_lr: float | None = option(None, "Last learning rate. Default: a tenth of the peak.")
    warmup: int | None = option(None, "Steps of linear warm-up. Default: a tenth.")
    weight_decay: float = option(0.1, "Weight decay of AdamW (matrices only).")
    beta1: float = option(0.9, "AdamW.")
    beta2: float = option(0.95, "AdamW.")
    clip: float = option(1.0, "Largest norm of the gradient; 0: no clipping.")
    seed: int = option(0, "Seed of the weights, the data order and the draws.")
    # machine
    device: str = option("auto", "auto, cpu or cuda.")
    dtype: str | None = option(
        None, "float32, bfloat16 or float16 (autocast). Default: bfloat16 on a GPU, else float32."
    )
    compile: bool = option(False, "torch.compile the model.")
    deterministic: bool = option(False, "Deterministic kernels, for bit-for-bit runs on a GPU.")
    # watching
    eval_interval: int | None = option(None, "Steps between evaluations.", free=True)
    eval_tokens: int | None = option(None, "Validation tokens used at most (a fixed slice).")
    log_interval: int | None = option(None, "Steps between reads of the loss. Default: 10 on a GPU, else 1.", free=True)
    save_interval: int | None = option(None, "Steps between checkpoints.", free=True)
    samples: int = option(3, "Texts to write at the end; 0: none.", free=True)
    sample_tokens: int = option(120, "Tokens in each.", free=True)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The FFN kinds to train, in order."""
        wanted = (("dense", "sparse") if self.compare else ()) + self.ffn
        return tuple(dict.fromkeys(wanted)) or ("sparse",)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.runs)

    @property
    def runs(self) -> dict[str, Settings]:
        """What to train, in order, with the settings of each: "sparse", or "sparse@0.003" of several rates."""
        own = {kind: arm_settings(self, kind) for kind in self.kinds}
        if not isinstance(self.lr, tuple):
            return own
        return {f"{kind}@{lr:g}": with_rate(s, lr) for kind, s in own.items() for lr in self.lr}

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def resolve(settings: Settings) -> Settings:
    """Fill in the preset and the defaults that depend on the machine, then check every value.

    Raises Sparse24Error, naming the option, its rule, the value and what to do.
    """
    settings = dataclasses.replace(settings, **fitted(Settings, vars(settings), flag_of))
    require_choice("--preset", settings.preset, PRESETS)
    require_choice("--device", settings.device.split(":")[0], ("auto", "cpu", "cuda"))
    require_choice("--recipe", settings.recipe, (None, *RECIPES))
    values = recipe_values("paper") | PRESETS[settings.preset]
    values |= recipe_values(settings.recipe) if settings.recipe else {}
    values |= {"dense_fraction": 0.0} if settings.operand == ACTIVATION else {}
    filled = {k: v for k, v in values.items() if getattr(settings, k) is None}
    if "micro_batch" in filled and settings.batch:  # the preset's may not divide the batch that was asked for
        filled["micro_batch"] = math.gcd(filled["micro_batch"], settings.batch)
    if "steps" not in filled and "warmup" in filled:
        filled["warmup"] = None
    s = dataclasses.replace(settings, **filled)
    device = resolve_device(s.device)
    s = dataclasses.replace(
        s,
        lr=rates(s.lr),
        device=device,
        dtype=s.dtype or (names((DEFAULT_DTYPE,)) if device.startswith("cuda") else "float32"),
        warmup=s.warmup if s.warmup is not None else s.steps // 10,
        log_interval=s.log_interval or (10 if device.startswith("cuda") else 1),
        max_bytes=s.max_bytes if s.max_bytes is not None or s.data else 8_000_000,
        ffn_width=s.ffn_width or default_ffn_width(s.model, s.width),
    )
    if not isinstance(s.lr, tuple):
        s = with_rate(s, s.lr)
    for settings in s.runs.values():
        check(settings)
    return s


def recipe_values(name: str) -> dict[str, Any]:
    """The settings that a named recipe decides; gradients are pruned where it leaves that open."""
    values = vars(RECIPES[name])
    return values | {"mvue": True if values["mvue"] is None else values["mvue"]}


def rates(lr: float | tuple[float, ...] | str) -> float | tuple[float, ...]:
    """The learning rates in "1.5e-3,3e-3", each once; one alone is a number."""
    try:
        parts = lr.split(",") if isinstance(lr, str) else lr if isinstance(lr, tuple) else (lr,)
        found = tuple(dict.fromkeys(float(part) for part in parts))
    except ValueError as e:
        raise Sparse24Error(
            f"--lr must be a number, or several between commas, got {lr!r}; use --lr 1.5e-3,3e-3"
        ) from e
    return found[0] if len(found) == 1 else found


def with_rate(s: Settings, lr: float) -> Settings:
    return dataclasses.replace(s, lr=lr, min_lr=lr / 10 if s.min_lr is None else s.min_lr)


def arm_settings(s: Settings, kind: str) -> Settings:
    """The settings of an arm of this kind, of which only "activation" has its own."""
    return dataclasses.replace(s, operand=ACTIVATION, dense_fraction=0.0) if kind == ACTIVATION else s


def kind_of(arm: str) -> str:
    """The FFN kind of an arm."""
    return arm.partition("@")[0]


def default_ffn_width(model: str, width: int) -> int:
    return 4 * width if model == "gpt2" else -(-(8 * width // 3) // 64) * 64


def resolve_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Sparse24Error(f"--device is {name}, but torch {torch.__version__} sees no CUDA device; use --device cpu")
    return name


def check(s: Settings) -> None:
    """Every rule on the values."""
    check_choices(s)
    check_ranges(s)
    check_sizes(s)


def check_choices(s: Settings) -> None:
    require_choice("--model", s.model, ("gpt2", "llama"))
    require_choice("--tokenizer", s.tokenizer, ("bpe", "bytes"))
    require_choice("--method", s.method, METHODS)
    require_choice("--decay-schedule", s.decay_schedule, SCHEDULES)
    require_choice("--dense-at", s.dense_at, PLACES)
    require_choice("--dtype", s.dtype, DTYPES)
    require_choice("--backend", s.backend, ("auto", "sparse"))
    require_choice("--operand", s.operand, OPERANDS)
    for kind in s.kinds:
        require_choice("--ffn", kind, ARMS)
    require_choice("--activation", s.activation, (None, *ACTIVATIONS))
    known = s.precision is None or s.precision in PRECISIONS
    rule = rule_on(s)
    rule("precision", known, f"must be {' or '.join(PRECISIONS)}", "leave it out for 16 bits")
    if s.operand == ACTIVATION:
        check_activation(s, rule)
    if ACTIVATION in (s.operand, *s.kinds):
        pruned = s.precision in PRUNED_PRECISIONS
        rule("precision", pruned, "must be fp8 where activations are pruned", "or leave it out, for 16 bits")
    scaled_twice = s.precision is not None and FORMATS[DTYPES[s.dtype]].wants_loss_scaling
    rule("dtype", not scaled_twice, f"cannot go with --precision {s.precision}", "use --dtype bfloat16")


def check_activation(s: Settings, rule: Callable[[str, bool, str, str], None]) -> None:
    """What --operand activation asks of the other options."""
    zeros = ("relu2", "relu")
    rule("activation", s.activation in zeros, f"must be {' or '.join(zeros)} for --operand activation", "name it")
    rule("model", s.model == "gpt2", "must be gpt2 for --operand activation: llama's FFN has a gate", "change one")
    rule("dense_fraction", s.dense_fraction == 0, "must be 0 for --operand activation", "leave it out")


def check_ranges(s: Settings) -> None:
    """Numbers by themselves."""
    rule = rule_on(s)
    ratio = s.time_ratio is None or 0 < s.time_ratio < math.inf
    rule("time_ratio", ratio, "must be finite and above 0", "leave it out for the cost model's")
    by_recipe = s.operand != ACTIVATION and {"sparse", "wide"} & set(s.kinds)
    known = s.time_ratio is not None or s.method != "mvue" or not by_recipe
    rule("time_ratio", known, "must be given for --method mvue, of which the cost model knows nothing", "measure it")
    for name in COUNTS:
        rule(name, getattr(s, name) >= 1, "must be at least 1", "give a positive number")
    for name in ("samples", "sample_tokens", "seed", "warmup"):
        rule(name, getattr(s, name) >= 0, "must not be negative", "give 0 or more")
    for name in ("out", "cache_dir"):  # which safetensors and tokenizers write to
        unicode = not any("\ud800" <= c <= "\udfff" for c in str(getattr(s, name) or ""))
        rule(name, unicode, "must be a name in Unicode", "rename the folder, or in an ASCII locale set PYTHONUTF8=1")
    rule("seed", s.seed < 2**63, "must be below 2^63", "give a smaller number")
    for name in ("lr", "min_lr", "init_std"):
        rule(name, 0 < getattr(s, name) < math.inf, "must be finite and above 0", "give a small positive number")
    for name in ("decay", "weight_decay", "clip"):
        finite = 0 <= getattr(s, name) <= FLOAT32_MAX
        rule(name, finite, "must be finite and not negative", "give 0 or a small number")
    for name in ("dropout", "beta1", "beta2"):
        rule(name, 0 <= getattr(s, name) < 1, "must be in [0, 1)", "give a smaller one")
    rule("dense_fraction", 0 <= s.dense_fraction <= 1, "must be in [0, 1]", "the paper has 1/6")
    rule("valid_fraction", 0 < s.valid_fraction <= 0.5, "must be in (0, 0.5]", "0.05 is usual")
    rule("max_bytes", s.max_bytes is None or s.max_bytes >= 1, "must be at least 1", "leave it out to read all")


def check_sizes(s: Settings) -> None:
    """Numbers that must fit one another."""
    rule = rule_on(s)
    rule("ctx", s.ctx >= 2, "must be at least 2", "give the context length in tokens")
    rounded = -(-s.width // s.heads) * s.heads
    rule("width", s.width == rounded, f"must be a multiple of --heads ({s.heads})", f"use --width {rounded}")
    if s.model == "llama":
        head = s.width // s.heads
        rule(
            "width", head % 2 == 0, f"over --heads ({s.heads}) must be even for llama's rotary embedding", "change one"
        )
    if "half" in s.kinds:
        rule("ffn_width", s.ffn_width % 2 == 0, "must be even for --ffn half", "use an even width")
    if {"sparse", "wide", ACTIVATION} & set(s.kinds):
        for name in ("width", "ffn_width"):
            step = 4 if name == "ffn_width" else math.lcm(4, s.heads)
            above = -(-getattr(s, name) // step) * step
            rule(
                name,
                getattr(s, name) % 4 == 0,
                "must be a multiple of 4 for 2:4 FFNs",
                f"use {flag_of(name)} {above}",
            )
    if s.tokenizer == "bpe":
        enough = s.vocab_size >= 257
        rule("vocab_size", enough, "must be at least 257 (bytes and end of text)", "raise it, or --tokenizer bytes")
    fitting = math.gcd(s.batch, s.micro_batch)
    rule("micro_batch", s.micro_batch == fitting, f"must divide --batch ({s.batch})", f"use --micro-batch {fitting}")
    rule("warmup", s.warmup < s.steps, f"must be below --steps ({s.steps})", "shorten it or train longer")
    rule("min_lr", s.min_lr <= s.lr, f"must not exceed --lr ({s.lr})", "lower it")
    rule("overwrite", not (s.resume and s.overwrite), "cannot go with --resume", "give one of them")
    if s.resume and s.out is None:
        raise Sparse24Error("--resume needs --out; name the folder of the run to go on with")


def rule_on(s: Settings) -> Callable[[str, bool, str, str], None]:
    """rule(name, ok, text, remedy): `require` of a setting's value."""
    return lambda name, ok, text, remedy: require(ok, name, text, getattr(s, name), remedy)


def require(ok: bool, name: str, rule: str, value: Any, remedy: str) -> None:
    if not ok:
        raise Sparse24Error(f"{flag_of(name)} {rule}, got {value}; {remedy}")


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def require_choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise Sparse24Error(f"{name} must be one of {', '.join(filter(None, choices))}, got {value!r}")
