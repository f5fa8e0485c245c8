"""Copies of a model compute what it computes: averages, snapshots, evaluation in a new program."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from rounding import ANOTHER_ORDER
from tiny_models import MLP
from tiny_recipes import kept, make, run
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparse24
from sparse24 import Sparse24Error, Sparse24Warning
from sparse24.convert import sparse_layers
from sparse24.recipe import fingerprint_of, fingerprint_of_state

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(99))


def masked_twin(model, like):
    """A plain dense model with the weights of `model` under the phase and masks of `like`: the right function."""
    twin = MLP()
    inner = model.module if isinstance(model, AveragedModel) else model
    twin.load_state_dict(inner.state_dict())
    for name, layer in sparse_layers(like).items():
        if layer.phase == "sparse":
            weight = twin.get_submodule(name).weight
            weight.data.copy_(torch.where(kept(layer), weight, 0))
    return twin


@torch.no_grad()
def assert_same(model, twin):
    torch.testing.assert_close(model(X), twin(X), **ANOTHER_ORDER)


@pytest.fixture(autouse=True)
def no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        yield


def train_with_average(average, update, steps=12):
    """Trains to the end, and after each step asks that the average is the model's function of its own weights."""
    model, optimizer, _ = make(mask_interval=2)
    ema = average(model)
    for step in range(steps):
        run(model, optimizer, 1, first=step)
        update(ema, model)
        assert_same(ema, masked_twin(ema, model))
    assert {layer.phase for layer in sparse_layers(model).values()} == {"dense"}
    return model, ema


@pytest.mark.fault(79)
def test_an_averaged_model_follows_masks_and_phase_by_itself():
    train_with_average(
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        lambda ema, model: ema.update_parameters(model),
    )


def test_refresh_of_an_averaged_model_follows_too():
    def update(ema, model):
        ema.update_parameters(model)
        sparse24.refresh(ema)

    model, ema = train_with_average(AveragedModel, update)
    assert sparse24.verify(ema, like=model)


def test_an_average_written_through_data_follows():
    def update(ema, model):
        for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
            mine.data = 0.5 * mine.data + 0.5 * theirs.data  # another address
            mine.data.lerp_(theirs.data, 0.5)  # no version

    train_with_average(copy.deepcopy, update)


def test_an_average_in_place_through_data_follows_from_the_next_search_on():
    def update(ema, model):
        for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.5)

    train_with_average(copy.deepcopy, update)


def test_a_copy_of_a_copy_follows_the_trained_one():
    def average(model):
        first = copy.deepcopy(model)
        return copy.deepcopy(first)

    train_with_average(average, lambda ema, model: AveragedModel.update_parameters(_averaging(ema), model))


def _averaging(module):
    shell = AveragedModel(nn.Linear(1, 1))
    shell.module, shell.n_averaged = module, torch.tensor(1)
    return shell


@pytest.mark.fault(79)
def test_a_snapshot_keeps_the_function_that_it_had():
    model, optimizer, _ = make(mask_interval=2)
    run(model, optimizer, 3)
    snapshot = copy.deepcopy(model)
    twin = masked_twin(snapshot, model)
    run(model, optimizer, 9, first=3)
    assert_same(snapshot, twin)
    assert fingerprint_of(snapshot) != fingerprint_of(model)
    report = sparse24.verify(snapshot, like=model)
    assert not report and "follow" in str(report) and "phase" in str(report)


def never_run(steps):
    """An average that has not run since it was made, its model, and the plain twin of what it would compute."""
    model, optimizer, _ = make(lr=1.0, mask_interval=2)
    ema = AveragedModel(model)
    for step in range(steps):
        run(model, optimizer, 1, first=step)
        ema.update_parameters(model)
    plain = MLP()
    plain.load_state_dict(dict(ema.module.named_parameters()))
    return ema.module, model, masked_twin(plain, model)


def densified(model):
    sparse24.densify(model, masked=True)
    return model


def followed(model):
    other = MLP()
    sparse24.follow(other, like=model)
    other.load_state_dict(dict(model.named_parameters()))
    return other


@pytest.mark.fault(79)
@pytest.mark.parametrize("read", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema)), densified, followed])
@pytest.mark.parametrize("steps", [8, 12])
def test_an_average_that_has_never_run_is_read_as_it_would_run(read, steps):
    ema, model, twin = never_run(steps)
    assert_same(read(ema), twin)
    assert sparse_layers(model), "still there to be followed"


