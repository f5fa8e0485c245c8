"""Checkpoints of several ranks: the run goes on bit for bit on as many, and on another number within rounding.

On one GPU the same functions run over nccl with a world of one; `multigpu` tests are those with a world of two.
"""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_runs import SETTINGS, STEPS, WORLD, data, sparse_model
from process_ranks import started
from rounding import MANY_SUMS
from torch import nn

import sparse24
from sparse24 import Recipe


@pytest.fixture
def on_two_ranks(ranks_of):
    """Runs function(rank) in two processes, the same two for all tests, and returns both results."""
    return ranks_of(WORLD).run


HALF = STEPS // 2


WRAPS = ("ddp", "fsdp2", "none")


def wrapped_run(wrap, mvue=True, device="cpu", dtype=torch.float32, seed=0):
    """(model, optimizer, recipe) of one rank; without `wrap` that of a program without processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = sparse_model(seed).to(device, dtype)
    if wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif wrap == "fsdp2":
        fully_shard(model, mesh=init_device_mesh(device, (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, Recipe(model, optimizer, mvue=mvue, **SETTINGS)


def steps(model, optimizer, first, last, rank=0, world=1, device="cpu"):
    for step in range(first, last):
        x = data(step).chunk(world)[rank].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y = model(x)
        (y - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder, model, optimizer, recipe, rank=0):
    """As docs/distributed.md has it, with each rank's generators beside."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    state = recipe.state_dict()  # gathers masks that FSDP2 has sharded: all ranks take part
    if rank == 0:
        torch.save(state, folder / "recipe.pt")
    torch.save(state["rng"], folder / f"rng{rank}.pt")
    if dist.is_initialized():
        dist.barrier()


def load(folder, model, optimizer, recipe, rank=None):
    """The whole checkpoint; with a rank, its generators too."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    state = torch.load(folder / "recipe.pt", weights_only=True)
    if rank is not None:
        state["rng"] = torch.load(folder / f"rng{rank}.pt", weights_only=True)
    recipe.load_state_dict(state, rng=rank is not None)


def outcome(model, recipe):
    """Weights, masks and flips, as lists."""
    parameters = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    whole = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for n, p in parameters.items()}
    return whole, {n: m.tolist() for n, m in recipe.state_dict()["masks"].items()}, recipe.monitor.history()


def _save_and_go_on(rank, folder, wrap, mvue=True, device="cpu"):
    """Train half, save, train the rest; then the rest from the checkpoint. Outcomes at the checkpoint and of both."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    model, optimizer, recipe = wrapped_run(wrap, mvue, device)
    torch.manual_seed(7 + rank)
    steps(model, optimizer, 0, HALF, rank, world, device)
    save(folder, model, optimizer, recipe, rank)
    saved = outcome(model, recipe)
    steps(model, optimizer, HALF, STEPS, rank, world, device)
    resumed, again, recipe_again = wrapped_run(wrap, mvue, device, seed=1)
    torch.manual_seed(99)
    load(folder, resumed, again, recipe_again, rank)
    assert outcome(resumed, recipe_again) == saved
    steps(resumed, again, HALF, STEPS, rank, world, device)
    assert sparse24.verify(resumed), str(sparse24.verify(resumed))
    return saved, outcome(model, recipe), outcome(resumed, recipe_again)


def _load_and_go_on(rank, folder, wrap):
    """Take up a checkpoint of another world: the state as loaded, and the end of the run. No noise, so both compare."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    model, optimizer, recipe = wrapped_run(wrap, mvue=False, seed=1)
    load(folder, model, optimizer, recipe)
    loaded = outcome(model, recipe)
    assert recipe.step == HALF and recipe.last_search == 2
    steps(model, optimizer, HALF, STEPS, rank, world)
    assert sparse24.verify(model), str(sparse24.verify(model))
    return loaded, outcome(model, recipe)


@pytest.mark.fault(63)
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_distributed_checkpoint_resumes_bit_for_bit(on_two_ranks, wrap, tmp_path):
    """With noise, at a step between two mask searches; each rank has its own generators back."""
    for saved, whole, resumed in on_two_ranks(functools.partial(_save_and_go_on, folder=tmp_path, wrap=wrap)):
        assert whole == resumed != saved


def assert_close_outcomes(ours, theirs):
    (weights, masks, flips), (other_weights, other_masks, other_flips) = ours, theirs
    assert masks == other_masks and flips == other_flips
    for name, weight in weights.items():
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(other_weights[name]), **MANY_SUMS)


@pytest.mark.fault(63)
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_ranks_checkpoint_goes_on_in_one_process(on_two_ranks, wrap, tmp_path):
    """Weights, moments and masks are those that were saved; the rest of the run is that of the two ranks."""
    run = functools.partial(_save_and_go_on, folder=tmp_path, wrap=wrap, mvue=False)
    saved, whole, _ = on_two_ranks(run)[0]
    loaded, end = _load_and_go_on(0, tmp_path, "none")
    assert loaded == saved
    assert_close_outcomes(end, whole)


@pytest.mark.fault(63)
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_one_processs_checkpoint_goes_on_on_two_ranks(on_two_ranks, wrap, tmp_path):
    saved, whole, resumed = _save_and_go_on(0, tmp_path, "none", mvue=False)
    assert whole == resumed
    for loaded, end in on_two_ranks(functools.partial(_load_and_go_on, folder=tmp_path, wrap=wrap)):
        assert loaded == saved
        assert_close_outcomes(end, whole)


# -- nccl -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone_over_nccl(tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_a_world_of_one_over_nccl_trains_saves_and_resumes(alone_over_nccl, wrap, tmp_path):
    """As a process without a group does, bit for bit; DDP and FSDP2 add nothing where there is one rank."""
    saved, whole, resumed = _save_and_go_on(0, tmp_path / wrap, wrap, device="cuda")
    assert whole == resumed != saved
    assert_close_outcomes(whole, _save_and_go_on(0, tmp_path / "alone", "none", device="cuda")[1])


def _over_nccl(rank, wrap):
    model, optimizer, recipe = wrapped_run(wrap, device="cuda")
    recipe.check_ranks_every = 1
    torch.manual_seed(0)
    steps(model, optimizer, 0, STEPS, rank, WORLD, "cuda")
    return model.fc1.rank if wrap == "fsdp2" else model.module.fc1.rank, outcome(model, recipe)


@pytest.fixture(scope="module")
def on_two_gpus(tmp_path_factory):
    for ranks in started(WORLD, tmp_path_factory, "nccl"):
        yield ranks.run


@pytest.mark.multigpu
@pytest.mark.fault(64, 65)
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_gpus_over_nccl_keep_the_same_masks(on_two_gpus, wrap):
    """The checksum runs at each step and finds nothing; each rank has noise of its own."""
    (rank0, first), (rank1, second) = on_two_gpus(functools.partial(_over_nccl, wrap=wrap))
    assert (rank0, rank1) == (0, 1) and first == second
