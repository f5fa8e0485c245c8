"""Arms of equal FFN time: widths, the time axis, several learning rates, and what is said of them."""

import dataclasses
import json

import pytest
import torch

from sparse24.errors import Sparse24Error
from sparse24.pretrain import equal_time, plots, pretrain, summary
from sparse24.pretrain.metrics import read_rows
from sparse24.pretrain.model import build_model, model_config
from sparse24.pretrain.saved import from_json
from sparse24.pretrain.settings import Settings, kind_of, resolve


def rows(steps, dense_from, ms=None):
    phases = ["sparse"] * dense_from + ["dense"] * (steps - dense_from)
    return [{"step": 0, "phase": "sparse", "step_ms": None}] + [
        {"step": k + 1, "phase": phase, "step_ms": ms} for k, phase in enumerate(phases)
    ]


@pytest.mark.parametrize("ratio", [1.25, 1.5, 2.0, None])
@pytest.mark.parametrize("fraction", [0.0, 1 / 6, 0.5])
def test_narrow_takes_the_time_of_sparse_and_wide_that_of_dense(ratio, fraction):
    s = resolve(Settings(device="cpu", width=768, heads=12, time_ratio=ratio, dense_fraction=fraction, steps=120))
    sparse_steps = round(120 * (1 - fraction))
    total = {
        kind: equal_time.ffn_seconds(rows(120, sparse_steps if kind in equal_time.SPARSE_KINDS else 0), s, kind)[-1]
        for kind in ("dense", "sparse", "narrow", "wide")
    }
    step = 0.5 * 64 / 3072  # widths are rounded
    assert total["narrow"] == pytest.approx(total["sparse"], rel=step * total["dense"] / total["sparse"] + 1e-9)
    assert total["wide"] == pytest.approx(total["dense"], rel=step + 1e-9)
    if ratio:
        expected = (1 - fraction) / ratio + fraction
        assert total["sparse"] / total["dense"] == pytest.approx(expected)
    narrow, wide = (equal_time.ffn_width(s, kind) for kind in ("narrow", "wide"))
    assert narrow < s.ffn_width < wide and narrow % 64 == wide % 64 == 0
    assert equal_time.ffn_width(s, "half") == s.ffn_width // 2


def test_the_cost_models_ratio_is_that_of_the_named_layer():
    from sparse24.convert.cost_model import H100, Training, feed_forward

    for model, hidden, gated in (("gpt2", 16384, False), ("llama", 10944, True)):
        s = resolve(Settings(device="cpu", model=model, width=768, heads=12))
        time = equal_time.layer_time(s)
        times = feed_forward(4096, hidden, gated, Training(8192, 16, master_bytes=4), H100)
        assert time.ratio == times.speedup and time.dense_ms == times.dense_us / 1e3
        assert f"4096 x {hidden} FFN, 16 x 8192 tokens a step" in time.source and "estimate for an H100" in time.source
    s = dataclasses.replace(s, time_ratio=1.5)
    assert equal_time.layer_time(s).ratio == 1.5 and "--time-ratio" in equal_time.layer_time(s).source


def test_the_ratio_of_2_4_activations_is_that_of_their_layer():
    from sparse24.convert.cost_model import H100, Training, feed_forward_of_activations

    s = resolve(Settings(device="cpu", width=768, heads=12, activation="relu2", operand="activation"))
    times = feed_forward_of_activations(4096, 16384, Training(8192, 16, master_bytes=4), H100)
    time = equal_time.layer_time(s)
    assert time.ratio == pytest.approx(times.speedup) and times.speedup > 1 and "2:4 activations" in time.source
    in_8_bits = equal_time.layer_time(dataclasses.replace(s, precision="fp8"))
    assert in_8_bits.ratio > time.ratio and "2:4 activations in fp8" in in_8_bits.source
    assert s.dense_fraction == 0 and equal_time.run_ratio(s) == pytest.approx(time.ratio)


