"""Runs of the real Lightning on a tiny module, in seconds."""

import logging
import warnings

import lightning
import torch
from tiny_models import MLP
from torch import nn

from sparse24.integrations.lightning import Sparse24Callback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regression(lightning.LightningModule):
    """Learns to turn its input round; `make_net` is what it does it with."""

    def __init__(self, make_net=MLP):
        super().__init__()
        torch.manual_seed(0)
        self.net = make_net()

    def loss(self, batch):
        (x,) = batch
        return nn.functional.mse_loss(self.net(x), x.flip(-1))

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, index):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class MadeLate(Regression):
    """Its layers exist only when Lightning has asked for them."""

    def __init__(self):
        lightning.LightningModule.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = MLP()


def loader(seed=0, count=40):
    data = torch.utils.data.TensorDataset(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)))
    return torch.utils.data.DataLoader(data, batch_size=8)


def callback_of(**settings):
    return Sparse24Callback(**(dict(mask_interval=7, dense_fraction=0, decay=1e-3, total_steps=12) | settings))


def trainer_of(folder, *callbacks, **settings):
    given = dict(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, log_every_n_steps=1, num_sanity_val_steps=0, enable_checkpointing=False,
    ) | settings  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        return lightning.Trainer(callbacks=[*callbacks], **given)


def saving(folder, **settings):
    given = dict(every_n_train_steps=5, save_top_k=-1, filename="{step}") | settings
    return lightning.pytorch.callbacks.ModelCheckpoint(folder, **given)


def fit(folder, steps, ckpt=None, accumulate=1, gradient_clip_val=1.0, make=Regression, **settings):
    """(module, callback, trainer) after a run up to `steps` of twelve steps, the last three of which are dense."""
    callback = Sparse24Callback(**(dict(mask_interval=3, dense_fraction=0.25, total_steps=12) | settings))
    clips = dict(gradient_clip_val=gradient_clip_val, accumulate_grad_batches=accumulate)
    trainer = trainer_of(folder, callback, saving(folder), max_steps=steps, enable_checkpointing=True, **clips)
    module = make()
    torch.manual_seed(7)
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return module, callback, trainer
