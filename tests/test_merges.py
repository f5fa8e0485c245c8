"""Adapters merged into 2:4 weights: the model goes on computing what it computed."""

import warnings

import pytest
import torch
from rounding import ANOTHER_ORDER, EPS16, MANY_SUMS
from torch import nn

import sparse24
from sparse24 import Sparse24Warning
from sparse24.convert import sparse_layers

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))


class Lora(nn.Module):
    """PEFT's layer, as far as merges see it."""

    def __init__(self, base_layer, rank=4):
        super().__init__()
        rows, cols = base_layer.weight.shape
        self.base_layer, self.merged_adapters = base_layer, []
        make = dict(bias=False, dtype=base_layer.weight.dtype)
        self.lora_A, self.lora_B = nn.Linear(cols, rank, **make), nn.Linear(rank, rows, **make)
        base_layer.requires_grad_(False)

    @property
    def merged(self):
        return bool(self.merged_adapters)

    def product(self):
        return self.lora_B.weight.data @ self.lora_A.weight.data

    def merge(self, safe_merge=False, adapter_names=None):
        self.base_layer.weight.data += self.product()
        self.merged_adapters = adapter_names or ["default"]

    def unmerge(self):
        self.base_layer.weight.data -= self.product()
        self.merged_adapters = []

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.merged else y + self.lora_B(self.lora_A(x))


class Gated(nn.Module):
    def __init__(self, width=32, hidden=64):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(hidden, width, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


NAMES = ("gate_proj", "up_proj", "down_proj")


def adapted(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(Gated()).to(dtype)
    sparse24.sparsify(model, **settings)
    for name in NAMES:
        setattr(model[0], name, Lora(getattr(model[0], name)))
    return model.eval()


@torch.no_grad()
def run(model, dtype=torch.float32):
    return model(X.to(dtype)).float()


def merge_and_unload(model, names=NAMES):
    for name in names:
        lora = getattr(model[0], name)
        lora.merge()
        setattr(model[0], name, lora.base_layer)


#: of bf16, eight roundings: a merge rounds the weight and its delta too
TOLERANCE = {torch.float32: ANOTHER_ORDER, torch.bfloat16: dict(rtol=8 * EPS16, atol=8 * EPS16)}


@pytest.mark.fault(86)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("afterwards", ["nothing", "refresh", "densify", "a state_dict into a plain model"])
def test_a_merge_keeps_the_function_and_says_that_the_layer_is_dense(dtype, afterwards):
    model = adapted(dtype)
    before = run(model, dtype)
    with pytest.warns(Sparse24Warning, match="'gate_proj', and its product is not 2:4.*dense from here on"):
        merge_and_unload(model)
    if afterwards == "refresh":
        sparse24.refresh(model)
    if afterwards == "densify":
        sparse24.densify(model)
    if afterwards.startswith("a state_dict"):
        plain = nn.Sequential(Gated()).to(dtype)
        plain.load_state_dict(model.state_dict())
        model = plain
    torch.testing.assert_close(run(model, dtype), before, **TOLERANCE[dtype])


@pytest.mark.fault(86)
def test_of_a_model_with_one_merged_layer_the_others_stay_sparse():
    model = adapted()
    before = run(model)
    with pytest.warns(Sparse24Warning, match="'up_proj'"):
        merge_and_unload(model, ["up_proj"])
    torch.testing.assert_close(run(model), before)
    assert [layer.phase for layer in sparse_layers(model).values()] == ["sparse", "dense", "sparse"]


@pytest.mark.fault(86)
def test_a_merge_in_place_is_found_by_an_evaluation_and_can_be_undone():
    model = adapted()
    before = run(model)
    for name in NAMES:
        getattr(model[0], name).merge()
    with pytest.warns(Sparse24Warning, match="an adapter was merged into the sparse layer"):
        after = run(model)
    torch.testing.assert_close(after, before)
    for name in NAMES:
        getattr(model[0], name).unmerge()
    torch.testing.assert_close(run(model), before)


@pytest.mark.fault(86)
def test_an_adapter_taken_off_or_switched_off_without_a_merge_changes_nothing():
    model = adapted()
    for name in NAMES:
        getattr(model[0], name).lora_B.weight.data.zero_()
    before = run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        for name in NAMES:
            setattr(model[0], name, getattr(model[0], name).base_layer)
        torch.testing.assert_close(run(model), before)
    assert all(layer.phase == "sparse" for layer in sparse_layers(model).values())


@pytest.mark.fault(86)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_pefts_own_merges_keep_the_function(settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(Gated())
    sparse24.sparsify(model)
    config = peft.LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights=False, **settings)
    model = peft.get_peft_model(model, config).eval()
    before = run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Sparse24Warning)
        torch.testing.assert_close(run(model.merge_and_unload()), before, **MANY_SUMS)
