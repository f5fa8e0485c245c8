"""FSDP2 gathers packed forms of the rows that each rank has: the run of one process, to the last bit.

All ranks see the same batch, but the loss of rank 0 alone counts and gradients are summed, so that every sum has one
term that is not zero: what differs from a run without processes would be a fault of ours, not the order of a sum.
"""

import functools
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from packed_gather_runs import (
    HIDDEN,
    SETTINGS,
    WIDTH,
    alone,
    data,
    gated,
    in_8_bits,
    made,
    narrow_in_8_bits,
    outcome,
    plain,
    policy,
    shard,
    train,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import sparse24
from sparse24 import Recipe
from sparse24.layers.parallel import packed_gather
from sparse24.layers.state import state_of


@pytest.fixture(params=[1, 2, 3, 4])
def ranks(request, ranks_of):
    """Rows of 48 and 96, of 32 and 64, of 24 and 48 a rank: each way in which metadata are put together."""
    return ranks_of(request.param)


def _run(rank, make, options, settings, mesh=None):
    names = ("replicate", "shard")
    mesh = mesh and init_device_mesh("cpu", mesh, mesh_dim_names=names)
    model = shard(made(make), mesh, **options)
    recipe, losses = train(model, {"check_ranks_every": 1, **settings}, counts=float(rank == 0))
    for layer in recipe.layers.values():
        assert (state_of(layer).shards is not None) == (dist.get_world_size() > 1)
    assert sparse24.verify(model), str(sparse24.verify(model))
    return outcome(model, recipe, losses)


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


@pytest.mark.parametrize("world, make", [(2, in_8_bits), (4, in_8_bits), (4, narrow_in_8_bits)])
def test_8_bit_forms_and_their_scales_are_those_of_one_process(ranks_of, world, make):
    """The largest magnitude of a weight is that over all ranks' rows, in the step in which one process has it."""
    settings = dict(dense_fraction=0, mvue=None)
    expected = alone(make, settings)
    for found in ranks_of(world).run(functools.partial(_run, make=make, options={}, settings=settings)):
        assert found[2:] == expected[2:]
        assert found == expected


class Checkpointed(nn.Module):
    """Runs forward again in backward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def checkpointed():
    return nn.Sequential(*(Checkpointed(block) for block in gated()))


def wrapped():
    """As trainers wrap and compile blocks; what is compiled cannot fetch a form, so both must be gathered."""
    model = gated()
    for i, block in enumerate(model):
        model[i] = checkpoint_wrapper(block)
        model[i].compile(backend="aot_eager")
    return model


def compiled():
    model = gated()
    for block in model:
        block.compile(backend="aot_eager")
    return model


def frozen():
    model = gated()
    model[0].requires_grad_(False)
    return model


@pytest.mark.fault(67)
@pytest.mark.parametrize("make", [checkpointed, wrapped, compiled, frozen])
def test_checkpointed_compiled_and_frozen_blocks_train_as_in_one_process(two, make):
    """A forward pass in backward finds the form that it reads, which FSDP2 does not gather there by itself."""
    settings = dict(dense_fraction=0)
    expected = alone(make, settings)
    for found in two.run(functools.partial(_run, make=make, options={}, settings=settings)):
        assert found == expected


@pytest.mark.parametrize("mesh", [(2, 2), (1, 4)])
def test_replicas_of_shards_train_as_one_process(ranks_of, mesh):
    settings = dict(dense_fraction=0)
    expected = alone(gated, settings)
    for found in ranks_of(4).run(functools.partial(_run, make=gated, options={}, settings=settings, mesh=mesh)):
        assert found == expected


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _go_on(rank, folder, first, last):
    """Steps `first` to `last` of a run: from a checkpoint, unless it begins, and to the next."""
    model = shard(made(gated)) if dist.is_initialized() else made(gated)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, **SETTINGS, dense_fraction=0)
    if first:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        recipe.load_state_dict(torch.load(folder / f"{first}.pt", weights_only=True), rng=False)
    losses = []
    for step in range(first, last):
        x = data(step)
        loss = (model(x) - x.flip(-1)).square().mean()
        losses.append(loss.item())
        (loss * (rank == 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(last))
    state = recipe.state_dict()
    if rank == 0:
        torch.save(state, folder / f"{last}.pt")
    return outcome(model, recipe, losses)


@pytest.mark.fault(63)
def test_a_run_goes_on_with_other_shards_bit_for_bit(ranks_of, tmp_path):
    """Four ranks, then two, then three; each between two searches."""
    expected = [*alone(gated, dict(dense_fraction=0))]
    losses = []
    for world, first, last in ((4, 0, 1), (2, 1, 3), (3, 3, 6)):
        found = ranks_of(world).run(functools.partial(_go_on, folder=tmp_path, first=first, last=last))
        losses += found[0][0]
    assert [losses, *found[0][1:]] == expected


# -- beside a run whose weights are gathered whole --------------------------------------------------------------------


def _as_gathered(rank, packed, device="cpu"):
    """A run in bfloat16 with fp32 masters, its weights gathered packed or whole."""
    why_whole = packed_gather.why_whole
    packed_gather.why_whole = why_whole if packed else lambda layer, how: "of a test"
    try:
        model = shard(made(gated).to(device), mp_policy=policy())
        recipe, losses = train(model, dict(dense_fraction=0), counts=float(rank == 0))
        assert all((state_of(layer).shards is not None) == packed for layer in recipe.layers.values())
        assert sparse24.verify(model), str(sparse24.verify(model))
        return losses, [p.full_tensor().tolist() for p in model.parameters()]
    finally:
        packed_gather.why_whole = why_whole


@pytest.mark.fault(67)
def test_mixed_precision_computes_what_it_does_with_whole_weights(two):
    """A policy that casts weights: packed from the fp32 rows, rounded once."""
    packed, whole = (two.run(functools.partial(_as_gathered, packed=which)) for which in (True, False))
    assert packed == whole


def _over_nccl(rank, init, results):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{init}", rank=rank, world_size=2)
    try:
        results.put((rank, [_as_gathered(rank, packed, "cuda") for packed in (True, False)]))
    finally:
        dist.destroy_process_group()


@pytest.mark.multigpu
def test_two_gpus_over_nccl_compute_what_they_do_with_whole_weights(tmp_path):
    """Losses and weights to the last bit: the forms are the same, and so are the kernels that read them."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_over_nccl, args=(r, tmp_path / "init", results)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=180) for _ in workers)
    for worker in workers:
        worker.join(timeout=30)
    assert found[0] == found[1] and found[0][0] == found[0][1]


# -- gathered whole again ---------------------------------------------------------------------------------------------


def _whole_again(rank):
    model = shard(made(gated))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Recipe(model, optimizer, **SETTINGS, dense_fraction=0)
    model(data(0)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    recipe = Recipe(model, optimizer, **SETTINGS, dense_fraction=0, decay_in="backward", takeover=True)
    assert all(state_of(layer).shards is None for layer in recipe.layers.values())
    model(data(1)).square().mean().backward()
    optimizer.step()
    return bool(sparse24.verify(model)), [tuple(mask.shape) for mask in recipe._search.masks]


def test_a_recipe_that_reads_whole_weights_undoes_the_division(two):
    for verified, shapes in two.run(_whole_again):
        assert (
            verified and shapes == [(HIDDEN // 4, WIDTH // 2), (HIDDEN // 4, WIDTH // 2), (WIDTH // 4, HIDDEN // 2)] * 2
        )


def _dense_again(rank):
    torch.manual_seed(0)
    model = plain()
    sparse24.sparsify(model, fuse=False)
    shard(model)
    recipe, _ = train(model, dict(dense_fraction=0), steps=2)
    with torch.no_grad():
        before = model(data(0))
        sparse24.densify(model, masked=True)
        return torch.equal(model(data(0)), before), model[0].fc1.weight.full_tensor().isfinite().all().item()


def test_a_densified_model_is_gathered_dense(two):
    for same, finite in two.run(_dense_again):
        assert same and finite