def test_an_arm_of_2_4_activations_beside_others_takes_the_time_of_dense():
    settings = dict(device="cpu", width=768, heads=12, activation="relu2", steps=120, compare=True, ffn=("activation",))
    s = resolve(Settings(**settings))
    assert s.arms == ("dense", "sparse", "activation")
    own = s.runs["activation"]
    assert (own.operand, own.dense_fraction) == ("activation", 0) and s.runs["sparse"].operand == "weight"
    dense = equal_time.ffn_seconds(rows(120, 0), s, "dense")[-1]
    for seen_from in (s, own):
        taken = equal_time.ffn_seconds(rows(120, 120), seen_from, "activation")[-1]
        assert taken == pytest.approx(dense, rel=0.5 * 64 / 3072 + 1e-9)  # widths are rounded


@pytest.mark.parametrize(
    "asked, what",
    [
        ({}, "--activation must be relu2 or relu for --operand activation"),
        ({"activation": "relu2", "model": "llama"}, "--model must be gpt2 for --operand activation"),
        ({"activation": "relu2", "precision": "fp8-hybrid"}, "--precision must be fp8 where activations are pruned"),
        ({"activation": "relu2", "dense_fraction": 0.1}, "--dense-fraction must be 0 for --operand activation"),
    ],
)
def test_2_4_activations_say_what_does_not_go_with_them(asked, what):
    with pytest.raises(Sparse24Error, match=what):
        resolve(Settings(device="cpu", operand="activation", **asked))


def test_2_4_activations_train_without_a_recipe_and_resume(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    settings = dict(
        data=(str(text),), cache_dir=str(tmp_path / "cache"), device="cpu", tokenizer="bytes", layers=1, width=16,
        heads=2, ctx=16, batch=4, micro_batch=4, steps=6, eval_interval=3, save_interval=3, eval_tokens=64, samples=0,
        operand="activation", activation="relu2", ffn=("sparse", "wide"),
    )  # fmt: skip
    whole = pretrain(Settings(out=str(tmp_path / "whole"), **settings), say=lambda line: None)

    class Stop(Exception):
        pass

    def stop(step):
        if step == 4:
            raise Stop

    half = dict(settings, out=str(tmp_path / "half"))
    with pytest.raises(Stop):
        pretrain(Settings(**half), say=lambda line: None, on_step=stop)
    resumed = pretrain(Settings(**half, resume=True), say=lambda line: None)
    for arm in ("sparse", "wide"):
        assert resumed["arms"][arm]["valid_loss"] == whole["arms"][arm]["valid_loss"]
        assert resumed["arms"][arm]["flip_rate_last"] is None
    assert whole["arms"]["wide"]["ffn_width"] > whole["arms"]["sparse"]["ffn_width"]


def test_eight_bits_pay_for_more_width_against_the_same_dense_arm():
    plain = resolve(Settings(device="cpu", width=768, heads=12))
    arms = [plain, *(dataclasses.replace(plain, precision=precision) for precision in ("fp8-hybrid", "fp8"))]
    times = [equal_time.layer_time(s) for s in arms]
    assert times[0].ratio < times[1].ratio < times[2].ratio and len({time.dense_ms for time in times}) == 1
    wide = [equal_time.ffn_width(s, "wide") for s in arms]
    assert wide[0] < wide[1] < wide[2] and "2:4 in fp8" in times[2].source and "2:4" not in times[0].source
    assert equal_time.layer_time(dataclasses.replace(arms[2], time_ratio=2.0)).ratio == 2.0


def test_measured_time_counts_steps_that_were_not_timed_as_the_others():
    some = rows(4, 4, 100.0)
    some[1]["step_ms"] = None  # the first of a process is not timed
    assert equal_time.training_seconds(some) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert equal_time.training_seconds(rows(3, 3)) is None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["relu2", "gelu", "gelu_tanh", "silu", "relu"])
