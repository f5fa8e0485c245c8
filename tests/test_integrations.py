"""Hugging Face Trainer, accelerate and Lightning, with the real libraries on tiny models."""

from types import SimpleNamespace

import pytest
import torch
from rounding import MANY_SUMS
from tiny_models import MLP, gpt2, llama

import sparse24
from sparse24.errors import Sparse24Error
from sparse24.layers.modules import SparseLayer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # the Trainer wants it too
Trainer, TrainingArguments = transformers.Trainer, transformers.TrainingArguments
HFCallback = pytest.importorskip("sparse24.integrations.transformers").Sparse24Callback
from tiny_trainers import Texts, hf_trainer  # noqa: E402


def sparse_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, SparseLayer)]


# -- Hugging Face ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["hf", "lightning"])
def test_unknown_settings_are_refused_at_once(kind):
    callback = HFCallback if kind == "hf" else LightningCallback
    with pytest.raises(Sparse24Error, match="takes no setting 'mask_intervall'; did you mean mask_interval?"):
        callback(mask_intervall=20)


@pytest.mark.fault(36)
def test_trainers_train_dense_where_auto_leaves_the_model_dense(tmp_path, monkeypatch):
    """A GPU without our kernels: sparsify warns, and training goes on."""
    why = "no 2:4 products on cuda:0: too old"
    monkeypatch.setattr(sparse24.convert.choice, "why_unavailable", lambda *asked: why)
    with pytest.warns(sparse24.Sparse24Warning, match="left the model dense: no 2:4 products"):
        trainer, callback = hf_trainer(tmp_path, steps=2)
    trainer.train()
    assert callback.recipe is None and trainer.state.global_step == 2
    with pytest.warns(sparse24.Sparse24Warning, match="left the model dense: no 2:4 products"):
        module, callback, trainer = fit(tmp_path, 2)
    assert callback.recipe is None and trainer.global_step == 2 and not sparse_names(module)


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


# -- Lightning ------------------------------------------------------------------------------------------------------

lightning = pytest.importorskip("lightning")
LightningCallback = pytest.importorskip("sparse24.integrations.lightning").Sparse24Callback
from tiny_lightning import MadeLate, Regression  # noqa: E402


def fit(folder, steps, ckpt=None, accumulate=1, gradient_clip_val=1.0, make=Regression, **settings):
    data = torch.utils.data.TensorDataset(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    callback = LightningCallback(**(dict(mask_interval=3, dense_fraction=0.25, total_steps=12) | settings))
    save = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        max_steps=steps, callbacks=[callback, save], accelerator="cpu", devices=1, logger=False,
        gradient_clip_val=gradient_clip_val, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, accumulate_grad_batches=accumulate,
        default_root_dir=folder,
    )  # fmt: skip
    module = make()
    torch.manual_seed(7)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=ckpt)
    return module, callback, trainer


def test_lightning_trains_sparse_then_dense_and_logs(tmp_path):
    module, callback, trainer = fit(tmp_path, 12)
    assert callback.report.converted == ["net.fc1", "net.fc2"]
    assert callback.recipe.step == 12 and callback.recipe.phase == "dense"
    assert trainer.callback_metrics["sparse24/phase"] == 1.0 and "sparse24/flip_rate" in trainer.callback_metrics
    assert [step for step, _ in callback.recipe.monitor.history()] == [3, 6]


def test_layers_made_in_configure_model_are_converted(tmp_path):
    module, callback, _ = fit(tmp_path, 6, make=MadeLate)
    assert callback.report.converted == ["net.fc1", "net.fc2"] and callback.recipe.step == 6
    assert sparse24.verify(module)


@pytest.mark.parametrize(
    "precision, device, expected",
    [
        ("16-mixed", "cuda", torch.float16),
        ("bf16-mixed", "cuda", torch.bfloat16),
        ("32-true", "cuda", None),
        ("bf16-true", "cuda", None),
        ("bf16-mixed", "cpu", None),
    ],
)
def test_packed_dtype_follows_lightnings_precision(precision, device, expected):
    from sparse24.integrations.lightning import packed_dtype

    strategy = SimpleNamespace(root_device=torch.device(device))
    assert packed_dtype(SimpleNamespace(strategy=strategy, precision=precision)) is expected


@pytest.mark.parametrize("off", [dict(log=False), dict(log_every_n_steps=0)], ids=str)
def test_lightning_logs_nothing_when_told_so(tmp_path, off):
    callback = LightningCallback(total_steps=2, log=off.get("log", True))
    trainer = lightning.Trainer(
        max_steps=2, callbacks=[callback], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        log_every_n_steps=off.get("log_every_n_steps", 1),
    )  # fmt: skip
    trainer.fit(Regression(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 16)), 8))
    assert callback.recipe.step == 2 and not any(name.startswith("sparse24/") for name in trainer.callback_metrics)


