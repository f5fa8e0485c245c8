"""sparsify, densify, refresh: turning layers of a model sparse in place, and back.

A layer is converted by changing its class and adding buffers: parameters, hooks, names and every reference to the
module stay as they are, so an optimizer made before works on. *Which function* a layer trains, 2:4 or dense, is
decided here, once, and written into the report with its reason; no batch changes it later.
"""

from __future__ import annotations

import difflib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .. import _library, ops
from .._library import is_available
from ..errors import Sparse24Error, Sparse24Warning
from ..layers import feedforward, packing, sharding
from ..layers.modules import DTYPES, SparseLayer, SparseLinear, check_switch
from ..layers.owners import end_recipes
from . import cost_model, structure
from .cost_model import Training

BACKENDS = ("auto", "sparse")
DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
ALREADY_SPARSE = "already sparse"
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # parts of names that torch's wrappers insert


class Skipped(NamedTuple):
    """A layer that stays as it is, and why."""

    name: str
    reason: str


@dataclass
class SparsifyReport:
    """What `sparsify` did. Truthy when it converted something.

    converted  names of the layers that now train 2:4
    skipped    (name, reason) of those that were looked at and stay as they are
    reasons    name -> why this layer trains 2:4
    shapes     name -> (out_features, in_features)
    fused      name of a block whose layers were converted -> "" if it runs as one function, else why it does not
    """

    converted: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.converted)

    def __str__(self) -> str:
        rows = [
            (name, f"{self.shapes[name][0]} x {self.shapes[name][1]}", "2:4", self.reasons[name])
            for name in self.converted
        ]
        rows += [(name, "", "dense", reason) for name, reason in self.skipped]
        weights = sum(rows * cols for rows, cols in self.shapes.values())
        lines = [f"sparse24: {len(self.converted)} layers 2:4 ({weights:,} weights), {len(self.skipped)} skipped"]
        if rows:
            widths = [max(len(row[i]) for row in rows) for i in range(3)]
            lines += ["  " + "  ".join((*map(str.ljust, row, widths), row[3])) for row in rows]
        if self.fused:
            unfused = {name: why for name, why in self.fused.items() if why}
            lines.append(f"  {len(self.fused) - len(unfused)} of {len(self.fused)} blocks run as one function")
            lines += [f"  {name or 'the model'} runs layer by layer: {why}" for name, why in unfused.items()]
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    include: str | Sequence[str] = "auto",
    exclude: str | Sequence[str] = (),
    backend: str = "auto",
    *,
    mvue: bool = True,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
    micro_batches: int = 1,
    allow_tied: bool = False,
    fuse: bool = True,
    lean: bool = False,
) -> SparsifyReport:
    """Make the linear layers of a model's FFNs 2:4 sparse, in place.

    include     "auto": FFNs found by structure; or patterns over module names, such as ("*mlp*",), as in fnmatch
    exclude     patterns of layers to leave dense
    backend     "auto": on a GPU only layers that should train faster than torch.compile's dense ones, by the estimate
                of sparse24/convert/cost_model.py; on a CPU every matching layer, since there one wants the method.
                "sparse": every matching layer that can be 2:4
    mvue        prune output gradients to 2:4 without bias for the weight gradient
    dtype       dtype of the packed values; default: the weight's, and bfloat16 for float32 weights on a GPU
    tokens      tokens per forward call (batch x length), for that estimate: few tokens do not pay on a GPU; assumed
                to be 8192 where nothing is said
    micro_batches  forward calls an optimizer step: what is paid once a step weighs less
    allow_tied  also convert layers that share their weight with another module
    lean        memory before speed: one packed form of each weight, not two (1.125 bytes a weight less, for a pass over
                the weight in each backward), and in fused blocks h, what enters the down product, is made again in
                backward instead of kept (one activation of tokens x d_ff less)
    fuse        run blocks of a known form, such as Llama's and GPT-2's MLP, as one function (layers/feedforward.py)

    Call it again at will: layers that are sparse already stay as they are. Raises Sparse24Error, with the closest
    names, when a pattern matches nothing, and with the reasons when nothing at all can be converted; the model is
    then untouched. On a GPU without sparse kernels "auto" warns and leaves the model dense, and "sparse" raises.
    """
    _check_settings(model, backend, dtype, tokens, micro_batches, mvue)
    report = SparsifyReport()
    unavailable = _why_unavailable(model)
    chosen = candidates(model, include, patterns(exclude, "exclude"), report)
    owners = _weight_owners(model)
    training = Training(tokens or cost_model.ASSUMED_TOKENS, micro_batches, mvue=mvue)
    blocks = {name: ffn for ffn in structure.find_feed_forwards(model) for name in ffn.layers}
    todo: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        reason = _why_not(module, owners, allow_tied) or unavailable
        if reason is None:
            block = blocks.get(name)
            whole = block is not None and all(layer in chosen for layer in block.layers)
            converts, reason = choose_function(
                module, backend, training, block.sizes(model) if whole else None, assumed=tokens is None
            )
            if converts:
                todo[name] = module
                report.reasons[name] = reason
                report.shapes[name] = structure.features(module)[::-1]
                continue
        report.skipped.append(Skipped(name, reason))
    if unavailable and report.skipped and backend == "auto":
        warnings.warn(f"sparsify left the model dense: {unavailable}", Sparse24Warning, stacklevel=2)
    elif not todo and not any(skip.reason == ALREADY_SPARSE for skip in report.skipped):
        why = "; ".join(f"{name}: {reason}" for name, reason in report.skipped) or "no FFN was recognised"
        raise Sparse24Error(
            f"no layer of {type(model).__name__} can be made 2:4 ({why}). Name layers yourself, as in "
            f'include=("*mlp*",); linear layers here: {_some(_linear_names(model))}'
        )
    _convert(todo, mvue=mvue, compute_dtype=dtype, lean=lean)
    report.converted = list(todo)
    if fuse:
        report.fused = _fuse_blocks(model)
    after_conversion(model)
    return report


