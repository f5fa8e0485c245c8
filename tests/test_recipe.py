"""Recipe: what happens around an optimizer step, in which order and in which phase, and what is refused."""

import copy
import math

import pytest
import torch
from rounding import ANOTHER_ORDER
from tiny_models import MLP, gpt2, llama, tokens, train_step
from tiny_recipes import kept, make, run
from torch import nn

import sparse24
from sparse24 import Recipe, ops
from sparse24.errors import Sparse24Error
from sparse24.recipe.decay import scheduled_decay
from sparse24.recipe.phases import Phases

# -- masked decay ---------------------------------------------------------------------------------------------------


def test_decay_is_added_to_the_gradients_of_pruned_weights_only():
    model, optimizer, _ = make(lr=0.0, decay=0.03)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for layer in (model.fc1, model.fc2):
        torch.testing.assert_close(layer.weight.grad, 1 + 0.03 * torch.where(kept(layer), 0, layer.weight))
        assert torch.equal(layer.bias.grad, torch.ones_like(layer.bias))


@pytest.mark.fault(60)
def test_decay_comes_after_clipping_and_before_the_optimizers_moments():
    """Un-scale, clip, decay, step."""
    model, optimizer, _ = make(torch.optim.Adam, decay=0.5)
    model(torch.randn(8, 16)).square().sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    layer = model.fc1
    expected = layer.weight.grad + 0.5 * torch.where(kept(layer), 0, layer.weight.detach())
    optimizer.step()
    torch.testing.assert_close(optimizer.state[layer.weight]["exp_avg"], 0.1 * expected)


@pytest.mark.fault(59)
def test_accumulation_decays_once_and_keeps_mask_and_packed_forms_fixed():
    """Everything moves once per optimizer step, the noise with every micro-batch."""
    model, optimizer, recipe = make(lr=0.0, decay=1.0, mvue=True)
    before = [b.clone() for b in model.buffers()]
    x, gradients = torch.randn(32, 16), []
    for _ in range(3):
        gradients.append(torch.autograd.grad(model(x).square().sum(), model.fc1.weight)[0])
        assert recipe.step == 0 and all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert not torch.equal(gradients[0], gradients[1])
    model.fc1.weight.grad = sum(gradients)
    optimizer.step()
    torch.testing.assert_close(
        model.fc1.weight.grad - sum(gradients), torch.where(kept(model.fc1), 0, model.fc1.weight)
    )


@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_training_a_real_model_lowers_its_loss_in_both_phases(make_model):
    model, optimizer, recipe = make(
        torch.optim.AdamW, 3e-3, make_model(), total_steps=24, mask_interval=4, dense_fraction=0.25
    )
    losses = [train_step(model, optimizer, tokens()) for _ in range(24)]
    assert losses[17] < 0.8 * losses[0] and losses[-1] < losses[17]
    assert recipe.phase == "dense" and sparse24.verify(model)
    assert all(rate > 0 for _, rate in recipe.monitor.history())
    assert [step for step, _ in recipe.monitor.history()] == [4, 8, 12, 16]


def test_packed_forms_follow_every_step_and_masks_every_interval():
    model, optimizer, recipe = make(lr=0.05, mask_interval=3, dense_fraction=0)
    masks = [model.fc1.mask.clone()]
    for step in range(1, 10):
        run(model, optimizer, 1, step)
        assert sparse24.verify(model), step
        masks.append(model.fc1.mask.clone())
        searched = ops.transposable_mask(model.fc1.weight).view(torch.uint8)
        assert torch.equal(masks[-1], searched if step % 3 == 0 else masks[-2])
    assert not torch.equal(masks[0], masks[-1])


# -- phases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, fraction, at, sparse",
    [
        (12, 0.25, "end", range(9)),
        (12, 0.25, "start", range(3, 12)),
        (12, 0.25, "none", range(12)),
        (12, 0.0, "end", range(12)),
        (12, 1.0, "end", range(0)),
        (12, 1.0, "start", range(0)),
        (7, 1 / 6, "end", range(6)),
        (1, 1 / 6, "end", range(1)),
    ],
)
def test_the_dense_phase_lies_where_it_was_asked_for(total, fraction, at, sparse):
    phases = Phases.plan(total, fraction, at)
    assert [step for step in range(total) if phases.at(step) == "sparse"] == list(sparse)
    last = phases.at(total - 1)
    assert phases.at(total + 5) == last  # steps past the end belong to the last phase


