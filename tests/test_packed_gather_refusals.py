"""What FSDP2 cannot gather packed, or should not, is told by name on every rank."""

import datetime
import os
import warnings

import forks
import pytest
import torch
import torch.distributed as dist
from packed_gather_runs import (
    SETTINGS,
    STEPS,
    data,
    gated,
    made,
    plain,
    policy,
    shard,
    train,
)
from tiny_models import MLP
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import sparse24
from sparse24 import Recipe
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.layers.state import MASK


def _message(act):
    """What `act` warns of and raises, as text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            act()
        except Sparse24Error as error:
            return type(error).__name__, str(error)
    return "warned", " ".join(str(w.message) for w in caught if issubclass(w.category, Sparse24Warning))


def recipe_of(model, **settings):
    return Recipe(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **{**SETTINGS, **settings})


def _offloaded(rank):
    return _message(lambda: recipe_of(shard(made(plain), offload_policy=CPUOffloadPolicy(pin_memory=False))))


def _eight_bit_policy(rank):
    eight_bits = MixedPrecisionPolicy(param_dtype=torch.float8_e4m3fn)
    return _message(lambda: recipe_of(shard(made(plain), mp_policy=eight_bits)))


def _uneven(rank):
    torch.manual_seed(0)
    model = nn.Sequential(MLP(16, 40))
    sparse24.sparsify(model)
    return _message(lambda: recipe_of(shard(model)))


def _apart(rank):
    model = made(gated)
    mesh = init_device_mesh("cpu", (2,))
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(layer, mesh=mesh)
    return _message(lambda: recipe_of(shard(model)))


def _other_dtype(rank):
    model = shard(made(plain), mp_policy=policy())
    recipe_of(model, dense_fraction=0)

    def run():
        with torch.autocast("cpu", torch.float16):
            model(data(0))

    return _message(run)


@pytest.mark.fault(95)
@pytest.mark.parametrize(
    "task, kind, text",
    [
        (_offloaded, "Sparse24Error", "call fully_shard without offload_policy"),
        (_eight_bit_policy, "Sparse24DtypeError", "use torch.bfloat16 or torch.float16"),
        (_uneven, "warned", "40 rows over 2 ranks are no multiple of 8 for each; choose a multiple of 16"),
        (_apart, "warned", "call fully_shard on the block that has both"),
        (_other_dtype, "Sparse24DtypeError", "MixedPrecisionPolicy(param_dtype=torch.float16)"),
    ],
)
def test_what_cannot_be_gathered_packed_is_told_on_every_rank(two, task, kind, text):
    for found, message in two.run(task):
        assert found == kind and text in message, message


def _ignored(rank):
    model = made(plain)
    for block in model:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)), ignored_params={model[0].fc1.weight})
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params={model[0].fc1.weight})
    warned = _message(lambda: recipe_of(model, check_ranks_every=2))

    def run():
        train(model, dict(check_ranks_every=2, takeover=True), counts=float(rank == 0))

    return warned, _message(run)


@pytest.mark.fault(96)
def test_ignored_params_are_named_and_their_masks_found_to_differ(two):
    for (_, warned), (kind, message) in two.run(_ignored):
        assert "the weights of 0.fc1 are not sharded" in warned
        assert kind == "Sparse24Error" and "ranks hold different masks in 0.fc1:" in message


def _diverged(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(made(plain), mesh)

    def run():
        recipe = recipe_of(model, check_ranks_every=1)
        if rank == 3:
            next(iter(recipe.layers.values()))._buffers[MASK].fill_(0xC3)
        x = data(0)
        model(x).square().mean().backward()
        recipe.optimizer.step()

    return _message(run)


@pytest.mark.fault(64)
def test_replicas_with_different_masks_are_found_on_every_rank(ranks_of):
    for kind, message in ranks_of(4).run(_diverged):
        assert kind == "Sparse24Error" and "ranks hold different masks in 0.fc1:" in message


def _dies(rank, init, results):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2, timeout=limit)
    model = shard(made(plain))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Recipe(model, optimizer, **SETTINGS, dense_fraction=0)
    try:
        for step in range(STEPS):
            if step == 2 and rank == 1:
                os._exit(1)
            model(data(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.put("no error")
    except RuntimeError as error:
        results.put(str(error))
    os._exit(0)  # without the end of a process group that has lost a member


@pytest.mark.fault(97)
def test_a_rank_that_dies_is_an_error_on_the_other_within_the_time_limit(tmp_path):
    context = forks.context()
    results = context.SimpleQueue()
    workers = [context.Process(target=_dies, args=(r, tmp_path / "init", results), daemon=True) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=90)
        assert worker.exitcode is not None, "a rank hangs"
    message = results.get()
    assert "onnection" in message or "imed out" in message, message
