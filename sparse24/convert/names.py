"""Models inside wrappers: the innermost model, and the names that its layers have there."""

from __future__ import annotations

from torch import nn

from ..layers import SparseLayer, check_module
from ..layers.watch.copies import follow_now

#: children by which wrappers hold the model: Lightning Fabric (the original before its strategy's), torch.compile
WRAPPED = ("_original_module", "_forward_module", "_orig_mod")
#: parts that wrappers, activation checkpointing, FSDP and adapters insert into the names of a model's modules
WRAPPER_PARTS = {*WRAPPED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, torch.compile, AveragedModel, DeepSpeed's engine, Lightning Fabric and PEFT.

    A module whose only child is called `module`, and that has no parameters of its own, counts as a wrapper too.
    """
    check_module(model)
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    children = model._modules
    for name in WRAPPED:
        if children.get(name) is not None:
            return children[name]
    if type(model).__module__.split(".")[0] == "peft":
        return children.get("base_model") or children.get("model")
    alone = len(children) == 1 and not model._parameters and not isinstance(model, CONTAINERS)
    if alone or type(model).__name__ == "DeepSpeedEngine":
        return children.get("module")
    return None


def plain_name(name: str) -> str:
    """A module's or parameter's name without the parts that wrappers and adapters insert."""
    parts = [part for part in name.split(".") if part not in WRAPPER_PARTS]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:  # PEFT
        parts = parts[2:]
    return ".".join(parts)


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of `model` by the names that they have without wrappers and adapters.

    Those of a copy that follows another model take its masks and phase first, for whoever asks reads them.
    """
    found = {name: m for name, m in unwrap(model).named_modules() if isinstance(m, SparseLayer)}
    for layer in found.values():
        follow_now(layer)
    plain = {plain_name(name): layer for name, layer in found.items()}
    return plain if len(plain) == len(found) else found
