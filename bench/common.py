"""What the scripts here share: shapes of real layers, and timing and tables from sparse24.benchmark."""

from sparse24.benchmark.timing import (  # noqa: F401
    ColdL2,
    Table,
    arguments,
    chosen,
    copy_bandwidth,
    header,
    heat,
    masters,
    open_table,
    save_picture,
    time_cold,
    time_hot,
)

#: (name, rows, cols) of weights
WEIGHTS = [
    ("gpt2-124M up", 3072, 768),
    ("gpt2-1.5B up", 6400, 1600),
    ("llama-7B up", 11008, 4096),
    ("llama-8B up", 14336, 4096),
]
#: (name, tokens, features) of output gradients
GRADIENTS = [
    ("gpt2-124M", 16384, 3072),
    ("llama-7B", 8192, 11008),
    ("llama-8B", 16384, 14336),
]
#: (name, tokens, d_model, d_ff)
LAYERS = [
    ("gpt2-124M", 16384, 768, 3072),
    ("gpt2-350M", 16384, 1024, 4096),
    ("gpt2-774M", 16384, 1280, 5120),
    ("gpt2-1558M", 8192, 1600, 6400),
    ("llama-7B", 8192, 4096, 11008),
    ("llama-8B", 16384, 4096, 14336),
]
