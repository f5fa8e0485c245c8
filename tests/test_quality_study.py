"""The quality study: what its arms are called, how results add up over runs, and paired differences."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_studies import counting_rows, shrink

from bench.quality import compare, picture, report, study, training
from bench.quality.arms import parse
from bench.quality.model import SmallGPT, optimizers

NAMES = [
    "relu2 dense lr=3e-3 seed=1",
    "gelu dense wide=2/3 lr=1.5e-3",
    "relu2 2:4 wide=1.375 seed=2",
    "relu2 2:4 mvue=True precision=fp8-hybrid dense=1/3",
    "relu2 2:4 method=mvue dense=0 decay=2e-5 interval=20",
    "swiglu 2:4 wide=1.25 dense=1/3 lr=1.5e-3 tokens=131k size=60m",
    "relu2 2:4 optimizer=muon",
    "relu2 dense precision=fp8 size=350m lr=1e-3",
    "relu2 2:4 operand=activation precision=fp8 wide=1.25 size=350m",
]


DENSE_FP8 = "relu2 dense precision=fp8 size=350m"


@pytest.mark.parametrize("name", NAMES)
def test_an_arm_has_one_spelling_and_is_read_back_from_it(name):
    arm = parse(name)
    assert parse(arm.spelled) == arm and parse(arm.spelled).spelled == arm.spelled
    assert parse(arm.group).seed == 0 and arm.slug.replace("-", "").replace("_", "").replace(".", "").isalnum()


def test_what_an_arm_does_not_use_does_not_tell_arms_apart():
    assert parse("relu2 dense lr=3e-3").plain == parse("relu2 dense decay=1e-4 dense=0").plain
    assert parse("relu2 dense").plain != parse("relu2 dense wide=2/3").plain
    assert parse("relu2 dense").plain == parse("relu2 dense operand=activation").plain
    assert parse("relu2 dense").plain != parse("relu2 dense precision=fp8").plain
    assert parse("relu2 2:4 seed=1").group == parse("relu2 2:4 lr=3e-3 wide=1").group == "relu2 2:4"


@pytest.mark.parametrize(
    "name, words",
    [
        ("silu dense", "begins with relu2, gelu, swiglu"),
        ("relu2 dense tokens=100k", "tokens must be one of 32k"),
        ("relu2 dense size=70b", "size must be one of 10m, 60m"),
        ("relu2 dense optimizer=lion", "optimizer must be one of adamw, muon"),
        ("relu2 sparse", "then dense or 2:4"),
        ("relu2 2:4 width=2", "no setting width"),
        ("relu2 2:4 precision=fp8", "write mvue=True or mvue=False"),
        ("relu2 2:4 mvue=True precision=int8", "precision must be one of fp8, fp8-hybrid here"),
        ("relu2 dense precision=fp8-hybrid", "precision must be one of fp8 here"),
        ("relu2 2:4 operand=activation precision=fp8-hybrid", "precision must be one of fp8 here"),
    ],
)
def test_names_that_are_none(name, words):
    with pytest.raises(ValueError, match=words):
        parse(name)


def test_every_result_is_kept_under_the_name_that_it_was_measured_under():
    """Results are found by their arm: a new setting must not rename those that lack it."""
    for path in report.RESULTS.glob("**/*.json"):
        run = json.loads(path.read_text())
        arm = parse(run["arm"])
        assert run["group"] in (arm.group, run["arm"].removesuffix(f" seed={arm.seed}")), path
        parts = path.stem.replace("_lr_3e-3", "").replace("_seed_", "_seed-").split("_")
        assert sorted(parts) == sorted(arm.slug.split("_")), path


def test_what_must_be_shared_is_told_of_dense_arms_too():
    names = ("size=60m", "tokens=131k", "optimizer=muon")
    assert len({parse(f"relu2 dense {name}").plain for name in ("", *names)}) == 4
    assert {parse(f"gelu dense {name}").plain.group for name in names} == {f"gelu dense {name}" for name in names}


def test_the_decay_of_muon_is_the_recipes_unless_a_name_has_one():
    assert parse("relu2 2:4 optimizer=muon").decay == 1 and parse("relu2 2:4 optimizer=muon decay=3e-1").decay == 0.3
    assert parse("relu2 2:4").decay == 6e-5


@pytest.mark.parametrize("size, millions", [("10m", 10.6), ("60m", 63.7), ("350m", 352.4)])
def test_gated_and_plain_layers_have_as_many_parameters(size, millions):
    arms = [parse(f"{activation} dense size={size}") for activation in ("gelu", "swiglu")]
    width, layers = training.SIZES[size].width, training.SIZES[size].layers
    with torch.device("meta"):
        counts = [SmallGPT(64, 64, width, layers, arm.d_ff(width), arm.activation).block_parameters() for arm in arms]
    rounded = 3 * arms[1].d_ff(width) - 2 * arms[0].d_ff(width)  # to multiples of 64, and 8/3 * 2048 is none
    assert counts[1] - counts[0] == layers * width * rounded and abs(rounded) <= 3 * 32
    assert rounded == 0 or size == "350m"
    assert round(counts[0] / 1e6, 1) == millions
    assert parse("swiglu dense").d_ff(384) == 1024 and parse("swiglu dense wide=1.25").d_ff(384) == 1280


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    model = SmallGPT(64, 64, 64, 1, 192, "swiglu")
    muon, adamw = optimizers(model, "muon", 1e-3, False)
    of = [[p for group in each.param_groups for p in group["params"]] for each in (muon, adamw)]
    assert {id(p) for p in of[0]} == {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    assert len(of[0]) + len(of[1]) == len(list(model.parameters()))
    (only,) = optimizers(model, "adamw", 1e-3, False)
    assert type(only) is torch.optim.AdamW


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
    by_arm = {row[0]: row[1:] for row in report.rows(groups, {"plain": 1.5})}
    assert by_arm["relu2 dense"][-2] == "0" and by_arm["relu2 dense lr=6e-3"][-2].startswith("+43.")
    assert by_arm["relu2 2:4 mvue=True"] == ["2.0200", "one seed", "1", "0.72", "+1.00 %", "-"]
    assert by_arm["relu2 2:4 mvue=True precision=fp8"][3:] == ["-", "+2.01 %", "-"]
    assert by_arm["relu2 dense wide=2/3"][3:] == ["0.67", "+5.00 %", "-"]
    fp8 = "relu2 2:4 mvue=True precision=fp8"
    assert report.precision_rows(groups) == [[fp8, "2.0402", "2.0200", "1", "+1.00 %", "-"]]


def test_the_paired_t_needs_three_pairs():
    """Differences of 1, 2 and 3 %: their mean is 2, its error 1/sqrt(3)."""
    base = runs(1.0, 2.0, 1.0)
    assert compare.paired_t(runs(1.01, 2.04, 1.03), base) == "+3.5 (2)"
    assert compare.paired_t(runs(1.01, 2.04), base) == compare.paired_t(runs(1.01, 2.04, 1.03), base[:2]) == "-"


def test_arms_are_compared_within_their_family():
    groups = {
        "relu2 dense": runs(2.0), "gelu dense": runs(4.0), "gelu 2:4": runs(4.04), "swiglu 2:4": runs(1.0),
        "swiglu 2:4 mvue=False": runs(1.0), "swiglu 2:4 mvue=True precision=fp8": runs(1.0),
        "relu2 dense tokens=131k": runs(3.0), "relu2 2:4 tokens=131k": runs(2.97), "relu2 dense size=60m": runs(1.0),
        "relu2 2:4 size=60m optimizer=muon": runs(1.0),
    }  # fmt: skip
    ratios = {"plain": 1.5, "gated": 2.0, "gated mvue=False": 1.25}
    by_arm = {row[0]: row for row in report.rows(groups, ratios)}
    against = {arm: row[-2] for arm, row in by_arm.items()}
    assert against["gelu 2:4"] == "+1.00 %" and against["relu2 2:4 tokens=131k"] == "-1.00 %"
    assert against["swiglu 2:4"] == against["relu2 2:4 size=60m optimizer=muon"] == "-"
    times = {arm: by_arm[arm][4] for arm in by_arm if arm.startswith("swiglu")}
    assert times == {
        "swiglu 2:4": f"{5 / 6 / 2 + 1 / 6:.2f}", "swiglu 2:4 mvue=False": f"{5 / 6 / 1.25 + 1 / 6:.2f}",
        "swiglu 2:4 mvue=True precision=fp8": "-",
    }  # fmt: skip
    text = report.other_tables(groups, ratios)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "### GELU", "### squared ReLU, 131k tokens a step", "### squared ReLU, 64 million parameters",
        "### squared ReLU, 64 million parameters, Muon", "### SwiGLU",
    ]  # fmt: skip
    assert "| relu2 dense |" not in text and report.other_tables({"relu2 dense": runs(1.0)}, ratios) == "Not run yet.\n"


def test_one_lucky_seed_is_no_base():
    groups = {"relu2 dense": runs(2.0, 2.0), "relu2 dense lr=1.5e-3": runs(1.9), "relu2 2:4": runs(2.02)}
    assert compare.best_dense(groups, parse("relu2 2:4")) == "relu2 dense"


def curve(name, seed, *points):
    """A run of 100 steps from (step, loss)."""
    return {"arm": f"{name} seed={seed}", "seed": seed, "steps": 100, "mean": points[-1][1], "valid_curve": points}


def test_time_to_a_loss_lies_on_the_curve_and_is_never_extrapolated():
    dense = [curve("relu2 dense", seed, (60, 3.0), (80, 2.5), (100, 2.0)) for seed in (0, 1)]
    narrow = [curve("relu2 dense wide=1/2", 0, (60, 3.5), (80, 3.0), (100, 2.75))]
    wide = "relu2 2:4 wide=1.5 dense=1/2"
    sparse = [curve(wide, seed, (60, 3.0), (80, 2.25), (100, last)) for seed, last in ((0, 1.75), (1, 2.1))]
    groups = {
        "relu2 dense": dense,
        "relu2 dense wide=1/2": narrow,
        wide: sparse,
        "relu2 2:4": [dense[0] | {"valid_curve": []}],
    }
    ratios = {"plain": 1.5}
    assert compare.loss_targets(groups) == ["relu2 dense", "relu2 dense wide=1/2"]
    # Half of the steps at 1, half at 1.5: the loss of 2.0 lies after 90 steps, 2.75 after 60 + 20/3 and after 70.
    assert {row[0]: row[1:] for row in report.loss_rows(groups, ratios)} == {
        wide: ["1.10 (1 of 2 seeds)", "0.75"], "relu2 dense": ["1.00 ± 0.00", "0.70"],
        "relu2 dense wide=1/2": ["not reached", "0.50"],
    }  # fmt: skip
    early = [curve("relu2 dense", 0, (60, 1.0), (100, 0.5))]
    assert compare.time_to(early, dense, ratios) == "at most 0.60"
    assert compare.time_to(runs(1.0), dense, ratios) == "-"  # no curve was kept
    assert report.loss_tables({"relu2 dense": runs(1.0)}, ratios) == report.NOT_RUN


def test_times_are_those_that_equal_time_has_measured(monkeypatch):
    rows = [
        {"layer": "4096 x 16384", "side": "2:4", "width": width, "of dense": of}
        for width, of in (("1", "0.65"), ("1.5", "0.97"))
    ]
    monkeypatch.setattr(compare.measured, "read", lambda name: rows)
    assert compare.measured_ratio("4096 x 16384", "2:4") == 1.54 and compare.measured_ratio("llama-8B", "2:4") is None


def test_the_picture_has_the_main_arms(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib here")
    learned = [[step, 3.0 - step / 1e3] for step in range(0, 1000, 100)]
    seeds = lambda *losses: [run | {"steps": 1000, "curve": learned} for run in runs(*losses)]  # noqa: E731
    groups = {f"relu2 2:4 wide={1 + i / 8}": seeds(2.0 + i / 100) for i in range(20)}
    groups |= {"relu2 dense": seeds(2.1, 2.1), "relu2 dense lr=6e-3": seeds(2.2), "gelu dense": seeds(1.0)}
    main, others = picture.drawn(groups, {"plain": 1.5})
    assert len(main) == picture.MOST_DRAWN and next(iter(main)) == "relu2 dense" and len(others) == 14
    picture.draw(tmp_path / "quality.png", groups, {"plain": 1.5})
    assert (tmp_path / "quality.png").stat().st_size > 10_000


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch)
    return counting_rows().to(training.DEVICE)


@pytest.mark.parametrize(
    "name",
    [
        "relu2 dense wide=2/3",
        "relu2 2:4 dense=1/3",
        "relu2 2:4 mvue=True precision=fp8",
        "relu2 2:4 method=mvue dense=0",
        "swiglu dense tokens=131k",
        "swiglu 2:4 wide=1.5 tokens=65k",
        "gelu 2:4 size=60m",
        "relu2 dense optimizer=muon",
        "relu2 2:4 optimizer=muon",
        "relu2 2:4 operand=activation wide=1.25 size=350m",
        DENSE_FP8,
    ],
)
def test_an_arm_trains(tiny, monkeypatch, name):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    if name == DENSE_FP8:
        pytest.importorskip("torchao", reason="no torchao here")
    result = training.train(parse(name), tiny, {"text": tiny}, 12)
    assert result["mean"] == result["text"] and 0 < result["mean"] < result["curve"][0][1]
    assert json.dumps(result) and result["tokens"] == 12 * 4 * 512
    assert result["steps"] == 12 // parse(name).micro_batches
    at, losses = zip(*result["valid_curve"], strict=True)
    assert at[-1] == result["steps"] and losses[-1] == result["mean"] and list(at) == sorted(set(at))


def test_a_step_of_several_micro_batches_is_that_of_all_their_rows(tiny, monkeypatch):
    """In float64, where sums in another order are no other gradients."""
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    monkeypatch.setattr(training, "loss_of", lambda forward, ids: forward(ids[:, :-1], ids[:, 1:]))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    weights = []
    for tokens, batch in (("32k", 16), ("131k", 4)):
        monkeypatch.setattr(training, "BATCH", batch)
        step = training.Step(parse(f"swiglu dense tokens={tokens}"), 2, False)
        step.model.double()
        for i in range(2):
            step(tiny[16 * i : 16 * (i + 1)])
        weights.append([p.detach() for p in step.model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


def test_the_validation_loss_is_taken_late_in_a_run_and_evenly():
    at = sorted(training.validation_steps(4889))
    assert len(at) == training.VALID_POINTS and at[0] == round(0.6 * 4889) and at[-1] < 4889
    assert {b - a for a, b in zip(at, at[1:], strict=False)} <= {122, 123}
    assert 1 not in training.validation_steps(1) and 0 not in training.validation_steps(1)


CAPTURED = [
    "relu2 dense",
    DENSE_FP8,
    "relu2 2:4 operand=activation wide=1.25 size=350m",
    "relu2 2:4",
    "relu2 2:4 mvue=True precision=fp8",
    NAMES[4],
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CAPTURED, "swiglu 2:4 tokens=65k", "gelu 2:4 size=60m"])
def test_captured_steps_train_as_others_do(tiny, name):
    """To a few percent of what was learned: draws of MVUE are others."""
    if name == DENSE_FP8:
        pytest.importorskip("torchao", reason="no torchao here")
    captured, plain = (training.train(parse(name), tiny, {"text": tiny}, 120, c) for c in (True, False))
    learned = plain["curve"][0][1] - plain["mean"]
    assert learned > 0.5 and abs(captured["mean"] - plain["mean"]) < 0.1 * learned
