"""Sparse24 inside other people's training loops: `transformers` (Hugging Face) and `lightning`; each needs its
library.
"""

import importlib

__all__ = ["lightning", "torchtitan", "transformers"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
