"""What a run of `pretrain` leaves behind, and how to stop one: shared by the tests of resuming, crashes and damage."""

import signal

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
