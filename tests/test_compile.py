"""torch.compile of sparsified models: one graph, no recompilation as training goes on, and the same training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from rounding import ANOTHER_ORDER, ROUNDED_TO_16
from tiny_models import MLP, gpt2, llama, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import Recipe, Sparse24Warning, SparseGatedMLP, ops

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
    torch.testing.assert_close(losses[1], losses[0], **ANOTHER_ORDER)


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


@pytest.mark.fault(53)
@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_dynamic_batch_of_a_real_model_compiles_once(make_model):
    """Batch and length change; steps are taken and masks searched in between."""
    model, optimizer, _ = make(lambda: make_model(1), dense_fraction=0)
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((2, 16), (3, 16), (5, 12)):
        ids = tokens(batch, length)
        logits = forward(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits)
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.fault(53)
@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_blocks_that_run_as_one_function_and_layer_by_layer_both_compile(make_model):
    for fuse in (True, False):
        model = make_model(1)
        report = sparse24.sparsify(model, fuse=fuse)
        assert any(why == "" for why in report.fused.values()) is fuse
        counter = CompileCounterWithBackend("eager")
        forward = torch.compile(model, backend=counter, fullgraph=True)
        logits = forward(input_ids=tokens(), use_cache=False).logits
        torch.testing.assert_close(logits, model(input_ids=tokens(), use_cache=False).logits)
        assert counter.frame_count == 1
        torch._dynamo.reset()


@pytest.mark.fault(73)
def test_going_back_to_a_phase_compiles_nothing_new():
    """Sparse, dense, sparse again: the graph of a phase is kept."""
    model, optimizer, recipe = make(MLP, dense_fraction=0.5)
    counter = CompileCounterWithBackend(BACKEND)
    forward, x = torch.compile(model, backend=counter, fullgraph=True), torch.randn(8, 16)
    early = recipe.state_dict()
    for _ in range(2):
        for step in range(8):
            torch.testing.assert_close(forward(x), model(x))
            assert recipe.phase == ("sparse" if step < 4 else "dense")
            forward(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        recipe.load_state_dict(early)
    assert counter.frame_count == 2


@pytest.mark.parametrize("method", ["ste", "sr-ste", "step", "s-ste", "dense"])
def test_every_method_compiles_in_one_graph_a_phase(method):
    model, optimizer, recipe = make(MLP, method=method, dense_fraction=0.5, mvue=False)
    counter = CompileCounterWithBackend(BACKEND)
    forward, phases = torch.compile(model, backend=counter, fullgraph=True), set()
    for step in range(8):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(forward(x), model(x))
        phases.add(recipe.phase)
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == len(phases)


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


@pytest.mark.fault(54)
@pytest.mark.parametrize("make_model", [gpt2, llama])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_real_model_changes_no_gradient(make_model, reentrant):
    """As transformers switches it on; forward runs twice and draws nothing."""
    gradients = []
    for checkpointed in (False, True):
        model = make_model(2)
        sparse24.sparsify(model)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.fault(53)
@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_real_models_train_compiled_by_inductor_on_a_gpu(make_model):
    """The default backend, one graph a phase, under autocast: losses are those of eager training."""
    losses = []
    for compiled in (False, True):
        model = make_model(1, 128).cuda()
        sparse24.sparsify(model, backend="sparse")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        Recipe(model, optimizer, total_steps=8, mask_interval=2, dense_fraction=0.25, mvue=False)
        counter = CompileCounterWithBackend("inductor")
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        losses.append([])
        for step in range(8):
            ids = tokens(8, 32, seed=step).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                logits = forward(input_ids=ids, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert counter.frame_count == 2
    torch.testing.assert_close(losses[1], losses[0], **ROUNDED_TO_16)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_inside_a_compiled_function(dtype):
    model, _, _ = make(MLP, dense_fraction=0)
    x = torch.randn(8, 16)

    def run(x):
        with torch.autocast("cpu", dtype):
            return model(x)

    torch.testing.assert_close(torch.compile(run, backend=BACKEND, fullgraph=True)(x), run(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("precision", [None, "fp8", "fp8-hybrid"])
@pytest.mark.parametrize("make_model", [MLP, lambda width, hidden: SparseGatedMLP(width, hidden).float()])
@pytest.mark.fault(53)
def test_blocks_compile_in_one_graph_with_and_without_gradients(make_model, precision, grad):
    torch.manual_seed(0)
    model = make_model(64, 128)
    if isinstance(model, SparseGatedMLP):
        sparse24.densify(model)
    sparse24.sparsify(model, precision=precision)
    x = torch.randn(8, 64)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(model, backend=BACKEND, fullgraph=True)(x), model(x))


@pytest.mark.fault(79)
def test_a_compiled_average_follows_masks_and_phase():
    model, optimizer, recipe = make(MLP, dense_fraction=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    forward, x = torch.compile(average.module, backend=BACKEND), torch.randn(8, 16)
    for _ in range(8):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        with torch.no_grad():
            out, plain = forward(x), MLP()
            plain.load_state_dict(average.module.state_dict())
            if recipe.phase == "sparse":
                for name in ("fc1", "fc2"):
                    mask = ops.unpack_mask(model.get_submodule(name).mask.view(torch.uint16))
                    plain.get_submodule(name).weight.mul_(mask)
            torch.testing.assert_close(out, plain(x), **ANOTHER_ORDER)
    assert recipe.phase == "dense"


def test_a_compiled_copy_in_one_graph_is_told_how():
    model, *_ = make(MLP)
    average, x = copy.deepcopy(model), torch.randn(8, 16)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="once=True"):
        torch.compile(average, backend=BACKEND, fullgraph=True)(x)
    torch._dynamo.reset()
    sparse24.follow(average, like=model, once=True)
    torch.testing.assert_close(torch.compile(average, backend=BACKEND, fullgraph=True)(x), model(x))


@pytest.mark.fault(80)
def test_a_compiled_model_tells_of_weights_of_other_masks():
    x = torch.randn(8, 16)
    model, optimizer, _ = make(MLP, dense_fraction=0)
    saved = copy.deepcopy(model.state_dict())
    forward = torch.compile(model, backend=BACKEND, fullgraph=False)
    for _ in range(6):
        (forward(x) * 30).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.load_state_dict(saved)
    with pytest.warns(Sparse24Warning, match="saved under other masks"):
        forward(x)


def compile_in_a_compiled_loop(model):
    def step(x):
        loss = torch.compile(model, backend="eager")(x).sum()
        loss.backward()
        return loss

    return torch.compile(step, backend="eager")


@pytest.mark.fault(53)
@pytest.mark.parametrize("compiled_autograd", [False, True])
def test_a_model_is_compiled_inside_of_compiled_code(compiled_autograd):
    """torch.compile(model) registers a module, which our hook would look at while it has no attributes yet."""
    model, x = MLP(), torch.randn(8, 16)
    sparse24.sparsify(model, mvue=False)
    expected = model(x).sum()
    gradients = torch.autograd.grad(expected, [*model.parameters()])
    with torch._dynamo.config.patch(compiled_autograd=compiled_autograd):
        torch.testing.assert_close(compile_in_a_compiled_loop(model)(x), expected)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.fault(53)
def test_a_compiled_optimizer_step_compiles_nothing_of_the_recipe():
    """What it does on the host with each layer would be compiled anew for each, up to the compiler's limit."""
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16 * n) for n in range(1, 6)))
    sparse24.sparsify(model, include="*")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe(model, optimizer, total_steps=8, mask_interval=2)
    step = torch.compile(optimizer.step, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            step()
    assert recipe.step == 4 and sparse24.verify(model)
