"""Sparse training on a GPU: what the CPU tests cannot see. Run with `pytest -m gpu`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse24
from sparse24 import Recipe, SparseGatedMLP, SparseLinear

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
        ours = (layer.mask.view(torch.uint16), layer.packed, layer.E, layer.packed_t, layer.E_t)
        for a, b in zip(ours, on_cpu, strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("mvue", [True, False])
def test_forward_and_gradients_are_those_of_the_masked_dense_layer(mvue):
    block = SparseGatedMLP(WIDTH, HIDDEN, device="cuda", dtype=torch.bfloat16, mvue=mvue)
    x = batch(0).bfloat16().requires_grad_()
    y = block(x)
    with torch.no_grad():
        weights = [
            torch.where(sparse24.ops.unpack_mask(layer.mask), layer.weight, 0).float()
            for layer in (block.gate_proj, block.up_proj, block.down_proj)
        ]
        exact = (F.silu(x.float() @ weights[0].t()) * (x.float() @ weights[1].t())) @ weights[2].t()
    torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=5e-2)
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
    torch.testing.assert_close(compiled, train(twin, twin_optimizer, 20), rtol=2e-2, atol=2e-2)


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
