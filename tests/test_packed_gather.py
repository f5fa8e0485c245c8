"""FSDP2 gathers packed forms of the rows that each rank has: the run of one process, to the last bit.

All ranks see the same batch, but the loss of rank 0 alone counts and gradients are summed, so that every sum has one
term that is not zero: what differs from a run without processes would be a fault of ours, not the order of a sum.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from process_ranks import Ranks
from tiny_models import MLP
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparse24
from sparse24 import Recipe
from sparse24.layers import packed_gather
from sparse24.layers.state import PACKED_BUFFERS, state_of

WIDTH, HIDDEN, STEPS = 96, 192, 6
SETTINGS = dict(total_steps=STEPS, mask_interval=2, decay=1e-2, mvue=False)


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    """Rows of 48 and 96, of 32 and 64, of 24 and 48 a rank: each way in which metadata are put together."""
    started = Ranks(request.param, tmp_path_factory.mktemp("gloo") / "init")
    started.world = request.param
    yield started
    started.end()


def plain():
    return nn.Sequential(MLP(WIDTH, HIDDEN), MLP(WIDTH, HIDDEN))


def gated():
    """Blocks that run as one function, gate and up in one buffer."""
    blocks = [sparse24.SparseGatedMLP(WIDTH, HIDDEN) for _ in range(2)]
    for block in blocks:
        sparse24.densify(block)
    return nn.Sequential(*blocks)


def made(make):
    torch.manual_seed(0)
    model = make()
    sparse24.sparsify(model)
    return model


def shard(model, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def data(step):
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(step))


def train(model, settings, steps=STEPS, counts=1.0):
    """(recipe, losses); `counts`: 1 where the loss counts, else 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, **{**SETTINGS, **settings})
    losses = []
    for step in range(steps):
        x = data(step)
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
            forms[name] = [layer._buffers[form].reshape(-1).tolist() for form in PACKED_BUFFERS]
    masks = {name: mask.tolist() for name, mask in recipe.state_dict()["masks"].items()}
    return losses, weights, forms, masks, recipe.monitor.history()


def _run(rank, make, options, settings, mesh=None):
    names = ("replicate", "shard")
    mesh = mesh and init_device_mesh("cpu", mesh, mesh_dim_names=names)
    model = shard(made(make), mesh, **options)
    recipe, losses = train(model, {"check_ranks_every": 1, **settings}, counts=float(rank == 0))
    assert all(state_of(layer).shards is not None for layer in recipe.layers.values())
    assert sparse24.verify(model), str(sparse24.verify(model))
    return outcome(model, recipe, losses)


def alone(make, settings):
    model = made(make)
    return outcome(model, *train(model, settings))


@pytest.mark.parametrize("make", [plain, gated])
@pytest.mark.parametrize("reshard", [True, False])
def test_masks_forms_and_losses_are_those_of_one_process(ranks, make, reshard):
    settings = dict(dense_fraction=0)
    task = functools.partial(_run, make=make, options=dict(reshard_after_forward=reshard), settings=settings)
    expected = alone(make, settings)
    for found in ranks.run(task):
        for name, ours, theirs in zip(("losses", "weights", "forms", "masks", "flips"), found, expected, strict=True):
            assert ours == theirs, name


@pytest.mark.parametrize("place", ["start", "end"])
def test_in_the_dense_phase_the_dense_weight_is_gathered(ranks, place):
    """The run goes from one to the other between two steps, either way round."""
    settings = dict(dense_fraction=1 / 3, dense_at=place)
    expected = alone(gated, settings)
    for found in ranks.run(functools.partial(_run, make=gated, options={}, settings=settings)):
        assert found == expected
