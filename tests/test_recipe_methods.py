"""The training methods of sparse24/recipe/methods.py, by what a recipe does for each."""

import copy
import math

import pytest
import torch
from rounding import ANOTHER_ORDER, MANY_SUMS
from tiny_models import MLP
from tiny_recipes import kept, loss_of, make, run

import sparse24
from sparse24 import ops
from sparse24.errors import Sparse24Error
from sparse24.functional.soft import row_mask, soft_scale, soft_threshold
from sparse24.recipe.methods import FrozenSecondMoment


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


@pytest.mark.parametrize("options", [dict(foreach=False), dict(foreach=True), dict(fused=True)], ids=str)
def test_step_is_dense_first_and_then_divides_by_what_it_has_frozen(options):
    """AdamW by hand. The bias of the second moment is that of the six dense steps in each step that follows: were it
    corrected by those taken, the divisor would shrink by 15 % in these three.
    """
    settings = dict(method="step", dense_fraction=0.5, mvue=False, opt=options)
    model, optimizer, recipe = make(torch.optim.AdamW, 1e-2, **settings)
    assert recipe.phase == "dense"
    run(model, optimizer, 6)
    assert recipe.phase == "sparse" and sparse24.verify(model).phase == "sparse"
    frozen = {layer: optimizer.state[layer.weight]["exp_avg_sq"].clone() for layer in (model.fc1, model.fc2)}
    bias_moment = optimizer.state[model.fc1.bias]["exp_avg_sq"].clone()
    for taken in (7, 8, 9):
        before = {layer: layer.weight.detach().clone() for layer in frozen}
        firsts = {layer: optimizer.state[layer.weight]["exp_avg"].clone() for layer in frozen}
        loss_of(model, taken).backward()
        optimizer.step()
        for layer, second in frozen.items():
            first = 0.9 * firsts[layer] + 0.1 * layer.weight.grad
            update = (first / (1 - 0.9**taken)) / ((second / (1 - 0.999**6)).sqrt() + 1e-8)
            expected = before[layer] * (1 - 1e-2 * 0.01) - 1e-2 * update
            torch.testing.assert_close(layer.weight.detach(), expected, **MANY_SUMS)
            held = second * ((1 - 0.999**taken) / (1 - 0.999**6))  # what Adam itself would divide alike
            torch.testing.assert_close(optimizer.state[layer.weight]["exp_avg_sq"], held, **ANOTHER_ORDER)
        optimizer.zero_grad()
    assert not torch.equal(optimizer.state[model.fc1.bias]["exp_avg_sq"], bias_moment)


