"""Lightning: the callback does everything; accumulation and clipping are Lightning's own.

pip install lightning; python examples/lightning_module.py [--steps 20]
"""

import argparse

import lightning
import torch
from torch import nn

import sparse24
from sparse24.integrations.lightning import Sparse24Callback


class Denoiser(lightning.LightningModule):
    """Two residual gated FFNs that learn to clean their input."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(sparse24.SparseGatedMLP(64, 128) for _ in range(2))

    def training_step(self, batch, index):
        (x,) = batch
        y = x + 0.3 * torch.randn_like(x)
        for block in self.blocks:
            y = y + block(y)
        loss = nn.functional.mse_loss(y, x)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 20) -> Sparse24Callback:
    torch.manual_seed(0)
    callback = Sparse24Callback(decay=6e-5, mask_interval=5)
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=[callback],
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    data = torch.utils.data.TensorDataset(torch.sign(torch.randn(512, 64)))
    trainer.fit(Denoiser(), torch.utils.data.DataLoader(data, batch_size=16))
    print(callback.recipe)
    return callback


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
