"""examples/fsdp2_llama.py, tiny: two gloo ranks, under torchrun and as forks; other arms on one rank."""

import contextlib
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "fsdp2_llama.py"
TINY = ["--size", "tiny", "--steps", "6", "--tokenizer", "bytes", "--mask-interval", "2", "--log-every", "2"]


def torchrun(ranks, *options, gpus=False):
    """The example's output; without `gpus` it sees none, and so its ranks are CPUs over gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launch, str(SCRIPT), *TINY, *map(str, options)]
    path = os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def run_as_rank(rank, world, port, told, options):
    """The example in a process that torchrun might have started; a GPU is not looked for."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.cuda.is_available = lambda: False
    sys.argv = [str(SCRIPT), *TINY, *map(str, options)]
    with open(told, "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def two_forks(tmp_path):
    """What torchrun(2, *options) does and returns, by processes that need no imports."""

    def run(*options):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        told = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
        tasks = [(rank, 2, port, told[rank], options) for rank in range(2)]
        ranks = [forks.context().Process(target=run_as_rank, args=task, daemon=True) for task in tasks]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=120)
        assert [process.exitcode for process in ranks] == [0, 0], told[0].read_text()
        return told[0].read_text()

    return run


@pytest.fixture
def one_rank(monkeypatch, capsys):
    """The same of one rank, in this process."""

    def run(*options):
        world = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        for name, value in world.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *map(str, options)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    yield run
    if dist.is_initialized():  # where the example failed
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 2000)
    return ["--data", folder / "text.txt", "--cache-dir", folder / "cache"]


def last_loss(output):
    return float(re.search(r"last loss ([\d.]+)", output)[1])


def test_two_ranks_stop_and_resume_bit_for_bit(tmp_path, text, two_forks, one_rank):
    """The last loss, with noise in its gradients, is that of the run that was not stopped."""
    out = tmp_path / "out"
    whole = torchrun(2, *text)
    assert re.search(r"step 6  loss \d\.\d+  \d+ tokens/s a GPU  MFU nan %  peak \d+\.\d+ GB", whole), whole
    assert "6 layers 2:4" in whole
    two_forks(*text, "--out", out, "--save-every", "3", "--stop", "3")
    resumed = two_forks(*text, "--out", out, "--resume")
    assert "3 steps, last loss" in resumed and last_loss(resumed) == last_loss(whole)
    alone = one_rank(*text, "--out", out, "--resume", "--batch", "2")
    assert last_loss(alone) == pytest.approx(last_loss(whole), rel=0.1)  # another draw of the noise
    assert torch.load(out / "step-3" / "training.pt", weights_only=True)["recipe"]["step"] == 3


@pytest.mark.parametrize("arm", ["dense", "2:4-fp8-hybrid", "2:4-fp8"])
def test_other_arms_train(text, arm, one_rank):
    output = one_rank(*text, "--arm", arm, "--stop", "2")
    assert f"{arm}: 2 steps, last loss" in output and 3 < last_loss(output) < 10


WIDE = ["--size", "1b", "--layers", "2", "--length", "512", "--stop", "4"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multigpu)])
@pytest.mark.parametrize("arm", ["dense", "fp8-tensorwise", "fp8-rowwise", "2:4", "2:4-fp8-hybrid", "2:4-fp8"])
def test_arms_train_on_gpus(text, ranks, arm):
    if arm.startswith("fp8"):
        pytest.importorskip("torchao")
    output = torchrun(ranks, *text, *WIDE, "--compile", "--arm", arm, gpus=True)
    assert f"{arm}: 4 steps, last loss" in output and last_loss(output) < 14
    assert re.search(r"MFU \d+\.\d %", output), output


def test_nothing_to_resume_is_said_at_once(tmp_path, text, one_rank, capsys):
    with pytest.raises(SystemExit, match="2"):
        one_rank(*text, "--out", tmp_path, "--resume")
    assert f"--resume finds no checkpoint in {tmp_path}" in capsys.readouterr().err
