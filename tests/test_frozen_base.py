"""Frozen 2:4 layers under trained adapters: their masks stay, there is nothing to decay, and no dense phase comes."""

import pytest
import torch
from rounding import MANY_SUMS, ORDER
from tiny_models import MLP
from torch import nn

import sparse24
from sparse24.layers.modules import SparseLayer
from sparse24.recipe import fingerprint_of_state


def trained_base(interval=7, steps=10):
    """A 2:4 model that stops between two mask searches, so that its masks are not what a search finds now."""
    model = MLP()
    sparse24.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    recipe = sparse24.Recipe(model, optimizer, total_steps=20, mask_interval=interval, dense_fraction=0)
    for _ in range(steps):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    recipe.detach()
    return model


def masks_of(model):
    return [m.mask.clone() for m in model.modules() if isinstance(m, SparseLayer)]


@pytest.mark.fault(86)
def test_a_recipe_over_frozen_layers_counts_and_leaves_their_function_alone():
    base = trained_base().requires_grad_(False)
    x, masks = torch.randn(4, 16), masks_of(base)
    searched = sparse24.ops.transposable_mask(base.fc1.weight.detach()).view(torch.uint8)
    assert not torch.equal(searched, masks[0]), "the case needs masks that a search would not find"
    before = base(x)
    model = nn.Sequential(base, nn.Linear(16, 16))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    recipe = sparse24.Recipe(model, optimizer, total_steps=6, mask_interval=2)
    for _ in range(6):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert recipe.step == 6 and recipe.phase == "sparse"
    assert torch.equal(base(x), before) and all(map(torch.equal, masks, masks_of(base))) and sparse24.verify(model)


@pytest.mark.fault(86)
def test_among_trained_layers_a_frozen_one_keeps_its_mask():
    model = trained_base()
    model.fc1.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    frozen, moving = masks_of(model)
    sparse24.Recipe(model, optimizer, total_steps=6, mask_interval=1, dense_fraction=0)
    for _ in range(3):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.fc1.mask, frozen)
    assert torch.equal(model.fc2.mask, sparse24.ops.transposable_mask(model.fc2.weight.detach()).view(torch.uint8))


@pytest.mark.fault(87)
def test_a_recipe_can_start_at_a_later_step():
    """A run that was dense until now: the trainer's step counts, so that the phases end where they should."""
    model = MLP()
    sparse24.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    recipe = sparse24.Recipe(model, optimizer, total_steps=12, mask_interval=2)
    recipe.start_at(9)
    assert recipe.step == 9 and recipe.phase == "sparse" and recipe.metrics()["mask_age"] == 0
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    assert recipe.step == 10 and recipe.phase == "dense"
    with pytest.raises(sparse24.Sparse24Error, match="step must be an integer, 0 or more"):
        recipe.start_at(-1)


# -- adapters, through the trainers' callbacks ------------------------------------------------------------------------


class Adapter(nn.Module):
    """LoRA as PEFT lays it around a layer."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def with_adapters(model, names):
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapter(model.get_submodule(name)))
    return model


LLAMA_FFN = [f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")]


@pytest.mark.fault(86, 88)
@pytest.mark.parametrize("sparse_first", [True, False], ids=["sparsified before", "by the callback"])
def test_the_trainers_callback_takes_a_frozen_base(tmp_path, sparse_first):
    pytest.importorskip("accelerate")
    from tiny_models import llama
    from tiny_trainers import Texts, eval_loss, hf_trainer

    def make():
        model = llama()
        if not sparse_first:
            return with_adapters(model, ["model.layers.0.self_attn.q_proj"])
        sparse24.sparsify(model)
        return with_adapters(model, LLAMA_FFN)

    trainer, callback = hf_trainer(tmp_path, make, steps=5)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    masks = masks_of(trainer.model)
    trainer.train()
    assert callback.recipe.step == 5 and callback.recipe.phase == "sparse" and sparse24.verify(trainer.model)
    assert all(map(torch.equal, masks, masks_of(trainer.model)))
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    again, callback = hf_trainer(tmp_path, make, steps=8, override=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert callback.recipe.step == 8
    ids = torch.stack([text["input_ids"] for text in Texts()])
    with torch.no_grad():
        expected = again.model.eval()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(torch.tensor(eval_loss(again)), expected, **MANY_SUMS)


@pytest.mark.fault(86, 88)
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_lightnings_callback_takes_a_frozen_base(tmp_path):
    pytest.importorskip("lightning")
    from tiny_lightning import Regression, callback_of, loader, saving, trainer_of

    def make():
        return with_adapters(trained_base(), ["fc1", "fc2"])

    module, callback = Regression(make), callback_of(dense_fraction=0.25)
    masks = masks_of(module)
    trainer_of(tmp_path, callback, saving(tmp_path), max_steps=10, enable_checkpointing=True).fit(module, loader())
    assert callback.recipe.step == 10 and callback.recipe.phase == "sparse"
    assert all(map(torch.equal, masks, masks_of(module))) and sparse24.verify(module)
    fresh = Regression(make)
    path = tmp_path / "step=10.ckpt"
    result = trainer_of(tmp_path, callback_of(dense_fraction=0.25)).test(
        fresh, loader(1), ckpt_path=path, verbose=False
    )
    with torch.no_grad():
        expected = sum(module.loss(batch).item() for batch in loader(1)) / len(loader(1))
    assert result[0]["loss"] == pytest.approx(expected, rel=ORDER)


@pytest.mark.parametrize("phase", ["sparse", "dense"])
def test_a_state_keeps_the_phase_of_frozen_layers(phase):
    """One layer is frozen in its phase, the other is trained into the dense one; evaluation elsewhere has both."""
    model = trained_base()
    model.fc1.enter(phase)
    model.fc1.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    recipe = sparse24.Recipe(model, optimizer, total_steps=2, mask_interval=1, dense_fraction=0.5)
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    state = recipe.state_dict()
    assert recipe.fingerprint() == fingerprint_of_state(state) and recipe.fingerprint().startswith(phase)
    fresh = MLP()
    fresh.load_state_dict(model.state_dict())
    sparse24.load_masks(fresh, state)
    assert (fresh.fc1.phase, fresh.fc2.phase) == (phase, "dense")
    x = torch.randn(4, 16)
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(sparse24.Sparse24Error, match="corrupt: its frozen layers"):
        recipe.load_state_dict(state | {"frozen_layers": ["fc1"]})
