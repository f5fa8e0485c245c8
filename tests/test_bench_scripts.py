"""Every script of bench/ from its options to its CSV, without a GPU: small shapes, on the CPU, with made-up times."""

import importlib.util
import sys
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import common
from sparse24.benchmark import suite, timing

SMALL = [("gpt2-small", 64, 64, 128)]
#: script -> what it measures instead of real shapes
SCRIPTS = {
    "bench_activation": {"SHAPES": [("small", 64, 64)]},
    "bench_compress": {"WEIGHTS": [("small up", 64, 64)]},
    "bench_mask": {"WEIGHTS": [("small up", 64, 64)], "MODELS": [("small all", 2, ((64, 64),))]},
    "bench_mvue": {"WEIGHTS": [("small up", 64, 64)], "GRADIENTS": [("small", 1024, 64)]},
    "bench_gemm": {"LAYERS": SMALL, "CEILING": 64},
    "gated_epilogue": {"LAYERS": [suite.ffn_shape("small", 64, 128, 128)]},
    "l2_walks": {"SHAPES": [("small", 64, 64)]},
}


class CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def call_each(candidates, *args, **settings):
    for call in candidates.values():
        call()
    return dict.fromkeys(candidates, 10.0)


def import_walks(monkeypatch):
    """bench.l2_walks, its kernel unused: with a stand-in for triton where there is none."""
    triton = types.ModuleType("triton")
    triton.jit, triton.language = (lambda kernel: kernel), types.ModuleType("triton.language")
    triton.language.constexpr = int
    with monkeypatch.context() as patch:
        if importlib.util.find_spec("triton") is None:
            patch.setitem(sys.modules, "triton", triton)
            patch.setitem(sys.modules, "triton.language", triton.language)
        importlib.import_module("bench.l2_walks")


@pytest.fixture
def without_gpu(monkeypatch):
    import_walks(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda call, **settings: call)
    monkeypatch.setattr(torch, "_sparse_semi_structured_tile", lambda w, algorithm, use_cutlass: w, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    sizes = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sizes)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    monkeypatch.setattr(suite, "LAYERS", [])
    for script in SCRIPTS:
        module = importlib.import_module(f"bench.{script}")
        for name, value in SCRIPTS[script].items():
            monkeypatch.setattr(module, name, value)
        for name in ("time_cold", "time_hot", "time_busy"):
            monkeypatch.setattr(module, name, call_each, raising=False)
        monkeypatch.setattr(module, "copy_bandwidth", lambda: 4.0, raising=False)
        monkeypatch.setattr(module, "hot_clock_mhz", lambda call, time_us: 1500.0, raising=False)
        monkeypatch.setattr(module, "triton_mvue", lambda: None, raising=False)
        monkeypatch.setattr(module, "triton_searches", lambda dtype: {}, raising=False)
        monkeypatch.setattr(module, "counters", counters, raising=False)
    with CudaIsCpu():
        yield


def counters(module, metrics):
    return [[dict.fromkeys(metrics, 1e3)]] * len(importlib.import_module(module).WALKS)


def run(monkeypatch, script, *options):
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    importlib.import_module(f"bench.{script}").main()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_writes_what_it_measures(without_gpu, monkeypatch, tmp_path, script):
    run(monkeypatch, script, "--csv", tmp_path)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines()
    assert "# device: NVIDIA H200" in lines and "# commit: abc1234" in lines
    rows = [line for line in lines if not line.startswith("#")]
    assert len(rows) >= 2
    run(monkeypatch, script, "--csv", tmp_path, "--append")
    assert path.read_text().splitlines() == lines  # every row has a key of its own


def test_options_of_the_shared_parser_reach_the_table(tmp_path):
    args = timing.arguments("").parse_args(["--csv", str(tmp_path), "--append"])
    table = common.open_table(args, "t", ["a", "b"], key=2)
    assert (table.folder, table.append, table.key) == (tmp_path, True, 2)
    assert common.open_table(timing.arguments("").parse_args([]), "t", ["a"]).folder is None
