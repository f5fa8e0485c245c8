"""Adjusting what is around sparse layers: torch's fast paths for inference, which would pass them by, and DDP. And a
note in the configs of transformers' models whose blocks prune their activation, which no weight shows.
"""

from __future__ import annotations

from torch import nn

from ..layers import SparseLayer
from ..layers.fused.feedforward import FusedFeedForward
from ..layers.fused.sparse_activation import SparseActivation
from ..layers.state import HOLDER, is_ours

DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
#: of a config: what `save_pretrained` writes into config.json
NOTE, PRUNED = "sparse24", {"operand": "activation"}
_ACTIVATION, _NESTED = f"{HOLDER}_activation", f"{HOLDER}_nested"


def after_conversion(model: nn.Module) -> None:
    """Adjust the modules around the layers that are sparse now, and undo it around those that are dense again."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its inference fast path reads linear1.weight and never calls the layer: 0 sends it to the plain path.
            sparse = isinstance(module.linear1, SparseLayer) or isinstance(module.linear2, SparseLayer)
            _replace(module, "activation_relu_or_gelu", 0, _ACTIVATION, sparse)
        if isinstance(module, nn.TransformerEncoder):
            # It was decided when the encoder was made that padding becomes a nested tensor on that fast path.
            sparse = any(isinstance(m, SparseLayer) for m in module.modules())
            _replace(module, "use_nested_tensor", False, _NESTED, sparse)
        _write_ddp_ignores(module)


def note_in_configs(model: nn.Module) -> None:
    """Have the configs of transformers' models say whether blocks prune their activation."""
    configs: dict[int, tuple[object, bool]] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if _is_config_of_transformers(config):
            prunes = any(isinstance(inner, SparseActivation) for inner in module.modules())
            configs[id(config)] = config, prunes or configs.get(id(config), (None, False))[1]
    for config, prunes in configs.values():
        if prunes:
            setattr(config, NOTE, dict(PRUNED))
        elif config.__dict__.get(NOTE) == PRUNED:
            delattr(config, NOTE)


def _is_config_of_transformers(config: object) -> bool:
    """Found out without importing transformers, which has spelt the class in two ways."""
    return any(
        cls.__name__.lower() == "pretrainedconfig" and cls.__module__.startswith("transformers.")
        for cls in type(config).__mro__
    )


def _replace(module: nn.Module, name: str, value, keep_as: str, sparse: bool) -> None:
    """Set an attribute while the module is sparse. The module keeps the old value, as `keep_as`, until it is dense."""
    if sparse and keep_as not in module.__dict__:
        module.__dict__[keep_as] = getattr(module, name)
        setattr(module, name, value)
    elif not sparse and keep_as in module.__dict__:
        setattr(module, name, module.__dict__.pop(keep_as))


def _write_ddp_ignores(module: nn.Module) -> None:
    """DDP would broadcast packed forms, as large as the model, before each forward. Every rank makes them itself."""
    ours = [
        f"{name}.{buffer}" if name else buffer
        for name, layer in module.named_modules()
        if isinstance(layer, (SparseLayer, FusedFeedForward))
        for buffer in filter(is_ours, layer._buffers)
    ]
    before = module.__dict__.get(DDP_IGNORES, ())  # the module's own: wrappers pass on their model's
    others = [name for name in before if not is_ours(name.rsplit(".", 1)[-1])]
    if ours or others:
        module.__dict__[DDP_IGNORES] = others + ours
    elif before:
        del module.__dict__[DDP_IGNORES]
