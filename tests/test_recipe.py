"""Recipe: what happens around an optimizer step, in which order, and that a resumed run is the run itself."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from tiny_models import MLP, gpt2, llama, tokens, train_step
from torch import nn

import sparse24
from sparse24 import Recipe, ops
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.methods import METHODS
from sparse24.monitor import FlipMonitor, gap_quantiles, gap_sample
from sparse24.phases import Phases, scheduled_decay
from sparse24.soft import row_mask, soft_scale, soft_threshold


def kept(layer):
    return ops.unpack_mask(layer.mask)


def make(optimizer=torch.optim.SGD, lr=0.1, model=None, opt=None, **settings):
    torch.manual_seed(0)
    model = MLP() if model is None else model
    sparse24.sparsify(model)
    optimizer = optimizer(model.parameters(), lr=lr, **(opt or {}))
    settings = dict(total_steps=12, mask_interval=4, dense_fraction=0.25) | settings
    return model, optimizer, Recipe(model, optimizer, **settings)


def run(model, optimizer, steps, first=0):
    """Steps on data that depends on the step's number alone."""
    for step in range(first, first + steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


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


#: all of torch.optim but those that want sparse gradients, a closure or matrices only
OPTIMIZERS = [
    optimizer
    for name, optimizer in sorted(vars(torch.optim).items())
    if isinstance(optimizer, type) and name not in ("Optimizer", "SparseAdam", "LBFGS", "Muon")
]


@pytest.mark.fault(70)
@pytest.mark.parametrize(
    "optimizer, options",
    [
        *((optimizer, dict()) for optimizer in OPTIMIZERS),
        (torch.optim.AdamW, dict(foreach=True)),
        (torch.optim.AdamW, dict(fused=True)),
        (torch.optim.Adam, dict(weight_decay=0.1, amsgrad=True)),
        (torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
    ],
)
def test_any_optimizer_that_reads_gradients_works(optimizer, options):
    """Only .grad is touched; parameter groups keep their own settings."""
    model, optimizer, recipe = make(optimizer, 1e-2, opt=options)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.0})
    run(model, optimizer, 12)
    assert recipe.step == 12 and recipe.phase == "dense"


@pytest.mark.fault(70)
def test_lbfgs_whose_step_evaluates_several_times():
    """Each evaluation of the closure multiplies with the weights of the moment, makes a gradient and gets the decay; it
    is one step, and the masks stay within it.
    """
    model, optimizer, recipe = make(torch.optim.LBFGS, 0.1, opt=dict(max_iter=4), mvue=False, decay=0.01)
    x, losses = torch.randn(32, 16), []

    def closure():
        assert sparse24.verify(model)
        optimizer.zero_grad()
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert recipe.step == 3 and len(losses) > 6 and losses[-1] < losses[0] and sparse24.verify(model)


