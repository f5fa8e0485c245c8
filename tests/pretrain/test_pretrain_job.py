"""The job from text to tables."""

import csv
import json

import pytest
import torch
from PIL import Image  # matplotlib needs it too
from rounding import MANY_SUMS

from sparse24.errors import Sparse24Error
from sparse24.pretrain import pretrain
from sparse24.pretrain.metrics import FIELDS, MetricsLog, read_rows
from sparse24.pretrain.model import build_model, build_optimizer, model_config
from sparse24.pretrain.settings import resolve
from sparse24.pretrain.summary import table
from sparse24.pretrain.train import learning_rate


@pytest.fixture(scope="module")
def compared(tmp_path_factory, text_file, cache_dir):
    """Both arms and the half-width one on a small text: (folder, summary, lines printed)."""
    from sparse24.pretrain import Settings

    out, lines = tmp_path_factory.mktemp("compared") / "run", []
    summary = pretrain(
        Settings(
            data=(str(text_file),),
            cache_dir=str(cache_dir),
            out=str(out),
            device="cpu",
            compare=True,
            ffn=("half",),
            layers=1,
            width=32,
            heads=2,
            ctx=32,
            vocab_size=300,
            batch=8,
            steps=60,
            lr=1e-2,
            warmup=6,
            mask_interval=5,
            eval_interval=20,
            eval_tokens=512,
            save_interval=30,
            samples=2,
            sample_tokens=8,
        ),  # fmt: skip
        lines.append,
    )
    return out, summary, lines


def test_every_promised_file_is_there(compared):
    out, _, _ = compared
    for arm in ("dense", "sparse", "half"):
        (events,) = (out / "tensorboard" / arm).glob("events.out.tfevents.*")
        assert events.stat().st_size > 1000, "more than its header"
        (path,) = (out / "checkpoint" / arm).iterdir()
        assert path.name == "step-000060"
    files = {path.name for path in out.iterdir() if path.is_file()}
    pictures = {"loss.png", "flip_rate.png", "flips_against_gap.png"}
    assert files == pictures | {"metrics.csv", "config.json", "samples.txt", "summary.json", "summary.md"}
    for name in pictures:
        width, height = Image.open(out / name).size
        assert width > 600 and height > 400, name
    samples = (out / "samples.txt").read_text(encoding="utf-8")
    assert all(arm in samples for arm in ("dense", "sparse", "half"))
    assert set(json.loads((out / "config.json").read_text())) >= {"settings", "data"}


def test_both_arms_learn_and_start_from_the_same_weights(compared):
    out, summary, _ = compared
    for arm in summary["arms"].values():
        assert arm["valid_loss"] < 0.7 * arm["first_valid_loss"]
    dense, sparse = (read_rows(out / "metrics.csv", arm) for arm in ("dense", "sparse"))
    assert [r["step"] for r in dense] == [r["step"] for r in sparse] == list(range(61))
    assert dense[1]["loss"] == pytest.approx(
        sparse[1]["loss"], rel=0.01
    )  # the same batch and, but for the masks, model
    assert (
        summary["arms"]["half"]["parameters"]
        < summary["arms"]["dense"]["parameters"]
        == summary["arms"]["sparse"]["parameters"]
    )


def test_sparse_arm_is_2_to_4_until_its_dense_phase(compared):
    out, summary, _ = compared
    rows = read_rows(out / "metrics.csv", "sparse")
    assert [r["phase"] for r in rows[1:]] == ["sparse"] * 50 + ["dense"] * 10
    assert summary["arms"]["sparse"]["verified"] is True
    assert all(r["verified"] == 1.0 for r in rows if r["step"] in (0, 20, 40))
    assert summary["arms"]["sparse"]["flip_rate_peak"] > 0 and summary["arms"]["dense"]["flip_rate_peak"] > 0


@pytest.mark.parametrize(
    "changes, phases",
    [
        (dict(method="step"), "dense sparse"),
        (dict(method="sr-ste", decay_schedule="linear"), "sparse dense"),
        (dict(method="s-ste"), "sparse"),
        (dict(method="ste", dense_at="start"), "dense sparse"),
        (dict(dense_at="none", decay_schedule="cosine"), "sparse"),
    ],
    ids=str,
)
def test_methods_schedules_and_places_of_the_dense_steps(small, tmp_path, quiet, changes, phases):
    pretrain(small(dense_fraction=0.5, **changes), quiet)
    rows = read_rows(tmp_path / "run" / "metrics.csv", "sparse")[1:]
    assert " ".join(dict.fromkeys(row["phase"] for row in rows)) == phases
    assert all(row["verified"] == 1.0 for row in rows if row["verified"] is not None)
    decays = [row["decay"] for row in rows if row["decay"]]  # that of the next step: 0 before the first dense one
    if "decay_schedule" in changes:
        rising = changes["decay_schedule"] == "linear"
        assert decays == sorted(decays, reverse=not rising) and decays[0] != decays[-1]


