"""A loop with Hugging Face accelerate: accumulation, clipping, mixed precision, checkpoints; a small Llama on counting.

    python examples/accelerate_loop.py [--steps 20] [--mixed-precision no] [--out accelerate-run] [--resume]
    accelerate launch examples/accelerate_loop.py

Sparsify before `accelerator.prepare`, make the recipe after it. Its hooks are on the optimizer inside the wrapped one,
so they run on real steps only: not on micro-batches, and not on steps that loss scaling skips.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import sparse24


def sequences(count: int = 256) -> list[torch.Tensor]:
    return [(torch.arange(32) * (1 + i % 3) + i) % 64 for i in range(count)]


def main(
    steps: int = 20,
    mixed_precision: str = "no",
    out: str = "accelerate-run",
    resume: bool = False,
    cpu: bool = False,
) -> sparse24.Recipe:
    torch.manual_seed(0)
    cpu = cpu or not sparse24.is_available("cuda")
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).to(accelerator.device)
    # On a GPU values are packed in 16 bits: bfloat16, unless products will take float16. backend: also toys like this.
    dtype = torch.float16 if mixed_precision == "fp16" and not cpu else None
    accelerator.print(sparse24.sparsify(model, backend="sparse", dtype=dtype))

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1)
    loader = torch.utils.data.DataLoader(sequences(), batch_size=4, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    recipe = sparse24.Recipe(model, optimizer, total_steps=steps, decay=6e-5, mask_interval=5)
    accelerator.register_for_checkpointing(recipe)  # save_state and load_state take the recipe along
    if resume:
        accelerator.load_state(out)

    while recipe.step < steps:
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and recipe.step % 5 == 0:
                now = recipe.metrics()
                accelerator.print(
                    f"step {recipe.step:4d}  loss {loss.item():.3f}  flip rate {now['flip_rate']:.4f}  {recipe.phase}"
                )
            if accelerator.sync_gradients and recipe.step == steps:
                break
    accelerator.save_state(out)
    accelerator.print(sparse24.verify(accelerator.unwrap_model(model)))
    return recipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--out", type=Path, default=Path("accelerate-run"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    main(**{name: str(v) if isinstance(v, Path) else v for name, v in vars(parser.parse_args()).items()})