@pytest.mark.parametrize("precision, dtype", [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_lightning_in_half_precision(tmp_path, precision, dtype):
    data = torch.utils.data.TensorDataset(torch.randn(32, 16))
    callback = LightningCallback(total_steps=4, mask_interval=2, dense_fraction=0)
    trainer = lightning.Trainer(
        max_steps=4, callbacks=[callback], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, precision=precision, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Regression()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    assert callback.recipe.step == 4 and module.net.fc1.packed.dtype == dtype and sparse24.verify(module)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning_in_mixed_precision_on_a_gpu(tmp_path, precision):
    data = torch.utils.data.TensorDataset(torch.randn(48, 16))
    callback = LightningCallback(backend="sparse", total_steps=6, mask_interval=2, dense_fraction=0)
    trainer = lightning.Trainer(
        max_steps=6, callbacks=[callback], accelerator="gpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, precision=precision, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Regression()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    assert module.net.fc1.packed.dtype == (torch.float16 if precision == "16-mixed" else torch.bfloat16)
    assert 0 < callback.recipe.step <= 6 and sparse24.verify(module)


def test_decay_follows_lightnings_closure_and_clipping(tmp_path):
    """The closure runs backward and clipping inside optimizer.step; accumulation counts one step."""
    norms = {}
    for decay in (0.0, 10.0):
        seen = norms[decay] = []

        class Look(Regression):
            def on_before_zero_grad(self, optimizer, seen=seen):
                if self.net.fc1.weight.grad is not None:
                    seen.append(self.net.fc1.weight.grad.norm().item())

        data = torch.utils.data.TensorDataset(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)))
        callback = LightningCallback(decay=decay, total_steps=4, dense_fraction=0)
        trainer = lightning.Trainer(
            max_steps=2, callbacks=[callback], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.01, accumulate_grad_batches=2,
        )  # fmt: skip
        trainer.fit(Look(), torch.utils.data.DataLoader(data, batch_size=8))
        assert callback.recipe.step == 2
    assert norms[0.0] and max(norms[0.0]) <= 0.01 + 1e-6 and max(norms[10.0]) > 0.1


@pytest.mark.fault(58, 60)
def test_lightning_that_clips_or_scales_takes_no_decay_in_backward(tmp_path):
    with pytest.raises(Sparse24Error, match="the trainer clips gradients.*gradient_clip_val=0, or leave"):
        fit(tmp_path, 2, decay_in="backward")
    trainer = SimpleNamespace(gradient_clip_val=None, precision="16-mixed")
    with pytest.raises(Sparse24Error, match='the trainer scales gradients.*precision="bf16-mixed"'):
        LightningCallback(decay_in="backward").setup(trainer, Regression(), "fit")


@pytest.mark.fault(59)
def test_lightnings_accumulation_shares_the_decay_in_backward(tmp_path):
    weights = []
    for decay_in in ("step", "backward"):
        settings = dict(decay=0.05, decay_in=decay_in, mvue=False)
        module, callback, _ = fit(tmp_path / decay_in, 2, accumulate=2, gradient_clip_val=None, **settings)
        assert callback.recipe.micro_batches == 2 and callback.recipe.step == 2
        weights.append(module.net.fc1.weight.detach())
    torch.testing.assert_close(*weights, **MANY_SUMS)


@pytest.mark.fault(61)
def test_resumed_lightning_run_equals_the_uninterrupted_one(tmp_path):
    """The recipe's state travels in Lightning's checkpoint.

    Without MVUE: a resumed Lightning draws from torch's generator for its data loader in another order.
    """
    whole, callback, _ = fit(tmp_path, 12, mvue=False)
    (checkpoint,) = tmp_path.glob("*step=5*.ckpt")
    torch.load(checkpoint, weights_only=True)
    resumed, again, _ = fit(tmp_path, 12, ckpt=str(checkpoint), mvue=False)
    assert again.recipe.step == 12
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert again.recipe.monitor.history() == callback.recipe.monitor.history()


def test_lightning_run_of_unknown_length_asks_for_total_steps(tmp_path):
    with pytest.raises(Sparse24Error, match="total_steps"):
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 16)), batch_size=8)
        trainer = lightning.Trainer(
            max_epochs=-1, callbacks=[LightningCallback()], accelerator="cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Regression(), data)
