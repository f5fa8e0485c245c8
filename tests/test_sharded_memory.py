"""What a rank of FSDP2 holds in a step, in exact bytes, and that a sharded model which nobody has is freed."""

import functools
import gc
import weakref

import pytest
import torch
from packed_gather_runs import SETTINGS, policy, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import sparse24
from sparse24 import Recipe

WIDTH, HIDDEN, BLOCKS, TOKENS = 128, 256, 4, 64
#: bytes a weight of the packed forms of both directions
FORMS = {None: 2.25, "fp8-hybrid": 1.25, "fp8": 1.25}


class Live(TorchDispatchMode):
    """Within it, the memory of a model's shards and buffers and of all that ops return, as long as it lives: whoever
    has it, Python or autograd.
    """

    def __init__(self, model):
        super().__init__()
        self.refs, self.peak = {}, 0
        for parameter in model.parameters():
            self.add(parameter._local_tensor)
        for buffer in model.buffers():
            self.add(buffer)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.refs[storage._cdata] = StorageWeakRef(storage)

    def bytes(self):
        total = 0
        for key, ref in list(self.refs.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                del self.refs[key]
            else:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "placements") for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.bytes())
        return out


def sharded(precision, sparse=True, **options):
    """(model of blocks, its optimizer, its recipe or None), in bfloat16 with fp32 masters."""
    torch.manual_seed(0)
    model = nn.Sequential(*(sparse24.SparseGatedMLP(WIDTH, HIDDEN, precision=precision) for _ in range(BLOCKS)))
    if not sparse:
        sparse24.densify(model)
    shard(model, mp_policy=policy(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return (
        model,
        optimizer,
        Recipe(model, optimizer, **SETTINGS | dict(mvue=True), dense_fraction=0) if sparse else None,
    )


def step(model, optimizer):
    model(torch.randn(TOKENS, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _after_each_forward(rank, precision, reshard):
    """Bytes that live after the forward pass of each block."""
    model, optimizer, recipe = sharded(precision, reshard_after_forward=reshard)
    step(model, optimizer)  # scales are known from here on
    found = []
    with Live(model) as live:
        for block in model:  # after FSDP2's own hook, which reshards
            block.register_forward_hook(lambda *_: found.append(live.bytes()))
        model(torch.randn(TOKENS, WIDTH))
    return found


def kept_bytes(precision):
    """What backward needs of a block: x, gate and up, h; x as the output of the block before it, where it is that."""
    if precision == "fp8":
        return TOKENS * (WIDTH + 2 * 2 * HIDDEN + HIDDEN)
    return 2 * TOKENS * (WIDTH + 2 * HIDDEN + HIDDEN)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("precision", FORMS)
def test_after_a_blocks_forward_only_what_backward_reads_of_its_input_lives(two, precision, reshard):
    """Of the gathered weights nothing does, unless reshard_after_forward=False asks for that: then both forms."""
    forms = 0 if reshard else FORMS[precision] * 3 * WIDTH * HIDDEN
    for found in two.run(functools.partial(_after_each_forward, precision=precision, reshard=reshard)):
        grown = [after - before for before, after in zip(found[:-1], found[1:], strict=True)]
        assert grown[1:] == [kept_bytes(precision) + forms] * (BLOCKS - 2), grown


def _peak(rank, precision, sparse):
    model, optimizer, recipe = sharded(precision, sparse)
    for _ in range(2):
        step(model, optimizer)
    with Live(model) as live:
        step(model, optimizer)
    return live.peak


def test_no_arm_needs_more_memory_than_dense_and_its_forms(two):
    """A step's peak, of what ops return, beside dense: at most 1.25 bytes for each weight of a rank, and the forms of
    one block.
    """
    dense = two.run(functools.partial(_peak, precision=None, sparse=False))
    for precision, both in FORMS.items():
        allowed = 1.25 * BLOCKS * 3 * WIDTH * HIDDEN / 2 + both * 3 * WIDTH * HIDDEN
        for mine, of_dense in zip(
            two.run(functools.partial(_peak, precision=precision, sparse=True)), dense, strict=True
        ):
            assert mine <= of_dense + allowed, (precision, mine, of_dense)


def trained_from_meta(precision):
    """(model, recipe) after a step. Made on the meta device, as large ones are: then its shards are views."""
    with torch.device("meta"):
        model = nn.Sequential(*(sparse24.SparseGatedMLP(WIDTH, HIDDEN, precision=precision) for _ in range(BLOCKS)))
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, **SETTINGS, dense_fraction=0)
    step(model, optimizer)
    return model, recipe


def _is_freed(rank, precision, detach):
    """How many modules and shards are alive."""
    model, recipe = trained_from_meta(precision)
    modules = [weakref.ref(module) for module in model.modules()]
    shards = [StorageWeakRef(p._local_tensor.untyped_storage()) for p in model.parameters()]
    if detach:
        recipe.detach()
    del model, recipe
    gc.collect()
    return sum(ref() is not None for ref in modules), sum(not ref.expired() for ref in shards)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_a_sharded_model_that_nobody_has_is_freed(two, precision, detach):
    """With its shards: what FSDP2 calls on them does not keep the model."""
    assert two.run(functools.partial(_is_freed, precision=precision, detach=detach)) == [(0, 0), (0, 0)]
