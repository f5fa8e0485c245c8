"""densify(masked=True) keeps what a model computes, also beneath adapters and before they are merged."""

import copy

import pytest
import torch
from tiny_layers import sparse_mlp
from tiny_models import ActivatedMLP as MLP
from torch import nn

import sparse24
from sparse24 import Recipe
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.layers import SparseLayer

pytestmark = pytest.mark.fault(86)


@pytest.mark.parametrize("phase", ["sparse", "dense"])
def test_masked_densify_keeps_the_function_and_the_parameters(phase):
    model, x = sparse_mlp(), torch.randn(4, 32)
    for layer in (model[0].up_proj, model[0].down_proj):
        layer.enter(phase)
    y, parameters, before = model(x), [*model.parameters()], copy.deepcopy(model.state_dict())
    assert sparse24.densify(model, masked=True) == ["0.up_proj", "0.down_proj"]
    torch.testing.assert_close(model(x), y)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    kept = {key: (value == before[key]) | (value == 0) for key, value in model.state_dict().items()}
    assert all(k.all() for k in kept.values())
    zeros = (model[0].up_proj.weight == 0).float().mean()
    assert zeros == (0.5 if phase == "sparse" else 0.0)


def test_masked_densify_of_a_soft_method_and_of_conv1d():
    transformers = pytest.importorskip("transformers")
    conv, x = nn.Sequential(transformers.pytorch_utils.Conv1D(24, 16)), torch.randn(4, 16)
    sparse24.sparsify(conv, include=("0",))
    y = conv(x)
    sparse24.densify(conv, masked=True)
    torch.testing.assert_close(conv(x), y)
    model, x = sparse_mlp(), torch.randn(4, 32)
    Recipe(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=8, method="s-ste")
    y = model(x)
    sparse24.densify(model, masked=True)
    torch.testing.assert_close(model(x), y)


def test_masked_densify_refuses_a_weight_that_others_have_and_changes_nothing():
    model = nn.Sequential(MLP())
    model.head = nn.Linear(32, 64, bias=False)
    model.head.weight = model[0].up_proj.weight
    sparse24.sparsify(model[0], allow_tied=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Sparse24Error, match="up_proj is shared with another module"):
        sparse24.densify(model, masked=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model[0].up_proj, SparseLayer)


class Adapter(nn.Module):
    """The least that PEFT's LoRA layers have in common."""

    def __init__(self, base_layer, rank=4):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.Linear(32, rank, bias=False), nn.Linear(rank, 64, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merge(self):
        self.base_layer.weight.data += self.lora_B.weight.data @ self.lora_A.weight.data


def test_a_merge_into_a_sparse_weight_is_said_and_into_a_masked_dense_one_keeps_the_function():
    model, x = sparse_mlp(), torch.randn(4, 32)
    model[0].up_proj = adapter = Adapter(model[0].up_proj)
    y = model(x)
    twin = copy.deepcopy(model)
    adapter.merge()
    with pytest.warns(Sparse24Warning, match=r"'up_proj' was changed under its adapter.*masked=True\) before merging"):
        model[0].up_proj = adapter.base_layer
    sparse24.densify(twin, masked=True)
    twin[0].up_proj.merge()
    twin[0].up_proj = twin[0].up_proj.base_layer
    torch.testing.assert_close(twin(x), y)


@pytest.mark.filterwarnings("error::sparse24.Sparse24Warning")
def test_an_adapter_that_is_taken_off_unmerged_is_no_news():
    model, x = sparse_mlp(), torch.randn(4, 32)
    y = model(x)
    model[0].up_proj = adapter = Adapter(model[0].up_proj)
    model[0].up_proj = adapter.base_layer
    assert torch.equal(model(x), y)


def test_layers_inside_adapters_are_found_and_named_as_without():
    model, x = nn.Sequential(MLP()), torch.randn(4, 32)
    model[0].up_proj = Adapter(model[0].up_proj)
    report = sparse24.sparsify(model)
    assert report.converted == ["0.up_proj.base_layer", "0.down_proj"]
    assert [*sparse24.convert.sparse_layers(model)] == ["0.up_proj", "0.down_proj"]
    model(x)
