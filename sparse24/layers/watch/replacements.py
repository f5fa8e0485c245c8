"""Who puts another module in a sparse layer's place: refused where it would silently make the layer dense.

Libraries of quantised training (torchao's float8 and QAT) replace every nn.Linear by a module of their own around the
same Parameter, and a sparse layer is an nn.Linear. Adapters (PEFT) put a module around the layer, and may have merged
theirs into its weight when they take it off again (`merges`). torch calls a hook whenever a module is registered; it
costs nothing else.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ...errors import Sparse24Error, Sparse24Warning
from .. import packing
from ..state import HOLDER, MASK, PACKED_BUFFERS, SPARSE, state_of
from . import merges
from .owners import model_changed


@cache
def watch_replacements() -> None:
    """Install the hook, once a process."""
    register_module_module_registration_hook(_look_at_registration)


def _look_at_registration(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    if torch.compiler.is_compiling():  # a frame with nothing to compile: the compiler then runs it as it is
        return
    old = parent._modules.get(name)
    if old is None or old is new:
        return
    _tell_recipes(old, new)
    if new is None:
        return
    if HOLDER in new.__dict__ and MASK in new._buffers:
        _forget_joint_forms(parent, old)
        if any(child is new for child in old.modules()):
            _check_merge(name, old, new)
    elif HOLDER in old.__dict__ and MASK in old._buffers:
        _refuse_dense_twin(parent, name, old, new)
        merges.note_adapter(old, new)


def _tell_recipes(old: nn.Module, new: nn.Module | None) -> None:
    """Of sparse layers that are no longer where they were, unless a wrapper holds them."""
    kept = set() if new is None else set(map(id, new.modules()))
    model_changed(m for m in old.modules() if HOLDER in m.__dict__ and id(m) not in kept)


def _forget_joint_forms(parent: nn.Module, old: nn.Module) -> None:
    """The buffer of a fused block holds gate and up: without one of them its layers run one by one until they are
    packed next, when the block is put together anew.
    """
    block = packing.blocks.get(old, (lambda: None,))[0]()
    if block is parent:
        parent._buffers.update(dict.fromkeys(PACKED_BUFFERS))


def _refuse_dense_twin(parent: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    weight = old._parameters.get("weight")
    if weight is not None and new._parameters.get("weight") is weight:
        raise Sparse24Error(
            f"{type(new).__name__} would take the place of the sparse layer {name!r} of {type(parent).__name__} with "
            "the same weight, and compute the dense function without a word; exclude the layer from that conversion, "
            "or call sparse24.densify(model) (dense weights) or densify(model, masked=True) (the 2:4 function) first"
        )


def _check_merge(name: str, adapter: nn.Module, layer: nn.Module) -> None:
    """An adapter is taken off a sparse layer: has it been merged into the weight?"""
    if _may_be_stale(layer) and not merges.keep_function(layer, adapter, name):
        warnings.warn(
            f"the weight of the sparse layer {name!r} was changed under its adapter, by a merge perhaps: what was "
            "added outside the 2:4 mask will be lost, and the model compute another function. To keep it, call "
            "sparse24.densify(model, masked=True) before merging; sparse24.refresh(model) takes the weight as it is",
            Sparse24Warning,
            stacklevel=4,
        )


def _may_be_stale(layer: nn.Module) -> bool:
    """Whether the packed form is not that of the present weight. Reads the weight, and waits for the device."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or packing.is_dtensor(weight):
        return False
    return state_of(layer).phase == SPARSE and not layer.is_packed()
