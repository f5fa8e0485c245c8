"""Hugging Face Trainer, and a loop with accelerate: the real libraries on tiny models."""

from types import SimpleNamespace

import pytest
import torch
from rounding import MANY_SUMS
from tiny_models import MLP, gpt2, llama

import sparse24
from sparse24.errors import Sparse24Error

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # the Trainer wants it too
Trainer, TrainingArguments = transformers.Trainer, transformers.TrainingArguments
HFCallback = pytest.importorskip("sparse24.integrations.transformers").Sparse24Callback
from tiny_layers import sparse_names  # noqa: E402
from tiny_trainers import Texts, hf_trainer  # noqa: E402


@pytest.mark.parametrize("make", [gpt2, llama])
def test_trainer_trains_sparse_then_dense_and_logs(tmp_path, make):
    trainer, callback = hf_trainer(tmp_path, make)
    assert len(callback.report.converted) == len(sparse_names(trainer.model)) > 0
    before = trainer.model.get_submodule(callback.report.converted[0]).weight.detach().clone()
    trainer.train()
    assert callback.recipe.step == 12 and callback.recipe.phase == "dense"
    assert not torch.equal(before, trainer.model.get_submodule(callback.report.converted[0]).weight)
    logged = [entry for entry in trainer.state.log_history if "sparse24/flip_rate" in entry]
    assert len(logged) >= 6 and logged[2]["sparse24/flip_rate"] > 0
    assert [entry["sparse24/phase"] for entry in logged][:6] == [0, 0, 0, 0, 1, 1]
    assert sparse24.verify(trainer.model)


@pytest.mark.fault(60)
def test_decay_follows_the_trainers_clipping(tmp_path):
    """Un-scale, clip, decay, step; the Trainer clips before it calls the optimizer."""
    trainer, callback = hf_trainer(tmp_path, steps=2, decay=10.0, dense_fraction=0)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            layer = model.get_submodule(callback.report.converted[0])
            seen.append(layer.weight.grad.norm().item())

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            layer = model.get_submodule(callback.report.converted[0])
            seen.append(layer.weight.grad.norm().item())

    trainer.add_callback(Look())
    trainer.train()
    assert seen[0] <= 1.0 + 1e-4 < seen[1]


@pytest.mark.fault(58, 60)
@pytest.mark.parametrize(
    "arguments, words",
    [(dict(max_grad_norm=1.0), "clips.*max_grad_norm=0"), (dict(fp16=True, max_grad_norm=0.0), "scales.*bf16=True")],
)
def test_trainers_that_clip_or_scale_take_no_decay_in_backward(tmp_path, arguments, words):
    callback = HFCallback(decay_in="backward")
    arguments = SimpleNamespace(**(dict(fp16=False, gradient_accumulation_steps=1) | arguments))
    with pytest.raises(Sparse24Error, match=f"the trainer {words}.*or leave decay_in='step'"):
        callback.on_init_end(arguments, None, None, model=gpt2())


@pytest.mark.fault(59)
def test_trainers_accumulation_shares_the_decay_in_backward(tmp_path):
    """Each of the two micro-batches of a step adds half of it; the run is that with the decay in the step."""
    weights = []
    for decay_in in ("step", "backward"):
        trainer, callback = hf_trainer(
            tmp_path / decay_in, steps=4, decay=0.05, decay_in=decay_in, mvue=False, arguments=dict(max_grad_norm=0.0)
        )
        trainer.train()
        assert callback.recipe.micro_batches == 2
        weights.append(trainer.model.get_submodule(callback.report.converted[0]).weight.detach())
    torch.testing.assert_close(*weights, **MANY_SUMS)