class Adam8bit(torch.optim.Optimizer):
    """Adam whose moments are int8 with one scale a tensor, as 8-bit optimizers keep them; reads .grad and no more."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, dict(lr=lr, betas=(0.9, 0.99)))

    @staticmethod
    def quantized(x):
        scale = x.abs().max().clamp_min(1e-12) / 127
        return (x / scale).round().to(torch.int8), scale

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                moments = [q.float() * scale for q, scale in state["moments"]] if state else [torch.zeros_like(p)] * 2
                terms = p.grad, p.grad.square().sqrt()
                moments = [b * m + (1 - b) * t for m, t, b in zip(moments, terms, group["betas"], strict=True)]
                p.sub_(group["lr"] * moments[0] / (moments[1] + 1e-3))
                state["moments"] = [*map(self.quantized, moments)]


@pytest.mark.fault(70)
def test_8_bit_optimizers_work():
    """Their state is not looked at: it is int8 as before, and the decay is in what they have read."""
    model, optimizer, recipe = make(Adam8bit, 1e-2, decay=10.0, mvue=False)
    layer, x = model.fc1, torch.randn(8, 16)
    model(x).square().mean().backward()
    expected = layer.weight.grad + 10.0 * torch.where(kept(layer), 0, layer.weight.detach())
    optimizer.step()
    moment, scale = optimizer.state[layer.weight]["moments"][0]
    assert moment.dtype == torch.int8
    torch.testing.assert_close(moment * scale, 0.1 * expected, rtol=0, atol=scale.item())
    optimizer.zero_grad()
    run(model, optimizer, 11, 1)
    assert recipe.step == 12 and recipe.phase == "dense"
    assert all(q.dtype == torch.int8 for q, _ in optimizer.state[layer.weight]["moments"])


@pytest.mark.fault(70)
def test_8_bit_adam_of_bitsandbytes_works():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, optimizer, recipe = make(bitsandbytes.optim.AdamW8bit, 1e-2, MLP(64, 128))
    for step in range(12):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert recipe.step == 12 and recipe.phase == "dense"


@pytest.mark.fault(70)
@pytest.mark.parametrize("options", [dict(foreach=False), dict(foreach=True), dict(fused=True)], ids=str)
def test_decay_is_the_same_whatever_the_optimizers_implementation(options):
    weights = []
    for chosen in (dict(foreach=False), options):
        model, optimizer, _ = make(torch.optim.AdamW, 1e-2, opt=chosen, decay=0.1, mvue=False)
        run(model, optimizer, 6)
        weights.append(model.fc1.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.fault(70)
def test_parameter_groups_and_the_equal_run_without_them():
    """Groups with weight_decay 0."""
    results = []
    for grouped in (False, True):
        torch.manual_seed(0)
        model = MLP()
        sparse24.sparsify(model)
        groups = [{"params": [model.fc2.weight]}, {"params": [model.fc1.weight, model.fc1.bias, model.fc2.bias]}]
        optimizer = torch.optim.AdamW(groups if grouped else model.parameters(), lr=1e-2, weight_decay=0.0)
        Recipe(model, optimizer, total_steps=12, mask_interval=4)
        run(model, optimizer, 6)
        results.append(model.fc1.weight)
    assert torch.equal(*results)


@pytest.mark.fault(69)
def test_optimizer_made_before_sparsify_works():
    """Parameters stay the same objects."""
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse24.sparsify(model)
    Recipe(model, optimizer, total_steps=10)
    before = model.fc1.weight.clone()
    run(model, optimizer, 1)
    assert not torch.equal(before, model.fc1.weight) and sparse24.verify(model)


def test_closures_run_before_the_decay():
    model, optimizer, recipe = make(lr=0.0, decay=1.0)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.zeros(4, 16)).sum() * 0
        loss.backward()
        return loss

    for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        assert call().item() == 0
        torch.testing.assert_close(model.fc1.weight.grad, torch.where(kept(model.fc1), 0, model.fc1.weight))
    assert recipe.step == 2


def test_sparse_weights_without_gradient_are_left_alone():
    model, optimizer, recipe = make(decay=1.0)
    model.fc1.weight.requires_grad_(False)
    before = model.fc1.weight.clone()
    run(model, optimizer, 2)
    assert torch.equal(before, model.fc1.weight) and recipe.step == 2


# -- CUDA graphs ----------------------------------------------------------------------------------------------------


class Graph:
    """Stands for torch.cuda.CUDAGraph: its replay does what was captured."""

    def __init__(self, replay):
        self.replay = replay


@pytest.fixture
def capture(monkeypatch):
    """capture(step): run `step` as in a capture; returns the graph."""

    def run_captured(step):
        monkeypatch.setattr(sparse24.recipe, "is_capturing", lambda: True)
        try:
            step()
        finally:
            monkeypatch.undo()

    return run_captured


@pytest.mark.fault(35)
def test_captured_steps_are_counted_by_replay_and_refused_otherwise(capture):
    model, optimizer, recipe = make(lr=0.05, decay=0.1, total_steps=8, mask_interval=2, mvue=False)
    twin, twin_optimizer, twin_recipe = make(lr=0.05, decay=0.1, total_steps=8, mask_interval=2, mvue=False)
    step = lambda: run(model, optimizer, 1, recipe.step)  # noqa: E731
    with pytest.raises(Sparse24Error, match="could not count; capture under `with recipe.capturing"):
        capture(lambda: (model(torch.ones(4, 16)).sum() * 0).backward() or optimizer.step())
    with pytest.raises(Sparse24Error, match="no step has been captured"):
        recipe.replay(Graph(step))
    assert torch.equal(model.fc1.weight, twin.fc1.weight) and not model.fc1.weight.grad.any()
    optimizer.zero_grad()
    with recipe.capturing():
        capture(optimizer.step)  # no gradients: nothing moves
    assert recipe.step == 0
    graph = Graph(lambda: capture_free(step, recipe))
    for _ in range(6):
        recipe.replay(graph)
        run(twin, twin_optimizer, 1, twin_recipe.step)
        assert recipe.step == twin_recipe.step and torch.equal(model.fc1.weight, twin.fc1.weight)
        assert torch.equal(model.fc1.mask, twin.fc1.mask) and sparse24.verify(model)
    assert recipe.phase == "dense" and recipe.monitor.history() == twin_recipe.monitor.history()
    with pytest.raises(Sparse24Error, match="step of the sparse phase with decay 0.1, the next step is dense"):
        recipe.replay(graph)


def capture_free(step, recipe):
    """One replay: the kernels of the step, its packing included, and none of what the recipe does on the host."""
    finish, recipe._finish_step = recipe._finish_step, lambda step: None
    try:
        step()
        for layer in recipe.layers.values():
            layer._repack()
    finally:
        recipe._finish_step = finish


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(method="sr-ste"), "a step of method='sr-ste' cannot be captured"),
        (dict(decay_schedule="cosine"), "decay_schedule='cosine' changes the decay at each step"),
    ],
)
def test_steps_that_a_graph_cannot_hold_are_not_captured(settings, words):
    *_, recipe = make(**settings)
    with pytest.raises(Sparse24Error, match=words), recipe.capturing():
        pass


# -- GradScaler -----------------------------------------------------------------------------------------------------


def scaled_step(model, optimizer, scaler, poison=False, unscale=False):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    scaler.scale(model(x).square().sum() * (math.inf if poison else 1)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.fault(58)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_decay_under_a_gradient_scaler_is_that_without(fused, unscale):
    """A fused optimizer un-scales in its kernel, so what is added before must be scaled."""
    moments = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, optimizer, _ = make(torch.optim.AdamW, opt=dict(fused=fused), decay=0.5, mvue=False)
        if scaler is None:
            model(torch.randn(8, 16, generator=torch.Generator().manual_seed(0))).square().sum().backward()
            optimizer.step()
        else:
            scaled_step(model, optimizer, scaler, unscale=unscale)
        moments.append(optimizer.state[model.fc1.weight]["exp_avg"])
    torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-6)


@pytest.mark.fault(58, 60)
@pytest.mark.parametrize("fused", [False, True])
def test_order_under_a_scaler_is_unscale_clip_decay_step(fused):
    """Adam's first moment is a tenth of what it was given: the clipped gradient plus the whole decay."""
    model, optimizer, _ = make(torch.optim.AdamW, opt=dict(fused=fused), decay=0.5, mvue=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.randn(8, 16)).square().sum()).backward()
    scaler.unscale_(optimizer)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) > 1e-3
    layer = model.fc1
    expected = layer.weight.grad + 0.5 * torch.where(kept(layer), 0, layer.weight.detach())
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(optimizer.state[layer.weight]["exp_avg"], 0.1 * expected)


