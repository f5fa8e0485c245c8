"""Changing the class of a model's layers and blocks, and back: all or nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import Sparse24Error
from ..layers import SparseLayer, SparseLinear
from ..layers.fused.feedforward import FusedFeedForward, fuse, unfuse_block
from ..layers.fused.mixed_class import class_without
from ..layers.watch.owners import model_changed
from ..layers.watch.unseen import share_lookout
from . import structure
from .surroundings import after_conversion


@torch.inference_mode(False)  # else a caller's inference mode makes buffers that no recipe may write later
def make_sparse(
    model: nn.Module, layers: dict[str, nn.Module], *, fuse_blocks: bool, **settings: Any
) -> dict[str, str]:
    """Make `layers` of `model` sparse and fuse what can be fused; block -> "" or why it is not fused.

    An error, out of memory on the last layer perhaps, leaves the model as it was.
    """
    converted: list[tuple[nn.Module, type]] = []
    fused_before = {id(m) for m in model.modules() if isinstance(m, FusedFeedForward)}
    try:
        for module in layers.values():
            converted.append((module, type(module)))
            module.__class__ = _sparse_class(module)
            module._init_sparse(**settings)
        share_lookout(layers.values())
        reasons = _fuse_all(model) if fuse_blocks else {}
        after_conversion(model)
        model_changed(module for module in model.modules() if isinstance(module, SparseLayer))
    except BaseException:
        for block in [m for m in model.modules() if isinstance(m, FusedFeedForward) and id(m) not in fused_before]:
            unfuse_block(block)
        for module, dense in converted:
            if isinstance(module, SparseLayer):
                module._drop_sparse()
                module.__class__ = dense
        after_conversion(model)
        raise
    return reasons


def _fuse_all(model: nn.Module) -> dict[str, str]:
    """Fuse what can be fused; the modules that hold converted FFNs, and why not."""
    found = {
        ffn.name: model.get_submodule(ffn.name)
        for ffn in structure.find_feed_forwards(model)
        if any(isinstance(model.get_submodule(name), SparseLayer) for name in ffn.layers)
    }
    return {name: fuse(block) for name, block in found.items()}


def _sparse_class(module: nn.Module) -> type:
    if structure.is_conv1d(module):
        from ..layers.conv1d import SparseConv1D

        return SparseConv1D
    return SparseLinear


def dense_class(name: str, layer: SparseLayer) -> type:
    """The layer's class without ours, inside of that of fully_shard if there is one.

    Raises Sparse24Error for another class that somebody has put over ours.
    """
    own = class_without(SparseLayer, type(layer))
    if own is None:
        raise Sparse24Error(
            f"{name or 'the layer'} is a {type(layer).__name__}: it was wrapped after sparsify, by a parametrization "
            "perhaps; take that off (remove_parametrizations), or densify before wrapping"
        )
    return own
