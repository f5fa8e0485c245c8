"""Hugging Face Trainer, accelerate and Lightning, with the real libraries on tiny models."""

import pytest
import torch
from tiny_models import MLP, gpt2, llama, tokens
from torch import nn

import sparse24
from sparse24.errors import Sparse24Error
from sparse24.modules import SparseLayer

transformers = pytest.importorskip("transformers")
Trainer, TrainingArguments = transformers.Trainer, transformers.TrainingArguments
HFCallback = pytest.importorskip("sparse24.integrations.transformers").Sparse24Callback


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = tokens(1, 16, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def hf_trainer(folder, make=gpt2, steps=12, **settings):
    arguments = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=5e-3, save_steps=5, logging_steps=2, report_to=[], use_cpu=True, seed=3, max_grad_norm=1.0,
    )  # fmt: skip
    callback = HFCallback(**(dict(mask_interval=3, dense_fraction=0.25) | settings))
    trainer = Trainer(model=make(), args=TrainingArguments(**arguments), train_dataset=Texts(), callbacks=[callback])
    return trainer, callback


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


@pytest.mark.fault(59, 60)
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


# -- accelerate -----------------------------------------------------------------------------------------------------


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


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = MLP()

    def training_step(self, batch, index):
        (x,) = batch
        return nn.functional.mse_loss(self.net(x), x.flip(-1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder, steps, ckpt=None, accumulate=1, **settings):
    data = torch.utils.data.TensorDataset(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    callback = LightningCallback(**(dict(mask_interval=3, dense_fraction=0.25, total_steps=12) | settings))
    save = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        max_steps=steps, callbacks=[callback, save], accelerator="cpu", devices=1, logger=False, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, accumulate_grad_batches=accumulate,
        default_root_dir=folder,
    )  # fmt: skip
    module = Regression()
    torch.manual_seed(7)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=ckpt)
    return module, callback, trainer


def test_lightning_trains_sparse_then_dense_and_logs(tmp_path):
    module, callback, trainer = fit(tmp_path, 12)
    assert callback.report.converted == ["net.fc1", "net.fc2"]
    assert callback.recipe.step == 12 and callback.recipe.phase == "dense"
    assert trainer.callback_metrics["sparse24/phase"] == 1.0 and "sparse24/flip_rate" in trainer.callback_metrics
    assert [step for step, _ in callback.recipe.monitor.history()] == [3, 6]


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
