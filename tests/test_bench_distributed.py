"""`python -m sparse24 bench --distributed`: under torchrun with two gloo ranks, and the arithmetic of its columns."""

import csv
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparse24.benchmark import distributed
from sparse24.benchmark.communication import CountBytes, exposed_ms, uncovered
from sparse24.benchmark.distributed import COLUMNS, MODELS, Plan, Times
from sparse24.errors import Sparse24Error

ROOT = Path(__file__).resolve().parents[1]


LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def bench(*options, ranks=2, gpus=False):
    command = [sys.executable, *LAUNCH, str(ranks), "-m", "sparse24", "bench", "--distributed", *map(str, options)]
    env = os.environ | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)


def test_two_ranks_time_all_arms_and_write_one_csv(tmp_path):
    sizes = ["--model", "tiny", "--tokens", "128", "--warm", "1", "--steps", "2", "--rounds", "2", "--no-compile"]
    arms = ["--arms", "dense, 2:4, 2:4 fp8-hybrid"]
    run = bench(*sizes, *arms, "--csv", tmp_path, "--name", "two_ranks")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = (tmp_path / "two_ranks.csv").read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert "# device: CPU" in head and list(rows[0]) == COLUMNS
    assert [row["arm"] for row in rows] == ["dense", "2:4", "2:4 fp8-hybrid"]
    for row in rows:
        assert row["model"] == "tiny 2 layers" and row["gpus"] == "2" and row["steps"] == "4"
        assert float(row["step_ms"]) > 0 and row["exposed_ms"] == row["MFU"] == row["power W"] == "nan"
        # two numbers of three or four digits each: half a unit of either
        assert float(row["tokens/s a GPU"]) == pytest.approx(128e3 / float(row["step_ms"]), rel=2e-3)
        # the same
        assert float(row["speedup"]) == pytest.approx(float(rows[0]["step_ms"]) / float(row["step_ms"]), rel=2e-3)
        assert float(row["gathered MB"]) > 0 and float(row["reduced MB"]) > 0


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multigpu)])
def test_gpus_have_all_columns(tmp_path, ranks):
    sizes = ["--model", "llama-1B", "--layers", "2", "--tokens", "2048", "--warm", "2", "--steps", "5", "--rounds", "1"]
    arms = ["--arms", "dense,2:4,2:4 fp8-hybrid,2:4 fp8"]
    run = bench(*sizes, *arms, "--csv", tmp_path, ranks=ranks, gpus=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = (tmp_path / "distributed.csv").read_text().splitlines()
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        assert 0 < float(row["MFU"]) < 1 and float(row["peak GB"]) > 0
        assert float(row["exposed_ms"]) >= 0 and (float(row["gathered MB"]) > 0) == (ranks > 1)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model="llama-9B"), "--model must be one of tiny, llama-1B, llama-3B, llama-8B, got 'llama-9B'"),
        (dict(steps=0), "--steps must be at least 1, got 0"),
        (dict(tokens=8193), "--tokens must be a multiple of 8192, a whole sequence of llama-8B, got 8193"),
        (dict(layers=33), "--layers must be from 1 to 32"),
    ],
)
def test_bad_plans_name_the_option(changes, words):
    with pytest.raises(Sparse24Error, match=words.replace("(", r"\(")):
        Plan(**changes).shape()


def test_arms_are_chosen_by_name(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert Plan().chosen() == ["dense", "2:4", "2:4 fp8-hybrid", "2:4 fp8"]
    assert Plan(arms=("2:4", "dense")).chosen() == ["dense", "2:4"]
    with pytest.raises(Sparse24Error, match="--arms has sparse; there are dense, "):
        Plan(arms=("sparse",)).chosen()
    with pytest.raises(Sparse24Error, match="pip install torchao"):
        Plan(arms=("FP8 dense rowwise",)).chosen()
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: "torchao")
    assert Plan().chosen() == list(distributed.ARMS)


def test_outside_of_torchrun_the_command_is_told(run_cli):
    status, _, err = run_cli("bench", "--distributed", "--model", "tiny", "--tokens", 64)
    assert status == 2 and "torchrun --nproc-per-node 2 -m sparse24 bench --distributed" in err


def test_a_layer_of_ones_own_is_not_distributed(run_cli):
    status, _, err = run_cli("bench", "--distributed", "--d-model", 64, "--d-ff", 128)
    assert status == 2 and "--distributed times whole models" in err


def test_the_llama_of_8_billion_weights_has_them():
    shape = MODELS["llama-8B"]
    attention = 2 * 4096**2 + 2 * 4096 * 1024
    weights = 32 * (attention + 3 * 4096 * 14336) + 2 * 128256 * 4096
    # published as 8.03 billion: half a unit of the last digit is less than a thousandth
    assert weights == pytest.approx(8.03e9, rel=1e-3) and Plan().shape() == shape
    assert Plan(layers=8, tokens=16384).shape() == shape.of(layers=8, batch=2)


def test_a_row_follows_from_the_times():
    """Medians; speed-up over dense; what nothing was measured for is NaN."""
    times = Times([10.0, 30.0, 20.0], [700.0, 500.0], 3e6, 1e6, 1.5, 2e9)
    row = dict(zip(COLUMNS, distributed.row(MODELS["tiny"], "2:4", times, 25.0, 2), strict=True))
    assert (row["step_ms"], row["speedup"], row["tokens/s a GPU"]) == (20.0, 1.25, 64 / 0.02)
    assert (row["gathered MB"], row["reduced MB"], row["peak GB"], row["power W"]) == (3.0, 1.0, 2.0, 600.0)
    assert math.isnan(row["MFU"]) or torch.cuda.is_available()


@pytest.mark.parametrize(
    "spans, covers, expected",
    [
        ([], [(0, 9)], 0),
        ([(0, 4)], [], 4),
        ([(0, 4), (2, 6)], [], 6),  # overlapping spans count once
        ([(0, 10)], [(2, 3), (5, 7)], 7),
        ([(0, 2), (8, 9)], [(1, 8.5)], 1.5),
        ([(1, 2)], [(0, 1), (2, 3)], 1),  # neighbours cover nothing
    ],
)
def test_exposed_time_is_what_no_kernel_lies_over(spans, covers, expected):
    assert uncovered(spans, covers) == pytest.approx(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_nothing_is_known_of_exposed_time():
    assert math.isnan(exposed_ms(lambda: None))


def _counted(rank, reshard):
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    model(torch.ones(2, 8)).sum().backward()  # the first pass sets up
    with CountBytes() as count:
        model(torch.ones(2, 8)).sum().backward()
        dist.all_gather(list(torch.empty(2, 3)), torch.ones(3))
        dist.all_reduce(torch.ones(5))
        model[0].weight.full_tensor()
    return dict(count.bytes)


@pytest.mark.parametrize("reshard", [True, False])
def test_bytes_of_collectives_are_counted(two, reshard):
    """FSDP2 gathers each weight in forward, again in backward where it was freed, and reduces each gradient once."""
    weights = 4 * (8 * 16 + 16 * 8)
    gathered = weights * (2 if reshard else 1) + 4 * 6 + 4 * 8 * 16
    for counted in two.run(functools.partial(_counted, reshard=reshard)):
        assert counted == {"gather": gathered, "reduce": weights + 4 * 5}