def test_table_and_pictures_are_told_at_the_end(compared):
    out, summary, lines = compared
    assert table(summary["arms"]) in lines and str(out / "loss.png") in lines[-1]
    text = (out / "summary.md").read_text()
    assert table(summary["arms"]) in text and all(f"| {arm}" in text for arm in ("dense", "sparse", "half"))
    saved = json.loads((out / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary))
    assert saved["compare"]["valid_loss_ratio"] == pytest.approx(
        saved["arms"]["sparse"]["valid_loss"] / saved["arms"]["dense"]["valid_loss"]
    )
    assert all(saved["arms"][arm]["step_ms"] > 0 for arm in saved["arms"])


def test_samples_continue_validation_text(compared):
    out, _, _ = compared
    text = (out / "samples.txt").read_text(encoding="utf-8")
    assert text.count("[>]") == 1 + 3 * 2 and "=== sparse, step 60 ===" in text


def test_checkpoint_opens_with_transformers(compared):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    out, _, _ = compared
    path = out / "checkpoint" / "sparse" / "step-000060"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.n_layer == 1 and model.lm_head.weight is model.transformer.wte.weight
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    logits = model(torch.tensor([tokenizer.encode("The of and")])).logits
    assert torch.isfinite(logits).all()


def test_tensorboard_holds_training_validation_and_recipe(compared):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(compared[0] / "tensorboard" / "sparse"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"training/loss", "training/bits_per_byte", "validation/loss", "recipe/flip_rate", "speed/step_ms"} <= tags
    assert len(events.Scalars("training/loss")) == 60


def test_steps_are_timed_once_caches_and_compilers_are_warm(compared):
    """Of 60 steps the first five are not, nor the two with which the dense phase begins at step 51."""
    out, _, _ = compared
    untimed = {
        arm: [r["step"] for r in read_rows(out / "metrics.csv", arm)[1:] if r["step_ms"] is None]
        for arm in ("dense", "sparse")
    }
    assert untimed == {"dense": [1, 2, 3, 4, 5], "sparse": [1, 2, 3, 4, 5, 51, 52]}


def test_bits_per_byte_follow_from_loss_and_bytes(small, quiet, tmp_path):
    pretrain(small(ffn=("dense",), tokenizer="bytes", valid_fraction=0.05), quiet)
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    # of the byte tokenizer each token is a byte, but for the end of text, which stands in the last window alone
    assert rows[-1]["valid_bits_per_byte"] == pytest.approx(rows[-1]["valid_loss"] / 0.6931471805599453, rel=0.01)


def test_accumulated_micro_batches_train_like_one_batch(small, quiet, tmp_path):
    losses = {}
    for micro_batch in (1, 4):
        out = tmp_path / f"micro{micro_batch}"
        pretrain(small(ffn=("dense",), micro_batch=micro_batch, out=str(out)), quiet)
        losses[micro_batch] = [r["loss"] for r in read_rows(out / "metrics.csv") if r["loss"] is not None]
    assert losses[1] == pytest.approx(losses[4], rel=MANY_SUMS["rtol"])