def test_dense_phase_trains_the_dense_function_without_decay():
    model, optimizer, recipe = make(lr=0.0, decay=1.0)
    run(model, optimizer, 9)
    assert recipe.phase == "dense" and recipe.current_decay == 0.0
    x = torch.randn(4, 16)
    dense = model.fc2.weight @ torch.relu(model.fc1.weight @ x.t() + model.fc1.bias[:, None]) + model.fc2.bias[:, None]
    torch.testing.assert_close(model(x), dense.t(), **ANOTHER_ORDER)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not model.fc1.weight.grad.any()


def test_run_without_a_dense_phase_ends_sparse():
    model, optimizer, recipe = make(dense_fraction=0)
    run(model, optimizer, 14)
    assert recipe.phase == "sparse" and sparse24.verify(model).phase == "sparse"


def test_metrics_are_floats_with_fixed_names():
    model, optimizer, recipe = make(lr=0.05)
    names = ("flip_rate", "flip_rate_per_step", "decay", "phase", "mask_age", "gap_q10", "gap_q50", "gap_q90")
    for _ in range(12):
        metrics = recipe.metrics()
        assert all(type(metrics[name]) is float and math.isfinite(metrics[name]) for name in names)
        run(model, optimizer, 1)
    assert metrics["phase"] == 1.0 and metrics["decay"] == 0.0
    assert 0 < metrics["gap_q10"] < metrics["gap_q50"] < metrics["gap_q90"]
    assert metrics["flip_rate_per_step"] == metrics["flip_rate"] / 4


def test_flip_rate_counts_what_changed_between_two_searches():
    model, optimizer, recipe = make(lr=0.2, mask_interval=5, dense_fraction=0)
    before = [kept(layer) for layer in recipe.layers.values()]
    run(model, optimizer, 4)
    assert recipe.metrics()["flip_rate"] == 0.0 and recipe.metrics()["mask_age"] == 4.0
    run(model, optimizer, 1, 4)
    after = [kept(layer) for layer in recipe.layers.values()]
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    assert changed > 0
    assert recipe.metrics()["flip_rate"] == pytest.approx(changed / sum(mask.numel() for mask in after))
    assert recipe.metrics()["mask_age"] == 0.0
    assert set(recipe.monitor.layer_rates()) == {"fc1", "fc2"}


def test_dense_steps_may_come_first_for_any_method():
    model, optimizer, recipe = make(lr=0.1, decay=0.5, dense_at="start")
    assert recipe.phase == "dense" and recipe.current_decay == 0.0
    run(model, optimizer, 3)
    assert recipe.phase == "sparse" and recipe.current_decay == 0.5 and recipe.last_search == 3
    assert torch.equal(ops.transposable_mask(model.fc1.weight).view(torch.uint8), model.fc1.mask)
    assert sparse24.verify(model).phase == "sparse"
    run(model, optimizer, 9, 3)
    assert recipe.phase == "sparse" and [step for step, _ in recipe.monitor.history()] == [4, 8, 12]


def test_frozen_masks_stay_frozen_in_a_resumed_run():
    model, optimizer, recipe = make(lr=0.2, mask_interval=1, dense_fraction=0)
    recipe.freeze_masks()
    *_, again = make(model=copy.deepcopy(model), mask_interval=1, dense_fraction=0)
    again.load_state_dict(recipe.state_dict())
    assert again.masks_frozen


def test_masks_can_be_frozen_and_set_free():
    model, optimizer, recipe = make(lr=0.2, mask_interval=1, dense_fraction=0)
    recipe.freeze_masks()
    mask = model.fc1.mask.clone()
    run(model, optimizer, 3)
    assert torch.equal(mask, model.fc1.mask) and sparse24.verify(model)
    recipe.unfreeze_masks()
    run(model, optimizer, 1, 3)
    assert not torch.equal(mask, model.fc1.mask)


