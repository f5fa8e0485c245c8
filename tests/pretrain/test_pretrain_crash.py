"""kill -9 at random moments: what a run leaves is whole, and resumed it ends as if nothing had been.

Five times here; `make crash` does it a hundred times, at other moments each time.
"""

import os
import random
import time

import forks
import pytest
import torch
from run_files import alone, final_weights, history

from sparse24.files import LOCK
from sparse24.pretrain import pretrain

CRASHES = int(os.environ.get("SPARSE24_CRASHES", "5"))
SEED = int(os.environ.get("SPARSE24_CRASH_SEED", "0"))


@pytest.fixture
def start():
    """start(settings): a process that runs `pretrain` with them."""

    def run(settings, function=pretrain):
        process = forks.context().Process(target=alone, args=(os.devnull, function, settings))
        process.start()
        return process

    run(None, function=repr).join()  # what all of them import is imported

    return run


def status_of(process) -> int:
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.fault(62)
def test_runs_killed_at_random_moments_end_like_the_uninterrupted_one(small, tmp_path, start):
    wanted = dict(steps=30, save_interval=1, samples=0, dropout=0.1, ffn=("sparse",))
    begun = time.monotonic()
    assert status_of(start(small(out=str(tmp_path / "whole"), **wanted))) == 0
    length = time.monotonic() - begun
    rows, weights = history(tmp_path / "whole", "sparse"), final_weights(tmp_path / "whole", "sparse")
    assert len(rows) == 31
    moments, where = random.Random(SEED), {}
    for crash in range(CRASHES):
        out = tmp_path / f"run{crash}"
        process = start(small(out=str(out), **wanted))
        last = int(moments.random() * 30)  # by steps, not by time: a busy machine does not move the moments
        while not reached(out, last) and process.is_alive():
            time.sleep(0.0005)
        time.sleep(moments.random() * (length / 30 if last else length / 3))
        process.kill()
        left = "finished" if status_of(process) == 0 else what_is_left(out)
        where[left] = where.get(left, 0) + 1
        resume = (out / "config.json").exists()
        assert status_of(start(small(out=str(out), resume=resume, **wanted))) == 0, left
        assert history(out, "sparse") == rows, left
        ours = final_weights(out, "sparse")
        assert ours.keys() == weights.keys() and all(torch.equal(ours[k], weights[k]) for k in ours), left
        assert [path.name for path in (out / "checkpoint" / "sparse").iterdir()] == ["step-000030"]
        assert not (out / LOCK).exists()
    print(f"killed: {where}")
    assert where.get("finished", 0) < CRASHES


def reached(out, step) -> bool:
    """Whether the checkpoint of this step, or a later one, is there."""
    found = (out / "checkpoint" / "sparse").glob("step-*")
    return step == 0 or any(int(path.name.removeprefix("step-")) >= step for path in found)


def what_is_left(out) -> str:
    folder = out / "checkpoint" / "sparse"
    if not folder.exists():
        return "before the first checkpoint"
    if any(path.name.endswith(".tmp") for path in folder.iterdir()):
        return "while a checkpoint was written"
    return "between two checkpoints"
