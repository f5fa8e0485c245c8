"""tune_decay: the same data and noise for each arm, a table, a choice inside the band."""

import json
import math

import pytest
import torch
from rounding import MANY_SUMS
from tiny_models import MLP

import sparse24
from sparse24 import tune_decay
from sparse24.errors import Sparse24Error

X = [torch.randn(32, 16, generator=torch.Generator().manual_seed(i)) for i in range(60)]


def loss(model, x):
    return (model(x) - x.flip(-1)).square().mean()


def tune(grid, **settings):
    return tune_decay(
        MLP, lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.0), X, grid, 60,
        **(dict(loss=loss, mask_interval=5) | settings),
    )  # fmt: skip


def test_mu_falls_with_the_decay_and_the_choice_lies_in_the_band():
    """With 1024 blocks, so that mu is more than noise."""
    batches = [torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(60)]
    result = tune_decay(
        lambda: MLP(64, 128), lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.0), batches,
        (0.0, 3e-3, 1e-2, 1.5e-2, 2e-2, 0.3), 60, loss=loss, mask_interval=5,
    )  # fmt: skip
    dense, *arms = result.table
    assert dense.decay is None and dense.mu == 1.0 and dense.flip_rate > 0
    mu = {arm.decay: arm.mu for arm in arms}
    assert mu[0.3] < mu[1e-2] < mu[0.0]
    assert result and 0.60 <= mu[result.decay] <= 0.95
    assert abs(mu[result.decay] - 0.8) == min(abs(m - 0.8) for m in mu.values())
    assert "<- chosen" in str(result)


def test_result_is_reproducible_and_can_be_saved_and_drawn(tmp_path):
    first, second = tune((0.0, 1e-2)), tune((1e-2, 0.0))
    assert [(a.decay, a.mu, a.loss) for a in first.table] == [(a.decay, a.mu, a.loss) for a in second.table]
    first.plot(tmp_path / "mu.png")
    first.save(tmp_path / "mu.json")
    assert (tmp_path / "mu.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "mu.json").read_text())["table"]) == 3


def test_finished_arms_are_not_run_again(tmp_path):
    path, made = tmp_path / "arms.json", []

    def make_model():
        made.append(1)
        return MLP()

    settings = dict(path=path, loss=loss, mask_interval=5)
    optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731
    tune_decay(make_model, optimizer, X, (0.0,), 20, **settings)
    tune_decay(make_model, optimizer, X, (0.0, 1e-2), 20, **settings)
    assert len(made) == 3  # dense, 0 and then 1e-2
    with pytest.raises(Sparse24Error, match="other settings"):
        tune_decay(make_model, optimizer, X, (0.0,), 30, **settings)
    with pytest.raises(Sparse24Error, match="other settings"):
        tune_decay(make_model, optimizer, X, (0.0,), 20, recipe_settings={"mvue": False}, **settings)
    path.write_text("{")
    with pytest.raises(Sparse24Error, match="not a file of tune_decay"):
        tune_decay(make_model, optimizer, X, (0.0,), 20, **settings)


def test_hopeless_and_broken_arms_stop_early():
    result = tune((0.0, 0.3))
    assert result.table[-1].steps < 60 and "too tightly" in result.table[-1].note
    blown = tune((0.0,), loss=lambda m, x: loss(m, x) * (math.nan if m.fc1.phase == "sparse" else 1))
    assert "the loss is nan" in blown.table[-1].note and blown.table[-1].steps == 5
    assert not blown and "no decay gives mu" in str(blown)


def test_arms_whose_masks_move_far_too_much_stop_early():
    result = tune((0.0,), target=(0.1, 0.2))
    assert result.table[1].steps < 60 and "move too much" in result.table[1].note and not result


def test_arms_in_a_warm_up_are_compared_with_the_dense_run_at_the_same_step():
    """Halfway through a linear warm-up every flip rate is about half of its last one."""

    def with_warm_up(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 60)

    result = tune_decay(MLP, with_warm_up, X, (0.0,), 60, (1.5, 5.0), loss=loss, mask_interval=5)
    dense, arm = result.table
    assert dense.rate_at(30) < 0.75 * dense.rate_at(60) == 0.75 * dense.flip_rate
    assert arm.steps == 60 and not arm.note


@pytest.mark.fault(78)
def test_shuffled_data_are_the_same_in_every_arm():
    """The noise of a sparse arm is drawn from the generator that a DataLoader shuffles with."""
    loader = torch.utils.data.DataLoader(torch.stack(X[:8]), batch_size=2, shuffle=True)
    seen = []

    def watched(model, x):
        seen.append(x.sum().item())
        return loss(model, x)

    tune_decay(MLP, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), loader, (0.0,), 20, loss=watched,
               mask_interval=5)  # fmt: skip
    dense, arm = seen[:20], seen[20:]
    assert dense == arm and dense[:4] != dense[4:8], "shuffled anew in each pass"