@pytest.mark.parametrize("schedule, halfway", [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_decay_follows_its_schedule(schedule, halfway):
    assert scheduled_decay(2.0, schedule, 0.5) == pytest.approx(2.0 * halfway)
    assert scheduled_decay(2.0, "linear", 0.0) == 0.0 and scheduled_decay(2.0, "cosine", 1.0) == pytest.approx(0.0)
    model, optimizer, recipe = make(decay=2.0, decay_schedule=schedule, total_steps=8, dense_fraction=0)
    run(model, optimizer, 4)
    assert recipe.current_decay == pytest.approx(2.0 * halfway)
    recipe.decay = 4.0
    assert recipe.metrics()["decay"] == pytest.approx(4.0 * halfway)


@pytest.mark.parametrize("schedule, halfway", [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_decay_schedules_run_over_the_sparse_steps_alone(schedule, halfway):
    model, optimizer, recipe = make(decay=2.0, decay_schedule=schedule, dense_fraction=0.5, total_steps=16)
    run(model, optimizer, 4)
    assert recipe.current_decay == pytest.approx(2.0 * halfway)
    run(model, optimizer, 4, first=4)
    assert recipe.current_decay == 0.0 and recipe.phase == "dense"


def test_a_decay_that_was_set_comes_back_with_the_state():
    *_, recipe = make(decay=2.0)
    recipe.decay = 0.5
    *_, again = make(decay=2.0)
    again.load_state_dict(recipe.state_dict())
    assert again.decay == again.current_decay == 0.5


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(71)
@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(decay=-1e-5), "decay must be a finite number that float32 holds, 0 or more, got -1e-05"),
        (dict(decay=1e39), "decay must be a finite number that float32 holds"),
        (dict(decay=math.nan), "decay must be a finite number"),
        (dict(decay=math.inf), "decay must be a finite number"),
        (dict(decay="6e-5"), "decay must be a finite number"),
        (dict(mask_interval=0), "mask_interval must be an integer, 1 or more, got 0"),
        (dict(mask_interval=2.5), "mask_interval must be an integer"),
        (dict(total_steps=0), "total_steps must be the number of optimizer steps of the whole run, .*, got 0"),
        (dict(total_steps=1e4), "total_steps must be .* an integer of 1 or more, got 10000.0"),
        (dict(dense_fraction=1.5), "dense_fraction must be the part of the steps that is dense, a number from 0 to 1"),
        (dict(dense_fraction=math.nan), "dense_fraction must be the part"),
        (dict(method="magic"), "method must be one of fst, ste, sr-ste, step, s-ste, mvue, dense, got 'magic'"),
        (dict(decay_schedule="exp"), "decay_schedule must be one of"),
        (dict(dense_at="middle"), "dense_at must be one of"),
        (dict(check_ranks_every=-1), "check_ranks_every must be an integer, 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, words):
    """Decay 0 is allowed (straight-through), negative, NaN and Inf are not."""
    with pytest.raises(Sparse24Error, match=words):
        make(**settings)


@pytest.mark.fault(71)
def test_decay_zero_is_plain_straight_through():
    """Decay 0 = STE."""
    results = []
    for settings in (dict(decay=0.0), dict(method="ste")):
        model, optimizer, _ = make(**settings)
        run(model, optimizer, 5)
        results.append(model.fc1.weight)
    assert torch.equal(*results)


def test_model_and_optimizer_must_fit():
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Sparse24Error, match="MLP has no sparse layers; call sparse24.sparsify"):
        Recipe(model, optimizer, total_steps=1)
    sparse24.sparsify(model)
    with pytest.raises(Sparse24Error, match="no sparse weight that requires a gradient is in the optimizer"):
        Recipe(model, torch.optim.SGD(MLP().parameters(), lr=0.1), total_steps=1)
    with pytest.raises(Sparse24Error, match="must be a torch.optim.Optimizer, got str"):
        Recipe(model, "adam", total_steps=1)
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(Sparse24Error, match="got the scheduler ConstantLR; give the optimizer that it schedules"):
        Recipe(model, schedule, total_steps=1)
    with pytest.raises(Sparse24Error, match="must be a torch.nn.Module"):
        Recipe(None, optimizer, total_steps=1)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert Recipe(model, [other, optimizer], total_steps=1).optimizer is optimizer
    split = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model.fc1, model.fc2)]
    with pytest.raises(Sparse24Error, match="spread over several optimizers"):
        Recipe(model, split, total_steps=1)


@pytest.mark.fault(77)
def test_second_recipe_on_the_same_optimizer_is_refused_and_a_new_pair_takes_over():
    """No double decay."""
    model, optimizer, recipe = make(lr=0.0, decay=1.0)
    with pytest.raises(Sparse24Error, match="has? a recipe already|have a recipe already"):
        Recipe(model, optimizer, total_steps=10)
    recipe.detach()
    Recipe(model, optimizer, total_steps=10, decay=1.0)
    model.fc1.weight.grad = torch.zeros_like(model.fc1.weight)
    optimizer.step()
    torch.testing.assert_close(model.fc1.weight.grad, torch.where(kept(model.fc1), 0, model.fc1.weight))
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    Recipe(model, other, total_steps=10, decay=1.0)
    model.fc1.weight.grad = torch.zeros_like(model.fc1.weight)
    optimizer.step()
    assert not model.fc1.weight.grad.any()