def densify(model: nn.Module) -> list[str]:
    """Give every sparse layer its dense class back, with the same parameter objects; returns the layers' names.

    A recipe of the model ends: its hooks come off the optimizer, which trains the dense layers from then on.
    """
    feedforward.unfuse(model)
    names, layers = [], sparse_layers(model)
    end_recipes(layers.values())
    for name, layer in layers.items():
        dense = _dense_class(layer)
        layer._drop_sparse()
        layer.__class__ = dense
        names.append(name)
    after_conversion(model)
    return names


def refresh(model: nn.Module, *, search: bool = False) -> int:
    """Re-pack every sparse layer of `model` after its weights were written by hand (EMA, `.data`, surgery).

    search  also find the masks anew from the weights' magnitudes; by default the masks stay, and a copy of another
            model (`copy.deepcopy`, `AveragedModel`) takes the masks and phase that this one has now

    Returns how many layers were packed. A mask that is none any more, because an average over buffers went through it
    (`AveragedModel(use_buffers=True)`), is searched anew, with a warning.
    """
    sharding.reshard(sharding.sharded_modules(model))
    layers = sparse_layers(model)
    for layer in layers.values():
        if search:
            layer.accept_weights()
        layer.look(forward=False)
    broken = [] if search else [name for name, layer in layers.items() if not _has_mask(layer)]
    if broken:
        warnings.warn(
            f"the masks of {', '.join(broken[:4])} ({len(broken)} layers) do not keep two in each row and column of "
            "their blocks: something has written to buffers, an average perhaps; they are searched anew",
            Sparse24Warning,
            stacklevel=2,
        )
    for name, layer in layers.items():
        layer._repack(search=search or name in broken)
    return len(layers)


def _has_mask(layer: SparseLayer) -> bool:
    return layer.mask is None or layer.mask.is_meta or ops.is_transposable(layer.mask)


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of `model` by name, without the prefixes that DDP, torch.compile and checkpointing add."""
    return {plain_name(name): m for name, m in unwrap(model).named_modules() if isinstance(m, SparseLayer)}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, torch.compile and AveragedModel."""
    around = (DistributedDataParallel, AveragedModel)
    while isinstance(model, around) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, around) else model._orig_mod
    return model


