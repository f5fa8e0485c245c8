"""Processes that start at once: forks of one that has imported what is large, and has never run torch.

Forks have no CUDA, and the environment of the process that they are forks of.
"""

import multiprocessing

LARGE = [
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pytest",
    "sparse24.pretrain.job",
    "tokenizers",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "tqdm",
    "transformers.models.gpt2.modeling_gpt2",
]


def context():
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(LARGE)
    return forks
