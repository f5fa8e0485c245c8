"""sparsify(operand="activation"): what a plain feed-forward block's activation makes is 2:4, and weights are dense.

Blocks change their class, and nothing else (layers/fused/sparse_activation.py). There is no recipe: nothing happens
between steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import Sparse24Error, Sparse24Warning
from ..functional.sparse_activation import check_pruned_precision
from ..layers import SparseLayer
from ..layers.fused.sparse_activation import SparseActivation, precision_of, prune_activations, restore
from ..layers.fused.sparse_activation import why_not as why_not_block
from . import choice, structure
from .bypassed import why_block_bypassed
from .candidates import find_candidates, patterns, why_not_plain
from .cost_model import Training
from .report import ALREADY_SPARSE, Skipped, SparsifyReport
from .surroundings import note_in_configs

OPERANDS = ("weight", "activation")
ACTIVATION = "activation"


def sparsify_activations(
    model: nn.Module,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    backend: str,
    training: Training,
    *,
    assumed: bool,
) -> SparsifyReport:
    """What `sparsify` does for operand="activation"; `assumed`: the tokens of `training` are our default."""
    check_pruned_precision(training.precision)
    report = SparsifyReport(operand=ACTIVATION, precision=training.precision)
    chosen = find_candidates(model, include, patterns(exclude, "exclude"), report)
    unavailable = choice.why_unavailable(model, training.precision)
    blocks: list[nn.Module] = []
    dense: list[tuple[structure.FeedForward, str]] = []
    for ffn in structure.find_feed_forwards(model):
        if not any(name in chosen for name in ffn.layers):
            continue
        block = model.get_submodule(ffn.name)
        reason = _why_not(model, block, ffn, chosen, training.precision) or unavailable
        if reason is None:
            weight = model.get_submodule(ffn.layers[0]).weight
            converts, reason = choice.choose_activations(
                ffn.sizes(model), weight.device, backend, training.of(master_bytes=weight.itemsize), assumed=assumed
            )
            if converts:
                blocks.append(block)
                report.converted += [name for name in ffn.layers if name not in report.converted]
                report.reasons |= dict.fromkeys(ffn.layers, reason)
                report.shapes |= {name: structure.features(chosen[name])[::-1] for name in ffn.layers}
                report.fused[ffn.name] = ""
                continue
        dense.append((ffn, reason))
    known = set(report.converted)
    for ffn, reason in dense:  # last, for blocks may share layers; one that has none of its own goes by its name
        names = [name for name in ffn.layers if name in chosen and name not in known] or [ffn.name]
        report.skipped += [Skipped(name, reason) for name in names]
        known |= set(names)
    report.skipped += [
        Skipped(name, "it is in no feed-forward block of a known form, down(act(up(x)))")
        for name in chosen
        if name not in known
    ]
    report.warn_of_kept_settings(stacklevel=5)
    if unavailable and report.skipped and backend == "auto":
        warnings.warn(f"sparsify left the model dense: {unavailable}", Sparse24Warning, stacklevel=4)
    elif not blocks and not any(skip.reason.startswith(ALREADY_SPARSE) for skip in report.skipped):
        _raise_nothing_fits(model, report, backend)
    _convert(blocks, training.precision)
    note_in_configs(model)
    return report


def _why_not(
    model: nn.Module,
    block: nn.Module,
    ffn: structure.FeedForward,
    chosen: dict[str, nn.Module],
    precision: str | None,
) -> str | None:
    """Why the block stays as it is, or None."""
    if isinstance(block, SparseActivation):
        own = precision_of(block)
        return ALREADY_SPARSE if own == precision else f"{ALREADY_SPARSE}, with precision={own!r}"
    layers = {name: model.get_submodule(name) for name in ffn.layers}
    if any(isinstance(layer, SparseLayer) for layer in layers.values()):
        return "its weights are 2:4 already, and one operand of a product can be; call sparse24.densify first"
    if left_out := [name for name in layers if name not in chosen]:
        return f"include and exclude leave out {left_out[0]} of the same block"
    for layer in layers.values():
        if (reason := why_not_plain(layer)) is not None:
            return reason
    return why_not_block(block) or why_block_bypassed(model, ffn.name, ffn.shape.down)


def _raise_nothing_fits(model: nn.Module, report: SparsifyReport, backend: str) -> None:
    if backend == "auto" and report.skipped and not _has_cause(report):
        return  # left dense by choice, which the report explains
    why = "; ".join(dict.fromkeys(reason for _, reason in report.skipped)) or "no feed-forward block was recognised"
    raise Sparse24Error(
        f"no activation of {type(model).__name__} can be pruned to 2:4 ({why}). It takes plain blocks with a ReLU or a "
        "squared ReLU; operand='weight' makes the weights of others 2:4, and in a forward of your own "
        "sparse24.functional.sparse_activation_mlp computes the same"
    )


def _has_cause(report: SparsifyReport) -> bool:
    """Whether a block was skipped for what it is, and not by the cost model."""
    return any(not reason.startswith(choice.ESTIMATE) for _, reason in report.skipped)


@torch.inference_mode(False)
def _convert(blocks: list[nn.Module], precision: str | None) -> None:
    """All or nothing."""
    done: list[nn.Module] = []
    try:
        for block in blocks:
            prune_activations(block, precision)
            done.append(block)
    except BaseException:
        for block in done:
            restore(block)
        raise