def plain_name(name: str) -> str:
    """A module's or parameter's name without the parts that torch's wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


# -- which layers ---------------------------------------------------------------------------------------------------


def choose_function(
    module: nn.Module,
    backend: str,
    training: Training,
    block: tuple[int, int, bool] | None = None,
    *,
    assumed: bool = False,
) -> tuple[bool, str]:
    """Whether this layer trains 2:4, and why: from its shape, the expected tokens and the device; never from a
    batch.

    block    (d_model, d_ff, gated) of the feed-forward layer that it is part of, which is then judged as a whole
    assumed  nobody has said how many tokens a call has
    """
    device = module.weight.device
    if backend == "sparse":
        return True, "backend='sparse'"
    if device.type != "cuda":
        return True, f"{device.type}: every matching layer is 2:4, for the method"
    training, rates = training.of(master_bytes=module.weight.dtype.itemsize), rates_on(device)

    def estimate(training: Training) -> float:
        if block is not None:
            return cost_model.feed_forward(*block, training, rates).speedup
        return cost_model.linear(*structure.features(module)[::-1], training, rates).speedup

    speedup = estimate(training)
    out_features, in_features = structure.features(module)[::-1]
    what = f"feed-forward layer of {block[0]} x {block[1]}" if block else f"layer of {out_features} x {in_features}"
    calls = f" and {training.micro_batches} calls a step" if training.micro_batches > 1 else ""
    told = f"estimated {speedup:.2f}x of a compiled dense {what} at {training.tokens} tokens a call{calls}"
    told += " (assumed: say tokens=)" if assumed else ""
    if speedup >= cost_model.MARGIN:
        return True, f"{told}, on {torch.cuda.get_device_name(device)}"
    remedies = ["backend='sparse' converts it anyway"]
    if training.mvue and (without := estimate(training.of(mvue=False))) >= cost_model.MARGIN:
        remedies.insert(0, f"with mvue=False it is {without:.2f}x")
    return False, f"{told}, less than the {cost_model.MARGIN:.2f}x asked for; {', '.join(remedies)}"


def rates_on(device: torch.device) -> cost_model.Rates:
    """The cost model's rates on a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    info = _library.device_info(index)
    return cost_model.rates_for(info["multiprocessors"], info["memory_bandwidth"])


def _check_settings(model, backend, dtype, tokens, micro_batches, mvue) -> None:
    if not isinstance(model, nn.Module):
        raise Sparse24Error(f"model must be a torch.nn.Module, got {type(model).__name__}")
    sharding.sharded_modules(model)  # refuses FSDP1
    if backend not in BACKENDS:
        raise Sparse24Error(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if dtype is not None and dtype not in DTYPES:
        raise Sparse24Error(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    for name, value in (("tokens", 1 if tokens is None else tokens), ("micro_batches", micro_batches)):
        if not isinstance(value, int) or value < 1:
            raise Sparse24Error(f"{name} must be an integer, 1 or more, got {value!r}")
    check_switch("mvue", mvue)


def _why_unavailable(model: nn.Module) -> str | None:
    """Why the GPU that holds the model cannot multiply sparse, or None; a model elsewhere runs everywhere."""
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if device is None or is_available(device):
        return None
    return f"no 2:4 products on {device}: {is_available(device).reason}"


def patterns(value: str | Iterable[str], argument: str) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(p, str) and p for p in patterns):
        raise Sparse24Error(f"{argument} must be patterns over module names, got {value!r}")
    return patterns


def candidates(
    model: nn.Module, include: str | Sequence[str], exclude: tuple[str, ...], report: SparsifyReport
) -> dict[str, nn.Module]:
    """The layers that `include` names and `exclude` does not; experts go to the report."""
    modules = dict(model.named_modules())
    if include == "auto":
        chosen = []
        for ffn in structure.find_feed_forwards(model):
            if ffn.is_expert:
                reason = "an expert of a mixture: each sees too few tokens to pay for its re-packing"
                report.skipped += [Skipped(name, reason) for name in ffn.layers]
            else:
                chosen += ffn.layers
        for name in structure.find_fused_experts(model):
            report.skipped.append(Skipped(name, "experts of a mixture in 3-D parameters: not supported"))
    else:
        names, chosen = _linear_names(model), []
        for pattern in patterns(include, "include"):
            matched = [name for name in names if fnmatchcase(name, pattern)]
            if not matched:
                _raise_no_match("include", pattern, names)
            chosen += matched
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in modules):
            _raise_no_match("exclude", pattern, [name for name in modules if name])
    chosen = dict.fromkeys(chosen)  # in order, once each
    left = {name: modules[name] for name in chosen if not any(fnmatchcase(name, p) for p in exclude)}
    if chosen and not left:
        raise Sparse24Error(
            f"exclude={exclude} leaves none of the layers that include={include!r} names: {_some(list(chosen))}"
        )
    return left


