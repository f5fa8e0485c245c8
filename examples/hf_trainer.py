"""Hugging Face Trainer: the callback does everything, resuming included.

pip install accelerate; python examples/hf_trainer.py [--steps 20] [--out hf-run]
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sparse24
from sparse24.integrations.transformers import Sparse24Callback


class Sequences(torch.utils.data.Dataset):
    """Counting modulo 64, from random starts."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        ids = (torch.arange(32) * (1 + index % 3) + index) % 64
        return {"input_ids": ids, "labels": ids}


def main(steps: int = 20, out: str = "hf-run") -> Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    # backend="sparse": also layers as small as these, which a GPU would not run faster
    callback = Sparse24Callback(backend="sparse", decay=6e-5, mask_interval=5)
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=5,
            save_steps=10,
            report_to=[],
            use_cpu=not sparse24.is_available("cuda"),
        ),
        train_dataset=Sequences(),
        callbacks=[callback],  # here, not by add_callback: the model is converted before the optimizer is made
    )
    callback.log_through(trainer)  # the Trainer's progress bar and report_to show the metrics too
    print(callback.report)
    trainer.train()
    print(callback.recipe)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="hf-run")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)