def test_activations_are_those_of_their_names(small, kind, name):
    functions = {
        "relu2": lambda x: torch.relu(x).square(), "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "relu": torch.relu,
    }  # fmt: skip
    model = build_model(model_config(resolve(small(model=kind, activation=name)), "dense", 300, 0), 0)
    mlp = model.transformer.h[0].mlp if kind == "gpt2" else model.model.layers[0].mlp
    function = mlp.act if kind == "gpt2" else mlp.act_fn
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(function(x), functions[name](x))


def test_arms_of_equal_time_with_their_own_rates_end_to_end(small, quiet, tmp_path, rendered):
    lines = []
    summary_of = pretrain(
        small(compare=True, ffn=("narrow", "wide"), lr="3e-3,1e-2", activation="relu2", time_ratio=1.5), lines.append
    )
    kinds = ("dense", "sparse", "narrow", "wide")
    arms = summary_of["arms"]
    assert list(arms) == [f"{kind}@{lr}" for kind in kinds for lr in ("0.003", "0.01")]
    for arm, result in arms.items():
        own = read_rows(tmp_path / "run" / "metrics.csv", arm)
        assert own[-1]["step"] == 12 and max(r["lr"] for r in own if r["lr"]) == pytest.approx(
            float(arm.partition("@")[2])
        )
        assert result["ffn_width"] == {"dense": 128, "sparse": 128, "narrow": 96, "wide": 176}[kind_of(arm)]
        assert (tmp_path / "run" / "checkpoint" / arm / "step-000012").is_dir()
        assert (result["flip_rate_peak"] or 0) > 0 and (result["verified"] is True) == (
            kind_of(arm) in ("sparse", "wide")
        )
    best = summary.best(arms)
    for kind in kinds:
        assert best[kind]["valid_loss"] == min(r["valid_loss"] for arm, r in arms.items() if kind_of(arm) == kind)
    ratios = summary_of["compare"]
    assert ratios["wide_valid_loss_ratio"] == best["wide"]["valid_loss"] / best["dense"]["valid_loss"]
    assert ratios["ffn_time_ratio"] == pytest.approx(10 / 12 / 1.5 + 2 / 12)
    text = "\n".join(lines)
    assert "At the same FFN time 2:4 is" in text and "no speed was measured" in text and "ms/step" not in text
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    again = pretrain(small(compare=True, ffn=("narrow", "wide"), lr="3e-3,1e-2", activation="relu2", time_ratio=1.5,
                           resume=True), quiet)  # fmt: skip
    assert again["arms"] == arms


def test_the_loss_is_drawn_against_steps_and_time(small):
    s = resolve(small())
    arms = {
        "dense": [row | {"arm": "dense", "loss": 3.0, "valid_loss": 3.0} for row in rows(4, 0, 10.0)],
        "sparse": [row | {"arm": "sparse", "loss": 3.0, "valid_loss": 3.0} for row in rows(4, 3, 8.0)],
    }
    labels = [label for label, _ in plots.loss_axes(arms, s)]
    assert (
        labels[0] == "optimizer step"
        and labels[1].startswith("FFN time (s)\nestimate for an H100")
        and len(labels) == 2
    )
    label, places = plots.loss_axes(arms, dataclasses.replace(s, device="cuda"))[2]
    assert "on this GPU" in label and places["sparse"] == pytest.approx([0, 0.008, 0.016, 0.024, 0.032])