def _why_not(module: nn.Module, owners: dict[int, list[nn.Module]], allow_tied: bool) -> str | None:
    """Why this layer cannot be 2:4, or None."""
    if isinstance(module, SparseLayer):
        return ALREADY_SPARSE
    if type(module) is not nn.Linear and not (structure.is_conv1d(module) and type(module).__name__ == "Conv1D"):
        return f"{type(module).__name__} is a linear layer with a behaviour of its own"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (offloading or another library's hook)"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (parametrized, pruned or normalised)"
    if len(owners[id(weight)]) > 1 and not allow_tied:
        return "its weight is tied with another module, which would be masked too; allow_tied=True converts it"
    in_features, out_features = structure.features(module)
    if min(in_features, out_features) < 4:
        return f"{out_features} x {in_features} has no whole 4x4 block"
    if in_features % 4 or out_features % 4:
        return f"{out_features} x {in_features} is not a multiple of 4 both ways"
    allowed = DTYPES[:3] if weight.device.type == "cuda" else DTYPES
    if weight.dtype not in allowed:
        return f"{weight.dtype} weights are not supported (supported: {', '.join(map(str, allowed))})"
    return None


def _weight_owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """id of a parameter -> the modules that hold it. One module under two names holds its weight once."""
    owners = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(module)
    return owners


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and structure.is_linear(module)]


def _raise_no_match(argument: str, pattern: str, names: list[str]) -> None:
    bare = pattern.strip("*")
    by_part = {part: part for name in names for part in name.split(".")}
    close = difflib.get_close_matches(bare, [*names, *by_part], n=5, cutoff=0.5)
    hint = f"the closest are {_some(close)}" if close else f"names here: {_some(names)}"
    raise Sparse24Error(f"{argument} pattern {pattern!r} matches no layer; {hint}")


def _some(names: list[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "") or "none"


# -- the conversion itself ------------------------------------------------------------------------------------------


def _sparse_class(module: nn.Module) -> type:
    if structure.is_conv1d(module):
        from ..layers.conv1d import SparseConv1D

        return SparseConv1D
    return SparseLinear


def _dense_class(layer: SparseLayer) -> type:
    """The class right of the mixin."""
    bases = type(layer).__bases__
    if SparseLayer not in bases:
        raise Sparse24Error(
            f"{type(layer).__name__} was wrapped after sparsify (by fully_shard, perhaps); densify before wrapping"
        )
    return bases[bases.index(SparseLayer) + 1]


def _convert(todo: dict[str, nn.Module], **settings) -> None:
    """All or nothing: out of memory on the last layer leaves the model dense."""
    done = []
    try:
        for module in todo.values():
            dense = type(module)
            module.__class__ = _sparse_class(module)
            done.append((module, dense))
            module._init_sparse(**settings)
    except BaseException:
        for module, dense in done:
            module._drop_sparse()
            module.__class__ = dense
        raise


def _fuse_blocks(model: nn.Module) -> dict[str, str]:
    """Fuse what can be fused; the modules that hold converted FFNs, and why not."""
    found = {
        ffn.name: model.get_submodule(ffn.name)
        for ffn in structure.find_feed_forwards(model)
        if any(isinstance(model.get_submodule(name), SparseLayer) for name in ffn.layers)
    }
    return {name: feedforward.fuse(block) for name, block in found.items()}


def after_conversion(model: nn.Module) -> None:
    """What modules around the layers must know."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its inference fast path reads linear1.weight and never calls the layer: 0 sends it to the plain path.
            sparse = isinstance(module.linear1, SparseLayer) or isinstance(module.linear2, SparseLayer)
            if sparse and "_sparse24_activation" not in module.__dict__:
                module._sparse24_activation = module.activation_relu_or_gelu
                module.activation_relu_or_gelu = 0
            elif not sparse and "_sparse24_activation" in module.__dict__:
                module.activation_relu_or_gelu = module.__dict__.pop("_sparse24_activation")
        if isinstance(module, nn.TransformerEncoder):
            # It was decided when the encoder was made that padding becomes a nested tensor on that fast path.
            sparse = any(isinstance(m, SparseLayer) for m in module.modules())
            if sparse and "_sparse24_nested" not in module.__dict__:
                module._sparse24_nested = module.use_nested_tensor
                module.use_nested_tensor = False
            elif not sparse and "_sparse24_nested" in module.__dict__:
                module.use_nested_tensor = module.__dict__.pop("_sparse24_nested")
        # DDP would broadcast the packed forms, as large as the model, before each forward. Every rank makes them
        # itself.
        buffers = [
            f"{name}.{buffer}" if name else buffer
            for name, layer in module.named_modules()
            if isinstance(layer, (SparseLayer, feedforward.FusedFeedForward))
            for buffer in (*packing.SPARSE_BUFFERS, "soft")
        ]
        others = [
            name
            for name in module.__dict__.get(DDP_IGNORES, ())  # the module's own: wrappers pass on their model's
            if name.rsplit(".", 1)[-1] not in (*packing.SPARSE_BUFFERS, "soft")
        ]
        if buffers or others:
            module.__dict__[DDP_IGNORES] = others + buffers
        else:
            module.__dict__.pop(DDP_IGNORES, None)
