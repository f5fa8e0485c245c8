"""DDP and FSDP2 in two processes over gloo: the same masks on all ranks, different noise, the single-process result."""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed_runs import SETTINGS, STEPS, WORLD, data, sparse_model
from rounding import MANY_SUMS
from tiny_models import MLP
from torch import nn

import sparse24
from sparse24 import Recipe, ops
from sparse24.errors import Sparse24Error


@pytest.fixture
def on_two_ranks(ranks_of):
    """Runs function(rank) in two processes, the same two for all tests, and returns both results."""
    return ranks_of(WORLD).run


def train(model, recipe, optimizer, shard):
    for step in range(STEPS):
        x = shard(data(step))
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return recipe


def numbers(model):
    """What a rank sends home: lists, not tensors, so that no shared memory is involved."""
    return {name: t.tolist() for name, t in (*model.named_parameters(), ("mask", model.fc1.mask))}


def single_process(mvue=False):
    model = sparse_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, Recipe(model, optimizer, mvue=mvue, **SETTINGS), optimizer, lambda x: x)
    return model


# -- DDP --------------------------------------------------------------------------------------------------------------


def _ddp(rank, mvue, seeds_differ=False, **settings):
    model = sparse_model(seed=rank if seeds_differ else 0)  # DDP hands out rank 0's weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    recipe = Recipe(wrapped, optimizer, mvue=mvue, check_ranks_every=1, **SETTINGS, **settings)
    torch.manual_seed(0)
    train(wrapped, recipe, optimizer, lambda x: x.chunk(WORLD)[rank])
    assert sparse24.verify(wrapped) and list(recipe.layers) == ["fc1", "fc2"]
    return numbers(model)


@pytest.mark.fault(64, 66)
@pytest.mark.parametrize("decay_in", ["step", "backward"])
def test_ddp_equals_the_single_process_run(on_two_ranks, decay_in):
    """Masks are identical on all ranks, and equal to those of one process on the whole batch. A decay that each rank
    adds in backward is averaged with the gradients.
    """
    first, second = on_two_ranks(functools.partial(_ddp, mvue=False, seeds_differ=True, decay_in=decay_in))
    assert first == second
    alone = numbers(single_process())
    assert first["mask"] == alone["mask"]
    for name in ("fc1.weight", "fc2.weight", "fc1.bias"):
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(alone[name]), **MANY_SUMS)


def _noise(rank):
    model = sparse_model()
    Recipe(model, torch.optim.SGD(model.parameters(), lr=0.0), **SETTINGS)
    torch.manual_seed(0)  # the same torch seed on all ranks, as most training scripts have it
    model(data(0)).square().mean().backward()
    return model.fc2.weight.grad.tolist(), model.fc1.rank


@pytest.mark.fault(65)
def test_ranks_draw_independent_noise_from_one_seed(on_two_ranks):
    """The rank goes into the key."""
    (first, rank0), (second, rank1) = on_two_ranks(_noise)
    assert (rank0, rank1) == (0, 1) and first != second


@pytest.mark.fault(64)
def test_ddp_with_noise_keeps_the_ranks_together(on_two_ranks):
    """Gradients are averaged, so weights and masks stay the same on all ranks."""
    first, second = on_two_ranks(functools.partial(_ddp, mvue=True))
    assert first == second


def _diverged(rank):
    model = sparse_model(seed=rank)  # no DDP: nothing hands out one rank's weights
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe(model, optimizer, check_ranks_every=2, **SETTINGS)
    try:
        train(model, recipe, optimizer, lambda x: x)
    except Sparse24Error as error:
        return str(error)
    return "no error"


@pytest.mark.fault(64)
def test_ranks_with_different_masks_are_found_out(on_two_ranks):
    """The checksum names the layers."""
    for message in on_two_ranks(_diverged):
        assert "ranks hold different masks in fc1, fc2" in message