def put_through_data(average, model):
    for mine, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def lend(average):
    return torch.func.functional_call(average, {n: p + 1 for n, p in average.named_parameters()}, torch.randn(8, 32))


@pytest.mark.fault(79)
@pytest.mark.parametrize("read", [lambda ema: ema(torch.randn(8, 32)), lend, sparse24.refresh, copy.deepcopy])
@pytest.mark.parametrize("write", [AveragedModel.update_parameters, put_through_data])
@pytest.mark.parametrize("steps", [3, 6], ids=["sparse", "dense"])
def test_all_layers_of_an_8_bit_block_follow_also_those_that_are_packed_with_another(steps, write, read):
    """Gate and up have one scale: packing one packs the other, which must not hide that it was written."""
    model = nn.Sequential(sparse24.SparseGatedMLP(32, 64, precision="fp8-hybrid"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparse24.Recipe(model, optimizer, total_steps=8, mask_interval=1, dense_fraction=0.5)
    average = AveragedModel(model)
    for _ in range(steps):
        model(torch.randn(32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    write(average, model)
    read(average)
    assert sparse24.verify(average.module, like=model)


@pytest.mark.fault(79)
def test_exporting_an_average_that_has_never_run_is_refused():
    ema, _, twin = never_run(12)
    with pytest.raises(Sparse24Error, match="copy of another.*Run it once eagerly"):
        torch.export.export(ema, (X,))
    assert_same(ema, twin)
    assert_same(torch.export.export(ema, (X,)).module(), twin)


@pytest.mark.fault(79)
@pytest.mark.parametrize("steps", [8, 12])
def test_an_average_takes_the_last_masks_and_phase_of_a_model_that_is_gone(steps):
    ema, twin = never_run(steps)[::2]
    gc.collect()
    assert_same(ema, twin)


@pytest.mark.fault(79)
def test_a_shallow_copy_of_a_layer_shares_its_training():
    model, optimizer, _ = make(lr=1.0)
    run(model, optimizer, 2)
    shallow = copy.copy(model.fc1)
    for step in range(2, 12):
        run(model, optimizer, 1, first=step)
        assert shallow.phase == model.fc1.phase
        torch.testing.assert_close(shallow(X), model.fc1(X), rtol=0, atol=0)
    shallow(X).sum().backward()
    optimizer.step()
    torch.testing.assert_close(shallow(X), model.fc1(X), rtol=0, atol=0)


def test_a_moved_copy_still_follows():
    model, optimizer, _ = make(mask_interval=2)
    ema = AveragedModel(model)
    run(model, optimizer, 5)
    ema.update_parameters(model)
    ema.to(torch.float64).to(torch.float32)
    assert_same(ema, masked_twin(ema, model))


def test_a_copy_that_is_trained_by_a_recipe_of_its_own_follows_nobody():
    model, optimizer, _ = make(mask_interval=2)
    fork = copy.deepcopy(model)
    other = torch.optim.SGD(fork.parameters(), lr=0.5)
    sparse24.Recipe(fork, other, total_steps=100, mask_interval=3)
    run(fork, other, 7, first=50)
    run(model, optimizer, 4)
    assert_same(fork, masked_twin(fork, fork))
    assert fingerprint_of(fork) != fingerprint_of(model)


@pytest.mark.fault(79)
def test_follow_makes_a_dense_copy_compute_the_same():
    model, optimizer, recipe = make(mask_interval=2)
    run(model, optimizer, 5)
    dense = MLP()
    dense.load_state_dict(model.state_dict())
    assert sparse24.follow(dense, like=torch.compile(model, backend="eager")) == 2
    assert_same(dense, masked_twin(model, model))
    assert fingerprint_of(dense) == recipe.fingerprint() == fingerprint_of_state(recipe.state_dict())
    run(model, optimizer, 7, first=5)
    dense.load_state_dict(model.state_dict())
    sparse24.follow(AveragedModel(dense).module, like=model)
    sparse24.follow(dense, like=model)
    assert_same(dense, masked_twin(model, model))
    assert recipe.fingerprint().startswith("dense-")


def test_follow_takes_the_scales_of_s_ste():
    model, optimizer, _ = make(method="s-ste")
    run(model, optimizer, 5)
    other = MLP()
    other.load_state_dict(model.state_dict())
    sparse24.follow(other, like=model)
    assert torch.equal(other(X), model(X))
    assert fingerprint_of(other) == fingerprint_of(model)


def test_follow_refuses_another_model_and_changes_nothing():
    model, _, _ = make()
    wide = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(Sparse24Error, match="has no|without sparse layers"):
        sparse24.follow(model, like=wide)
    with pytest.raises(Sparse24Error, match="same architecture"):
        sparse24.follow(wide, like=model)
    other = MLP()
    other.get_submodule(next(iter(sparse_layers(model)))).weight = nn.Parameter(torch.zeros(4, 16))
    with pytest.raises(Sparse24Error, match="other shapes"):
        sparse24.follow(other, like=model)
    assert not sparse_layers(wide) and not sparse_layers(other)
    with pytest.raises(Sparse24Error, match="like must be"):
        sparse24.follow(model, like=None)


@pytest.mark.fault(79)
@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("steps", [7, 12])
@pytest.mark.parametrize("dense", [True, False])
def test_load_masks_evaluates_a_checkpoint_in_a_new_program(weights_first, steps, dense):
    model, optimizer, recipe = make()
    run(model, optimizer, steps)
    torch.save((model.state_dict(), recipe.state_dict()), file := io.BytesIO())
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh = MLP()
    if not dense:
        sparse24.sparsify(fresh)
    if weights_first:
        fresh.load_state_dict(weights)
        assert sparse24.load_masks(fresh, state) == 2
    else:
        assert sparse24.load_masks(fresh, state) == 2
        fresh.load_state_dict(weights)
    assert_same(fresh, masked_twin(model, model))
    assert sparse24.verify(fresh, like=model)


def test_load_masks_says_what_it_wants():
    model, optimizer, recipe = make()
    with pytest.raises(Sparse24Error, match='"recipe"'):
        sparse24.load_masks(MLP(), {"recipe": recipe.state_dict()})
    state = recipe.state_dict()
    name = next(iter(state["masks"]))
    state["masks"] = state["masks"] | {name: torch.full_like(state["masks"][name], 255)}
    with pytest.raises(Sparse24Error, match=f"saved mask of {name}"):
        sparse24.load_masks(model, state)
    with pytest.raises(Sparse24Error, match="same architecture"):
        sparse24.load_masks(nn.Sequential(nn.Linear(16, 16)), recipe.state_dict())


@pytest.mark.fault(79)
def test_a_snapshot_taken_by_loading_keeps_its_masks_whether_they_were_equal_before_or_not():
    for steps_between in (0, 3):  # the copy's masks are those of the weights already, or other ones
        model, optimizer, _ = make(mask_interval=2)
        run(model, optimizer, 2)
        best = copy.deepcopy(model)
        run(model, optimizer, steps_between, first=2)
        best.load_state_dict(model.state_dict())
        twin = masked_twin(best, model)
        run(model, optimizer, 6, first=2 + steps_between)
        assert_same(best, twin)


@pytest.mark.fault(79)
def test_a_copy_that_was_given_other_weights_and_masks_follows_its_origin_no_more():
    model, optimizer, recipe = make(mask_interval=2)
    run(model, optimizer, 2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(recipe.state_dict())
    held = copy.deepcopy(model)
    run(model, optimizer, 4, first=2)
    held.load_state_dict(weights)
    sparse24.load_masks(held, state)
    twin = masked_twin(held, held)
    run(model, optimizer, 2, first=6)
    assert_same(held, twin)
    with torch.no_grad():
        held.fc1.weight.add_(0.01)
    sparse24.refresh(held)
    assert torch.equal(held.fc1.mask, state["masks"]["fc1"])
    assert_same(held, masked_twin(held, held))


@pytest.mark.fault(79)
def test_a_copy_of_a_model_that_has_been_made_dense_is_on_its_own():
    model, optimizer, _ = make(mask_interval=2)
    run(model, optimizer, 3)
    held = copy.deepcopy(model)
    twin = masked_twin(held, model)
    sparse24.densify(model)
    assert_same(held, twin)
