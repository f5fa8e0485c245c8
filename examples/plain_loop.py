"""A plain PyTorch loop: a small GPT-2 learns to count, with 2:4 sparse FFNs, accumulation and clipping.

    python examples/plain_loop.py [--steps 60]

Three lines make it sparse: sparsify, Recipe, and (to save) the recipe's state beside the model's and the optimizer's.
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sparse24


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    print(sparse24.sparsify(model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    recipe = sparse24.Recipe(model, optimizer, total_steps=steps, decay=6e-5, mask_interval=10)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)

    for step in range(steps):
        for _ in range(2):  # micro-batches: mask and packed weights stay as they are in between
            ids = (torch.randint(0, 64, (8, 1)) + torch.arange(32)) % 64  # counting, from a random start
            loss = model(input_ids=ids, labels=ids).loss / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # masked decay before, packing and masks after: the recipe's hooks
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 9:
            m = recipe.metrics()
            print(
                f"step {step + 1:4d}  loss {2 * loss.item():.3f}  flip rate {m['flip_rate']:.4f}  phase {recipe.phase}"
            )

    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recipe": recipe.state_dict()},
        "plain_loop.pt",
    )
    print(sparse24.verify(model))
    return 2 * loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
