"""Lightning's Trainer with our callback, on tiny modules."""

from types import SimpleNamespace

import pytest
import torch
from rounding import MANY_SUMS

import sparse24
from sparse24.errors import Sparse24Error

lightning = pytest.importorskip("lightning")
LightningCallback = pytest.importorskip("sparse24.integrations.lightning").Sparse24Callback
from tiny_lightning import MadeLate, Regression, fit  # noqa: E402


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
