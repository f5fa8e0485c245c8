"""Recipe under any optimizer: whatever its implementation, with closures, parameter groups and a GradScaler."""

import math

import pytest
import torch
from rounding import ANOTHER_ORDER, MANY_SUMS
from tiny_models import MLP
from tiny_recipes import kept, make, run
from torch import nn

import sparse24
from sparse24 import Recipe

# -- optimizers -----------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(*weights, **MANY_SUMS)


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
    torch.testing.assert_close(*moments, **ANOTHER_ORDER)


@pytest.mark.parametrize("fused", [False, True])
def test_decay_of_weights_under_a_gradient_scaler_is_that_without(fused):
    """A step that is taken decays, whether or not the optimizer was told that nothing is infinite."""
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, optimizer, _ = make(torch.optim.AdamW, opt=dict(fused=fused), decay=0.5, method="sr-ste", mvue=False)
        if scaler is None:
            model(torch.randn(8, 16, generator=torch.Generator().manual_seed(0))).square().sum().backward()
            optimizer.step()
        else:
            scaled_step(model, optimizer, scaler)
        weights.append(model.fc1.weight.detach())
    torch.testing.assert_close(*weights, **ANOTHER_ORDER)


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
    torch.testing.assert_close(*moments, **ANOTHER_ORDER)


@pytest.mark.parametrize("method", ["fst", "sr-ste"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.fault(58)
def test_step_that_the_scaler_skips_changes_and_counts_nothing(fused, method):
    """No decay, no count, no search on Inf or NaN; fused optimizers run their hooks all the same."""
    model, optimizer, recipe = make(
        torch.optim.AdamW, opt=dict(fused=fused), decay=0.5, mask_interval=1, method=method, mvue=False
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    scaled_step(model, optimizer, scaler, poison=True)
    assert recipe.step == 0 and recipe.metrics()["flip_rate"] == 0
    assert all(torch.equal(t, before[n]) for n, t in (*model.named_parameters(), *model.named_buffers()))
    assert not model.fc1.weight_has_changed(), "else the next forward pass would look for a writer"
    optimizer.zero_grad()
    scaled_step(model, optimizer, scaler)
    assert recipe.step == 1 and not torch.equal(model.fc1.weight, before["fc1.weight"])


@pytest.mark.fault(11)
def test_infinite_gradients_survive_the_pruning():
    """The scaler must see them to skip the step."""
    model, optimizer, recipe = make()
    model(torch.randn(8, 16)).backward(torch.full((8, 16), math.inf))
    assert not model.fc1.weight.grad.isfinite().all() and not model.fc2.weight.grad.isfinite().all()


# -- Muon -------------------------------------------------------------------------------------------------------------


def muon_pair(model, lr):
    """Muon for the matrices, and an optimizer for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices, lr, 0.0), torch.optim.SGD([p for p in model.parameters() if p.dim() < 2], lr)]


@pytest.mark.fault(70)
def test_muon_gets_the_decay_beside_its_update():
    """Inside the gradient it would be orthogonalised. With a gradient of 0 the update is 0, and the decay is left."""
    model = MLP()
    sparse24.sparsify(model)
    muon, _ = muon_pair(model, 0.5)
    recipe = Recipe(model, muon, total_steps=4, decay=0.2)
    assert Recipe(model, muon, total_steps=4, takeover=True).decay == 1.0
    recipe = Recipe(model, muon, total_steps=4, decay=0.2, takeover=True)
    expected = {}
    for name, layer in recipe.layers.items():
        layer.weight.grad = torch.zeros_like(layer.weight)
        weight = layer.weight.detach()
        expected[name] = torch.where(kept(layer), weight, weight * (1 - 0.5 * 0.2))
    muon.step()
    for name, layer in recipe.layers.items():
        torch.testing.assert_close(layer.weight.detach(), expected[name])
        assert not layer.weight.grad.any()


@pytest.mark.fault(70)
def test_muon_trains_and_refuses_what_puts_the_decay_into_gradients():
    model = MLP()
    sparse24.sparsify(model)
    optimizers = muon_pair(model, 0.02)
    with pytest.raises(sparse24.Sparse24Error, match="where a recipe with Muon has none; leave decay_in='step'"):
        Recipe(model, optimizers, total_steps=12, decay_in="backward")
    recipe = Recipe(model, optimizers, total_steps=12, mask_interval=4, dense_fraction=0.25)
    for step in range(12):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        (model(x) - x.flip(-1)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert recipe.step == 12 and recipe.phase == "dense"
