"""Tensor parallel over gloo: parts of layers train as the whole layers of one process do, with the same masks."""

import functools

import pytest
import torch
import torch.distributed as dist
from process_ranks import started
from tensor_parallel_runs import (
    HIDDEN,
    SETTINGS,
    STEPS,
    WIDTH,
    Gated,
    assert_same_training,
    data,
    numbers,
    one_process,
    parallel_model,
    plain_plan,
    sequence_plan,
    train,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparse24
from sparse24 import Recipe
from sparse24.errors import Sparse24Error
from sparse24.layers import mask_of


@pytest.fixture(params=[2, 4])
def ranks(request, ranks_of):
    return ranks_of(request.param)


# -- training -------------------------------------------------------------------------------------------------------


def _train(rank, order, plan=plain_plan, bias=False, **settings):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallel_model(order, mesh, plan, bias, precision=settings.pop("precision", None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, **{"mvue": False, "check_ranks_every": 1, **SETTINGS, **settings})
    losses = train(model, recipe, optimizer)
    assert sparse24.verify(model), str(sparse24.verify(model))
    part = model[0].mlp.gate_proj
    assert mask_of(part).shape == (HIDDEN // 4 // dist.get_world_size(), WIDTH // 2)
    return numbers(model, recipe, losses)


@pytest.mark.parametrize("order", ["sparsify first", "plan first"])
@pytest.mark.parametrize("settings", [dict(), dict(bias=True), dict(decay_in="backward")])
def test_parts_train_as_the_whole_layers_do(ranks, order, settings):
    """Column-wise gate and up, row-wise down: the masks of one process, and its losses up to the order of sums."""
    expected = one_process(**settings)
    for found in ranks.run(functools.partial(_train, order=order, **settings)):
        assert_same_training(found, *expected)


def _sequence(rank, order):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallel_model(order, mesh, sequence_plan, bias=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe, losses = Recipe(model, optimizer, mvue=False, check_ranks_every=1, **SETTINGS), []
    for step in range(STEPS):
        x = data(step).chunk(2, dim=1)[rank]
        loss = (model(x) - x.flip(-1)).square().sum() / data(step).numel()
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    return numbers(model, recipe, losses)


@pytest.mark.parametrize("order", ["sparsify first", "plan first"])
def test_sequence_parallel_plans_train_as_the_whole_layers_do(two, order):
    """The sequence is cut outside the feed-forward layer, whose input is gathered and whose output is scattered."""
    expected = one_process(bias=True)
    for found in two.run(functools.partial(_sequence, order=order)):
        assert_same_training(found, *expected)


def _with_fsdp(rank, order, decay_in="step", bias=False, hidden=HIDDEN, shape=(2, 2)):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "dp", "tp")[-len(shape) :])
    model = parallel_model(order, mesh["tp"], bias=bias, hidden=hidden)
    of_data = mesh["dp"] if len(shape) == 2 else mesh["replicate", "dp"]
    for block in model:
        fully_shard(block, mesh=of_data)
    fully_shard(model, mesh=of_data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, mvue=False, check_ranks_every=1, decay_in=decay_in, **SETTINGS)
    losses = train(model, recipe, optimizer, lambda x: x.chunk(2)[rank // 2])
    assert sparse24.verify(model), str(sparse24.verify(model))
    dist.all_reduce(mean := torch.tensor(losses, dtype=torch.float64))
    return numbers(model, recipe, (mean / 4).tolist())


@pytest.mark.parametrize("order", ["sparsify first", "plan first"])
@pytest.mark.parametrize(
    "settings, shape",
    [
        (dict(), (2, 2)),
        (dict(decay_in="backward", bias=True), (2, 2)),
        (dict(hidden=24), (2, 2)),  # shards of the parts cut 4x4 blocks
        (dict(), (2, 1, 2)),
    ],
)
def test_fsdp2_shards_the_parts_over_the_other_dimension(four, order, settings, shape):
    """Two ranks of FSDP2, or two replicas of shards, by two of tensor parallel: the masks of one process."""
    expected = one_process(**settings)
    for found in four.run(functools.partial(_with_fsdp, order=order, shape=shape, **settings)):
        assert_same_training(found, *expected)


def _sparsified_last(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallel_model("never", mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    try:
        sparse24.sparsify(model)
    except Sparse24Error as error:
        return str(error)
    return "no error"


@pytest.mark.fault(68)
def test_sparsify_comes_before_fully_shard_where_weights_are_cut(four):
    for message in four.run(_sparsified_last):
        assert "it is tensor parallel, and its weight has placements" in message and "before fully_shard" in message


@pytest.mark.parametrize("method", ["ste", "sr-ste", "step", "s-ste", "mvue"])
def test_every_method_trains_parts(two, method):
    """S-STE's scale is that of the whole weight; a dense phase multiplies DTensors, as PyTorch does."""
    settings = dict(method=method, dense_fraction=0.5) | (dict(mvue=False) if method != "mvue" else dict(mvue=None))
    found = two.run(functools.partial(_train, order="sparsify first", **settings))
    if method == "mvue":  # prunes by noise
        return
    expected = one_process(**settings)
    for one in found:
        assert_same_training(one, *expected)


def _noise(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallel_model("sparsify first", mesh)
    recipe = Recipe(model, torch.optim.SGD(model.parameters(), lr=0.0), **SETTINGS)
    down = model[1].mlp.down_proj
    torch.manual_seed(0)
    mean, draws = 0, 400
    for _ in range(draws):
        model(data(0)).square().sum().backward()
        mean = mean + down.weight.grad.to_local() / draws
        one = down.weight.grad.to_local()
        model.zero_grad()
    recipe.detach()
    for layer in sparse24.convert.sparse_layers(model).values():
        layer.set_mvue(False)
    model(data(0)).square().sum().backward()
    exact = down.weight.grad.to_local()
    return ((mean - exact).norm() / exact.norm()).item(), ((one - exact).norm() / exact.norm()).item()


def test_pruned_gradients_of_parts_are_unbiased(two):
    """The mean of many draws comes as near to the exact gradient of the part as independent draws do."""
    for of_mean, of_one in two.run(_noise):
        assert 0 < of_one and of_mean < 3 * of_one / 400**0.5


class Wide(nn.Module):
    """Parts of two ranks that 8-bit products can have."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


def _wide(mesh=None, precision=None):
    torch.manual_seed(0)
    model = nn.Sequential(Wide()).to(torch.bfloat16 if precision else torch.float32)
    sparse24.sparsify(model, precision=precision)
    if mesh is not None:
        parallelize_module(model, mesh, {"0.fc1": ColwiseParallel(), "0.fc2": RowwiseParallel()})
    return model


def _wide_data(step, dtype):
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(step)).to(dtype)


def _train_float8(rank, precision, alone=False):
    mesh = None if alone else init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = _wide(mesh, precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    recipe, losses = Recipe(model, optimizer, mvue=False, **SETTINGS), []
    for step in range(3):
        x = _wide_data(step, torch.bfloat16)
        loss = (model(x) - x).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert sparse24.verify(model), str(sparse24.verify(model))
    casts = recipe.state_dict()["casts"]
    return losses, {name: values[1].item() for name, values in casts.items()}  # scales of the weights


@pytest.mark.parametrize("precision", ["fp8-hybrid", "fp8"])
def test_parts_in_8_bits_have_the_scales_of_the_whole(two, precision):
    """The largest magnitude is that of all parts, in the first packing too."""
    losses, scales = _train_float8(0, precision, alone=True)
    for of_parts, scales_of_parts in two.run(functools.partial(_train_float8, precision=precision)):
        assert scales_of_parts == scales
        # a gradient that rounds to the other of two 8-bit values is off by 2^-3; a sum of 64 of them by 2^-6
        assert of_parts == pytest.approx(losses, rel=2.0**-6)


def _compiled(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = _wide(mesh)
    Recipe(model, torch.optim.SGD(model.parameters(), lr=0.0), mvue=False, **SETTINGS)
    x = _wide_data(0, torch.float32)
    model(x).square().mean().backward()
    eager = [p.grad.to_local().clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    for gradient, p in zip(eager, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_local(), gradient)
    return True


def test_parts_compile_in_one_graph(two):
    assert two.run(_compiled) == [True, True]


def _from_meta(rank):
    """As torchtitan does: convert, plan and shard on the meta device, then make weights."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = nn.Sequential(Wide())
    sparse24.sparsify(model)
    parallelize_module(model, mesh["tp"], {"0.fc1": ColwiseParallel(), "0.fc2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.distributed.tensor.distribute_tensor(torch.randn(p.shape) / 8, p.device_mesh, p.placements))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, check_ranks_every=1, **SETTINGS)
    model(_wide_data(0, torch.float32)).square().mean().backward()
    optimizer.step()
    assert sparse24.verify(model), str(sparse24.verify(model))
    return {name: mask.tolist() for name, mask in recipe.state_dict()["masks"].items()}


def test_layers_are_cut_on_the_meta_device_too(two):
    first, second = two.run(_from_meta)
    assert first == second and len(first["0.fc1"]) == 32


def _with_settings(rank, lean=False, mvue=True, frozen=False):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallel_model("plan first", mesh, lean=lean)
    if frozen:
        for name, p in model.named_parameters():
            p.requires_grad_("mlp" not in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    recipe = Recipe(model, optimizer, check_ranks_every=1, mvue=mvue, **SETTINGS)
    losses = train(model, recipe, optimizer)
    assert sparse24.verify(model), str(sparse24.verify(model))
    assert recipe.step == STEPS and set(recipe.metrics()) >= {"flip_rate", "phase"}
    return losses


@pytest.mark.filterwarnings("ignore:the weights of all")
@pytest.mark.parametrize(
    "settings", [dict(lean=True), dict(mvue="input"), dict(mvue="auto"), dict(frozen=True), dict(lean=True, mvue=False)]
)
def test_settings_of_layers_hold_for_parts(two, settings):
    first, second = two.run(functools.partial(_with_settings, **settings))
    assert first == second  # ranks see the same sums
    assert first[-1] < first[0] or "frozen" in settings


# -- on GPUs --------------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multigpu)]
)
def gpus(request, tmp_path_factory):
    yield from started(request.param, tmp_path_factory, "nccl")


class Big(nn.Module):
    def __init__(self, width=256, hidden=1024):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    forward = Gated.forward


def _big(precision, mesh=None):
    torch.manual_seed(0)
    model = nn.Sequential(Big()).to("cuda", torch.bfloat16)
    sparse24.sparsify(model, backend="sparse", precision=precision, mvue=False)
    if mesh is not None:
        plan = {"0.gate_proj": ColwiseParallel(), "0.up_proj": ColwiseParallel(), "0.down_proj": RowwiseParallel()}
        parallelize_module(model, mesh, plan)
    return model


def _on_gpus(rank, precision, compiled):
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("tp",))
    one, parts = _big(precision), _big(precision, mesh)
    recipe = Recipe(parts, torch.optim.SGD(parts.parameters(), lr=0.0), mvue=False, check_ranks_every=1, **SETTINGS)
    for name, mask in recipe.state_dict()["masks"].items():
        assert torch.equal(mask, mask_of(one.get_submodule(name))), name
    torch.manual_seed(1)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    expected = one(x)
    expected.square().mean().backward()
    y = (torch.compile(parts, fullgraph=True) if compiled else parts)(x)
    y.square().mean().backward()
    assert sparse24.verify(parts), str(sparse24.verify(parts))
    errors = [((y - expected).float().norm() / expected.float().norm()).item()]
    for ours, theirs in zip(parts.parameters(), one.parameters(), strict=True):
        gradient, exact = whole(ours.grad).float(), theirs.grad.float()
        errors.append(((gradient - exact).norm() / exact.norm()).item())
    recipe.optimizer.step()
    return errors


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision, limit", [(None, 0.02), ("fp8-hybrid", 0.1), ("fp8", 0.1)])
def test_parts_compute_what_the_whole_does_on_gpus(gpus, precision, limit, compiled):
    """Masks to the bit; outputs and gradients up to the rounding of bf16, or of casts by scales of parts."""
    for errors in gpus.run(functools.partial(_on_gpus, precision=precision, compiled=compiled)):
        assert all(error < limit for error in errors), errors
