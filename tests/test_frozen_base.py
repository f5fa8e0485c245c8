"""Frozen 2:4 layers under trained adapters: their masks stay, there is nothing to decay, and no dense phase comes."""

import copy
import pickle

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


@pytest.mark.fault(61)
def test_s_ste_resumes_beside_a_frozen_layer():
    """A layer that was never trained has no scale."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(MLP(), MLP())
        sparse24.sparsify(model)
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return model, optimizer, sparse24.Recipe(model, optimizer, total_steps=8, method="s-ste", mvue=False)

    model, optimizer, recipe = make()
    x = torch.randn(8, 16)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    other, _, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(recipe.state_dict())
    assert torch.equal(other(x), model(x)) and resumed.step == 3
    evaluated = nn.Sequential(MLP(), MLP())
    evaluated.load_state_dict(model.state_dict())
    sparse24.load_masks(evaluated, recipe.state_dict())
    assert torch.equal(evaluated(x), model(x))
    with pytest.raises(sparse24.Sparse24Error, match="'scaled_layers' does not name layers"):
        resumed.load_state_dict(recipe.state_dict() | {"scaled_layers": ["0.fc1", "nowhere"]})


# -- unfrozen later ---------------------------------------------------------------------------------------------------


def unfrozen_run(unfreeze_at, frozen=("0",), method="fst", **settings):
    """20 steps of three blocks, some of them frozen until a step; (model, recipe, data)."""
    torch.manual_seed(0)
    model = nn.Sequential(MLP(), MLP(), MLP())
    sparse24.sparsify(model)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    # A fused optimizer leaves no trace in versions, and the head keeps a graph where all blocks are frozen.
    head = nn.Linear(16, 16)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 5e-2, fused=True)
    recipe = sparse24.Recipe(
        model, optimizer, total_steps=20, mask_interval=2, decay=0.1, mvue=False, method=method, track_blocks=True,
        **settings,
    )  # fmt: skip
    x, y = torch.randn(2, 32, 16)
    for step in range(20):
        if step == unfreeze_at:
            model.requires_grad_(True)
        (head(model(x)) - y).square().mean().backward()
        if recipe.phase == "sparse":
            assert sparse24.verify(model), f"packed forms are behind at step {step}"
        optimizer.step()
        optimizer.zero_grad()
    return model, recipe


@pytest.mark.fault(102)
@pytest.mark.parametrize("frozen", [("0",), ("1",), ("0", "1", "2")], ids=["first", "middle", "all"])
@pytest.mark.filterwarnings("ignore:the weights of all 6 sparse layers are frozen")
def test_weights_that_are_unfrozen_later_are_trained_like_the_rest(frozen):
    model, recipe = unfrozen_run(5, frozen)
    assert recipe.phases.sparse_until == 17 and {layer.phase for layer in recipe.layers.values()} == {"dense"}
    rates = [recipe.monitor.layer_rates()[name] for name in recipe.layers]
    assert list(recipe.monitor.names) == list(recipe.layers) and len(rates) == 6
    totals = torch.tensor(recipe.monitor.flips).sum(0)
    assert (totals > 0).all(), "masks of all layers are searched"
    assert recipe.block_flips.counts.numel() == sum(layer.weight.numel() // 16 for layer in recipe.layers.values())
    per_layer = recipe.block_flips.counts.split([layer.weight.numel() // 16 for layer in recipe.layers.values()])
    assert [int(counts.sum()) for counts in per_layer] == totals.tolist()


@pytest.mark.fault(102)
def test_a_layer_that_is_unfrozen_later_gets_masked_decay():
    model = nn.Sequential(MLP(), MLP())
    sparse24.sparsify(model)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    sparse24.Recipe(model, optimizer, total_steps=20, decay=0.5, dense_fraction=0)
    model[0].requires_grad_(True)
    layer = model[0].fc1
    before, kept = layer.weight.detach().clone(), sparse24.ops.unpack_mask(layer.mask.view(torch.uint16))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.where(kept, before, 0.5 * before), rtol=0, atol=0)


@pytest.mark.fault(102)
def test_a_state_with_unfrozen_layers_is_taken_up_once_they_are_unfrozen():
    model, recipe = unfrozen_run(5)
    state = recipe.state_dict()
    _, frozen = unfrozen_run(99)
    with pytest.raises(sparse24.Sparse24Error, match="freeze and unfreeze weights as they were then"):
        frozen.load_state_dict(state)
    for layer in frozen.layers.values():
        layer.weight.requires_grad_(True)
    frozen.load_state_dict(state)
    assert frozen.monitor.flips == recipe.monitor.flips


@pytest.mark.fault(56)
def test_a_recipe_with_frozen_layers_is_copied_and_pickled_once_it_is_detached():
    _, recipe = unfrozen_run(99)
    recipe.detach()
    for other in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert other.step == 20 and list(other.layers) == list(recipe.layers)


@pytest.mark.fault(102)
def test_step_refuses_layers_without_a_second_moment():
    with pytest.raises(sparse24.Sparse24Error, match="no second moment of them to keep"):
        unfrozen_run(8, method="step", dense_fraction=0.25)
