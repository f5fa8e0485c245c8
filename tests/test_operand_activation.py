"""sparsify(operand="activation"): which blocks prune their activation, and that none computes anything else unseen."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from rounding import MANY_SUMS, ROUNDED_TO_16
from tiny_models import Adapter
from torch import nn

import sparse24
from sparse24 import Sparse24Error, Sparse24Warning
from sparse24.testing import assert_same_bits


class Block(nn.Module):
    def __init__(self, width=16, hidden=64, bias=True):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)
        self.act_fn, self.dropout = nn.ReLU(), nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(self.down_proj(self.act_fn(self.up_proj(x))))


class InSource(Block):
    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Gated(nn.Module):
    def __init__(self, width=16, hidden=64):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down_proj, self.act_fn = nn.Linear(hidden, width), nn.ReLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Smooth(Block):
    def __init__(self):
        super().__init__()
        self.act_fn = nn.GELU()


def by_hand(block, x):
    """Two of each four of what the activation makes, by sorting; the values of these tests have no ties but zeros."""
    u = block.up_proj(x)
    h = F.relu(u).square() if isinstance(block, InSource) else F.relu(u)
    groups = h.unflatten(-1, (-1, 4))
    kept = torch.zeros_like(groups).scatter(-1, groups.topk(2).indices, 1).flatten(-2)
    return block.down_proj(h * kept)


@pytest.fixture(params=[Block, InSource])
def model(request):
    return nn.Sequential(request.param(), nn.LayerNorm(16), request.param())


@pytest.fixture
def x():
    return torch.randn(3, 7, 16)


def pruned(model, **settings):
    report = sparse24.sparsify(model, operand="activation", **settings)
    return model, report


def expected(model, x):
    return by_hand(model[2], model[1](by_hand(model[0], x)))


def test_it_computes_the_pruned_function_and_trains_without_a_recipe(model, x):
    wanted = expected(model, x)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    model, report = pruned(model)
    torch.testing.assert_close(model(x), wanted, **MANY_SUMS)
    assert list(model.state_dict()) == keys and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert report and report.operand == "activation" and len(report.converted) == 4 and "2:4 activation" in str(report)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(model(x), expected(model, x), **MANY_SUMS)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average


@pytest.mark.parametrize("how", [copy.deepcopy, pickled, averaged], ids=["deepcopy", "pickle", "AveragedModel"])
def test_a_copy_computes_what_the_model_computes(model, x, how):
    model, _ = pruned(model)
    with torch.no_grad():
        model[0].up_proj.weight.mul_(-1)
    assert_same_bits(how(model)(x), model(x))


def test_another_model_with_the_weights_must_be_pruned_too_and_then_is_the_same(model, x):
    other = copy.deepcopy(model)
    model, _ = pruned(model)
    other.load_state_dict(model.state_dict())
    assert not torch.equal(other(x), model(x))  # plain torch, which nobody told
    assert_same_bits(pruned(other)[0](x), model(x))


def change_nothing(model):
    return model


def hook_a_layer(model):
    model[0].down_proj.register_forward_hook(lambda module, args, out: None)
    return model


def hook_every_module(model):
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    model.register_forward_hook(lambda *_: handle.remove())
    return model


def parametrize_a_layer(model):
    nn.utils.parametrize.register_parametrization(model[2].up_proj, "weight", nn.Identity())
    return model


def wrap_a_layer(model):
    model[0].up_proj = Adapter(model[0].up_proj)
    return model


def vmapped(model):
    return torch.vmap(model)


def called_functionally(model):
    return lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def exported(model):
    return torch.export.export(model, (torch.randn(3, 7, 16),)).module()


def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, not of what it computes
@pytest.mark.parametrize(
    "change",
    [change_nothing, hook_a_layer, hook_every_module, parametrize_a_layer, wrap_a_layer, vmapped, called_functionally,
     exported, compiled],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_however_it_is_called_it_is_the_pruned_function(model, x, change):
    model, _ = pruned(model)
    wanted = expected(model, x)
    torch.testing.assert_close(change(model)(x), wanted, **MANY_SUMS)


def test_hooks_on_layers_fire(model, x):
    model, _ = pruned(model)
    seen = []
    model[0].up_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(x).sum().backward()
    assert seen == [(3, 7, 64)] and model[0].up_proj.weight.grad is not None


@pytest.mark.parametrize("how", ["another", "hooked", "patched"])
def test_a_changed_activation_takes_effect_with_a_warning(x, how):
    block = pruned(nn.Sequential(Block()))[0][0]
    if how == "another":
        block.act_fn = nn.GELU()
    elif how == "hooked":
        block.act_fn.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        block.act_fn.forward = torch.tanh
    with pytest.warns(Sparse24Warning, match="Block is not what sparsify.* found"):
        y = block(x)
    u = block.up_proj(x)
    h = {"another": F.gelu, "hooked": lambda u: 2 * F.relu(u), "patched": torch.tanh}[how](u)
    torch.testing.assert_close(y, block.down_proj(h))


def test_under_autocast_it_is_that_of_layers_one_by_one(model, x):
    model, _ = pruned(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        for block in (model[0], model[2]):
            block.up_proj.register_forward_hook(lambda module, args, out: None)
        torch.testing.assert_close(y, model(x), **ROUNDED_TO_16)
    assert y.dtype == torch.bfloat16


def test_densify_gives_the_dense_function_back(model, x):
    dense = model(x)
    model, _ = pruned(model)
    assert not torch.equal(model(x), dense)
    assert sparse24.densify(model) == ["0", "2"]
    assert_same_bits(model(x), dense)
    assert type(model[0]) in (Block, InSource) and not any("sparse24" in name for name in vars(model[0]))


def test_which_blocks_and_why_not_the_others():
    model = nn.ModuleDict({"plain": Block(), "gated": Gated(), "smooth": Smooth(), "odd": Block(8, 6)})
    report = sparse24.sparsify(model, operand="activation")
    assert report.converted == ["plain.up_proj", "plain.down_proj"]
    why = dict(report.skipped)
    assert "gated" in why["gated.up_proj"] and "is gelu, and only relu and squared_relu" in why["smooth.up_proj"]
    assert "6 hidden features, not a multiple of 4" in why["odd.down_proj"]
    again = sparse24.sparsify(model, operand="activation")
    assert not again and dict(again.skipped)["plain.up_proj"] == "already sparse"


def test_include_and_exclude_are_of_whole_blocks(model):
    with pytest.raises(Sparse24Error, match="leave out .*down_proj of the same block"):
        sparse24.sparsify(model, operand="activation", exclude=("*down_proj",))
    report = sparse24.sparsify(model, operand="activation", exclude=("2.*",))
    assert report.converted == ["0.up_proj", "0.down_proj"]


def test_one_operand_at_a_time(model):
    with_weights = copy.deepcopy(model)
    sparse24.sparsify(with_weights)
    with pytest.raises(Sparse24Error, match="its weights are 2:4 already"):
        sparse24.sparsify(with_weights, operand="activation")
    model, _ = pruned(model)
    with pytest.raises(Sparse24Error, match="its block prunes the activation"):
        sparse24.sparsify(model)


def test_a_recipe_says_that_none_is_needed(model):
    model, _ = pruned(model)
    with pytest.raises(Sparse24Error, match="need no recipe"):
        sparse24.Recipe(model, torch.optim.SGD(model.parameters()), 10)


@pytest.mark.parametrize("setting", [{"lean": True}, {"fuse": False}, {"mvue": False}, {"dtype": torch.bfloat16}])
def test_settings_of_2_4_weights_are_refused(model, setting):
    with pytest.raises(Sparse24Error, match=f"{next(iter(setting))} is about 2:4 weights"):
        sparse24.sparsify(model, operand="activation", **setting)


def test_nothing_fits():
    with pytest.raises(Sparse24Error, match="gated.*sparse24.functional.sparse_activation_mlp"):
        sparse24.sparsify(nn.Sequential(Gated()), operand="activation")
    with pytest.raises(Sparse24Error, match="operand"):
        sparse24.sparsify(nn.Sequential(Block()), operand="input")


def test_layers_of_gpt2_whose_weights_are_transposed():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=32, activation_function="relu", resid_pdrop=0.0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    mlp = transformers.GPT2LMHeadModel(config).transformer.h[0].mlp
    with torch.no_grad():
        mlp.c_fc.weight.normal_(), mlp.c_proj.weight.normal_()
    x = torch.randn(5, 16)
    u = F.relu(mlp.c_fc(x))
    kept = torch.zeros_like(u.view(5, 16, 4)).scatter(-1, u.view(5, 16, 4).topk(2).indices, 1).view(5, 64)
    wanted = mlp.c_proj(u * kept)
    holder = nn.Sequential(mlp)
    sparse24.sparsify(holder, operand="activation")
    y = holder(x)
    torch.testing.assert_close(y, wanted, **MANY_SUMS)
    y.sum().backward()
    assert mlp.c_proj.weight.grad.shape == (64, 16) and mlp.c_fc.weight.grad.shape == (16, 64)
