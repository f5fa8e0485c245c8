"""Runs of the real Hugging Face Trainer on tiny models, in seconds."""

import torch
from tiny_models import gpt2, tokens
from transformers import Trainer, TrainingArguments

from sparse24.integrations.transformers import Sparse24Callback
from sparse24.layers.modules import SparseLayer


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)  # where a loop over it ends
        ids = tokens(1, 16, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def hf_trainer(folder, make=gpt2, steps=12, arguments=None, **settings):
    """A Trainer and its callback; `arguments` are of TrainingArguments, `settings` of the callback."""
    given = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=5e-3, save_steps=5, logging_steps=2, report_to=[], use_cpu=True, seed=3, disable_tqdm=True,
    ) | (arguments or {})  # fmt: skip
    callback = Sparse24Callback(**(dict(mask_interval=3, dense_fraction=0.25) | settings))
    model = make if isinstance(make, torch.nn.Module) else make()
    trainer = Trainer(
        model=model, args=TrainingArguments(**given), train_dataset=Texts(), eval_dataset=Texts(), callbacks=[callback]
    )
    return trainer, callback


def sparse_layers_of(model):
    return [m for m in model.modules() if isinstance(m, SparseLayer)]


def eval_loss(trainer):
    return trainer.evaluate()["eval_loss"]