VARIANTS = (
    {"model": "llama"}, {"dtype": "bfloat16"}, {"method": "ste"}, {"mvue": False, "decay": 0.0},
    {"precision": "fp8-hybrid", "model": "llama"}, {"precision": "fp8"},
)  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_variants_train(small, quiet, changes):
    summary = pretrain(small(ffn=("sparse",), eval_interval=12, **changes), quiet)
    assert summary["arms"]["sparse"]["verified"] is True
    assert summary["arms"]["sparse"]["valid_loss"] < summary["arms"]["sparse"]["first_valid_loss"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attention_is_that_of_transformers(small, kind):
    config = model_config(resolve(small(model=kind)), "dense", 300, 0)
    ours = build_model(config, 0).eval()
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        ours.set_attn_implementation("sdpa")
        torch.testing.assert_close(logits, ours(input_ids=ids).logits, **MANY_SUMS)


def test_fp16_scales_the_loss_and_trains(small, quiet, tmp_path):
    summary = pretrain(small(ffn=("dense",), dtype="float16"), quiet)
    assert summary["arms"]["dense"]["valid_loss"] < summary["arms"]["dense"]["first_valid_loss"]
    first = read_rows(tmp_path / "run" / "metrics.csv")[1]
    pretrain(small(ffn=("dense",), out=str(tmp_path / "float32")), quiet)
    whole = read_rows(tmp_path / "float32" / "metrics.csv")[1]
    # the norm is told, and clipped, of gradients that are not scaled: by 2 ** 16 it would be another number
    assert first["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.1)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(ffn_width=66), "--ffn-width must be a multiple of 4 for 2:4 FFNs, got 66; use --ffn-width 68"),
        (dict(width=34), "--width must be a multiple of 4 for 2:4 FFNs, got 34; use --width 36"),
    ],
)
def test_layers_that_cannot_be_sparse_are_told_with_what_to_ask_for(small, quiet, changes, words):
    with pytest.raises(Sparse24Error, match=words):
        pretrain(small(**changes), quiet)
    assert resolve(small(ffn=("dense",), **changes)).kinds == ("dense",)


def test_unwritable_folder_is_named_and_nothing_is_left(small, quiet, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    with pytest.raises(Sparse24Error, match="--out .*file/run cannot be written .*name a folder that can"):
        pretrain(small(out=str(blocked / "run")), quiet)
    with pytest.raises(Sparse24Error, match="--out .*file cannot be written"):
        pretrain(small(out=str(blocked)), quiet)
    assert blocked.read_text() == "mine"


def test_bad_input_leaves_no_folder_behind(small, quiet, tmp_path):
    with pytest.raises(Sparse24Error, match="does not exist"):
        pretrain(small(data=(str(tmp_path / "absent.txt"),)), quiet)
    assert not (tmp_path / "run").exists()


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_then_falls_along_a_cosine(small):
    s = resolve(small(steps=100, warmup=10))
    rates = [learning_rate(step, s) for step in range(100)]
    assert (
        rates[0] == pytest.approx(s.lr / 10)
        and rates[9] == pytest.approx(s.lr)
        and rates[99] == pytest.approx(s.min_lr)
    )
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True)) and all(
        a >= b for a, b in zip(rates[9:], rates[10:], strict=False)
    )
    assert learning_rate(11, resolve(small(steps=12, warmup=10))) == pytest.approx(s.min_lr)  # a fall of one step


@pytest.mark.fault(53)
def test_arms_compile_by_themselves(small, quiet, monkeypatch):
    """Torch counts compilations by the class of a model: one arm would leave too few of them to the next."""
    compiles = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiles(model, backend="eager"))
    of_one_arm = 6  # 8 bits: a first step, and each phase, with and without gradients
    with torch._dynamo.config.patch(recompile_limit=of_one_arm, fail_on_recompile_limit_hit=True):
        summary = pretrain(small(compile=True, compare=True, ffn=("half",), precision="fp8"), quiet)
    torch._dynamo.reset()
    assert list(summary["arms"]) == ["dense", "sparse", "half"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_are_a_function_of_seed_and_config(small, kind):
    config = model_config(resolve(small(model=kind)), "dense", 300, 0)
    state = torch.get_rng_state()
    a, b, c = (build_model(config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs) and not all(torch.equal(x, z) for x, _, z in pairs)


def test_weight_decay_spares_biases_and_norms(small):
    s = resolve(small())
    model = build_model(model_config(s, "dense", 300, 0), 0)
    matrices, others = build_optimizer(model, s).param_groups
    assert matrices["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert all(p.dim() == 1 for p in others["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_line_cut_short_by_a_crash_is_dropped_on_resume(tmp_path):
    log = MetricsLog(tmp_path, "dense", 0)
    log.write([{"step": step, "phase": "dense", "loss": 1.0 / (1 + step)} for step in range(5)])
    log.close()
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text()[:-30])
    assert [r["step"] for r in read_rows(path)] == [0, 1, 2, 3]
    MetricsLog(tmp_path, "dense", 2).close()
    assert [(r["step"], r["loss"]) for r in read_rows(path)] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    with path.open() as f:
        assert tuple(next(csv.reader(f))) == FIELDS
