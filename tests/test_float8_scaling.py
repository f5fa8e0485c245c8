"""Scales of 8-bit layers over a training: a step behind, in metrics and states, the same on all ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparse24
from sparse24 import Recipe, Sparse24Error, SparseGatedMLP
from sparse24.layers import float8, state_of
from sparse24.ops.float8 import scale_of
from sparse24.recipe import scaling


def make(precision="fp8", steps=40, seed=0, **settings):
    torch.manual_seed(seed)
    model = SparseGatedMLP(64, 128, precision=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, Recipe(model, optimizer, total_steps=steps, dense_fraction=0, **settings)


def step(model, optimizer, factor=1.0, seed=0):
    x = factor * torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def scale(layer, slot):
    return float(layer._buffers[float8.SCALE_BUFFERS[slot]])


@pytest.mark.fault(89)
def test_what_is_clipped_is_a_metric_and_the_next_scale_fits():
    model, optimizer, recipe = make(count_casts=True)
    assert "casts_clipped" not in recipe.metrics()  # nothing is cast yet
    step(model, optimizer)
    assert recipe.metrics()["casts_clipped"] == 0 and recipe.metrics()["values_clipped"] == 0
    before = scale(model.gate_proj, "x")
    step(model, optimizer, factor=64.0)
    metrics = recipe.metrics()
    assert 0 < metrics["casts_clipped"] < 1 and 0 < metrics["values_clipped"] < 1
    assert scale(model.gate_proj, "x") == 64 * before
    step(model, optimizer, factor=64.0)
    assert recipe.metrics()["values_clipped"] < metrics["values_clipped"]


@pytest.mark.fault(91)
def test_what_rounds_to_zero_is_a_metric():
    model, optimizer, recipe = make(count_casts=True)
    step(model, optimizer, factor=2.0**14)
    step(model, optimizer, factor=2.0**-14)
    assert recipe.metrics()["values_flushed"] > 0.1  # all of x; the rest is 0 before it is cast
    plain = make()
    step(*plain[:2])
    assert "values_flushed" not in plain[2].metrics() and "casts_clipped" in plain[2].metrics()


@pytest.mark.fault(91)
def test_compiled_passes_count_as_eager_ones_do():
    counted = []
    for backend in ("eager", "aot_eager"):
        model, optimizer, recipe = make(count_casts=True)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.manual_seed(0)
        for factor in (1.0, 64.0):
            step(compiled, optimizer, factor)
        counted.append(recipe.metrics())
    assert counted[0] == counted[1] and counted[0]["values_clipped"] > 0


@pytest.mark.fault(89)
def test_tensors_of_zeros_keep_their_scale():
    model, optimizer, _ = make()
    step(model, optimizer)
    before = [scale(layer, slot) for layer in (model.gate_proj, model.down_proj) for slot in ("x", "dy")]
    step(model, optimizer, factor=0.0)
    after = [scale(layer, slot) for layer in (model.gate_proj, model.down_proj) for slot in ("x", "dy")]
    assert all(a > 0 for a in after) and after[0] == before[0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_behind_a_weight_of_zeros_are_clipped_once_and_not_rounded_to_zero():
    torch.manual_seed(0)
    model = SparseGatedMLP(64, 128, precision="fp8")
    nn.init.zeros_(model.down_proj.weight)
    sparse24.refresh(model, search=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Recipe(model, optimizer, total_steps=20, decay=0.0, dense_fraction=0)
    x, dy = torch.randn(2, 48, 64), 1e-3 * torch.randn(2, 48, 64)
    grads = []
    for _ in range(4):
        model(x).backward(dy)
        grads.append(model.up_proj.weight.grad.abs().max().item())
        optimizer.step()
        optimizer.zero_grad()
    assert grads[0] == 0 and all(0 < grad < 1 for grad in grads[2:])
    assert scale(model.gate_proj, "dy") < 1e-4


@pytest.mark.parametrize("precision", float8.PRECISIONS)
def test_a_layer_that_the_first_step_left_out_computes_what_its_twin_does(precision):
    """As under stochastic depth, or in an evaluation before its first training pass."""
    torch.manual_seed(0)
    left_out, twin, ran = (SparseGatedMLP(64, 128, precision=precision) for _ in range(3))
    twin.load_state_dict(left_out.state_dict())
    model = nn.ModuleList([left_out, ran])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Recipe(model, optimizer, total_steps=20, decay=0.0, dense_fraction=0)
    step(ran, optimizer)
    x = torch.randn(2, 48, 64)
    with torch.no_grad():
        expected, found = twin(x), left_out(x)
    # x by scale 1 and not by its own: one more rounding to 3 bits of mantissa, of x and of h
    assert (found - expected).norm() < 2 * 2**-4 * expected.norm()
    assert scale(left_out.gate_proj, "x") == 1


def test_micro_batches_join_their_largest_magnitudes():
    model, optimizer, _ = make()
    step(model, optimizer)
    xs = [factor * torch.randn(2, 32, 64) for factor in (1.0, 8.0, 0.5)]
    outs = [model(x) for x in xs]  # all forward passes before any backward
    sum(out.square().mean() for out in outs).backward()
    optimizer.step()
    assert scale(model.gate_proj, "x") == float(scale_of(torch.stack([x.abs().max() for x in xs]).max().reshape(1)))


def test_ranks_agree_on_the_largest_magnitude(monkeypatch):
    model, optimizer, _ = make()
    step(model, optimizer)
    twin = copy.deepcopy(scale(model.gate_proj, "x"))
    monkeypatch.setattr(
        scaling, "_all_reduce_max", lambda largest: largest.mul_(16)
    )  # another rank saw 16 times as much
    step(model, optimizer)
    assert scale(model.gate_proj, "x") == 16 * twin


def test_a_skipped_step_leaves_scales_and_packed_weights_together():
    """A fused optimizer skips a step by itself, where a scaler has found Inf."""
    torch.manual_seed(0)
    model = SparseGatedMLP(64, 128, precision="fp8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    recipe = Recipe(model, optimizer, total_steps=20, dense_fraction=0)
    step(model, optimizer)
    before = float8.scale_state(model.down_proj)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    step(model, optimizer, factor=64.0)
    after = float8.scale_state(model.down_proj)
    assert recipe.step == 1 and torch.equal(after[:3], before[:3]) and after[3] > 0  # the amax of x waits
    del optimizer.grad_scale, optimizer.found_inf
    step(model, optimizer)
    assert recipe.step == 2 and float(float8.scale_state(model.down_proj)[0]) > float(before[0])


def test_a_copy_looks_at_its_tensors_itself():
    model, optimizer, _ = make()
    step(model, optimizer)
    assert state_of(model.down_proj).scales_known
    twin = copy.deepcopy(model)
    assert not state_of(twin.down_proj).scales_known
    x = 1000 * torch.randn(2, 32, 64)
    with torch.no_grad():
        theirs = sparse24.densify(masked := copy.deepcopy(model), masked=True) and masked(x)
        assert (twin(x) - theirs).norm() < 0.1 * theirs.norm()  # the trained model would clip


def test_states_of_other_precisions_load_and_broken_ones_are_refused():
    model, optimizer, recipe = make()
    step(model, optimizer)
    state, weights = copy.deepcopy((recipe.state_dict(), model.state_dict()))
    assert set(state["casts"]) == {"gate_proj", "up_proj", "down_proj"}
    sixteen, _, theirs = make(precision=None, seed=1)
    sixteen.load_state_dict(weights)
    theirs.load_state_dict(state)
    assert "casts" not in theirs.state_dict()
    other, _, again = make(seed=2)
    other.load_state_dict(weights)
    again.load_state_dict(theirs.state_dict())  # of 16 bits: scales are found anew
    assert not state_of(other.down_proj).scales_known
    again.load_state_dict(state)
    assert state_of(other.down_proj).scales_known and scale(other.down_proj, "x") == scale(model.down_proj, "x")
    for broken in ({"gate_proj": torch.zeros(7)}, {"gate_proj": torch.ones(3)}, [1]):
        with pytest.raises(Sparse24Error, match="scales of 8-bit layers"):
            again.load_state_dict({**state, "casts": broken})


def test_a_frozen_half_is_packed_by_the_scale_that_it_shares():
    torch.manual_seed(0)
    model = SparseGatedMLP(64, 128, precision="fp8")
    model.gate_proj.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    Recipe(model, optimizer, total_steps=20, dense_fraction=0)
    with torch.no_grad():
        model.up_proj.weight.mul_(8)
    for _ in range(3):
        step(model, optimizer)
    x = torch.randn(2, 32, 64)
    sparse24.densify(masked := copy.deepcopy(model), masked=True)
    assert (model(x) - masked(x)).norm() < 0.1 * masked(x).norm()


@pytest.mark.parametrize("settings", [dict(method="s-ste"), dict(method="mvue"), dict(mvue="input")])
def test_methods_of_16_bits_are_refused_by_name(settings):
    with pytest.raises(Sparse24Error, match="precision='fp8'"):
        make(**settings)


def test_a_dense_phase_in_between_begins_anew():
    torch.manual_seed(0)
    model = SparseGatedMLP(64, 128, precision="fp8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recipe = Recipe(model, optimizer, total_steps=8, dense_fraction=0.5, dense_at="start")
    for _ in range(4):
        step(model, optimizer)
    assert recipe.phase == "sparse" and not state_of(model.down_proj).scales_known
    step(model, optimizer)
    assert state_of(model.down_proj).scales_known
    assert isinstance(model.down_proj, nn.Linear)
