"""kill -9 at random moments: what a run leaves is whole, and resumed it ends as if nothing had been.

Five times here; `make crash` does it a hundred times, at other moments each time.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from run_files import final_weights, history

from sparse24.files import LOCK

CRASHES = int(os.environ.get("SPARSE24_CRASHES", "5"))
SEED = int(os.environ.get("SPARSE24_CRASH_SEED", "0"))

# A process that has imported everything and never run torch starts each run by a fork: a kill costs no imports.
SERVER = """
import json, os, sys
import matplotlib.backends.backend_agg, matplotlib.figure, tokenizers, torch, torch.utils.tensorboard, tqdm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from sparse24.pretrain import Settings, pretrain
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        pretrain(Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(line).items()}))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def start():
    """start(settings) -> (pid of the run, function that waits for its exit status)."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)  # fmt: skip

    def run(settings):
        server.stdin.write(json.dumps(dataclasses.asdict(settings)) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), lambda: os.waitstatus_to_exitcode(int(server.stdout.readline()))

    yield run
    server.stdin.close()
    server.wait()


@pytest.mark.slow
@pytest.mark.fault(62)
def test_runs_killed_at_random_moments_end_like_the_uninterrupted_one(small, tmp_path, start):
    wanted = dict(steps=30, save_interval=1, samples=0, dropout=0.1, ffn=("sparse",))
    begun = time.monotonic()
    assert start(small(out=str(tmp_path / "whole"), **wanted))[1]() == 0
    length = time.monotonic() - begun
    rows, weights = history(tmp_path / "whole", "sparse"), final_weights(tmp_path / "whole", "sparse")
    assert len(rows) == 31
    moments, where = random.Random(SEED), {}
    for crash in range(CRASHES):
        out = tmp_path / f"run{crash}"
        pid, wait = start(small(out=str(out), **wanted))
        last = int(moments.random() * 30)  # by steps, not by time: a busy machine does not move the moments
        while not reached(out, last) and not ended(pid):
            time.sleep(0.0005)
        time.sleep(moments.random() * (length / 30 if last else length / 3))
        with contextlib.suppress(ProcessLookupError):  # it has ended before
            os.kill(pid, signal.SIGKILL)
        status = wait()
        left = "finished" if status == 0 else what_is_left(out)
        where[left] = where.get(left, 0) + 1
        resume = (out / "config.json").exists()
        assert start(small(out=str(out), resume=resume, **wanted))[1]() == 0, left
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


def ended(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def what_is_left(out) -> str:
    folder = out / "checkpoint" / "sparse"
    if not folder.exists():
        return "before the first checkpoint"
    if any(path.name.endswith(".tmp") for path in folder.iterdir()):
        return "while a checkpoint was written"
    return "between two checkpoints"