@pytest.mark.fault(58, 59)
@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_under_a_scaler_decays_once(fused):
    """Three scaled micro-batches and one step: the decay is added to their sum, and scaled once."""
    moments = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=512.0)):
        model, optimizer, recipe = make(torch.optim.AdamW, opt=dict(fused=fused), decay=0.5, mvue=False)
        for part in torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).chunk(3):
            loss = model(part).square().sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
        optimizer.step() if scaler is None else scaler.step(optimizer)
        assert recipe.step == 1
        moments.append(optimizer.state[model.fc1.weight]["exp_avg"])
    torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["fst", "sr-ste"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.fault(58)
def test_step_that_the_scaler_skips_changes_and_counts_nothing(fused, method):
    """No decay, no count, no refresh on Inf or NaN; fused optimizers run their hooks all the same."""
    model, optimizer, recipe = make(
        torch.optim.AdamW, opt=dict(fused=fused), decay=0.5, mask_interval=1, method=method, mvue=False
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    scaled_step(model, optimizer, scaler, poison=True)
    assert recipe.step == 0 and recipe.metrics()["flip_rate"] == 0
    assert all(torch.equal(t, before[n]) for n, t in (*model.named_parameters(), *model.named_buffers()))
    optimizer.zero_grad()
    scaled_step(model, optimizer, scaler)
    assert recipe.step == 1 and not torch.equal(model.fc1.weight, before["fc1.weight"])


@pytest.mark.fault(11)
def test_infinite_gradients_survive_the_pruning():
    """The scaler must see them to skip the step."""
    model, optimizer, recipe = make()
    model(torch.randn(8, 16)).backward(torch.full((8, 16), math.inf))
    assert not model.fc1.weight.grad.isfinite().all() and not model.fc2.weight.grad.isfinite().all()


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
def test_phases_of_a_run(total, fraction, at, sparse):
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
    torch.testing.assert_close(model(x), dense.t(), rtol=1e-5, atol=1e-5)
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


def test_flip_rate_counts_what_changed_between_two_refreshes():
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
    assert recipe.phase == "sparse" and recipe.current_decay == 0.5 and recipe.last_refresh == 3
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
def test_decay_schedules(schedule, halfway):
    assert scheduled_decay(2.0, schedule, 0.5) == pytest.approx(2.0 * halfway)
    assert scheduled_decay(2.0, "linear", 0.0) == 0.0 and scheduled_decay(2.0, "cosine", 1.0) == pytest.approx(0.0)
    model, optimizer, recipe = make(decay=2.0, decay_schedule=schedule, total_steps=8, dense_fraction=0)
    run(model, optimizer, 4)
    assert recipe.current_decay == pytest.approx(2.0 * halfway)
    recipe.decay = 4.0
    assert recipe.metrics()["decay"] == pytest.approx(4.0 * halfway)


# -- methods --------------------------------------------------------------------------------------------------------


def test_ste_has_no_decay():
    model, optimizer, recipe = make(lr=0.0, decay=1.0, method="ste")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not model.fc1.weight.grad.any() and recipe.metrics()["decay"] == 0.0


def test_sr_ste_decays_the_weights_by_the_learning_rate():
    model, optimizer, recipe = make(torch.optim.SGD, 0.5, decay=0.2, method="sr-ste")
    layer = model.fc1
    weight, pruned = layer.weight.detach().clone(), ~kept(layer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not layer.weight.grad.any()
    torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * 0.2 * weight * pruned)


def test_step_is_dense_first_and_then_freezes_the_second_moment():
    model, optimizer, recipe = make(torch.optim.AdamW, 1e-2, method="step", dense_fraction=0.5, mvue=False)
    assert recipe.phase == "dense"
    run(model, optimizer, 6)
    assert recipe.phase == "sparse" and sparse24.verify(model).phase == "sparse"
    moments = {layer: optimizer.state[layer.weight]["exp_avg_sq"].clone() for layer in (model.fc1, model.fc2)}
    bias_moment = optimizer.state[model.fc1.bias]["exp_avg_sq"].clone()
    layer, weight = model.fc1, model.fc1.weight.detach().clone()
    first, x = optimizer.state[layer.weight]["exp_avg"].clone(), torch.randn(32, 16)
    (model(x) - x).square().mean().backward()
    grad = layer.weight.grad.clone()
    optimizer.step()
    # AdamW by hand, with the second moment of before the step
    first = 0.9 * first + 0.1 * grad
    update = (first / (1 - 0.9**7)) / ((moments[layer] / (1 - 0.999**7)).sqrt() + 1e-8)
    expected = weight * (1 - 1e-2 * 0.01) - 1e-2 * update
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-4, atol=1e-6)
    for layer, moment in moments.items():
        assert torch.equal(optimizer.state[layer.weight]["exp_avg_sq"], moment)
    assert not torch.equal(optimizer.state[model.fc1.bias]["exp_avg_sq"], bias_moment)


def test_step_needs_an_optimizer_with_a_second_moment():
    with pytest.raises(Sparse24Error, match="freezes Adam's second moment; SGD"):
        make(method="step")


def test_soft_threshold_is_the_published_function():
    w = torch.tensor([[3.0, -1.0, 2.0, -5.0, 0.0, 0.0, 0.5, 0.0]])
    assert torch.equal(soft_threshold(w), torch.tensor([[1.0, 0.0, 0.0, -3.0, 0.0, 0.0, 0.5, 0.0]]))
    w = torch.randn(8, 16)
    soft = soft_threshold(w)
    assert int((soft.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) == 2
    scale = soft_scale(w)
    errors = [(w - s * soft).square().sum() for s in (scale, scale * 1.01, scale * 0.99)]
    assert errors[0] < errors[1] and errors[0] < errors[2]
    assert soft_scale(torch.zeros(4, 4)) == 1.0


def test_s_ste_multiplies_with_the_scaled_soft_threshold_and_trains_straight_through():
    model, optimizer, recipe = make(method="s-ste", lr=0.05, mvue=False)
    scale = soft_scale(model.fc1.weight.detach())
    assert recipe.phase == "sparse" and recipe.metrics()["decay"] == 0.0
    for step in range(12):
        expected = scale * soft_threshold(model.fc1.weight.detach())
        x = torch.randn(4, 16)
        torch.testing.assert_close(model.fc1(x), x @ expected.t() + model.fc1.bias, rtol=1e-5, atol=1e-5)
        model.fc1.weight.grad = None
        model.fc1(x).sum().backward()
        torch.testing.assert_close(model.fc1.weight.grad, x.sum(0).expand(32, 16), rtol=1e-5, atol=1e-5)
        optimizer.zero_grad()
        run(model, optimizer, 1, step)
    assert recipe.phase == "sparse" and sparse24.verify(model)
    assert recipe.metrics()["flip_rate"] > 0


def test_s_ste_keeps_exactly_two_of_four_of_each_row():
    w = torch.tensor([[3.0, -1.0, 2.0, -5.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, math.nan, 0.5, 0.0]])
    rows = [[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    assert torch.equal(ops.unpack_mask(row_mask(w)), torch.tensor(rows).bool())
    kept = ops.unpack_mask(row_mask(w := torch.randn(64, 32)))
    assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert not (~kept & (soft_threshold(w) != 0)).any()


def test_s_ste_multiplies_with_its_packed_form():
    """Forward and, with MVUE, the weight gradient are sparse products; the packed values are those thresholded."""
    model, optimizer, recipe = make(method="s-ste", lr=0.05)
    for step in range(3):
        run(model, optimizer, 1, step)
        layer = model.fc1
        assert torch.equal(ops.decompress(layer.packed, layer.E, 32, 16), layer.soft)
    x, dy = torch.randn(64, 16, requires_grad=True), torch.randn(64, 32)
    gradients = [torch.autograd.grad(layer(x), (x, layer.weight), dy) for _ in range(2)]
    torch.testing.assert_close(gradients[0][0], dy @ layer.soft)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.equal(gradients[0][1], gradients[1][1]), "MVUE draws anew"
    mean = sum(torch.autograd.grad(layer(x), layer.weight, dy)[0] for _ in range(400)) / 400
    exact = dy.t() @ x.detach()
    spread = (gradients[0][1] - exact).square().mean().sqrt()
    assert (mean - exact).square().mean().sqrt() < 3 * spread / 400**0.5


def test_s_ste_flip_rate_is_that_of_a_whole_interval():
    model, optimizer, recipe = make(method="s-ste", lr=0.2, mask_interval=5)
    before = row_mask(model.fc1.weight.detach())
    run(model, optimizer, 5)
    flips = ops.mask_flips(before, row_mask(model.fc1.weight.detach()))
    assert recipe.monitor.layer_rates()["fc1"] == int(flips) / model.fc1.weight.numel() > 0


def test_dense_method_trains_dense_and_only_watches_the_masks():
    torch.manual_seed(0)
    plain = MLP()
    reference = torch.optim.SGD(plain.parameters(), lr=0.05)
    model, optimizer, recipe = make(method="dense", lr=0.05, model=copy.deepcopy(plain))
    for step in range(8):
        run(plain, reference, 1, step)
        run(model, optimizer, 1, step)
    assert torch.equal(plain.fc1.weight, model.fc1.weight)
    assert recipe.metrics()["flip_rate"] > 0 and recipe.phase == "dense"
    assert torch.equal(ops.transposable_mask(model.fc1.weight).view(torch.uint8), model.fc1.mask)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(71)
@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(decay=-1e-5), "decay must be a finite number, 0 or more, got -1e-05"),
        (dict(decay=math.nan), "decay must be a finite number"),
        (dict(decay=math.inf), "decay must be a finite number"),
        (dict(decay="6e-5"), "decay must be a finite number"),
        (dict(mask_interval=0), "mask_interval must be an integer, 1 or more, got 0"),
        (dict(mask_interval=2.5), "mask_interval must be an integer"),
        (dict(total_steps=0), "total_steps must be the number of optimizer steps"),
        (dict(dense_fraction=1.5), "dense_fraction must lie in"),
        (dict(dense_fraction=math.nan), "dense_fraction must lie in"),
        (dict(method="magic"), "method must be one of fst, ste, sr-ste, step, s-ste, dense, got 'magic'"),
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


# -- checkpoints ----------------------------------------------------------------------------------------------------


def save(model, optimizer, recipe):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recipe": recipe.state_dict()}
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("recipe_first", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8, 9, 11])
@pytest.mark.fault(45, 61)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(method, stop, recipe_first):
    """Any step, any phase, any order of loading; the state loads with weights_only."""
    settings = dict(optimizer=torch.optim.AdamW, lr=1e-2, method=method, decay=1e-3)
    model, optimizer, recipe = make(**settings)
    torch.manual_seed(5)
    run(model, optimizer, stop)
    state = save(model, optimizer, recipe)
    run(model, optimizer, 12 - stop, stop)

    resumed, again, recipe_again = make(**settings)
    torch.manual_seed(99)
    with torch.no_grad():
        for p in resumed.parameters():
            p.normal_()
    if recipe_first:
        again.load_state_dict(state["optimizer"])
        recipe_again.load_state_dict(state["recipe"])
        resumed.load_state_dict(state["model"])
    else:
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        recipe_again.load_state_dict(state["recipe"])
    run(resumed, again, 12 - stop, stop)
    for (name, ours), (_, theirs) in zip(resumed.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(resumed.fc1.mask, model.fc1.mask)
    assert recipe_again.metrics() == recipe.metrics()
    assert recipe_again.monitor.history() == recipe.monitor.history()


def corrupt(state, key, value):
    state = copy.deepcopy(state)
    if value is ...:
        del state[key]
    else:
        state[key] = value
    return state


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("masks", ..., "lacks masks.*truncated"),
        ("version", 99, "version 99, this sparse24 reads 1"),
        ("step", "7", "'step' of the recipe state must be int"),
        ("step", -1, "corrupt"),
        ("phase", "warm", "corrupt: phase 'warm'"),
        ("decay", math.nan, "corrupt: decay nan"),
        ("last_refresh", 1000, "corrupt"),
        ("masks", {}, "another model"),
        ("masks", {"fc1": torch.zeros(2, 2), "fc2": None}, "must be uint8 \\(8, 8\\), got torch.float32"),
        ("masks", {"fc1": torch.full((8, 8), 255, dtype=torch.uint8), "fc2": None}, "mask of fc1 is corrupt"),
        ("monitor", {}, "flip history lacks"),
        ("settings", {}, "other settings: method was None"),
    ],
)
@pytest.mark.fault(46, 47)
def test_corrupt_state_is_refused_and_changes_nothing(key, value, words):
    """Versioned, checked as a whole, loaded only then."""
    model, optimizer, recipe = make(lr=0.1)
    run(model, optimizer, 5)
    state = corrupt(recipe.state_dict(), key, value)
    run(model, optimizer, 1, 5)
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(Sparse24Error, match=words):
        recipe.load_state_dict(state)
    assert recipe.step == 6 and all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    with pytest.raises(Sparse24Error, match="is a dict, got list"):
        recipe.load_state_dict([])


@pytest.mark.fault(46)
def test_state_of_another_shape_or_model_is_refused():
    """Masks of other layers or sizes."""
    *_, recipe = make()
    *_, wider = make(model=MLP(32, 64))
    with pytest.raises(Sparse24Error, match="must be uint8"):
        wider.load_state_dict(recipe.state_dict())
    *_, other = make(model=nn.ModuleDict({"ffn": MLP()}))
    with pytest.raises(Sparse24Error, match="another model: it lacks masks of \\['ffn.fc1'"):
        other.load_state_dict(recipe.state_dict())


@pytest.mark.fault(73, 74)
def test_phase_that_differs_from_the_settings_is_refused_unless_overridden():
    """A dense state in a sparse phase; going back finds new masks, as told."""
    model, optimizer, recipe = make(lr=0.1)
    run(model, optimizer, 10)
    state = recipe.state_dict()
    assert state["phase"] == "dense"
    model, optimizer, longer = make(lr=0.1, total_steps=40)
    with pytest.raises(Sparse24Error, match="total_steps was 12, is 40"):
        longer.load_state_dict(state)
    longer.load_state_dict(state, override=True)
    assert longer.phase == "sparse" and longer.step == 10 and sparse24.verify(model).phase == "sparse"
    assert torch.equal(ops.transposable_mask(model.fc1.weight).view(torch.uint8), model.fc1.mask)
    longer.load_state_dict(longer.state_dict())
    longer.load_state_dict(longer.state_dict())
    assert longer.phase == "sparse"


@pytest.mark.fault(63)
def test_masks_of_a_state_serve_another_dtype():
    """Masks are loaded, not recomputed, whatever the new run's dtype."""
    model, optimizer, recipe = make(lr=0.1)
    run(model, optimizer, 5)
    other, _, recipe_16 = make(model=MLP().bfloat16())
    other.load_state_dict({n: t.bfloat16() for n, t in model.state_dict().items()})
    recipe_16.load_state_dict(recipe.state_dict())
    assert torch.equal(other.fc1.mask, model.fc1.mask) and sparse24.verify(other)


@pytest.mark.fault(62)
def test_interrupt_inside_a_step_is_made_good_before_saving(monkeypatch):
    """The refresh belongs to the step; a save right after an interrupt is that of a whole step."""
    model, optimizer, recipe = make(lr=0.2, mvue=False)
    run(model, optimizer, 3)
    twin, twin_optimizer, twin_recipe = make(lr=0.2, mvue=False)
    run(twin, twin_optimizer, 4)

    real = ops.prune_compress_

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "prune_compress_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch.manual_seed(0)
        run(model, optimizer, 1, 3)
    monkeypatch.undo()
    assert recipe.step == 3
    state = recipe.state_dict()
    assert state["step"] == 4 and state["last_refresh"] == 4
    assert torch.equal(ops.transposable_mask(model.fc1.weight).view(torch.uint8), state["masks"]["fc1"])
    assert len(state["monitor"]["steps"]) == 1
    assert recipe.monitor.history() == twin_recipe.monitor.history() and recipe.monitor.rate() > 0


@pytest.mark.fault(62)
@pytest.mark.filterwarnings("ignore:the weight of a sparse layer has changed")
@pytest.mark.parametrize("saves", [False, True])
def test_training_that_goes_on_after_an_interrupt_loses_no_step(monkeypatch, saves):
    """Also when the interrupt hits the change of phases: every layer is in the new one before the next step."""
    model, optimizer, recipe = make(lr=0.2, total_steps=8)
    run(model, optimizer, 5)

    def interrupted(self, name, value):
        if name == "phase" and self is model.fc2:
            raise KeyboardInterrupt
        object.__setattr__(self, name, value)

    monkeypatch.setattr(type(model.fc1), "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, optimizer, 1, 5)
    monkeypatch.undo()
    assert [model.fc1.phase, model.fc2.phase] == ["dense", "sparse"]
    if saves:
        assert recipe.state_dict()["step"] == 6
        assert [model.fc1.phase, model.fc2.phase] == ["dense", "dense"]
    run(model, optimizer, 1, 6)
    assert recipe.step == 7 and [model.fc1.phase, model.fc2.phase] == ["dense", "dense"]


@pytest.mark.fault(56, 57)
def test_ema_copy_is_independent_and_current():
    """Averaged copies are models of their own; after averaging they ask to be refreshed."""
    model, optimizer, recipe = make(lr=0.1)
    ema = torch.optim.swa_utils.AveragedModel(model)
    run(model, optimizer, 3)
    ema.update_parameters(model)
    with pytest.warns(Sparse24Warning, match="refresh"):
        ema(torch.randn(2, 16))
    assert sparse24.refresh(ema) == 2
    assert sparse24.verify(ema) and sparse24.verify(model)


COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a dict": lambda recipe: copy.deepcopy({"layers": recipe.layers, "recipe": recipe}),
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda recipe: torch.save(recipe, io.BytesIO()),
}


@pytest.mark.fault(56)
@pytest.mark.parametrize("how", COPIES)
def test_recipe_in_use_is_not_copied_and_the_remedy_works(how):
    """Its copy would have no hooks. State and model make the recipe of a copy, which trains as the original."""
    model, optimizer, recipe = make(torch.optim.AdamW, lr=1e-2)
    run(model, optimizer, 5)
    with pytest.raises(Sparse24Error, match=r"cannot be copied or pickled.*recipe\.state_dict\(\).*new Recipe"):
        COPIES[how](recipe)
    states = copy.deepcopy((optimizer.state_dict(), recipe.state_dict()))
    twin, twin_optimizer, twin_recipe = make(torch.optim.AdamW, lr=1e-2, model=copy.deepcopy(model))
    twin_optimizer.load_state_dict(states[0])
    for m, o, r in ((model, optimizer, recipe), (twin, twin_optimizer, twin_recipe)):
        r.load_state_dict(states[1])  # with the generator that MVUE draws from
        run(m, o, 4, first=5)
    assert torch.equal(model.fc1.weight, twin.fc1.weight) and torch.equal(model.fc1.mask, twin.fc1.mask)


@pytest.mark.fault(56)
def test_detached_recipe_may_be_copied():
    """Trainers keep theirs after training, in callbacks that may be copied or sent to other processes."""
    model, optimizer, recipe = make()
    run(model, optimizer, 5)
    recipe.detach()
    for twin in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert twin.metrics() == recipe.metrics() and twin.monitor.history() == recipe.monitor.history()


# -- monitor --------------------------------------------------------------------------------------------------------


def feed(monitor, rates, sizes=(1000, 1000)):
    for i, rate in enumerate(rates):
        flips = torch.tensor([round(r * size) for r, size in zip(rate, sizes, strict=True)])
        monitor.push(flips, 40 * (i + 1), 40, (i + 1) / len(rates))
    monitor.rate()


@pytest.mark.fault(72)
def test_exploding_and_frozen_masks_raise_an_event_with_the_layers_names():
    """Told once each, never acted upon."""
    monitor, heard = FlipMonitor(["a", "b"], [1000, 1000]), []
    monitor.listeners.append(heard.append)
    with pytest.warns(Sparse24Warning, match="do not settle.*\\(b\\)"):
        feed(monitor, [(0.3 / (i + 1), 0.2 + 0.01 * i) for i in range(20)])
    assert [event["kind"] for event in heard] == ["explosion"] and heard[0]["layers"] == ["b"]
    monitor = FlipMonitor(["a", "b"], [1000, 1000])
    with pytest.warns(Sparse24Warning, match="hardly change.*\\(a\\)"):
        feed(monitor, [(0.0, 0.05)] * 20)


@pytest.mark.fault(72)
def test_healthy_rates_raise_nothing():
    monitor = FlipMonitor(["a", "b"], [1000, 1000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(monitor, [(0.3 * min((i + 1) / 4, (24 - i) / 20),) * 2 for i in range(20)])
    assert not monitor.events


def test_listener_may_change_the_decay():
    """A rule of the user's own, through the event."""
    model, optimizer, recipe = make(lr=0.0, decay=1e-3, mask_interval=1, total_steps=40, dense_fraction=0)
    recipe.on_event(lambda event: setattr(recipe, "decay", recipe.decay / 2))
    with pytest.warns(Sparse24Warning, match="frozen|hardly change"):
        run(model, optimizer, 10)
    assert recipe.decay == 5e-4 and recipe.events[0]["kind"] == "frozen"


def test_history_is_written_as_csv_and_picture(tmp_path):
    monitor = FlipMonitor(["a", "b"], [1000, 500])
    feed(monitor, [(0.3, 0.2), (0.1, 0.0)], (1000, 500))
    monitor.write_csv(tmp_path / "flips.csv")
    lines = (tmp_path / "flips.csv").read_text().splitlines()
    assert (
        lines[0] == "step,interval,flip_rate,flip_rate_per_step,a,b"
        and lines[2].startswith("80,40,0.0666")
        and lines[2].endswith("0.1,0.0")
    )
    monitor.plot(tmp_path / "flips.png")
    assert (tmp_path / "flips.png").read_bytes().startswith(b"\x89PNG")


def test_rates_per_step_are_those_per_refresh_over_the_interval():
    monitor = FlipMonitor(["a", "b"], [1000, 500])
    feed(monitor, [(0.3, 0.2), (0.1, 0.05)], (1000, 500))
    assert monitor.layer_rates() == {"a": 0.1, "b": 0.05}
    assert monitor.layer_rates(per_step=True) == {"a": 0.1 / 40, "b": 0.05 / 40}
    assert monitor.history(per_step=True) == [(step, rate / 40) for step, rate in monitor.history()]
    assert monitor.rate_per_step() == monitor.history(per_step=True)[-1][1]


def test_metrics_rates_of_layers_and_histograms_go_to_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, optimizer, recipe = make(lr=0.2, mask_interval=2, dense_fraction=0)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        recipe.write_tensorboard(writer)  # nothing is known of flips yet
        for step in (1, 2):
            run(model, optimizer, 2, step)
            recipe.write_tensorboard(writer)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert {"sparse24/flip_rate", "sparse24/gap_q50", "sparse24/flip_rate/fc1", "sparse24/flip_rate/fc2"} <= {
        *tags["scalars"]
    }
    assert {*tags["histograms"]} == {"sparse24/gap", "sparse24/flip_rate_of_layers"}
    points = events.Scalars("sparse24/flip_rate/fc1")
    assert [point.step for point in points] == [2, 4]
    assert points[-1].value == pytest.approx(recipe.monitor.layer_rates()["fc1"])
    blocks = sum(layer.weight.numel() // 16 for layer in recipe.layers.values())
    assert events.Histograms("sparse24/gap")[-1].histogram_value.num == blocks


def test_gap_quantiles_are_those_of_all_blocks_or_of_a_fair_sample():
    weights = [torch.randn(1200, 160), 2 * torch.randn(80, 640).t()]  # one of each layout
    gaps = torch.cat([ops.mask_gap(w).flatten() for w in weights])
    exact = torch.quantile(gaps, torch.tensor([0.1, 0.5, 0.9]))
    found = gap_quantiles(weights)
    assert found == dict(zip(("gap_q10", "gap_q50", "gap_q90"), exact.tolist(), strict=True))
    sample = gap_sample(weights, most=gaps.numel() // 8)
    assert gaps.numel() / 8.5 < sample.numel() < gaps.numel() / 7.5
    places = [(gaps <= value).float().mean().item() for value in gap_quantiles(weights, gaps.numel() // 8).values()]
    assert places == pytest.approx([0.1, 0.5, 0.9], abs=0.04)


def test_flips_of_blocks_add_up_and_can_be_drawn_against_their_gaps(tmp_path):
    model, optimizer, recipe = make(lr=0.2, mask_interval=2, dense_fraction=0, track_blocks=True)
    with pytest.raises(Sparse24Error, match="no refresh has been counted"):
        recipe.plot_flips_against_gap(tmp_path / "gap.png")
    run(model, optimizer, 8)
    recipe.metrics()
    total = sum(sum(flips) for flips in recipe.monitor.flips)
    assert total > 0 and int(recipe.block_flips.counts.sum()) == total
    recipe.plot_flips_against_gap(tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 1000
    settings = dict(mask_interval=2, dense_fraction=0, track_blocks=True)
    *_, again = make(model=copy.deepcopy(model), **settings)
    again.load_state_dict(recipe.state_dict())
    assert again.block_flips.refreshes == 4
    assert torch.equal(again.block_flips.counts, recipe.block_flips.counts)
    *_, wider = make(model=MLP(32, 64), **settings)
    with pytest.raises(Sparse24Error, match="of other layers"):
        wider.block_flips.load_state_dict(
            recipe.block_flips.state_dict(), [layer.mask for layer in wider.layers.values()]
        )
