"""Sparse training on a GPU: what the CPU tests cannot see. Run with `pytest -m gpu`."""

import pytest
import torch
import torch.nn.functional as F
from rounding import EPS16, ROUNDED_TO_16
from torch import nn

import sparse24
from sparse24 import Recipe, SparseGatedMLP, SparseLinear
from sparse24.testing import assert_as_accurate

pytestmark = pytest.mark.gpu
WIDTH, HIDDEN = 256, 512


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def make(seed=0, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(Block(), Block()).cuda()
    sparse24.sparsify(model, backend="sparse", **settings)
    return model


def batch(step, tokens=512):
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(step)).cuda()


def train(model, optimizer, steps, dtype=torch.bfloat16, scaler=None, forward=None, first=0):
    losses = []
    for step in range(first, first + steps):
        x = batch(step)
        with torch.autocast("cuda", dtype):
            loss = F.mse_loss((forward or model)(x), x.flip(-1))
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options", [dict(fused=True), dict(foreach=True), dict(capturable=True, foreach=True)], ids=str
)
def test_autocast_training_learns_and_stays_two_of_four(options):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    recipe = Recipe(model, optimizer, total_steps=60, mask_interval=10)
    losses = train(model, optimizer, 45)
    assert losses[-1] < losses[0] and sparse24.verify(model).phase == "sparse" and sparse24.verify(model)
    assert recipe.metrics()["flip_rate"] > 0
    train(model, optimizer, 15, first=45)
    assert recipe.phase == "dense"