def test_words_are_true():
    """Each sentence from figures known by hand."""
    s = resolve(Settings(device="cpu", time_ratio=1.5))
    result = {"step_ms": None, "step_ms_sparse_phase": None, "step_ms_of_run": None, "on_gpu": False,
              "ffn_seconds": 10.0, "flip_rate_peak": 0.05, "flip_rate_last": 0.001}  # fmt: skip
    results = {
        "dense": result | {"arm": "dense", "valid_loss": 3.0},
        "sparse": result | {"arm": "sparse", "valid_loss": 3.015, "ffn_seconds": 7.5},
        "narrow": result | {"arm": "narrow", "valid_loss": 3.03, "ffn_seconds": 7.5},
    }
    lines = summary.words(results, s)
    assert lines[0] == "2:4: validation loss 0.50 % above the dense model's, in 0.75x its FFN time."
    assert lines[1].endswith("loss 1.00 % above the dense model's, in 0.75x its FFN time.")
    assert lines[2] == "At the same FFN time 2:4 is 0.50 % below the narrow dense model."
    assert lines[3].endswith("; a 2:4 step there is 1.50x as fast as a dense one.")
    assert lines[4].startswith("Masks: at most 5.0 % of them changed from one search to the next, 0.10 % at the last")
    assert lines[4].endswith(": they have settled.")
    assert not any("this short" in line for line in lines)
    assert any(
        "this short overstates" in line for line in summary.words(results, dataclasses.replace(s, preset="demo"))
    )
    assert "no speed was measured. Next, on a GPU: `python -m sparse24 bench`" in lines[-1]
    (alone,) = summary.words({"dense": results["dense"]}, s)
    assert alone.startswith("FFN time: ") and "as fast as" not in alone


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(lr="3e-3,x"), "--lr must be a number, or several between commas, got '3e-3,x'; use --lr 1.5e-3,3e-3"),
        (dict(lr="3e-3,-1"), "--lr must be finite and above 0, got -1.0"),
        (dict(time_ratio=0.0), "--time-ratio must be finite and above 0, got 0.0; leave it out"),
        (dict(activation="tanh"), "--activation must be one of relu2, gelu, gelu_tanh, silu, relu, got 'tanh'"),
        (dict(ffn=("slim",)), "--ffn must be one of dense, sparse, half, narrow, wide, activation, got 'slim'"),
        (dict(lr="1e-2,1e-5", min_lr=1e-3), "--min-lr must not exceed --lr"),
    ],
)
def test_bad_values_are_named(small, changes, words):
    with pytest.raises(Sparse24Error, match=words):
        resolve(small(**changes))


def test_one_rate_is_a_number_and_arms_keep_their_plain_names(small):
    s = resolve(small(lr="3e-3", compare=True))
    assert s.lr == 3e-3 and s.min_lr == pytest.approx(3e-4) and s.arms == ("dense", "sparse")
    several = resolve(small(lr="3e-3,1e-2,3e-3", compare=True))
    assert list(several.runs) == ["dense@0.003", "dense@0.01", "sparse@0.003", "sparse@0.01"]
    assert several.runs["dense@0.01"].min_lr == pytest.approx(1e-3)


def test_a_named_recipe_fills_what_is_left_out(small):
    from sparse24.recipe.presets import PRESETS as RECIPES

    given = dict(mask_interval=None, decay=None)
    s = resolve(small(recipe="equal-time", **given))
    recipe = RECIPES["equal-time"]
    assert (s.dense_fraction, s.decay, s.mask_interval) == (recipe.dense_fraction, recipe.decay, recipe.mask_interval)
    assert s.mvue == recipe.mvue and resolve(small(recipe="equal-time", mvue=False)).mvue is False
    assert from_json(json.loads(json.dumps(s.to_json()))) == s  # so that --resume takes it up
    assert resolve(small(recipe="equal-time", dense_fraction=0.25)).dense_fraction == 0.25
    plain = resolve(small(**given))  # the preset's sizes come with a decay and an interval of their own
    assert (plain.dense_fraction, plain.decay, plain.mask_interval) == (1 / 6, 6e-4, 10)
    with pytest.raises(Sparse24Error, match="--recipe must be one of paper, equal-time, fine-tune, got 'best'"):
        resolve(small(recipe="best"))
    with pytest.raises(Sparse24Error, match="--time-ratio must be given for --method mvue"):
        resolve(small(recipe="fine-tune"))


@pytest.mark.parametrize("changes", [dict(recipe="equal-time"), dict(recipe="fine-tune", time_ratio=1.13)], ids=str)
def test_named_recipes_train(small, quiet, changes):
    result = pretrain(small(eval_interval=12, **changes), quiet)["arms"]["sparse"]
    assert result["valid_loss"] < result["first_valid_loss"]
