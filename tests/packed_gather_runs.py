"""Models whose rows FSDP2 shards, and a run of them: what the tests of packed gathers share."""

import torch
import torch.distributed as dist
from tiny_models import MLP
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sparse24
from sparse24 import Recipe
from sparse24.layers.parallel import packed_gather
from sparse24.layers.state import PACKED_BUFFERS

WIDTH, HIDDEN, STEPS = 96, 192, 6
SETTINGS = dict(total_steps=STEPS, mask_interval=2, decay=1e-2, mvue=False)


def plain():
    return nn.Sequential(MLP(WIDTH, HIDDEN), MLP(WIDTH, HIDDEN))


def gated():
    """Blocks that run as one function, gate and up in one buffer."""
    blocks = [sparse24.SparseGatedMLP(WIDTH, HIDDEN) for _ in range(2)]
    for block in blocks:
        sparse24.densify(block)
    return nn.Sequential(*blocks)


def in_8_bits(width=128, hidden=256):
    """Gate and up fused, whose K-major packed_t lie side by side; rows of 64 and 128, or of 32 and 64, a rank."""
    return nn.Sequential(*(sparse24.SparseGatedMLP(width, hidden, precision="fp8") for _ in range(2)))


def narrow_in_8_bits():
    """Rows of 48 or 24 a rank in down: as few as have whole bytes of E."""
    return in_8_bits(96)


def made(make):
    torch.manual_seed(0)
    model = make()
    if make not in (in_8_bits, narrow_in_8_bits):
        sparse24.sparsify(model)
    return model


def shard(model, mesh=None, **options):
    device = next(model.parameters()).device.type
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            if device == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def policy():
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def data(step, width=WIDTH):
    return torch.randn(32, width, generator=torch.Generator().manual_seed(step))


def train(model, settings, steps=STEPS, counts=1.0):
    """(recipe, losses); `counts`: 1 where the loss counts, else 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, **{**SETTINGS, **settings})
    losses = []
    for step in range(steps):
        x = data(step, next(iter(recipe.layers.values())).in_features).to(next(model.parameters()).device)
        loss = (model(x) - x.flip(-1)).square().mean()
        losses.append(loss.item())
        (loss * counts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return recipe, losses


def outcome(model, recipe, losses):
    """All that one run must have in common with another: lists, for they go through a queue."""
    weights = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for n, p in model.named_parameters()}
    forms = {}
    with packed_gather.whole_forms(list(recipe.layers.values())):
        for name, layer in recipe.layers.items() if recipe.metrics()["phase"] == 0 else ():
            forms[name] = [layer._buffers[form].reshape(-1).view(torch.uint8).tolist() for form in PACKED_BUFFERS]
    masks = {name: mask.tolist() for name, mask in recipe.state_dict()["masks"].items()}
    return losses, weights, forms, masks, recipe.monitor.history()


def alone(make, settings):
    model = made(make)
    return outcome(model, *train(model, settings))
