"""Layers that sparsify leaves dense, and the reason in its report."""

import pytest
import torch
from tiny_models import MLP
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import sparse24


class Skipper(nn.Module):
    """One FFN that can be converted, and one that cannot, made by the test."""

    def __init__(self, bad):
        super().__init__()
        self.good, self.bad = MLP(), bad


def skipped(bad, **settings):
    report = sparse24.sparsify(Skipper(bad), **settings)
    assert report.converted[:2] == ["good.fc1", "good.fc2"]
    return {name.removeprefix("bad."): reason for name, reason in report.skipped}


@pytest.mark.parametrize("width, hidden", [(6, 8), (8, 10), (3, 8), (8, 2), (1, 4)])
@pytest.mark.fault(13, 25)
def test_sizes_without_whole_blocks_are_skipped_with_the_reason(width, hidden):
    """Sizes that are no multiples of 4, down to 1, 2 and 3."""
    reasons = skipped(MLP(width, hidden))
    word = "no whole 4x4 block" if min(width, hidden) < 4 else "not a multiple of 4"
    assert set(reasons) == {"fc1", "fc2"} and all(word in reason for reason in reasons.values())


@pytest.mark.parametrize("width, hidden", [(4, 4), (4, 12), (12, 4)])
def test_a_layer_of_one_block_or_one_row_of_blocks_is_converted(width, hidden):
    model = MLP(width, hidden)
    assert sparse24.sparsify(model).converted == ["fc1", "fc2"]
    model(torch.randn(2, width)).sum().backward()
    assert sparse24.verify(model) and model.fc1.weight.grad.shape == (hidden, width)


@pytest.mark.fault(29)
def test_unsupported_dtypes_are_skipped_with_the_reason():
    """Complex weights are named with what is supported; float64 runs on the CPU."""
    assert "torch.complex64 weights are not supported" in skipped(MLP(dtype=torch.complex64))["fc1"]
    model = MLP(dtype=torch.float64)
    sparse24.sparsify(model)
    model(torch.randn(4, 16, dtype=torch.float64)).sum().backward()
    assert model.fc1.weight.grad.dtype == torch.float64


@pytest.mark.fault(49)
def test_tied_weights_are_refused_unless_allowed():
    """A mask on a shared weight would change the other module too."""
    bad = MLP(16, 16)
    bad.fc2.weight = bad.fc1.weight
    assert all("tied" in reason for reason in skipped(bad).values())
    bad = MLP(16, 16)
    bad.fc2.weight = bad.fc1.weight
    model = Skipper(bad)
    assert len(sparse24.sparsify(model, allow_tied=True).converted) == 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse24.Recipe(model, optimizer, total_steps=10, decay=0.5, dense_fraction=0)
    bad.fc1.weight.grad = torch.zeros(16, 16)
    optimizer.step()
    kept = sparse24.ops.unpack_mask(bad.fc1.mask)
    torch.testing.assert_close(bad.fc1.weight.grad, torch.where(kept, 0, 0.5 * bad.fc1.weight))


def test_a_module_used_twice_is_one_layer_and_not_tied():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = MLP()
            self.second = self.first

    assert len(sparse24.sparsify(Shared()).converted) == 2


def test_parametrized_hooked_and_subclassed_layers_are_skipped_with_the_reason():
    bad = MLP()
    parametrizations.orthogonal(bad.fc1)
    prune.random_unstructured(bad.fc2, "weight", 0.5)
    reasons = skipped(bad)
    assert "ParametrizedLinear" in reasons["fc1"] and "not a plain parameter" in reasons["fc2"]
    assert parametrize.is_parametrized(bad.fc1)

    class LoraLinear(nn.Linear):
        pass

    bad = MLP()
    bad.fc1 = LoraLinear(16, 32)
    bad.fc2.forward = lambda x: x
    reasons = skipped(bad)
    assert "LoraLinear" in reasons["fc1"] and "replaced on the instance" in reasons["fc2"]


def test_experts_are_skipped_with_the_reason():
    bad = nn.Module()
    bad.experts = nn.ModuleList([MLP(), MLP()])
    bad.shared_expert = MLP()
    reasons = skipped(bad)
    assert set(reasons) == {f"experts.{i}.fc{j}" for i in (0, 1) for j in (1, 2)}
    assert all("expert of a mixture" in reason for reason in reasons.values())


def test_report_is_a_table_with_reasons():
    report = sparse24.sparsify(Skipper(MLP(6, 8)))
    text = str(report)
    assert "2 layers 2:4 (1,024 weights), 2 skipped" in text
    assert any(line.split()[:5] == ["good.fc1", "32", "x", "16", "2:4"] for line in text.splitlines())
    assert "8 x 6 is not a multiple of 4" in text
    assert report and report.shapes["good.fc1"] == (32, 16) and "cpu" in report.reasons["good.fc1"]


class FusedByHand(nn.Module):
    """As kernels for whole blocks read it: the weights, and not the layers."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = torch.relu(nn.functional.linear(x, self.fc1.weight, self.fc1.bias))
        return nn.functional.linear(x, self.fc2.weight, self.fc2.bias)


class Calls(FusedByHand):
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x.to(self.fc1.weight.dtype))))


class CallsElsewhere(FusedByHand):
    def up(self, x):
        return torch.relu(self.fc1(x))

    def forward(self, x):
        return self.fc2(self.up(x) + 0 * self.fc1.weight.sum() + 0 * self.fc2.weight.sum())


class Iterates(FusedByHand):
    def forward(self, x):
        for layer in self.children():
            x = layer(x) + 0 * self.fc1.weight.sum()
        return x


@pytest.mark.fault(104)
def test_layers_that_nobody_calls_are_skipped_with_the_reason():
    """They would stay dense without a word, whatever the report says."""
    reasons = skipped(FusedByHand())
    assert set(reasons) == {"fc1", "fc2"}
    assert all("FusedByHand multiplies with its weight and does not call it" in r for r in reasons.values())
    with pytest.raises(sparse24.Sparse24Error, match=r"fc1: the forward of FusedByHand .*; let it call self.fc1\(x\)"):
        sparse24.sparsify(FusedByHand(), include=("fc*",))


@pytest.mark.fault(104)
@pytest.mark.parametrize("block", [Calls, CallsElsewhere, Iterates, MLP])
def test_layers_that_are_called_somewhere_are_converted(block):
    assert sparse24.sparsify(block()).converted == ["fc1", "fc2"]