def _uneven(rank):
    model = sparse_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recipe = Recipe(wrapped, optimizer, mvue=False, **SETTINGS)
    with wrapped.join():
        for step in range(3 + rank):
            (wrapped(data(step)) - data(step).flip(-1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    packed = bool(sparse24.verify(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(data(0))
    told = any("does not hear of" in str(w.message) for w in caught)
    before = recipe.step, packed, told, bool(sparse24.verify(model))
    states = [recipe.state_dict()]
    dist.broadcast_object_list(states, src=1)  # of the rank that took the most steps
    recipe.load_state_dict(states[0], rng=False)
    return before, recipe.step, model(data(0)).tolist(), numbers(model)


@pytest.mark.fault(83)
def test_a_rank_that_joins_early_packs_the_final_weights_and_takes_the_state_of_the_others(on_two_ranks):
    (early, *first), (late, *second) = on_two_ranks(_uneven)
    assert early == (3, False, True, True) and late == (4, True, True, True)
    assert first == second


@pytest.mark.fault(64)
def test_checksum_tells_masks_apart_that_differ_in_one_block_or_in_order():
    from sparse24.recipe.ranks import checksum

    mask = ops.transposable_mask(torch.randn(16, 16)).view(torch.uint8)
    other = mask.clone()
    other[0, 0] ^= 1
    swapped = mask.flip(0)
    assert len({int(checksum(m)) for m in (mask, other, swapped)}) == 3


# -- FSDP2 ------------------------------------------------------------------------------------------------------------


def plain():
    return MLP(16, 32), 16


def cut():
    """Rows that two ranks cannot share in whole 4x4 blocks."""
    return MLP(12, 20), 12


def gated():
    """A block that runs as one function."""
    block = sparse24.SparseGatedMLP(16, 64)
    sparse24.densify(block)
    return nn.Sequential(block), 16


def lean():
    """The other packed form is made in backward, from the weight that FSDP2 has gathered for it."""
    model = MLP(16, 32)
    sparse24.sparsify(model, lean=True)
    return model, 16


def conv1d():
    """Weights stored as [in, out]: the shards cut the columns that the kernels see."""
    from transformers.pytorch_utils import Conv1D

    model = MLP(16, 32)
    model.fc1, model.fc2 = Conv1D(32, 16), Conv1D(16, 32)
    return model, 16


def _fsdp(rank, folder, make, mesh=(WORLD,), decay_in="step"):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, width = make()
    sparse24.sparsify(model)
    names = ("replicate", "shard")[-len(mesh) :]
    fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, mvue=False, check_ranks_every=1, decay_in=decay_in, **SETTINGS)
    train(model, recipe, optimizer, lambda x: x[:, :width].chunk(WORLD)[rank])
    assert sparse24.verify(model), str(sparse24.verify(model))
    assert 0 < recipe.metrics()["gap_q10"] <= recipe.metrics()["gap_q90"]
    for form in (dict(), dict(masked=True), dict(format="compressed")):
        sparse24.export(model, folder / f"of rank {rank}", **form)  # gathers: all ranks take part
        assert sparse24.verify(model, folder / f"of rank {rank}")
    state = {name: p.full_tensor().tolist() for name, p in model.named_parameters()}
    return state, {name: mask.tolist() for name, mask in recipe.state_dict()["masks"].items()}


@pytest.mark.parametrize("decay_in", ["step", "backward"])
@pytest.mark.parametrize(
    "make, mesh",
    [(plain, (2,)), (cut, (2,)), (gated, (2,)), (lean, (2,)), (conv1d, (2,)), (cut, (1, 2)), (cut, (2, 1))],
)
@pytest.mark.fault(67)
def test_fsdp2_equals_the_single_process_run(on_two_ranks, make, mesh, decay_in, tmp_path):
    """Packed forms come from the gathered weight, the decay works on shards, even across a 4x4 block, or in backward on
    the gathered weight; so with a mesh of replicas and shards. Exported files are whole.
    """
    task = functools.partial(_fsdp, folder=tmp_path, make=make, mesh=mesh, decay_in=decay_in)
    (state, masks), second = on_two_ranks(task)
    assert (state, masks) == second
    torch.manual_seed(0)
    model, width = make()
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = train(model, Recipe(model, optimizer, mvue=False, **SETTINGS), optimizer, lambda x: x[:, :width])
    assert masks == {name: mask.tolist() for name, mask in recipe.state_dict()["masks"].items()}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(torch.tensor(state[name]), weight.detach(), **MANY_SUMS)


def _steps_again(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = sparse_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    recipe = Recipe(model, optimizer, mvue=False, **SETTINGS | dict(decay=0.5))
    layer, answers, mask = model.fc1, [], recipe.state_dict()["masks"]["fc1"]
    decay = 0.5 * torch.where(ops.unpack_mask(mask), 0, layer.weight.full_tensor().detach())
    for step, is_new in enumerate((True, False, True, True)):
        if is_new:
            optimizer.zero_grad(set_to_none=step > 2)
            (model(data(step)) - data(step).flip(-1)).square().mean().backward()
        before = layer.weight.grad.full_tensor().clone()
        optimizer.step()
        answers.append(torch.equal(layer.weight.grad.full_tensor(), before + decay if is_new else before))
    return answers


@pytest.mark.fault(67, 106)
def test_a_shards_gradient_gets_its_decay_once(on_two_ranks):
    """FSDP2 adds to the gradient of before where it was zeroed in place; one that is stepped twice is the same."""
    assert on_two_ranks(_steps_again) == [[True] * 4] * 2


@pytest.mark.fault(67)
def test_sharded_weights_are_gathered_one_at_a_time(monkeypatch):
    """All of them at once would be the memory that sharding saves; plain weights are packed in one launch."""
    calls, pack = [], ops.compress_
    model = sparse_model()
    monkeypatch.setattr(ops, "compress_", lambda weights, *rest: calls.append(len(weights)) or pack(weights, *rest))
    sparse24.layers.packing.pack([model.fc1, model.fc2], search=False)
    monkeypatch.setattr(sparse24.layers.packing, "full_weight", lambda layer: layer.kernel_weight())
    monkeypatch.setattr(sparse24.layers.packing, "is_dtensor", lambda tensor: True)
    sparse24.layers.packing.pack([model.fc1, model.fc2], search=False)
    assert calls == [2, 1, 1]


def _fsdp_in_16_bits(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = sparse_model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, check_ranks_every=1, **SETTINGS)
    torch.manual_seed(0)
    loss = [(model(data(0)).float() - data(0).flip(-1)).square().mean().item()]
    train(model, recipe, optimizer, lambda x: x.chunk(WORLD)[rank])
    loss.append((model(data(0)).float() - data(0).flip(-1)).square().mean().item())
    assert sparse24.verify(model), str(sparse24.verify(model))
    masters = [p.dtype for p in model.parameters()]
    return model(data(0)).dtype, masters, loss


@pytest.mark.fault(67)
def test_fsdp2_with_16_bit_parameters_and_fp32_masters(on_two_ranks):
    """Masks and packed values come from the fp32 shards; forward and backward run in bfloat16."""
    for dtype, masters, (before, after) in on_two_ranks(_fsdp_in_16_bits):
        assert dtype == torch.bfloat16 and set(masters) == {torch.float32} and after < before


def _fsdp1(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    messages = []
    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(sparse_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        try:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            recipe = Recipe(model, optimizer, **SETTINGS)
            train(model, recipe, optimizer, lambda x: x)
            messages.append("no error")
        except Sparse24Error as error:
            messages.append(str(error))
    return messages


def test_fsdp1_is_refused_and_fsdp2_named(on_two_ranks):
    for messages in on_two_ranks(_fsdp1):
        assert all("fully_shard" in message for message in messages), messages
