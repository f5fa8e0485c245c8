"""The converter, under a stand-in of torchtitan's order of calls, and in a plain loop."""

import functools
import io
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rounding import MANY_SUMS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparse24
from sparse24.errors import Sparse24Error
from sparse24.integrations.torchtitan import Sparse24Converter

STEPS = 6
SETTINGS = dict(mask_interval=2, dense_fraction=0, decay=1e-2, mvue=False)
PLAN = {"w1": ColwiseParallel(), "w3": ColwiseParallel(), "w2": RowwiseParallel()}


class FeedForward(nn.Module):
    """Llama's, under the names that torchtitan has for its layers."""

    def __init__(self, dim=16, hidden=64):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

    def init_weights(self):
        for i, p in enumerate(self.parameters()):
            values = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 8
            with torch.no_grad():
                is_sharded = hasattr(p, "placements")
                p.copy_(distribute_tensor(values, p.device_mesh, p.placements) if is_sharded else values)


class Optimizers(torch.optim.Optimizer):
    """torchtitan's container: an optimizer itself, which steps those of the model parts."""

    def __init__(self, parts):
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {})

    def step(self, *args, **kwargs):
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args, **kwargs):
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)


class Trainer:
    """The calls of torchtitan's trainer, in its order: convert on the meta device, parallelize, make weights, train."""

    def __init__(self, converter, mesh=None):
        with torch.device("meta"):
            self.model = Model()
        converter.convert(self.model)
        if mesh is not None:
            for layer in self.model.layers:
                parallelize_module(layer, mesh["tp"], PLAN)
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(self.model, mesh=mesh["dp"])
        self.model.to_empty(device="cpu")
        self.model.init_weights()
        parts = [self.model]
        self.optimizers = Optimizers(parts)
        self.optimizers.register_step_post_hook(lambda *args, **kwargs: converter.post_optimizer_hook(parts))

    def train(self, first, last, part=lambda x: x):
        losses = []
        for step in range(first, last):
            x = part(torch.randn(32, 16, generator=torch.Generator().manual_seed(step)))
            self.optimizers.zero_grad()
            loss = (self.model(x) - x.flip(-1)).square().mean()
            loss.backward()
            losses.append(loss.item())
            self.optimizers.step()
        return losses


def by_hand():
    """The same training without a converter."""
    model = Model()
    model.init_weights()
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe, losses = sparse24.Recipe(model, optimizer, STEPS, **SETTINGS), []
    for step in range(STEPS):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, recipe


@pytest.fixture
def converter():
    made = Sparse24Converter(STEPS, **SETTINGS)
    yield made
    made.detach()


def test_a_trainer_that_knows_no_recipes_trains_as_by_hand(converter):
    """The first pass reads packed weights, though these were made after `convert`; the optimizer is found."""
    trainer = Trainer(converter)
    losses, recipe = by_hand()
    assert trainer.train(0, STEPS) == losses
    assert converter.recipes[0].step == STEPS and converter.metrics()["step"] == STEPS
    assert converter.recipes[0].monitor.history() == recipe.monitor.history()
    assert converter.reports[0].converted == [f"layers.{i}.w{j}" for i in (0, 1) for j in (1, 3, 2)]


def test_a_recipe_may_be_attached_before_the_first_step(converter):
    trainer = Trainer(converter)
    (recipe,) = converter.attach([trainer.model], [trainer.optimizers.optimizers[0]])
    assert trainer.train(0, STEPS) == by_hand()[0] and converter.recipes == [recipe]
    with pytest.raises(Sparse24Error, match="this Model has its recipe already"):
        converter.attach(trainer.model, trainer.optimizers)


def test_a_step_that_nobody_hears_of_is_an_error(converter):
    """An optimizer of other weights."""
    model = Model()
    model.init_weights()
    converter.convert(model)
    other = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    other.step()
    with pytest.raises(Sparse24Error, match=r"no recipe trains the 2:4 layers of Model.*converter\.attach"):
        converter.post_optimizer_hook(model)


def test_settings_are_checked_at_once():
    with pytest.raises(Sparse24Error, match="Sparse24Converter takes no setting 'mask_intervall'; did you mean"):
        Sparse24Converter(STEPS, mask_intervall=2)
    config = Sparse24Converter.Config(total_steps=STEPS, settings=dict(decay=0.5))
    assert config.build(parallel_dims=None, model_compile_enabled=True).total_steps == STEPS
    with pytest.raises(Sparse24Error, match="got 2 models, 1 optimizers"):
        Sparse24Converter(STEPS).attach([Model(), Model()], [None])


def test_hooks_are_taken_off():
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
    before = dict(hooks)
    made = Sparse24Converter(STEPS, **SETTINGS)
    Trainer(made).train(0, 1)
    assert len(hooks) == len(before) + 1
    made.detach()
    assert dict(hooks) == before and not made.recipes[0]._hooks


def _run(rank, folder, shape, resume=False):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    converter = Sparse24Converter(STEPS, **SETTINGS)
    trainer = Trainer(converter, mesh)
    part = functools.partial(_part, mesh=mesh)
    state = {"model": trainer.model.state_dict(), "sparse24": converter}
    first = 0
    if resume:
        first = STEPS // 2
        dcp.load(state, checkpoint_id=folder)
        trainer.model.load_state_dict(state["model"])
    losses = trainer.train(first, STEPS // 2 if not resume else STEPS, part)
    if not resume:
        dcp.save({"model": trainer.model.state_dict(), "sparse24": converter}, checkpoint_id=folder)
        losses += trainer.train(STEPS // 2, STEPS, part)
    dist.all_reduce(mean := torch.tensor(losses, dtype=torch.float64))
    step = converter.recipes[0].step
    masks = {name: mask.tolist() for name, mask in converter.recipes[0].state_dict()["masks"].items()}
    converter.detach()
    return (mean / dist.get_world_size()).tolist(), step, masks


def _part(x, mesh):
    return x.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_fsdp2_and_tensor_parallel_train_as_one_process(two, tmp_path, shape):
    """Converted on the meta device, then cut or sharded; the recipe's state goes through a distributed checkpoint."""
    losses, recipe = by_hand()
    masks = {name: mask.tolist() for name, mask in recipe.state_dict()["masks"].items()}
    for found, step, theirs in two.run(functools.partial(_run, folder=tmp_path, shape=shape)):
        assert found == pytest.approx(losses, rel=MANY_SUMS["rtol"]) and step == STEPS and theirs == masks
    for found, step, _ in two.run(functools.partial(_run, folder=tmp_path, shape=shape, resume=True)):
        assert found[0] == pytest.approx(losses[STEPS // 2], rel=MANY_SUMS["rtol"]) and step == STEPS


def test_a_state_that_comes_before_the_first_step_waits(converter):
    trainer = Trainer(converter)
    trainer.train(0, 3)
    state = converter.state_dict()
    assert len(torch.load(io.BytesIO(state["recipes"]), weights_only=True)) == 1
    later = Sparse24Converter(STEPS, **SETTINGS)
    resumed = Trainer(later)
    later.load_state_dict(state)
    resumed.model.load_state_dict(trainer.model.state_dict())
    resumed.train(3, 4)
    assert later.recipes[0].step == 4
    later.detach()
