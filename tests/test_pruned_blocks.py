"""Blocks that prune their activation, copied, changed and called in other ways: the same function, or a word."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from forks import context
from rounding import MANY_SUMS
from tiny_models import Adapter
from torch import nn

import sparse24
from sparse24 import Sparse24Error, Sparse24Warning, functional
from sparse24.testing import assert_same_bits


class Block(nn.Module):
    """Its input has a name of its own."""

    def __init__(self, width=16, hidden=64):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = nn.ReLU()

    def forward(self, hidden_states):
        return self.fc2(self.act(self.fc1(hidden_states)))


class InPlace(Block):
    def forward(self, hidden_states):
        return self.fc2(torch.relu_(self.fc1(hidden_states)).square_())


def pruned(block):
    sparse24.sparsify(nn.Sequential(block), operand="activation", backend="sparse")
    return block


def by_hand(block, x):
    """Two of each four of ReLU's values, by sorting; there are no ties but zeros."""
    h = F.relu(block.fc1(x))
    groups = h.unflatten(-1, (-1, 4))
    return block.fc2(h * torch.zeros_like(groups).scatter(-1, groups.topk(2).indices, 1).flatten(-2))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return pruned(Block())


@pytest.fixture
def x():
    return torch.randn(3, 7, 16)


# -- copies -----------------------------------------------------------------------------------------------------------


def adapt(block):
    block.fc2 = Adapter(block.fc2)


def parametrize(block):
    nn.utils.parametrizations.weight_norm(block.fc2)


def prune_weights(block):
    from torch.nn.utils import prune

    prune.l1_unstructured(block.fc1, "weight", 0.5)


@pytest.mark.fault(56)
@pytest.mark.parametrize("change", [adapt, parametrize, prune_weights], ids=lambda change: change.__name__)
def test_a_copy_of_a_block_with_changed_layers_prunes_as_the_block_does(block, x, change):
    change(block)
    if change is prune_weights:
        block.fc1.weight = block.fc1.weight.detach()  # torch copies leaves only
    assert_same_bits(copy.deepcopy(block)(x), block(x))


@pytest.mark.fault(56, 109)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU()], ids=["relu", "gelu"])
def test_a_copy_of_a_block_that_runs_dense_runs_dense_and_says_so_too(block, x, act):
    block.act = act
    with pytest.warns(Sparse24Warning, match="runs dense from here on"):
        y = block(x)
    twin = copy.deepcopy(block)
    with pytest.warns(Sparse24Warning, match="runs dense from here on"):
        assert_same_bits(twin(x), y)
    again = copy.deepcopy(twin)
    with pytest.warns(Sparse24Warning, match="runs dense from here on"):
        assert_same_bits(again(x), y)
    sparse24.densify(again)
    assert_same_bits(again(x), y)


@pytest.mark.fault(109)
def test_each_change_gets_its_own_warning(block, x):
    own, pruned_y = block.act, block(x)
    for _ in range(2):
        block.act = nn.GELU()
        with pytest.warns(Sparse24Warning, match="runs dense"):
            block(x)
        block.act = own
        assert_same_bits(block(x), pruned_y)


def test_a_pickle_of_code_that_has_changed_is_refused(block, monkeypatch):
    made = block.__reduce_ex__(4)
    monkeypatch.setattr(Block, "forward", InPlace.forward)
    with pytest.raises(Sparse24Error, match="squared_relu here, and was relu.*Load the state_dict"):
        made[0](*made[1]).__setstate__(made[2])


@pytest.mark.fault(110)
def test_data_parallel_is_refused(block):
    with pytest.raises(Sparse24Error, match="replicas of Block.*DistributedDataParallel"):
        block._replicate_for_data_parallel()


# -- ways to call -----------------------------------------------------------------------------------------------------


def test_the_input_may_be_passed_by_the_name_that_the_block_gives_it(block, x):
    y = block(x)
    assert_same_bits(block(hidden_states=x), y)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        block(x=x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(hidden_states=x), y, **MANY_SUMS)
    weights = Block()
    sparse24.sparsify(weights)
    assert_same_bits(weights(hidden_states=x), weights(x))


@pytest.mark.fault(109)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiler_says_that_a_changed_block_runs_dense(block, x, fullgraph):
    torch.compiler.reset()
    block.act = nn.Tanh()
    with pytest.warns(Sparse24Warning, match="Block is not what sparsify.* found"):
        y = torch.compile(block, backend="eager", fullgraph=fullgraph)(x)
    torch.testing.assert_close(y, block.fc2(torch.tanh(block.fc1(x))), **MANY_SUMS)
    with pytest.warns(Sparse24Warning, match="Block is not what sparsify.* found"):
        torch.export.export(block, (x,))