class Adam(torch.optim.Optimizer):
    """Somebody else's, without an option for what its weight decay enters; of its step, the second moment alone."""

    def __init__(self, params, lr, weight_decay):
        decay = {"weight_decay": weight_decay} if weight_decay else {}
        super().__init__(params, dict(lr=lr, betas=(0.9, 0.999), **decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                moment = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
                moment.lerp_((p.grad + group.get("weight_decay", 0) * p).square(), 1 - group["betas"][1])


COUPLED = {"decoupled_weight_decay": False}
DECOUPLED = {"decoupled_weight_decay": True}
WITH_A_SECOND_MOMENT = [
    (torch.optim.AdamW, {}), (torch.optim.Adam, COUPLED), (torch.optim.Adam, DECOUPLED), (torch.optim.NAdam, COUPLED),
    (torch.optim.NAdam, DECOUPLED), (torch.optim.RAdam, COUPLED), (Adam, {}), (Adam, {"weight_decay": 0}),
]  # fmt: skip


@pytest.mark.parametrize("kind, options", WITH_A_SECOND_MOMENT)
def test_step_freezes_the_moment_that_weights_are_divided_by_whatever_weight_decay_enters(kind, options):
    """Read behind the optimizer's step and before the recipe puts the exact value back.

    The learning rate is zero and each gradient the weight itself or, in the next step, twice that, so that the average
    grows. One of the optimizers corrects no bias.
    """
    used = []

    def note(optimizer, *_):
        state = optimizer.state[weight]
        used.append(state["exp_avg_sq"] / (1 - 0.999 ** float(state.get("step", math.inf))))

    def made(params, lr):
        optimizer = kind(params, lr, **{"weight_decay": 50.0} | options)
        optimizer.register_step_post_hook(note)
        return optimizer

    model = MLP()
    weight = model.fc1.weight
    model, optimizer, recipe = make(made, 0.0, model=model, method="step", dense_fraction=0.25)
    for step in range(5):
        for p in model.parameters():
            p.grad = p.detach() * (step + 1)
        optimizer.step()
    assert recipe.phase == "sparse" and (used[2] > used[1]).all()
    torch.testing.assert_close(used[3], used[2], **MANY_SUMS)
    torch.testing.assert_close(used[4], used[2], **MANY_SUMS)


def test_step_freezes_the_same_moment_under_a_gradient_scaler():
    """A fused optimizer un-scales in its kernel and averages what it has then. A scale of 1024 rounds nothing."""
    weights = []
    for scale in (1.0, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        settings = dict(opt=dict(fused=True), method="step", dense_fraction=0.25, mvue=False)
        model, optimizer, recipe = make(torch.optim.AdamW, 1e-2, **settings)
        for step in range(6):
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert recipe.phase == "sparse"
        weights.append(model.fc1.weight.detach())
    assert torch.equal(*weights)


def test_step_never_leaves_a_moment_below_zero_for_the_optimizer_to_take_the_root_of():
    """Frozen at zero, what is taken off before the step is what the step adds, but for its rounding."""
    weight = torch.nn.Parameter(torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([weight], 1e-3)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    frozen = FrozenSecondMoment(optimizer, [weight])
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    frozen.before_step()
    optimizer.step()
    assert weight.isfinite().all() and (optimizer.state[weight]["exp_avg_sq"] >= 0).all()


def test_step_leaves_weights_alone_that_get_no_gradient():
    model, optimizer, recipe = make(torch.optim.AdamW, 1e-2, method="step", dense_fraction=0.25, mvue=False)
    run(model, optimizer, 4)
    assert recipe.phase == "sparse"
    weight = model.fc1.weight.detach().clone()
    moment = optimizer.state[model.fc1.weight]["exp_avg_sq"].clone()
    model.fc2(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert recipe.step == 5 and torch.equal(model.fc1.weight, weight)
    assert torch.equal(optimizer.state[model.fc1.weight]["exp_avg_sq"], moment)


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_step_goes_on_from_an_older_state_with_the_divisor_that_it_had_then(optimizer_first):
    """States of earlier versions say nothing of the bias: they held the second moment alone."""
    settings = dict(method="step", dense_fraction=0.5, mvue=False)
    model, optimizer, recipe = make(torch.optim.AdamW, 1e-2, **settings)
    run(model, optimizer, 8)
    state = recipe.state_dict()
    second = state["frozen_moment"][0]
    older = {key: value for key, value in state.items() if key != "frozen_corrections"}
    again, other, resumed = make(torch.optim.AdamW, 1e-2, **settings)
    again.load_state_dict(model.state_dict())
    loads = [(other, optimizer.state_dict()), (resumed, older)]
    for one, saved in loads if optimizer_first else reversed(loads):
        one.load_state_dict(saved)
    run(again, other, 2, first=8)
    expected = second * ((1 - 0.999**10) / (1 - 0.999**8))
    torch.testing.assert_close(other.state[again.fc1.weight]["exp_avg_sq"], expected, **ANOTHER_ORDER)
    with pytest.raises(Sparse24Error, match="'frozen_corrections' does not hold what these layers need"):
        resumed.load_state_dict(state | {"frozen_corrections": [0.5, math.nan]})


def test_step_needs_an_optimizer_with_a_second_moment():
    with pytest.raises(Sparse24Error, match="freezes Adam's second moment; SGD"):
        make(method="step")
    with pytest.raises(Sparse24Error, match="freezes Adam's second moment, which Adamax does not keep as 'exp_avg_sq'"):
        make(torch.optim.Adamax, method="step")


def test_step_looks_at_what_an_optimizer_of_somebody_keeps():
    """Lion, for one, has betas and a first moment alone: known once there is a state, by its first step."""

    class Lion(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)
            self.param_groups[0]["betas"] = (0.9, 0.99)

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)

    model, optimizer, recipe = make(Lion, 1e-2, method="step", dense_fraction=0.5)
    model(torch.randn(8, 16)).sum().backward()
    with pytest.raises(Sparse24Error, match="which Lion does not keep"):
        optimizer.step()
    recipe.detach()
    with pytest.raises(Sparse24Error, match="which Lion does not keep"):
        sparse24.Recipe(model, optimizer, total_steps=12, method="step")


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
        torch.testing.assert_close(model.fc1(x), x @ expected.t() + model.fc1.bias, **ANOTHER_ORDER)
        model.fc1.weight.grad = None
        model.fc1(x).sum().backward()
        torch.testing.assert_close(model.fc1.weight.grad, x.sum(0).expand(32, 16), **ANOTHER_ORDER)
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
    packed = model.fc1.packed.clone()
    for step in range(8):
        run(plain, reference, 1, step)
        run(model, optimizer, 1, step)
    assert torch.equal(plain.fc1.weight, model.fc1.weight)
    assert torch.equal(model.fc1.packed, packed), "nothing multiplies with packed forms, so none are made"
    assert recipe.metrics()["flip_rate"] > 0 and recipe.phase == "dense"
    assert torch.equal(ops.transposable_mask(model.fc1.weight).view(torch.uint8), model.fc1.mask)


def test_sr_ste_decays_each_group_at_its_own_learning_rate():
    model = MLP()
    sparse24.sparsify(model)
    groups = [{"params": [model.fc1.weight], "lr": 0.5}, {"params": [model.fc2.weight], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    sparse24.Recipe(model, optimizer, total_steps=4, method="sr-ste", decay=0.2)
    expected = []
    for layer, lr in ((model.fc1, 0.5), (model.fc2, 0.1)):
        layer.weight.grad = torch.zeros_like(layer.weight)
        weight = layer.weight.detach()
        expected.append(torch.where(kept(layer), weight, weight * (1 - lr * 0.2)))
    optimizer.step()
    torch.testing.assert_close([model.fc1.weight.detach(), model.fc2.weight.detach()], expected)