@pytest.mark.fault(58)
def test_fused_adam_under_a_scaler_skips_and_scales_as_told():
    """Half precision with fused Adam: Inf skips the step, and the decay is scaled like the gradient."""
    model = make(dtype=torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    recipe = Recipe(model, optimizer, total_steps=40, mask_interval=5, dense_fraction=0)
    train(model, optimizer, 30, torch.float16, torch.amp.GradScaler("cuda", init_scale=2.0**40))
    assert 0 < recipe.step < 30 and sparse24.verify(model)
    assert all(p.isfinite().all() for p in model.parameters())


def test_masks_and_packed_values_are_those_of_the_cpu():
    model = make()
    for layer in (m for m in model.modules() if isinstance(m, SparseLinear)):
        weight = layer.weight.detach().cpu()
        on_cpu = sparse24.ops.prune_compress(weight, dtype=torch.bfloat16)
        ours = (layer.mask.view(torch.uint16), layer.packed, layer.flat_E(), layer.packed_t, layer.E_t)
        for a, b in zip(ours, on_cpu, strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("mvue", [True, False])
def test_forward_and_gradients_are_those_of_the_masked_dense_layer(mvue):
    block = SparseGatedMLP(WIDTH, HIDDEN, device="cuda", dtype=torch.bfloat16, mvue=mvue)
    x = batch(0).bfloat16().requires_grad_()
    y = block(x)
    with torch.no_grad():
        weights = [
            torch.where(sparse24.ops.unpack_mask(layer.mask), layer.weight, 0).t()
            for layer in (block.gate_proj, block.up_proj, block.down_proj)
        ]
        plain = (F.silu(x @ weights[0]) * (x @ weights[1])) @ weights[2]
        gate, up, down = (weight.double() for weight in weights)
        exact = (F.silu(x.double() @ gate) * (x.double() @ up)) @ down
    assert_as_accurate(y, plain, exact)
    y.sum().backward()
    assert block.gate_proj.weight.grad.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.fault(53)
def test_compiled_training_with_the_default_backend():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    Recipe(model, optimizer, total_steps=20, mask_interval=5, mvue=False)
    twin = make()
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, fused=True)
    Recipe(twin, twin_optimizer, total_steps=20, mask_interval=5, mvue=False)
    compiled = train(model, optimizer, 20, forward=torch.compile(model, fullgraph=True))
    torch.testing.assert_close(compiled, train(twin, twin_optimizer, 20), **ROUNDED_TO_16)


@pytest.mark.fault(35)
def test_captured_graph_replays_with_new_weights_masks_and_noise():
    """Forward and backward are captured; packing between replays goes into the same buffers."""
    model = make().bfloat16()
    sparse24.refresh(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    Recipe(model, optimizer, total_steps=100, mask_interval=1, dense_fraction=0)
    x = batch(0).bfloat16()

    def step():
        F.mse_loss(model(x), x.flip(-1)).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    first = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad.zero_()
    graph.replay()
    assert any(not torch.equal(a, p.grad) for a, p in zip(first, model.parameters(), strict=True)), "fresh noise"
    optimizer.step()
    assert sparse24.verify(model)
    expected = model(x)
    for p in model.parameters():
        p.grad.zero_()
    graph.replay()
    assert torch.equal(expected, model(x))


class CapturedStep:
    """A whole training step in a CUDA graph: forward, backward, masked decay, fused AdamW and packing."""

    def __init__(self, lr=1e-3, warm_up=3, **settings):
        self.model = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True, capturable=True)
        self.recipe = Recipe(self.model, self.optimizer, **(dict(total_steps=1000, mask_interval=4) | settings))
        self.x = batch(0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in range(warm_up):  # real steps, which count
                self.x.copy_(batch(step))
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.capture()

    def capture(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with self.recipe.capturing(), torch.cuda.graph(self.graph):
            self.step()

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.mse_loss(self.model(self.x), self.x.flip(-1))
        loss.backward()
        self.optimizer.step()

    def replay(self, step):
        self.x.copy_(batch(step))
        self.recipe.replay(self.graph)


@pytest.mark.fault(35)
def test_captured_training_steps_are_the_eager_ones():
    """Counting, mask searches and packing included; without MVUE, whose noise would differ."""
    captured = CapturedStep(mvue=False, decay=1e-3)
    twin = make()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, fused=True, capturable=True)
    recipe = Recipe(twin, optimizer, total_steps=1000, mask_interval=4, mvue=False, decay=1e-3)
    assert captured.recipe.step == 3
    for step in range(3, 12):
        captured.replay(step)
    train(twin, optimizer, 12)
    assert captured.recipe.step == recipe.step == 12
    assert captured.recipe.last_search == recipe.last_search == 12
    assert sparse24.verify(captured.model)
    for ours, theirs in zip(captured.model.parameters(), twin.parameters(), strict=True):
        # weights of bf16 may round to either neighbour; near zero, a tenth of a step of lr 1e-3
        torch.testing.assert_close(ours, theirs, rtol=2 * EPS16, atol=1e-4)
    ours, theirs = (r.monitor.history() for r in (captured.recipe, recipe))
    assert [step for step, _ in ours] == [step for step, _ in theirs] == [4, 8, 12]


@pytest.mark.fault(35)
@pytest.mark.parametrize("mvue", [False, True])
def test_captured_steps_with_the_decay_in_backward_follow_its_schedule(mvue):
    """A learning rate of 0 and an input of 0: all that is in the gradients is the decay of the day."""
    settings = dict(decay=0.5, decay_schedule="linear", decay_in="backward", dense_fraction=0, total_steps=20)
    captured = CapturedStep(lr=0.0, mvue=mvue, **settings)
    for step in range(3, 12):
        now = captured.recipe.current_decay
        assert now == pytest.approx(0.5 * step / 20)
        captured.x.zero_()
        captured.recipe.replay(captured.graph)
        for layer in captured.recipe.layers.values():
            kept = sparse24.ops.unpack_mask(layer.mask)
            if layer.weight is captured.model[0].fc1.weight:  # whose input is 0: dW is 0 but for the decay
                torch.testing.assert_close(layer.weight.grad, torch.where(kept, 0, now * layer.weight.detach()))
            else:
                assert layer.weight.grad.isfinite().all()
    assert captured.recipe.step == 12 and sparse24.verify(captured.model)


@pytest.mark.fault(35)
def test_replays_of_a_captured_step_draw_new_noise():
    captured = CapturedStep(lr=0.0, decay=0.0)
    gradients = []
    for _ in range(3):
        captured.replay(0)
        gradients.append(captured.model[0].fc1.weight.grad.clone())
    assert not torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[1], gradients[2])
    torch.manual_seed(7)
    captured.replay(0)
    first = captured.model[0].fc1.weight.grad.clone()
    torch.manual_seed(7)
    captured.replay(0)
    assert torch.equal(first, captured.model[0].fc1.weight.grad), "torch's generator rules it"


@pytest.mark.fault(35)
def test_captured_step_is_refused_once_it_is_no_longer_the_next_one():
    captured = CapturedStep(total_steps=6, dense_fraction=1 / 3)
    captured.replay(3)
    assert captured.recipe.phase == "dense"
    with pytest.raises(sparse24.Sparse24Error, match="step of the sparse phase.*the next step is dense.*capture it"):
        captured.replay(4)
    captured.capture()
    captured.replay(4)
    assert captured.recipe.step == 5
    captured = CapturedStep()
    captured.recipe.decay = 1.0
    with pytest.raises(sparse24.Sparse24Error, match="with decay 1; capture it anew"):
        captured.replay(3)


@pytest.mark.fault(35)
def test_capturing_the_optimizers_step_unannounced_is_refused():
    captured = CapturedStep()
    with pytest.raises(sparse24.Sparse24Error, match="recipe.capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured.step()
    captured.replay(3)


def test_s_ste_multiplies_sparse_and_learns():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    recipe = Recipe(model, optimizer, total_steps=30, mask_interval=10, method="s-ste")
    losses = train(model, optimizer, 30)
    assert losses[-1] < losses[0] and recipe.phase == "sparse" and sparse24.verify(model)
    layer, x = model[0].fc1, batch(0).bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    exact = x.double() @ layer.soft.bfloat16().double().t() + layer.bias.double()
    plain = F.linear(x, layer.soft.bfloat16(), layer.bias.bfloat16())
    assert_as_accurate(y, plain, exact)


def test_flip_counts_do_not_wait_for_the_device():
    """A search while the GPU is busy returns at once; the counts arrive later."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe(model, optimizer, total_steps=100, mask_interval=1, dense_fraction=0)
    train(model, optimizer, 3)
    torch.cuda.synchronize()
    for layer in recipe.layers.values():
        layer.weight.grad = torch.randn_like(layer.weight)
    busy = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    busy.record()
    optimizer.step()
    assert not busy.query(), "the step came back while the GPU was still asleep"
    assert recipe.metrics()["flip_rate"] > 0


def test_float32_outside_autocast_is_the_same_function():
    model = make()
    x = batch(0)
    with pytest.warns(sparse24.Sparse24Warning, match="packed for torch.bfloat16 but called in torch.float32"):
        y = model(x)
    assert y.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.fault(56)
def test_move_between_devices_packs_anew_and_keeps_the_mask():
    model = make()
    mask = model[0].fc1.mask.clone()
    model.cpu()
    assert model[0].fc1.packed.device.type == "cpu" and sparse24.verify(model)
    model.cuda()
    assert torch.equal(model[0].fc1.mask, mask) and sparse24.verify(model)
