"""The quality study as it is started: what a result holds, and arms whose layers another library has."""

import json
import sys
import types

import pytest
import torch
from tiny_studies import counting_rows, shrink
from torch import nn

from bench.quality import study, training
from bench.quality.arms import parse
from sparse24.errors import Sparse24Error


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Tokens of a tiny study; `study.main` looks for results in this folder alone."""
    shrink(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "kept")
    rows = counting_rows().numpy().astype("uint16")
    rows[:24].tofile(tmp_path / "train.bin")
    for source in ("books", "code"):
        rows[24:28].tofile(tmp_path / f"{source}_valid.bin")
    return tmp_path


def started(monkeypatch, folder, *arguments: str) -> dict[str, dict]:
    """What a study in this process has written, by the arms' spelling."""
    out = folder / "out"
    monkeypatch.setattr(sys, "argv", ["study", str(folder), "--out", str(out), *arguments])
    study.main()
    runs = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return {parse(run["arm"]).spelled: run for run in runs}


ARMS = ["relu2 dense size=350m lr=1e-3 seed=0", "relu2 2:4 operand=activation size=350m wide=1.25 lr=1e-3 seed=0"]


def test_a_result_says_what_it_may_be_compared_by(monkeypatch, folder):
    runs = started(monkeypatch, folder, "--fraction", "0.5", "--arms", *ARMS)
    assert set(runs) == {parse(arm).spelled for arm in ARMS}
    for run in runs.values():
        assert run["fraction"] == 0.5 and run["steps"] == 12 // 4 and run["tokens"] == 12 * 512
        assert run["alone"] is True and run["outside_gib"] < study.MOST_OUTSIDE_GIB
        assert run["phases"] == [["dense", 3, run["step_ms"]]] and run["valid_curve"][-1] == [3, run["mean"]]
    assert len({run["text"] for run in runs.values()}) == 1


def test_another_part_of_the_text_is_another_text(monkeypatch, folder):
    half = started(monkeypatch, folder, "--fraction", "0.5", "--arms", "relu2 dense seed=0")
    both = started(monkeypatch, folder, "--arms", "relu2 dense seed=1")
    assert half["relu2 dense seed=0"]["text"] != both["relu2 dense seed=1"]["text"]
    with pytest.raises(SystemExit, match="relu2_dense_seed-0.json was trained on another text"):
        started(monkeypatch, folder, "--arms", "relu2 dense seed=0")
    kept = folder / "out"
    kept.rename(folder / "kept")  # where results of the repository lie: another text there leaves nothing out
    assert set(started(monkeypatch, folder, "--arms", "relu2 dense seed=0", "relu2 dense seed=1")) == {
        "relu2 dense seed=0"
    }


@pytest.mark.parametrize("processes, outside, alone", [(1, 0.6, True), (3, 0.6, False), (1, 20.0, False)])
def test_a_process_is_alone_where_it_was_started_alone_and_nobody_else_has_memory(
    monkeypatch, folder, processes, outside, alone
):
    monkeypatch.setattr(training, "outside_gib", lambda: outside)
    runs = started(monkeypatch, folder, "--one-of", str(processes), "--arms", "relu2 dense")
    assert [run["alone"] for run in runs.values()] == [alone]


def test_processes_that_share_a_gpu_are_told_of_it(monkeypatch, folder):
    started_with = []

    class Process:
        def __init__(self, command):
            started_with.append(command)

        def wait(self):
            return 0

    monkeypatch.setattr(study.subprocess, "Popen", Process)
    with pytest.raises(SystemExit) as ended:
        started(monkeypatch, folder, "--at-once", "3", "--arms", "relu2 dense")
    assert not ended.value.code and len(started_with) == 3
    assert all(command[-4:] == ["--at-once", "1", "--one-of", "3"] for command in started_with)


def test_the_time_of_a_step_is_that_of_its_phase(monkeypatch):
    """Laps of ten steps, one a second by the clock; validation stands still."""
    now = iter([0.0, 1.0, 101.0, 102.0, 302.0, 303.0, 305.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(now))
    clock = training.Clock()
    clock.steps.update({"sparse": 20, "dense": 10})
    assert clock.lap("sparse", 10) == 100  # to 1.0
    assert clock.lap("sparse", 10) == 10_000  # a compilation
    with clock.stopped():  # 102.0 to 302.0
        pass
    assert clock.lap("sparse", 10) == 200 and clock.lap("dense", 10) == 200
    assert clock.phases() == [("sparse", 20, 200.0), ("dense", 10, 200.0)] and clock.median() == 200.0
    assert clock.median("a phase without laps") == clock.median()


# -- dense FP8 ------


def without_torchao(monkeypatch):
    find = training.importlib.util.find_spec
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: find(name) if name != "torchao" else None)


def test_a_study_without_torchao_stops_before_it_trains(monkeypatch, folder):
    without_torchao(monkeypatch)
    with pytest.raises(SystemExit, match="relu2 dense lr=1e-3 .*pip install torchao"):
        started(monkeypatch, folder, "--arms", "relu2 dense", "relu2 dense precision=fp8 lr=1e-3")
    assert not (folder / "out").exists()
    with pytest.raises(Sparse24Error, match="pip install torchao"):
        training.make(parse("relu2 dense precision=fp8"), 10, False)
    training.check(parse("relu2 2:4 mvue=True precision=fp8"))  # these are the library's own


class Float8Linear(nn.Linear):
    """In torchao's place."""


def test_dense_fp8_is_torchaos_tensorwise_in_feed_forward_layers_alone(monkeypatch, folder):
    torchao, float8, asked = types.ModuleType("torchao"), types.ModuleType("torchao.float8"), []
    float8.Float8LinearConfig = types.SimpleNamespace(from_recipe_name=asked.append)

    def convert(module, *, config, module_filter_fn):
        for name, child in module.named_modules():
            if module_filter_fn(child, name):
                child.__class__ = Float8Linear

    float8.convert_to_float8_training = convert
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    monkeypatch.setitem(sys.modules, "torchao.float8", float8)
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: object())
    model, _, recipe = training.make(parse("relu2 dense precision=fp8 size=60m"), 10, False)
    converted = {name for name, child in model.named_modules() if type(child) is Float8Linear}
    assert converted == {f"blocks.{i}.mlp.{layer}_proj" for i in (0, 1) for layer in ("up", "down")}
    assert set(asked) == {"tensorwise"} and recipe is None


def test_activations_in_8_bits_are_asked_of_the_library(monkeypatch, folder):
    asked = []
    monkeypatch.setattr(training.sparse24, "sparsify", lambda model, **settings: asked.append(settings))
    training.make(parse("relu2 2:4 operand=activation precision=fp8"), 10, False)
    training.make(parse("relu2 2:4 operand=activation"), 10, False)
    sixteen = {"backend": "sparse", "operand": "activation"}
    assert asked == [sixteen | {"precision": "fp8"}, sixteen]
