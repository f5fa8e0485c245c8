"""Tensor-parallel layers in checkpoints, exports and copies, and what no part can be; the training is in
test_tensor_parallel.py.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from rounding import MANY_SUMS
from tensor_parallel_runs import SETTINGS, STEPS, data, dense_model, numbers, parallel_model, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparse24
from sparse24 import Recipe
from sparse24.errors import Sparse24Error
from sparse24.layers.parallel import tensor_parallel

# -- checkpoints ----------------------------------------------------------------------------------------------------


def _save(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallel_model("sparsify first", mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, mvue=False, track_blocks=True, **SETTINGS)
    _steps(model, optimizer, 0, STEPS // 2)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    state = recipe.state_dict()  # on all ranks: it gathers masks
    if rank == 0:
        torch.save(state, folder / "recipe.pt")
    dist.barrier()
    _steps(model, optimizer, STEPS // 2, STEPS)
    return numbers(model, recipe, [])


def _steps(model, optimizer, first, last):
    for step in range(first, last):
        x = data(step)
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _resume(rank, folder, shape=(), method="load"):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        model = parallel_model("plan first", mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])
    else:
        sparse24.sparsify(model := dense_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, mvue=False, track_blocks=True, **SETTINGS)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    recipe.load_state_dict(torch.load(folder / "recipe.pt", weights_only=True), rng=False)
    assert recipe.step == STEPS // 2 and sparse24.verify(model)
    _steps(model, optimizer, STEPS // 2, STEPS)
    return numbers(model, recipe, [])


def test_checkpoints_go_on_with_another_number_of_parts(two, four, tmp_path):
    """From two parts to one process without any, and to two by two ranks; masks are loaded, never searched anew."""
    expected, _ = two.run(functools.partial(_save, folder=tmp_path))
    for shape, found in (
        ((), [_resume(0, tmp_path)]),
        ((2, 2), four.run(functools.partial(_resume, folder=tmp_path, shape=(2, 2)))),
        ((1, 4), four.run(functools.partial(_resume, folder=tmp_path, shape=(1, 4)))),
    ):
        for one in found:
            assert one["masks"] == expected["masks"] and one["flips"] == expected["flips"], shape
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(torch.tensor(one["weights"][name]), torch.tensor(weight), **MANY_SUMS)


def _exported(rank, folder):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallel_model("sparsify first", mesh)
    for form in (dict(), dict(masked=True), dict(format="compressed")):
        sparse24.export(model, folder / f"{form} of {rank}", **form)
        assert sparse24.verify(model, folder / f"{form} of {rank}")
    state = sparse24.save.exporting.load_exported(folder / f"{dict(masked=True)} of {rank}").weights
    sparse24.densify(model, masked=True)
    return {n: w.tolist() for n, w in state.items()}, {
        n: whole(p.detach()).tolist() for n, p in model.named_parameters()
    }


def test_exports_are_whole_and_masked_weights_are_written_into_parts(two, tmp_path):
    sparse24.sparsify(model := dense_model())
    sparse24.densify(model, masked=True)
    expected = {name: p.tolist() for name, p in model.named_parameters()}
    for file, weights in two.run(functools.partial(_exported, folder=tmp_path)):
        assert file == expected and weights == expected


# -- copies -------------------------------------------------------------------------------------------------------


def _halfway(average, new, count):
    """Tensor by tensor: PyTorch's own averages of many tensors at once refuse DTensors beside plain ones."""
    return average + 0.5 * (new - average)


def _averaged(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallel_model("sparsify first", mesh, bias=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, mvue=False, **SETTINGS)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=_halfway)
    for step in range(STEPS):
        _steps(model, optimizer, step, step + 1)
        average.update_parameters(model)
    sparse24.follow(average, like=model)
    assert sparse24.verify(average, like=model), str(sparse24.verify(average, like=model))
    y = average(data(0)).detach()
    masks = recipe.state_dict()
    sparse24.load_masks(average, masks)
    assert torch.equal(average(data(0)), y)
    return y.tolist()


def test_averages_follow_the_parts(two):
    """An average over parts computes what the average over the whole model does."""
    model = dense_model(bias=True)
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Recipe(model, optimizer, mvue=False, **SETTINGS)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=_halfway)
    for step in range(STEPS):
        _steps(model, optimizer, step, step + 1)
        average.update_parameters(model)
    sparse24.follow(average, like=model)
    expected = average(data(0)).detach()
    for found in two.run(_averaged):
        torch.testing.assert_close(torch.tensor(found), expected, **MANY_SUMS)


# -- bad input ------------------------------------------------------------------------------------------------------


def _refused(rank, case):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = nn.Linear(16, 20) if case.startswith("uneven") else nn.Linear(16, 16)
    model = nn.Sequential(layer)
    if case != "uneven, plan first":
        sparse24.sparsify(model, include=("0",))
    try:
        if case == "unknown layout":
            parallelize_module(model, mesh, {"0": RowwiseParallel()})
            from torch.distributed.tensor import distribute_tensor

            model[0].forward(distribute_tensor(torch.ones(4, 16), mesh, [Replicate()]))
        elif case == "bare forward":
            parallelize_module(model, mesh, {"0": ColwiseParallel()})
            model[0].forward(torch.ones(4, 16))
        else:
            parallelize_module(model, mesh, {"0": ColwiseParallel()})
            sparse24.sparsify(model, include=("0",))
    except Sparse24Error as error:
        return str(error)
    return "no error"


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    "case, words",
    [
        ("uneven", "out_features=20 over 2 tensor-parallel ranks cuts through 4x4 blocks; it must be a multiple of 8"),
        ("uneven, plan first", "out_features=20 over 2 tensor-parallel ranks cuts through 4x4 blocks"),
        ("unknown layout", "the input of this tensor-parallel layer has placements (Replicate(),)"),
        ("bare forward", "the input of this tensor-parallel layer is no DTensor"),
    ],
)
def test_what_parts_cannot_be_is_named_on_every_rank(two, case, words):
    for message in two.run(functools.partial(_refused, case=case)):
        assert words in message


def test_cuts_say_their_part_of_a_mask():
    """Two parts of four rows each, and of four columns each."""

    class Mesh:
        size, get_local_rank = (lambda self: 2), (lambda self: 1)

    mask = torch.arange(8, dtype=torch.uint8).view(2, 4)
    assert tensor_parallel.Cut(Mesh(), 0).part_of(mask).tolist() == [[4, 5, 6, 7]]
    assert tensor_parallel.Cut(Mesh(), 1).part_of(mask).tolist() == [[2, 3], [6, 7]]
