"""bench --operand activation: a layer with 2:4 activations beside dense, without a GPU."""

import json

import benchmarks_on_cpu
import pytest

from sparse24.benchmark import activations, arms, command, report, suite
from sparse24.errors import Sparse24Error


@pytest.fixture
def without_gpu(monkeypatch):
    """Calls run on the CPU, times are made up."""
    benchmarks_on_cpu.without_gpu(monkeypatch, arms)
    us = {"dense": 20.0, "sparse": 16.0, "dense sum": 30.0, "sparse sum": 18.0}
    monkeypatch.setattr(activations, "time_hot", benchmarks_on_cpu.call_each(us.get))
    monkeypatch.setattr(activations, "header", lambda: {"device": "none"})
    monkeypatch.setattr(command, "check_gpu", lambda: None)


def test_a_layer_of_ones_own_prints_its_speed_up_and_break_even(without_gpu, capsys, tmp_path):
    activations.own_layer(2048, 64, 128, None, "bf16", 3, tmp_path)
    text = capsys.readouterr().out
    assert "feed-forward layer 64 x 128 relu2, 2048 tokens a call, bf16" in text
    assert "speed-up of a step: 1.25x" in text
    assert f"speed-up of a step of 3 micro-batches: {(20 + 2 * 30) / (16 + 2 * 18):.2f}x" in text
    assert "sparsify(operand='activation', tokens=2048, micro_batches=3) expects" in text
    assert "break-even: at or below 256 tokens a call" in text
    rows = (tmp_path / "own_activations.csv").read_text().splitlines()
    assert rows[1].startswith("weights,layer,tokens,dense_us") and len(rows) == 1 + 1 + 5
    assert rows[2].startswith("bf16,64 x 128 relu2,256,20,16,1.25,")


def test_both_arms_are_the_same_layer_and_one_of_them_prunes(without_gpu, monkeypatch):
    made = []
    build = arms.feed_forward_arm
    monkeypatch.setattr(arms, "feed_forward_arm", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    activations.measure(
        suite.ffn_shape("own", 16, 64, 128, kind="relu2"), suite.MASTERS["fp32 master"], rounds=1, warm=0
    )
    dense, sparse = (arm.module for arm in made)
    assert type(sparse).__name__ == f"SparseActivation{type(dense).__name__}"
    assert all(parameter.grad is not None for module in (dense, sparse) for parameter in module.parameters())


def test_its_table_goes_into_the_report(without_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "header", lambda: {"device": "none"})
    monkeypatch.setattr(report, "device", dict)
    activations.own_layer(256, 64, 128, False, "bf16", 1, None, tmp_path / "report.json")
    table = json.loads((tmp_path / "report.json").read_text())["tables"]["own_activations"]
    assert table["columns"] == activations.COLUMNS and [row[2] for row in table["rows"]] == [256, 512]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--operand", "activation"), "--operand activation is of a layer of your own: give --d-model and --d-ff"),
        (("--operand", "input"), "--operand must be weight or activation, got 'input'"),
        (("--operand", "activation", "--d-model", 64, "--d-ff", 128, "--gated"), "leave out --gated"),
        (("--operand", "activation", "--d-model", 64), "--d-model and --d-ff belong together"),
        (("--operand", "activation", "--d-model", 60, "--d-ff", 128), "--d-model must be positive, a multiple of 16"),
    ],
)
def test_what_it_does_not_time_is_refused_with_the_remedy(run_cli, options, message):
    status, _, err = run_cli("bench", *options)
    assert status == 2 and message in err


def test_a_gate_is_refused():
    with pytest.raises(Sparse24Error, match="squared ReLU without a gate"):
        activations.own_layer(256, 64, 128, True, "bf16", 1, None)
