"""Presets, defaults, and what bad option values get."""

import json

import pytest

from sparse24.errors import Sparse24Error
from sparse24.pretrain import PRESETS, Settings
from sparse24.pretrain.saved import differences, from_json
from sparse24.pretrain.settings import resolve


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "--preset must be one of tiny, demo, 124m, 350m, got 'huge'"),
        ({"model": "bert"}, "--model must be one of gpt2, llama, got 'bert'"),
        ({"ffn": ("thin",)}, "--ffn must be one of dense, sparse, half, narrow, wide, activation, got 'thin'"),
        ({"method": "magic"}, "--method must be one of fst, .*, got 'magic'"),
        ({"decay_schedule": "step"}, "--decay-schedule must be one of constant, linear, cosine, got 'step'"),
        ({"dense_at": "middle"}, "--dense-at must be one of auto, start, end, none, got 'middle'"),
        ({"precision": "fp4"}, "--precision must be fp8-hybrid or fp8, got fp4; leave it out for 16 bits"),
        ({"precision": "fp8", "dtype": "float16"}, "--dtype cannot go with --precision fp8, got float16"),
        ({"dtype": "int8"}, "--dtype must be one of .*, got 'int8'"),
        ({"tokenizer": "words"}, "--tokenizer must be one of bpe, bytes"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda"),
        ({"layers": 0}, "--layers must be at least 1, got 0; give a positive number"),
        ({"steps": -5}, "--steps must be at least 1, got -5"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"mask_interval": 0}, "--mask-interval must be at least 1, got 0"),
        ({"width": 33}, r"--width must be a multiple of --heads \(2\), got 33; use --width 34"),
        ({"width": 30, "heads": 2, "model": "llama"}, r"--width over --heads \(2\) must be even for llama"),
        ({"ctx": 1}, "--ctx must be at least 2, got 1"),
        ({"micro_batch": 3}, r"--micro-batch must divide --batch \(4\), got 3; use --micro-batch 1"),
        ({"vocab_size": 100}, "--vocab-size must be at least 257 .*, got 100; raise it, or --tokenizer bytes"),
        ({"warmup": 12}, r"--warmup must be below --steps \(12\), got 12"),
        ({"lr": 0.0}, "--lr must be finite and above 0, got 0.0"),
        ({"lr": float("nan")}, "--lr must be finite and above 0, got nan"),
        ({"min_lr": 1.0}, r"--min-lr must not exceed --lr \(0.003\), got 1.0"),
        ({"decay": -1e-4}, "--decay must be finite and not negative, got -0.0001"),
        ({"decay": float("nan")}, "--decay must be finite and not negative, got nan"),
        ({"clip": float("inf")}, "--clip must be finite and not negative, got inf"),
        ({"beta2": 1.0}, r"--beta2 must be in \[0, 1\), got 1.0"),
        ({"dense_fraction": 1.5}, r"--dense-fraction must be in \[0, 1\], got 1.5; the paper has 1/6"),
        ({"valid_fraction": 0.0}, r"--valid-fraction must be in \(0, 0.5\], got 0.0"),
        ({"resume": True, "overwrite": True}, "--overwrite cannot go with --resume"),
        ({"resume": True, "out": None}, "--resume needs --out"),
        ({"max_bytes": 0}, "--max-bytes must be at least 1, got 0"),
        ({"out": "run-\udcff"}, "--out must be a name in Unicode, got run-.*; rename .* PYTHONUTF8=1"),
        ({"cache_dir": "\udcff"}, "--cache-dir must be a name in Unicode"),
        ({"seed": 2**63}, r"--seed must be below 2\^63, got 9223372036854775808; give a smaller number"),
    ],
)
def test_bad_value_names_option_rule_value_and_remedy(small, changes, message):
    with pytest.raises(Sparse24Error, match=message):
        resolve(small(**changes))


def test_cuda_without_a_gpu_is_refused(small, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Sparse24Error, match="--device is cuda, but torch .* sees no CUDA device; use --device cpu"):
        resolve(small(device="cuda"))


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_for_both_models(preset, model):
    settings = resolve(Settings(preset=preset, model=model, device="cpu"))
    assert all(getattr(settings, name) is not None for name in PRESETS[preset])
    assert settings.ffn_width % 64 == 0


def test_given_values_win_over_the_preset():
    settings = resolve(Settings(layers=2, batch=6, steps=50, device="cpu"))
    assert (settings.layers, settings.batch, settings.width) == (2, 6, PRESETS["tiny"]["width"])
    assert settings.batch % settings.micro_batch == 0 and settings.warmup == 5


def test_arms_follow_compare_and_ffn():
    assert Settings().arms == ("sparse",)
    assert Settings(ffn=("half", "dense")).arms == ("half", "dense")
    assert Settings(compare=True).arms == ("dense", "sparse")
    assert Settings(compare=True, ffn=("half",)).arms == ("dense", "sparse", "half")


def test_settings_survive_json(small):
    settings = resolve(small(compare=True))
    assert from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_differences_name_what_decides_the_weights_and_nothing_else(small):
    a, b = (
        resolve(small(min_lr=2e-4)),
        resolve(small(width=64, lr=1e-4, min_lr=1e-5, out="elsewhere", eval_interval=1, samples=0)),
    )
    assert differences(a.to_json(), a.to_json()) == []
    assert differences(a.to_json(), b.to_json()) == [
        "width was 32, is 64", "ffn_width was 128, is 256", "lr was 0.003, is 0.0001", "min_lr was 0.0002, is 1e-05",
    ]  # fmt: skip
