"""torch.compile of sparsified models: one graph, no recompilation as training goes on, and the same training."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MLP, gpt2, llama, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import Recipe

# Traces forward and backward ahead of time like the default backend, without compiling C++ for minutes.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(make_model, **settings):
    model = make_model()
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe(model, optimizer, total_steps=8, mask_interval=2, **settings)
    return model, optimizer, recipe


@pytest.mark.parametrize("make_model", [gpt2, llama])
@pytest.mark.fault(53)
def test_compiled_training_is_eager_training_in_one_graph(make_model):
    """No graph break, and no recompilation but one when the dense phase begins."""
    losses = []
    for compiled in (False, True):
        model, optimizer, recipe = make(lambda: make_model(1), dense_fraction=0.25)
        counter = CompileCounterWithBackend(BACKEND)
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        torch.manual_seed(0)
        losses.append([])
        for _ in range(8):
            logits = forward(input_ids=tokens(), use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens().flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        if compiled:
            assert counter.frame_count == 2, "one graph for the sparse phase and one for the dense"
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


@pytest.mark.fault(53)
def test_dynamic_batch_compiles_once():
    """Another batch size is not another graph."""
    model, optimizer, _ = make(MLP, dense_fraction=0)
    counter = CompileCounterWithBackend(BACKEND)
    forward = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (8, 12, 20):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(forward(x), model(x))
        forward(x).sum().backward()
        optimizer.step()
    assert counter.frame_count == 1


def test_compiled_graph_sees_new_masks_and_weights_without_recompiling():
    model, optimizer, _ = make(MLP, dense_fraction=0)
    counter = CompileCounterWithBackend(BACKEND)
    forward, x = torch.compile(model, backend=counter, fullgraph=True), torch.randn(8, 16)
    forward(x)
    for _ in range(4):
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(forward(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.fault(54)
def test_checkpointed_block_inside_a_compiled_function():
    """Recomputation by the compiler does not draw the noise twice."""
    model, _, _ = make(MLP, dense_fraction=0)
    x, gradients = torch.randn(8, 16), []

    def recomputed(x):
        return checkpoint(model, x, use_reentrant=False)

    for run in (model, torch.compile(recomputed, backend=BACKEND, fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(3)
        run(x).square().mean().backward()
        gradients.append(model.fc1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_inside_a_compiled_function(dtype):
    model, _, _ = make(MLP, dense_fraction=0)
    x = torch.randn(8, 16)

    def run(x):
        with torch.autocast("cpu", dtype):
            return model(x)

    torch.testing.assert_close(torch.compile(run, backend=BACKEND, fullgraph=True)(x), run(x))
