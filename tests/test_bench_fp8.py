"""The benchmark of 8-bit layers on the CPU, small shapes and made-up times; and the FP8 dense layers beside them."""

from __future__ import annotations

import sys
import types

import benchmarks_on_cpu
import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from bench import bench_fp8
from sparse24 import SparseLinear
from sparse24.benchmark import arms, float8_dense, float8_suite, models, suite, timing

SMALL = models.ModelShape("small", "llama", 1, 64, 2, 2, 128, 0, 16, 2)


@pytest.fixture
def without_gpu(monkeypatch):
    patch_gpu_away(monkeypatch, compiled=False)


def patch_gpu_away(monkeypatch, compiled):
    benchmarks_on_cpu.without_gpu(monkeypatch, arms, compiled=compiled, allocated=10**6, peak=10**6)
    time_hot = benchmarks_on_cpu.call_each(lambda name: 20.0 if "dense" in name else 10.0)
    monkeypatch.setattr(float8_suite, "time_hot", time_hot)
    monkeypatch.setattr(bench_fp8, "header", dict)
    monkeypatch.setattr(bench_fp8, "LAYERS", [SMALL])
    monkeypatch.setattr(bench_fp8, "STEPS", [SMALL])
    monkeypatch.setattr(suite, "BLOCKS", [SMALL])


def test_every_part_writes_its_table(without_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench_fp8", "--what", "ffn,block,step", "--csv", str(tmp_path)])
    bench_fp8.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block_fp8.csv", "ffn_fp8.csv", "step_fp8.csv"]
    for path in tmp_path.iterdir():
        names, *rows = [line.split(",") for line in path.read_text().splitlines() if not line.startswith("#")]
        assert len(rows) == 1 and "fp8 over best FP8 dense" in names
        assert "FP8 dense _scaled_mm us" in names or "FP8 dense _scaled_mm ms" in names  # no torchao here: named so


def test_a_part_that_there_is_not_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_fp8", "--what", "ffn,model"])
    monkeypatch.setattr(bench_fp8, "header", dict)
    with pytest.raises(SystemExit, match="no part model"):
        bench_fp8.main()


def test_a_step_pays_for_packing_and_for_each_micro_batch(without_gpu):
    run = object.__new__(float8_suite.PartTimes)
    run.times = {"bf16 dense": 100.0, "bf16 dense sum": 90.0, "fp8": 40.0, "fp8 sum": 41.0}
    run.times |= {"fp8 repack": 5.0, "fp8 search": 45.0, "fp8 decay": 3.0}
    run.times |= {"FP8 dense _scaled_mm": 60.0, "FP8 dense _scaled_mm sum": 50.0}
    assert run.step_us("bf16 dense") == 100 and run.step_us("bf16 dense", 3) == 280
    assert run.step_us("fp8") == 40 + 5 + 1 + 3 and run.step_us("fp8", 3) == 49 + 82
    assert run.step_us("best FP8 dense", 2) == 110


@pytest.fixture
def compiled_by_tracing(monkeypatch):
    """torch.compile without a compiler, its limits as they were before, and nothing compiled afterwards."""
    patch_gpu_away(monkeypatch, compiled=True)
    compiles, config = nn.Module.compile, torch._dynamo.config
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: compiles(self, **settings, backend="eager"))
    counters.clear()
    with config.patch(recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


@pytest.mark.fault(53)
def test_no_arm_of_a_training_step_is_timed_eagerly(compiled_by_tracing):
    """Blocks of all arms are of one class, and torch counts compilations by class: these are more than its limit."""
    limit = torch._dynamo.config.recompile_limit
    float8_suite.training_step(timing.Table("step_fp8", float8_suite.step_columns()), SMALL, "bf16")
    once, twice = 1 + len(float8_dense.variants()) + 1, 3  # 8 bits compile their first step by itself
    assert limit < once + 2 * twice == counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.fault(53)
def test_an_arm_beyond_the_limit_of_the_compiler_is_an_error(compiled_by_tracing):
    trainer = arms.Trainer(SMALL, sparse=True, master=torch.bfloat16, precision="fp8")
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(FailOnRecompileLimitHit):
        for _ in range(2):
            trainer.step()


# ---- the rival ------------------------------------------------------------------------------------------------------


def test_fp8_dense_multiplies_what_it_should():
    torch.manual_seed(0)
    layer, twin = (nn.Linear(64, 48).bfloat16() for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    float8_dense.convert(nn.ModuleDict({"a": layer}), "scaled_mm")
    x, dy = torch.randn(32, 64).bfloat16(), torch.randn(32, 48).bfloat16()
    results = []
    for module in (layer, twin):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.backward(dy)
        results.append([y.detach(), inputs.grad, module.weight.grad, module.bias.grad])
    for ours, exact in zip(*results, strict=True):
        assert float((ours.float() - exact.float()).norm() / exact.float().norm()) < 0.06


def test_two_of_four_layers_stay_what_they_are():
    root = nn.ModuleDict({"a": SparseLinear(64, 64), "b": nn.Linear(64, 64)})
    float8_dense.convert(root, "scaled_mm")
    assert type(root["a"]) is SparseLinear and type(root["b"]) is float8_dense.ScaledLinear


def test_torchao_is_asked_where_it_is_installed(monkeypatch):
    """With a stand-in of the names that it has in 0.18."""
    seen = {}
    torchao, float8 = types.ModuleType("torchao"), types.ModuleType("torchao.float8")
    float8.Float8LinearConfig = types.SimpleNamespace(from_recipe_name=lambda name: f"config of {name}")

    def convert(module, *, config, module_filter_fn):
        seen[config] = [name for name, child in module.named_modules() if module_filter_fn(child, name)]

    float8.convert_to_float8_training = convert
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    monkeypatch.setitem(sys.modules, "torchao.float8", float8)
    monkeypatch.setattr(float8_dense.importlib.util, "find_spec", lambda name: object())
    assert float8_dense.variants() == {"FP8 dense tensorwise": "tensorwise", "FP8 dense rowwise": "rowwise"}
    float8_dense.convert(nn.ModuleDict({"a": SparseLinear(64, 64), "b": nn.Linear(64, 64)}), "rowwise")
    assert seen == {"config of rowwise": ["b"]}
