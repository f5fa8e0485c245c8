"""What a run of `pretrain` leaves behind, how to stop one, and how to have one in a process of its own."""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from sparse24.pretrain import checkpoint
from sparse24.pretrain.metrics import read_rows

EXACT = (
    "step",
    "phase",
    "loss",
    "bits_per_byte",
    "grad_norm",
    "lr",
    "flip_rate",
    "decay",
    "valid_loss",
    "valid_bits_per_byte",
)


def history(out, arm):
    return [tuple(row[name] for name in EXACT) for row in read_rows(out / "metrics.csv", arm)]


def final_weights(out, arm):
    return load_file(checkpoint.complete(out / "checkpoint" / arm)[-1][1] / "model.safetensors")


def stop_at(step, number=signal.SIGINT):
    def on_step(done):
        if done == step:
            signal.raise_signal(number)

    return on_step


def draw_nothing(figure, path, **_):
    """In place of Figure.savefig: rendering would be three quarters of the time of a run this small."""
    Path(path).write_bytes(b"drawn")


def alone(told, function, *arguments):
    """The body of a process (forks.py): `function`, without rendered figures; what it tells goes to the file `told`."""
    from matplotlib.figure import Figure

    Figure.savefig = draw_nothing
    torch.set_num_threads(1)
    stream = os.open(told, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))
    function(*arguments)


def command_line(*arguments):
    """`python -m sparse24` with these arguments."""
    from sparse24 import cli

    sys.argv = ["sparse24", *map(str, arguments)]
    cli.main()
