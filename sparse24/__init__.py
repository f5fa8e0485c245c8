"""sparse24: feed-forward layers of transformers, trained with 2:4 sparsity.

    import sparse24

    report = sparse24.sparsify(model)                                   # FFN layers become 2:4 layers, in place
    recipe = sparse24.Recipe(model, optimizer, total_steps=10_000)      # masks, decay and phases, by optimizer hooks

Importing it needs no GPU and touches none. Layers: `modules`; differentiable functions: `functional`; ops: `ops`;
the same in plain PyTorch: `reference`.
"""

from __future__ import annotations

import importlib

from . import errors, functional, ops, reference
from ._library import Availability, is_available
from ._version import __version__
from .errors import Sparse24BuildError, Sparse24DtypeError, Sparse24Error, Sparse24Warning

_LAZY = {
    "SparseLinear": "modules",
    "SparseConv1D": "conv1d",
    "SparseGatedMLP": "gated_mlp",
    "sparsify": "convert",
    "densify": "convert",
    "refresh": "convert",
    "Recipe": "recipe",
    "tune_decay": "tune",
    "verify": "verification",
    "export": "exporting",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name == "integrations":
        return importlib.import_module(".integrations", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
