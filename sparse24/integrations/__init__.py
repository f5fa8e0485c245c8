"""sparse24 in the training loops of others: `transformers` (Hugging Face), `lightning` and `torchtitan`.

The first two import their library; each module is imported when it is first asked for.
"""

import importlib

__all__ = ["lightning", "torchtitan", "transformers"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
