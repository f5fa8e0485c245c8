"""FSDP2 gathers packed forms of the rows that each rank has: the run of one process, to the last bit.

All ranks see the same batch, but the loss of rank 0 alone counts and gradients are summed, so that every sum has one
term that is not zero: what differs from a run without processes would be a fault of ours, not the order of a sum.
"""

import datetime
import functools
import multiprocessing
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_models import MLP
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import sparse24
from sparse24 import Recipe
from sparse24.benchmark.communication import CountBytes
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.layers import packed_gather
from sparse24.layers.state import MASK, PACKED_BUFFERS, state_of

WIDTH, HIDDEN, STEPS = 96, 192, 6
SETTINGS = dict(total_steps=STEPS, mask_interval=2, decay=1e-2, mvue=False)


@pytest.fixture(params=[1, 2, 3, 4])
def ranks(request, ranks_of):
    """Rows of 48 and 96, of 32 and 64, of 24 and 48 a rank: each way in which metadata are put together."""
    return ranks_of(request.param)


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


def made(make):
    torch.manual_seed(0)
    model = make()
    if make is not in_8_bits:
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


def _run(rank, make, options, settings, mesh=None):
    names = ("replicate", "shard")
    mesh = mesh and init_device_mesh("cpu", mesh, mesh_dim_names=names)
    model = shard(made(make), mesh, **options)
    recipe, losses = train(model, {"check_ranks_every": 1, **settings}, counts=float(rank == 0))
    for layer in recipe.layers.values():
        assert (state_of(layer).shards is not None) == (dist.get_world_size() > 1)
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


@pytest.mark.parametrize("world", [2, 4])
def test_8_bit_forms_and_their_scales_are_those_of_one_process(ranks_of, world):
    """The largest magnitude of a weight is that over all ranks' rows, in the step in which one process has it."""
    settings = dict(dense_fraction=0, mvue=None)
    expected = alone(in_8_bits, settings)
    for found in ranks_of(world).run(functools.partial(_run, make=in_8_bits, options={}, settings=settings)):
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


# -- what is sent, and what is held -----------------------------------------------------------------------------------


def policy():
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _bytes(rank, sparse):
    torch.manual_seed(0)
    model = nn.Sequential(*(sparse24.SparseGatedMLP(128, 256) for _ in range(2)))
    if not sparse:
        sparse24.densify(model)
    shard(model, mp_policy=policy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = sparse and Recipe(model, optimizer, **SETTINGS, dense_fraction=0)
    held = []
    model[1].register_forward_pre_hook(lambda module, args: held.append(_held(recipe)), prepend=False)
    with CountBytes() as count:
        model(torch.randn(8, 128)).square().mean().backward()
    return count.bytes["gather"], held, _held(recipe), sum(m.numel() for m in recipe and recipe._search.masks or [])


def _held(recipe):
    """Bytes of each packed form of the first block's down layer and of the second's."""
    layers = list(recipe.layers.values())[2::3] if recipe else []
    return [[layer._buffers[name].untyped_storage().nbytes() for name in PACKED_BUFFERS] for layer in layers]


def test_a_step_gathers_0_56_of_dense_bytes_and_holds_one_block(two):
    sparse, dense = (two.run(functools.partial(_bytes, sparse=which)) for which in (True, False))
    elements = 2 * 3 * 128 * 256
    for (sent, during, after, masks), (dense_sent, *_) in zip(sparse, dense, strict=True):
        assert dense_sent == 2 * 2 * elements  # 16 bits, in forward and in backward
        assert sent == 2 * 1.125 * elements
        values, positions = 128 * 256, 128 * 256 // 8
        assert during == [[[0, 0, 0, 0], [values, positions, 0, 0]]]  # the first block's are free, and one direction
        assert after == [[0, 0, 0, 0], [0, 0, 0, 0]] and masks == elements / 8 / 2


def _received_in_place(rank, make):
    """Of each layer of a block that runs forward, whether FSDP2 has copied values to where products read them."""
    model, found = shard(made(make), mp_policy=policy()), []
    Recipe(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **SETTINGS, dense_fraction=0)

    def look(block, args):
        for layer in (module for module in block.modules() if isinstance(module, sparse24.SparseLinear)):
            received = state_of(layer).shards.param.all_gather_outputs[0]
            found.append(received.data_ptr() == layer._buffers[PACKED_BUFFERS[0]].data_ptr())

    model[1].register_forward_pre_hook(look)
    model(data(0, 128 if make is in_8_bits else WIDTH))
    return found


@pytest.mark.parametrize("make", [gated, plain, in_8_bits])
def test_values_are_received_where_products_read_them(two, make):
    for found in two.run(functools.partial(_received_in_place, make=make)):
        assert found == [True] * (2 if make is plain else 3)


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


# -- bad input --------------------------------------------------------------------------------------------------------


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
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_dies, args=(r, tmp_path / "init", results), daemon=True) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=90)
        assert worker.exitcode is not None, "a rank hangs"
    message = results.get()
    assert "onnection" in message or "imed out" in message, message


# -- nccl -------------------------------------------------------------------------------------------------------------


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