def test_micro_batches_are_one_batch():
    results = [
        tune((0.0,), recipe_settings={"mvue": False}, clip=1.0, split=split).table
        for split in (None, lambda x: x.chunk(4))
    ]
    for whole, parts in zip(*results, strict=True):
        assert parts.flip_rate == whole.flip_rate
        assert parts.loss == pytest.approx(whole.loss, rel=MANY_SUMS["rtol"])


@pytest.mark.fault(58)
def test_steps_that_a_scaler_skips_are_made_up_for():
    calls = []

    def overflowing(model, x):
        calls.append(1)
        return loss(model, x) * (math.inf if len(calls) in (1, 2, 40) else 1)

    scaled = dict(mask_interval=5, make_scaler=lambda: torch.amp.GradScaler("cpu"))
    sgd = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731
    dense, arm = tune_decay(MLP, sgd, X, (0.0,), 20, loss=overflowing, **scaled).table
    assert dense.steps == arm.steps == 20 and len(calls) == 43
    with pytest.raises(Sparse24Error, match="counted 0 of 20 steps: .* loss scaling skips every step"):
        tune_decay(MLP, sgd, X, (0.0,), 20, loss=lambda m, x: loss(m, x) * math.inf, **scaled)


def test_schedulers_iterators_and_functions_of_batches():
    def with_schedule(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 10))

    results = [
        tune_decay(MLP, with_schedule, batches, (0.0,), 20, loss=loss, mask_interval=5).table[-1].flip_rate
        for batches in (X[:7], lambda: X[:7], lambda: iter(X[:7]))
    ]
    assert results[0] == results[1] == results[2] > 0


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(grid=()), "grid must hold at least one decay"),
        (dict(grid=(-1.0,)), "decay must be a finite number"),
        (dict(mask_interval=40), "probe_step must be at least two searches"),
        (dict(target=(0.9, 0.5)), "target must be two rising bounds"),
        (dict(loss=None), "does not return a scalar loss"),
        (dict(grid="1e-4"), "grid must be a sequence of decays, .*, got '1e-4'"),
        (dict(grid=1e-4), "grid must be a sequence of decays, .*, got 0.0001"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, words):
    with pytest.raises(Sparse24Error, match=words):
        tune(**({"grid": (0.0,)} | settings))


@pytest.mark.fault(100)
def test_a_model_in_place_of_a_function_that_makes_one_is_named():
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Sparse24Error, match="make_model must be a function, .*, got MLP; give lambda"):
        tune_decay(model, lambda m: optimizer, X, loss=loss)
    with pytest.raises(Sparse24Error, match="make_optimizer must be a function, .*, got SGD; give lambda"):
        tune_decay(MLP, optimizer, X, loss=loss)


def test_dense_run_that_never_moves_is_an_error():
    with pytest.raises(Sparse24Error, match="never change"):
        tune_decay(MLP, lambda m: torch.optim.SGD(m.parameters(), lr=0.0), X, (0.0,), 20, loss=loss, mask_interval=5)
    with pytest.raises(Sparse24Error, match="batches is an iterator, which only the first arm could read"):
        tune_decay(MLP, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), iter(X), (0.0,), 80, loss=loss)
    with pytest.raises(Sparse24Error, match="batches are empty"):
        tune_decay(MLP, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), [], (0.0,), 20, loss=loss, mask_interval=5)


def test_a_sparse_model_may_be_handed_over_too():
    def make():
        model = MLP()
        sparse24.sparsify(model, include=("fc1",))
        return model

    result = tune_decay(
        make, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), X, (0.0,), 20, loss=loss, mask_interval=5
    )
    assert len(result.table) == 2
