"""Callbacks that put averages of the weights into a module: the averages run under the module's masks and phase."""

import pytest
import torch
from rounding import ORDER
from tiny_models import MLP
from torch import nn

import sparse24
from sparse24 import ops
from sparse24.layers.modules import SparseLayer

lightning = pytest.importorskip("lightning")
pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging  # noqa: E402
from tiny_lightning import Regression, callback_of, loader, saving, trainer_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
STEPS = 12


class WithBuffers(nn.Module):
    """Buffers of its own behind the sparse layers: averaging callbacks pair buffers by their order."""

    def __init__(self):
        super().__init__()
        self.mlp, self.norm = MLP(), nn.BatchNorm1d(16)

    def forward(self, x):
        return self.norm(self.mlp(x))


class Swap(lightning.Callback):
    """An average as people write it themselves: `.data` swapped before validation and back after it."""

    def __init__(self):
        self.average = None

    def on_train_batch_end(self, trainer, pl_module, *args):
        now = [p.detach().clone() for p in pl_module.parameters()]
        self.average = now if self.average is None else [a.lerp(n, 0.5) for a, n in zip(self.average, now, strict=True)]

    def swap(self, pl_module):
        for parameter, average in zip(pl_module.parameters(), self.average, strict=True):
            kept = parameter.data.clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def on_validation_start(self, trainer, pl_module):
        self.swap(pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.swap(pl_module)


class Reference(lightning.Callback):
    """What validation should give: the average of the weights in a plain dense network, masked by the live masks."""

    def __init__(self, decay):
        self.decay, self.average, self.expected = decay, None, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        now = {n: p.detach().clone() for n, p in pl_module.net.named_parameters()}
        if self.average is None:
            self.average = now
        else:
            self.average = {n: self.decay * a + (1 - self.decay) * now[n] for n, a in self.average.items()}
        layers = {n: m for n, m in pl_module.net.named_modules() if isinstance(m, SparseLayer) and m.phase == "sparse"}
        masks = {n: ops.unpack_mask(m.mask.view(torch.uint16)) for n, m in layers.items()}
        self.expected.append(self.loss(pl_module, masks))

    def loss(self, pl_module, masks):
        twin = type(pl_module.net)()
        weights = dict(self.average)
        for name, mask in masks.items():
            weights[f"{name}.weight"] = torch.where(mask, weights[f"{name}.weight"], 0)
        twin.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return sum(nn.functional.mse_loss(twin(x), x.flip(-1)).item() for (x,) in loader(1)) / len(loader(1))


def run(folder, average, first, dense_fraction=0.25, module=None, **settings):
    """Validation losses by step, of a run that validates after each; `first`: ours stands before the average."""
    callback, losses = callback_of(dense_fraction=dense_fraction, mask_interval=3, **settings), []

    class Losses(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(trainer.callback_metrics["loss"].item())

    reference = Reference(0.5)
    ours = [callback, average] if first else [average, callback]
    given = dict(max_steps=STEPS, val_check_interval=1, enable_checkpointing=True)
    trainer = trainer_of(folder, *ours, reference, Losses(), saving(folder), **given)
    module = module or Regression()
    trainer.fit(module, loader(), loader(1))
    return module, callback, reference.expected, losses


def average_of(kind):
    return Swap() if kind == "swap" else EMAWeightAveraging(decay=0.5, use_buffers=kind == "buffers")


@pytest.mark.fault(79, 81)
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("kind", ["parameters", "buffers", "swap"])
def test_an_average_is_validated_under_the_models_masks_and_phase(tmp_path, kind, first):
    module, callback, expected, losses = run(tmp_path, average_of(kind), first)
    assert callback.recipe.step == STEPS and len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=ORDER)
    assert sparse24.verify(module)


@pytest.mark.fault(79)
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("kind", ["parameters", "buffers"])
def test_averaging_changes_nothing_of_the_training_itself(tmp_path, kind, first):
    """What is validated in between is the average; what is trained on is not."""
    module, _, _, _ = run(tmp_path / "with", average_of(kind), first, dense_fraction=0, mvue=False)
    plain, _, _, _ = run(tmp_path / "without", lightning.Callback(), first, dense_fraction=0, mvue=False)
    saved = torch.load(tmp_path / "with" / "step=10.ckpt", weights_only=True)
    own = torch.load(tmp_path / "without" / "step=10.ckpt", weights_only=True)
    for name, weight in saved["current_model_state"].items():
        assert torch.equal(weight, own["state_dict"][name]), name
    for name, mask in saved["callbacks"]["Sparse24Callback"]["masks"].items():
        assert torch.equal(mask, own["callbacks"]["Sparse24Callback"]["masks"][name])


@pytest.mark.fault(79, 81)
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_the_module_ends_as_the_average_under_its_masks_and_so_does_its_checkpoint(tmp_path, first):
    module, callback, expected, _ = run(tmp_path, WeightAveraging(avg_fn=_half), first, dense_fraction=0)
    loss = sum(module.loss(batch).item() for batch in loader(1)) / len(loader(1))
    assert loss == pytest.approx(expected[-1], rel=ORDER) and sparse24.verify(module)
    fresh = Regression()
    trainer = trainer_of(tmp_path, callback_of(mask_interval=3))
    result = trainer.test(fresh, loader(1), ckpt_path=tmp_path / "step=10.ckpt", verbose=False)
    assert result[0]["loss"] == pytest.approx(expected[9], rel=ORDER)


def _half(average, now, count):
    return average * 0.5 + now * 0.5


@pytest.mark.fault(79)
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("settings", [dict(), dict(method="s-ste"), dict(decay_in="backward")], ids=str)
def test_buffers_of_the_models_own_are_paired_rightly(tmp_path, first, settings):
    """The callback averages and swaps buffers by their order, and those of ours are among them."""
    average = EMAWeightAveraging(decay=0.5, use_buffers=True)
    module, callback, _, losses = run(
        tmp_path, average, first, dense_fraction=0, module=Regression(WithBuffers), **settings
    )
    plain, _, _, _ = run(
        tmp_path / "plain", lightning.Callback(), first, dense_fraction=0, module=Regression(WithBuffers), **settings
    )
    saved = torch.load(tmp_path / "step=10.ckpt", weights_only=True)["current_model_state"]
    own = torch.load(tmp_path / "plain" / "step=10.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.norm.running_mean"], own["net.norm.running_mean"])
    assert (
        callback.recipe.step == STEPS
        and sparse24.verify(module)
        and all(map(torch.isfinite, map(torch.tensor, losses)))
    )
