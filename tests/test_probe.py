"""MaskProbe: what a dense model's masks would do, with the model left alone."""

import copy
import warnings

import pytest
import torch
from tiny_models import MLP, gpt2, tokens, train_step

import sparse24
from sparse24 import MaskProbe, Recipe, ops
from sparse24.errors import Sparse24Error


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_probe_leaves_the_model_as_it_is():
    watched = MLP()
    plain = copy.deepcopy(watched)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (watched, plain)]
    MaskProbe(watched, optimizers[0], mask_interval=2)
    assert type(watched.fc1) is torch.nn.Linear and not list(watched.buffers())
    for model, optimizer in zip((watched, plain), optimizers, strict=True):
        train(model, optimizer, 6)
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_probe_and_the_dense_method_of_a_recipe_see_the_same():
    model = MLP()
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    probe = MaskProbe(model, optimizer, mask_interval=3)
    sparse24.sparsify(twin)
    recipe = Recipe(twin, twin_optimizer, total_steps=100, mask_interval=3, method="dense")
    for steps, first in ((2, 0), (3, 2), (6, 5)):
        train(model, optimizer, steps, first)
        train(twin, twin_optimizer, steps, first)
        ours, theirs = probe.metrics(), recipe.metrics()
        assert ours == {name: theirs[name] for name in ours}
    assert probe.monitor.history() == recipe.monitor.history() and probe.monitor.rate() > 0
    assert probe.monitor.layer_rates() == recipe.monitor.layer_rates()


def test_gpt2s_conv1d_and_patterns():
    model = gpt2(1)
    assert list(MaskProbe(model).layers) == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    probe = MaskProbe(model, optimizer := torch.optim.AdamW(model.parameters(), lr=1e-2), 1, include=("*c_fc",))
    before = ops.transposable_mask(model.transformer.h[0].mlp.c_fc.weight)
    train_step(model, optimizer, tokens())
    flips = ops.mask_flips(before, ops.transposable_mask(model.transformer.h[0].mlp.c_fc.weight))
    assert probe.monitor.rate() == int(flips) / model.transformer.h[0].mlp.c_fc.weight.numel() > 0


def test_still_masks_of_a_dense_model_raise_no_alarm():
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = MaskProbe(model, optimizer, mask_interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 12)
        assert probe.metrics()["flip_rate"] == 0.0 and len(probe.monitor.history()) == 12


@pytest.mark.fault(58)
def test_steps_that_a_fused_optimizer_skips_do_not_count():
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    probe, scaler = MaskProbe(model, optimizer, mask_interval=1), torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, steps in ((torch.inf, 0), (1.0, 1)):
        scaler.scale(model(torch.ones(4, 16)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert probe.step == steps


def test_state_goes_on_where_it_was():
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = MaskProbe(model, optimizer, mask_interval=3)
    train(model, optimizer, 4)
    state, weights = probe.state_dict(), copy.deepcopy(model.state_dict())
    train(model, optimizer, 5, 4)
    again = MLP()
    again.load_state_dict(weights)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    resumed = MaskProbe(again, optimizer, mask_interval=3)
    resumed.load_state_dict(state)
    train(again, optimizer, 5, 4)
    assert resumed.metrics() == probe.metrics() and resumed.monitor.history() == probe.monitor.history()
    with pytest.raises(Sparse24Error, match="of another model"):
        MaskProbe(MLP(32, 64)).load_state_dict(state)


def test_detached_probe_counts_no_more():
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = MaskProbe(model, optimizer, mask_interval=1)
    probe.detach()
    train(model, optimizer, 1)
    assert probe.step == 0


@pytest.mark.fault(100)
def test_a_scheduler_is_no_optimizer():
    model = MLP()
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(Sparse24Error, match="optimizer must be a torch.optim.Optimizer or None, got ConstantLR"):
        MaskProbe(model, schedule)


def test_models_without_dense_layers_are_refused():
    with pytest.raises(Sparse24Error, match="no dense layer of Sequential could be 2:4"):
        MaskProbe(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    sparse = MLP()
    sparse24.sparsify(sparse)
    with pytest.raises(Sparse24Error, match="a probe wants a dense model"):
        MaskProbe(sparse)
    with pytest.raises(Sparse24Error, match="mask_interval must be an integer, 1 or more, got 0"):
        MaskProbe(MLP(), mask_interval=0)