@pytest.mark.fault(61)
def test_resumed_trainer_equals_the_uninterrupted_one(tmp_path):
    """Resumed at a step that is no multiple of the mask interval."""
    trainer, callback = hf_trainer(tmp_path / "whole")
    trainer.train()
    assert (tmp_path / "whole" / "checkpoint-5" / "sparse24.pt").is_file()
    again, callback_again = hf_trainer(tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert callback_again.recipe.step == 12
    for (name, ours), (_, theirs) in zip(again.model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert callback_again.recipe.monitor.history() == callback.recipe.monitor.history()


@pytest.mark.fault(61)
def test_masks_of_another_run_are_not_resumed_with(tmp_path):
    """The Trainer's checkpoint is named to `train` alone, and its own output folder has one of the same step."""
    there, _ = hf_trainer(tmp_path / "there", steps=6)
    there.train()

    def another():
        model = gpt2()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    hf_trainer(tmp_path / "here", another, steps=6)[0].train()
    again, callback = hf_trainer(tmp_path / "here", steps=6)
    wanted = str(tmp_path / "there" / "checkpoint-5")
    with pytest.raises(Sparse24Error, match="has the masks of another run. Set args.resume_from_checkpoint"):
        again.train(resume_from_checkpoint=wanted)
    again, callback = hf_trainer(tmp_path / "here", steps=6)
    again.args.resume_from_checkpoint = wanted
    again.train(resume_from_checkpoint=wanted)
    for ours, theirs in zip(again.model.parameters(), there.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.fault(61)
def test_resuming_without_the_recipes_file_is_an_error(tmp_path):
    trainer, _ = hf_trainer(tmp_path)
    trainer.train()
    (tmp_path / "checkpoint-5" / "sparse24.pt").unlink()
    again, _ = hf_trainer(tmp_path)
    with pytest.raises(Sparse24Error, match="no sparse24.pt"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_callback_added_too_late_is_an_error(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    trainer = Trainer(model=gpt2(1), args=arguments, train_dataset=Texts())
    trainer.add_callback(HFCallback())
    with pytest.raises(Sparse24Error, match="added after the Trainer was made"):
        trainer.train()


def test_metrics_reach_the_trainers_own_loggers(tmp_path):
    """Trainer puts the callbacks of report_to before ours, and they see what is in the logs by then."""
    trainer, callback = hf_trainer(tmp_path, steps=4)
    seen = []

    class Logger(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer.callback_handler.callbacks.insert(0, Logger())
    callback.log_through(trainer)
    trainer.train()
    assert len(seen) >= 2 and all("sparse24/flip_rate" in logs for logs in seen)


@pytest.mark.fault(69)
def test_model_made_anew_by_the_trainer_is_converted_too(tmp_path):
    """model_init makes another model in train(), and its optimizer, before we see it."""
    callback = HFCallback(mask_interval=2)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=3, report_to=[], use_cpu=True)
    trainer = Trainer(model_init=lambda: gpt2(1), args=arguments, train_dataset=Texts(), callbacks=[callback])
    trainer.train()
    assert callback.recipe.step == 3 and sparse_names(trainer.model) and sparse24.verify(trainer.model)


def test_settings_of_sparsify_and_of_the_recipe_find_their_way(tmp_path):
    trainer, callback = hf_trainer(tmp_path, steps=2, lean=True, fuse=False, mvue=False, decay=3e-4, method="sr-ste")
    layer = trainer.model.get_submodule(callback.report.converted[0])
    assert layer.lean and not layer.mvue and not callback.report.fused
    trainer.train()
    assert callback.recipe.decay == 3e-4 and callback.recipe.method.name == "sr-ste" and not layer.mvue


@pytest.mark.parametrize(
    "settings, device, expected",
    [
        (dict(fp16=True, bf16=False), "cuda", torch.float16),
        (dict(fp16=False, bf16=True), "cuda", torch.bfloat16),
        (dict(fp16=False, bf16=False), "cuda", None),
        (dict(fp16=False, bf16=True), "cpu", None),
    ],
)
def test_packed_dtype_follows_the_trainers_arguments(settings, device, expected):
    from sparse24.integrations.transformers import packed_dtype

    assert packed_dtype(SimpleNamespace(device=torch.device(device), **settings)) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_trainer_in_half_precision_on_a_gpu(tmp_path, precision):
    callback = HFCallback(backend="sparse", mask_interval=2, dense_fraction=0)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=6, report_to=[], **{precision: True})
    model = llama(1, 64)
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts(), callbacks=[callback])
    layer = model.get_submodule(callback.report.converted[0])
    assert layer.packed.dtype == (torch.float16 if precision == "fp16" else torch.bfloat16)
    trainer.train()
    assert 0 < callback.recipe.step <= 6 and sparse24.verify(model)


# -- accelerate -----------------------------------------------------------------------------------------------------


def accelerated(model, optimizer, scaler=None):
    """An optimizer as `accelerator.prepare` wraps it, on a CPU also with a scaler."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    return accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)


@pytest.mark.fault(58)
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_accelerates_scaler_skips_do_not_count(fused):
    model = MLP()
    sparse24.sparsify(model)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = accelerated(model, plain, scaler)
    recipe = sparse24.Recipe(model, optimizer, total_steps=8, mask_interval=1, dense_fraction=0)
    assert recipe.optimizer is plain
    before = [p.clone() for p in model.parameters()]
    for factor, steps in ((torch.inf, 0), (1.0, 1)):
        scaler.scale(model(torch.ones(4, 16)).square().sum() * factor).backward()
        optimizer.step()
        assert recipe.step == steps
        assert all(map(torch.equal, before, model.parameters())) is (steps == 0)
        optimizer.zero_grad()


@pytest.mark.fault(59)
def test_accelerate_loop_with_a_wrapped_optimizer():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = MLP()
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    recipe = sparse24.Recipe(model, optimizer, total_steps=4, mask_interval=2, dense_fraction=0)
    for _ in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(4, 16)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert recipe.step == 4 and sparse24.verify(model)
