"""The quality study: what its arms are called, how results add up over runs, and paired differences."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bench.quality import report, study, training
from bench.quality.arms import parse

NAMES = [
    "relu2 dense lr=3e-3 seed=1",
    "gelu dense wide=2/3 lr=1.5e-3",
    "relu2 2:4 wide=1.375 seed=2",
    "relu2 2:4 mvue=True precision=fp8-hybrid dense=1/3",
    "relu2 2:4 method=mvue dense=0 decay=2e-5 interval=20",
]


@pytest.mark.parametrize("name", NAMES)
def test_an_arm_has_one_spelling_and_is_read_back_from_it(name):
    arm = parse(name)
    assert parse(arm.spelled) == arm and parse(arm.spelled).spelled == arm.spelled
    assert parse(arm.group).seed == 0 and arm.slug.replace("-", "").replace("_", "").replace(".", "").isalnum()


def test_what_an_arm_does_not_use_does_not_tell_arms_apart():
    assert parse("relu2 dense lr=3e-3").plain == parse("relu2 dense decay=1e-4 dense=0").plain
    assert parse("relu2 dense").plain != parse("relu2 dense wide=2/3").plain
    assert parse("relu2 2:4 seed=1").group == parse("relu2 2:4 lr=3e-3 wide=1").group == "relu2 2:4"


@pytest.mark.parametrize(
    "name, words",
    [
        ("silu dense", "begins with relu2 or gelu"),
        ("relu2 sparse", "then dense or 2:4"),
        ("relu2 2:4 width=2", "no setting width"),
        ("relu2 2:4 precision=fp8", "write mvue=True or mvue=False"),
    ],
)
def test_names_that_are_none(name, words):
    with pytest.raises(ValueError, match=words):
        parse(name)


@pytest.fixture
def made(monkeypatch, tmp_path):
    """work(names): run them with a training that only notes its arm; .done are those, .out the folder."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "kept")
    state = SimpleNamespace(done=[], out=tmp_path / "out", kept=tmp_path / "kept")
    state.out.mkdir()
    state.kept.mkdir()

    def make(arm):
        if arm.wide == 9:
            raise RuntimeError("out of memory")
        state.done.append(arm.spelled)
        return {"arm": arm.name, "seed": arm.seed, "mean": 1.0}

    state.work = lambda *names, seconds=math.inf: study.work([parse(n) for n in names], state.out, seconds, make)
    return state


def test_results_add_up_over_runs(made):
    (made.kept / "old_name.json").write_text(json.dumps({"arm": "relu2 dense lr=3e-3 seed=0"}))
    assert made.work("relu2 dense seed=0", "relu2 dense seed=1") == 0
    assert made.work("relu2 dense seed=1", "relu2 dense dense=0 seed=1", "relu2 2:4") == 0
    assert made.done == ["relu2 dense seed=1", "relu2 2:4 seed=0"]


def test_an_interrupted_arm_begins_anew_and_a_failed_one_stops_no_other(made):
    (made.out / "relu2_dense_seed-0.json").write_text("")
    assert made.work("relu2 dense wide=9", "relu2 dense") == 1
    assert made.done == ["relu2 dense seed=0"] and json.loads((made.out / "relu2_dense_seed-0.json").read_text())


def test_an_arm_that_another_process_makes_is_left_to_it(made):
    with study.claimed(made.out / "relu2_dense_seed-0.json") as mine:
        assert mine
        made.work("relu2 dense", "gelu dense")
    assert made.done == ["gelu dense seed=0"]


def runs(*losses):
    return [{"seed": seed, "mean": loss} for seed, loss in enumerate(losses)]


def test_differences_are_paired_by_seed():
    """Seeds move the loss by 10 %, the arm by 1 %."""
    assert report.difference(runs(1.01, 1.111, 0.909), runs(1.0, 1.1, 0.9)) == "+1.00 ± 0.00 %"
    assert report.difference(runs(1.02, 1.01), runs(1.0, 1.0, 7.0)) == "+1.50 ± 0.50 %"
    assert report.difference(runs(1.01), runs(1.0)) == "+1.00 %" and report.difference(runs(1), []) == "-"


def test_the_table_compares_with_dense_at_its_best_and_with_the_same_arm_in_sixteen_bits():
    groups = {
        "relu2 dense": runs(2.0, 2.2), "relu2 dense lr=6e-3": runs(3.0, 3.0), "relu2 dense wide=2/3": runs(2.1),
        "relu2 2:4 mvue=True": runs(2.02), "relu2 2:4 mvue=True precision=fp8": runs(2.0402),
    }  # fmt: skip
    by_arm = {row[0]: row[1:] for row in report.rows(groups, {"": 1.5})}
    assert by_arm["relu2 dense"][-1] == "0" and by_arm["relu2 dense lr=6e-3"][-1].startswith("+43.")
    assert by_arm["relu2 2:4 mvue=True"] == ["2.0200", "one seed", "1", "0.72", "+1.00 %"]
    assert by_arm["relu2 2:4 mvue=True precision=fp8"][3:] == ["-", "+2.01 %"]
    assert by_arm["relu2 dense wide=2/3"][3:] == ["0.67", "+5.00 %"]
    fp8 = "relu2 2:4 mvue=True precision=fp8"
    assert report.precision_rows(groups) == [[fp8, "2.0402", "2.0200", "1", "+1.00 %"]]


@pytest.fixture
def tiny(monkeypatch):
    """Sizes for seconds, and text that can be learned: each row counts on from a number of its own."""
    for name, value in dict(WIDTH=64, LAYERS=1, BATCH=4, VALID_BATCHES=1, VOCABULARY=64).items():
        monkeypatch.setattr(training, name, value)
    torch.manual_seed(0)
    return ((torch.randint(0, 64, (480, 1)) + torch.arange(513)) % 64).to(torch.int16).to(training.DEVICE)


@pytest.mark.parametrize(
    "name",
    [
        "relu2 dense wide=2/3",
        "relu2 2:4 dense=1/3",
        "relu2 2:4 mvue=True precision=fp8",
        "relu2 2:4 method=mvue dense=0",
    ],
)
def test_an_arm_trains(tiny, monkeypatch, name):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    result = training.train(parse(name), tiny, {"text": tiny}, 12)
    assert result["mean"] == result["text"] and 0 < result["mean"] < result["curve"][0][1]
    assert json.dumps(result) and result["tokens"] == 12 * 4 * 512


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["relu2 dense", "relu2 2:4", "relu2 2:4 mvue=True precision=fp8", NAMES[-1]])
def test_captured_steps_train_as_others_do(tiny, name):
    """To a few percent of what was learned: draws of MVUE are others."""
    captured, plain = (training.train(parse(name), tiny, {"text": tiny}, 120, c) for c in (True, False))
    learned = plain["curve"][0][1] - plain["mean"]
    assert learned > 0.5 and abs(captured["mean"] - plain["mean"]) < 0.1 * learned