def test_a_trace_computes_the_pruned_function_of_any_batch(block, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        traced = torch.jit.trace(block, x)
    other = torch.randn(2, 5, 16)
    torch.testing.assert_close(traced(other), by_hand(block, other), **MANY_SUMS)


@pytest.mark.parametrize("runs", ["as one function", "layer by layer", "dense"])
def test_jagged_inputs_give_jagged_outputs(block, runs):
    if runs == "layer by layer":
        block.fc1.register_forward_hook(lambda module, args, out: None)
    elif runs == "dense":
        sparse24.densify(block)
    parts = [torch.randn(2, 16), torch.randn(5, 16)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    flat = torch.cat(parts).requires_grad_()
    y, wanted = block(x), block(flat)
    assert y.is_nested and torch.equal(y.offsets(), x.offsets())
    torch.testing.assert_close(y.values(), wanted, **MANY_SUMS)
    (gradient,), (expected,) = (torch.autograd.grad(out.sum(), x_) for out, x_ in ((y.values(), x), (wanted, flat)))
    torch.testing.assert_close(gradient.values(), expected, **MANY_SUMS)


@pytest.mark.fault(110)
def test_what_cannot_be_pruned_is_refused_with_a_way_out(block, x):
    with pytest.raises(Sparse24Error, match="symbolic_trace; torch.export.export"):
        torch.fx.symbolic_trace(block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        with pytest.raises(Sparse24Error, match="jit.script; torch.jit.trace and .*export keep.*densify"):
            torch.jit.script(nn.Sequential(block))
        sparse24.densify(dense := copy.deepcopy(block))
        scripted = torch.jit.script(dense)
        assert_same_bits(scripted(x), dense(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of a prototype
        nested = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(5, 16)])
    with pytest.raises(Sparse24Error, match="layout torch.jagged.*make such a one by .*or pass padded"):
        block(nested)
    block.fc1, block.fc2 = nn.Linear(16, 62), nn.Linear(62, 16)
    for _ in range(2):
        with pytest.raises(Sparse24Error, match=r"features in multiples of 4, got .*62"):
            block(x)
        block.fc1.register_forward_hook(lambda module, args, out: None)


def test_an_activation_in_place_does_not_change_what_is_kept(x):
    """Squares of these are equal, or infinite: who chose by them would keep others."""
    block = pruned(InPlace(4, 4)).half()
    with torch.no_grad():
        block.fc1.weight.copy_(torch.eye(4)), block.fc2.weight.copy_(torch.eye(4))
        block.fc1.bias.zero_(), block.fc2.bias.zero_()
    x = torch.tensor([[300.0, 310.0, 320.0, 330.0], [1e-5, 2e-5, 3e-5, 4e-5], [1.0, 2.0, 3.0, 4.0]]).half()
    places = []
    block.fc2.register_forward_pre_hook(lambda module, args: places.append(args[0] != 0))
    block(x)
    assert places[0].tolist() == [[False, False, True, True], [False] * 4, [False, False, True, True]]


# -- what sparsify and densify say ------------------------------------------------------------------------------------


@pytest.mark.fault(36)
def test_gpus_without_sparse_kernels_stay_dense_with_a_warning_or_raise_when_forced(monkeypatch):
    monkeypatch.setattr(sparse24.convert.choice, "why_unavailable", lambda *_: "no 2:4 products on cuda:0: too old")
    model = nn.Sequential(Block())
    with pytest.warns(Sparse24Warning, match="left the model dense.*too old") as said:
        report = sparse24.sparsify(model, operand="activation")
    assert not report and said[0].filename == __file__
    with pytest.raises(Sparse24Error, match="too old"):
        sparse24.sparsify(model, operand="activation", backend="sparse")


def test_experts_are_left_dense_unless_they_are_named():
    model = nn.ModuleDict({"experts": nn.ModuleList([Block()]), "shared": Block()})
    report = sparse24.sparsify(model, operand="activation")
    assert report.converted == ["shared.fc1", "shared.fc2"] and "expert" in dict(report.skipped)["experts.0.fc1"]
    report = sparse24.sparsify(model, include="experts*", operand="activation")
    assert report.converted == ["experts.0.fc1", "experts.0.fc2"]


def test_masked_weights_do_not_stand_for_pruned_activations(block):
    with pytest.warns(Sparse24Warning, match="no longer prune their activation") as said:
        assert sparse24.densify(nn.Sequential(block), masked=True) == ["0"]
    assert type(block) is Block and said[0].filename == __file__


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_callbacks_say_that_pruned_activations_need_none(trainer):
    pytest.importorskip(trainer)
    callback = importlib.import_module(f"sparse24.integrations.{trainer}").Sparse24Callback
    with pytest.raises(Sparse24Error, match="have none; call sparse24.sparsify.*before training.*leave out"):
        callback(operand="activation")


def test_the_function_names_what_does_not_fit():
    x, up, down = torch.randn(4, 16), torch.randn(64, 16), torch.randn(16, 64)
    run = functional.sparse_activation_mlp
    for call, words in (
        (lambda: run(x[0, 0], up, down), "x must be .*without dimensions"),
        (lambda: run(x, up, down, "gelu"), "activation must be relu or squared_relu, got 'gelu'"),
        (lambda: run(x, up, down, None), "activation must be"),
        (lambda: run(x, up, down.long()), "down must be of floating point, got torch.int64"),
        (lambda: run(x, up.to("meta"), down), "up is on meta but x is on cpu"),
        (lambda: run(x, up, down, bias_up=torch.zeros(1)), r"bias_up must have shape \(64,\), got \(1,\)"),
        (lambda: run(x, up, down, bias_down=torch.zeros(16, 1)), r"bias_down must have shape \(16,\), got \(16, 1\)"),
        (lambda: functional.kept_activations(up[:, :6]), "features in multiples of 4"),
    ):
        with pytest.raises(Sparse24Error, match=words):
            call()


# -- ranks ------------------------------------------------------------------------------------------------------------


def _gradients(rank, file, out):
    torch.manual_seed(0)
    block = pruned(Block())  # before there are ranks
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    block(torch.randn(3, 8, 16)).sum().backward()
    out.put((rank, block.fc1.weight.grad.tolist(), block.fc1.bias.grad.tolist()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_of_one_seed_draw_different_noise_though_sparsify_came_before_them(tmp_path):
    queue = context().Queue()
    processes = [context().Process(target=_gradients, args=(rank, tmp_path / "store", queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    (_, weight0, bias0), (_, weight1, bias1) = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert bias0 == bias1 and weight0 != weight1
