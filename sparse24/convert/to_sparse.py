"""sparsify: turning layers of a model sparse, in place.

A layer is converted by changing its class and adding buffers: parameters, hooks, names and every reference to the
module stay as they are, so an optimizer made before works on. *Which function* a layer trains, 2:4 or dense, is
decided here, once, and written into the report with its reason; no batch changes it later.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import Sparse24Error, Sparse24Warning
from ..formats import FLOAT8_DTYPES, packed_dtype
from ..layers import DTYPES, float8, state_of
from ..layers.fused.sparse_activation import activation_blocks
from ..layers.parallel import sharding
from ..options import at_least, checked_options, one_of
from . import choice, cost_model, structure
from .bypassed import why_bypassed
from .candidates import find_candidates, linear_names, patterns, some, weight_owners, why_not
from .classes import make_sparse
from .cost_model import Training
from .report import ALREADY_SPARSE, Skipped, SparsifyReport
from .to_sparse_activations import ACTIVATION, OPERANDS, sparsify_activations

BACKENDS = ("auto", "sparse")


@checked_options(backend=one_of(BACKENDS), tokens=at_least(1), micro_batches=at_least(1), operand=one_of(OPERANDS))
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
    precision: str | None = None,
    operand: str = "weight",
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
    micro_batches  forward calls an optimizer step: the more, the less weighs what is paid once a step
    allow_tied  also convert layers that share their weight with another module
    fuse        run blocks of a known form, such as Llama's and GPT-2's MLP, as one function (sparse24/layers/fused)
    lean        memory before speed: one packed form of each weight, not two (1.125 bytes a weight less, for a pass over
                the weight in each backward), and in fused blocks h, what enters the down product, is made again in
                backward instead of kept (one activation of tokens x d_ff less)
    precision   None: 16-bit products. "fp8-hybrid": forward and input gradient in float8_e4m3fn, the weight gradient in
                16 bits. "fp8": all three (docs/fp8.md)
    operand     which operand of the products is 2:4. "weight": what the rest of this page is about, and a `Recipe`
                trains. "activation": weights stay dense, and of what a (squared) ReLU makes, two of each four are kept;
                four of six products are sparse. Such blocks need no recipe, and have no masks and no state. It takes
                plain blocks, down(act(up(x))), in 16 bits or with precision="fp8"; mvue, dtype, fuse and lean have no
                meaning then

    Call it again at will: layers that are sparse already stay as they are, and a warning says so where this call asks
    for another precision, lean or dtype than they have. On a GPU without sparse kernels "auto" warns and leaves the
    model dense, and "sparse" raises.

    Raises Sparse24Error, with the closest names, when a pattern matches nothing, and with the reasons when nothing at
    all can be converted; the model is then untouched.
    """
    sharding.sharded_modules(model)  # refuses FSDP1
    _check_dtype(dtype)
    if precision is not None:
        float8.check_settings(precision, lean, dtype)
    training = Training(tokens or cost_model.ASSUMED_TOKENS, micro_batches, mvue=mvue, precision=precision)
    if operand == ACTIVATION:
        _check_alone(mvue=mvue, dtype=dtype, allow_tied=allow_tied, fuse=fuse, lean=lean)
        return sparsify_activations(model, include, exclude, backend, training, assumed=tokens is None)
    report = SparsifyReport(precision=precision)
    unavailable = choice.why_unavailable(model, precision)
    chosen = find_candidates(model, include, patterns(exclude, "exclude"), report)
    todo = _choose(model, chosen, report, backend, training, tokens is None, allow_tied, unavailable)
    _warn_of_kept_settings(chosen, report, precision=precision, lean=lean, dtype=dtype)
    if unavailable and report.skipped and backend == "auto":
        warnings.warn(f"sparsify left the model dense: {unavailable}", Sparse24Warning, stacklevel=3)
    elif not todo and not any(skip.reason.startswith(ALREADY_SPARSE) for skip in report.skipped):
        _raise_nothing_fits(model, report)
    report.fused = make_sparse(
        model, todo, fuse_blocks=fuse, mvue=mvue, compute_dtype=dtype, lean=lean, precision=precision
    )
    report.converted = list(todo)
    return report


def _raise_nothing_fits(model: nn.Module, report: SparsifyReport) -> None:
    why = "; ".join(f"{name}: {reason}" for name, reason in report.skipped) or "no FFN was recognised"
    raise Sparse24Error(
        f"no layer of {type(model).__name__} can be made 2:4 ({why}). Name layers yourself, as in "
        f'include=("*mlp*",); linear layers here: {some(linear_names(model))}'
    )


def _choose(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    report: SparsifyReport,
    backend: str,
    training: Training,
    assumed: bool,
    allow_tied: bool,
    unavailable: str | None,
) -> dict[str, nn.Module]:
    """Those of the layers that are to be converted; the report gets the reasons, for and against."""
    owners = weight_owners(model)
    blocks: dict[str, structure.FeedForward] = {}
    for ffn in structure.find_feed_forwards(model):
        for name in ffn.layers:
            blocks.setdefault(name, ffn)  # of blocks that share a layer, the first
    pruned = _pruned_layers(model)
    todo: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        reason = why_not(module, owners, allow_tied) or why_bypassed(model, name) or pruned.get(name) or unavailable
        if reason is None:
            block = blocks.get(name)
            whole = block is not None and all(layer in chosen for layer in block.layers)
            sizes = block.sizes(model) if whole else None
            converts, reason = choice.choose_function(module, backend, training, sizes, assumed=assumed)
            if converts:
                todo[name] = module
                report.reasons[name] = reason
                report.shapes[name] = structure.features(module)[::-1]
                continue
        report.skipped.append(Skipped(name, reason))
    return todo


def _pruned_layers(model: nn.Module) -> dict[str, str]:
    """Names of the layers of blocks whose activation is pruned -> why their weights are not made 2:4."""
    why = "its block prunes the activation, and one operand of a product can be 2:4; call sparse24.densify first"
    blocks = activation_blocks(model)
    return {name: why for ffn in structure.find_feed_forwards(model) if ffn.name in blocks for name in ffn.layers}


def _warn_of_kept_settings(chosen: dict[str, nn.Module], report: SparsifyReport, **asked) -> None:
    """Write into the report, and warn, which sparse layers have other settings than those asked for here."""
    for i, (name, reason) in enumerate(report.skipped):
        if reason != ALREADY_SPARSE:
            continue
        state, weight = state_of(chosen[name]), chosen[name].weight
        own = {
            "precision": state.precision,
            "lean": state.lean,
            "dtype": state.compute_dtype or packed_dtype(weight.dtype, weight.is_cuda),
        }
        others = [f"{key}={own[key]}" for key, value in asked.items() if value and value != own[key]]
        if others:
            report.skipped[i] = Skipped(name, f"{ALREADY_SPARSE}, with {', '.join(others)}")
    report.warn_of_kept_settings(stacklevel=5)


def _check_alone(**settings) -> None:
    """Raises Sparse24Error for a setting of 2:4 weights beside operand="activation"."""
    for name, value in settings.items():
        if value != inspect.signature(sparsify).parameters[name].default:
            raise Sparse24Error(
                f"{name} is about 2:4 weights, and operand='activation' leaves weights dense, got {name}={value!r}; "
                "leave it out"
            )


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        remedy = '; for 8-bit products say precision="fp8"' if dtype in FLOAT8_DTYPES else ""
        raise Sparse24Error(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}{remedy}")
