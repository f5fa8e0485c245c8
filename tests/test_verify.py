"""verify finds every number and every byte that is not what it should be."""

import pytest
import torch
from tiny_models import MLP
from torch import nn

import sparse24
from sparse24.errors import Sparse24Error


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), MLP(16, 64)


def sparse(**settings):
    model = Net()
    sparse24.sparsify(model, **settings)
    return model


@pytest.mark.parametrize("in_model, in_file", [(1.0, float("nan")), (float("nan"), 1.0), (0.0, float("nan")),
                                               (torch.finfo(torch.float32).max, float("inf"))])  # fmt: skip
def test_nan_and_infinity_in_a_file_are_no_other_number(in_model, in_file, tmp_path):
    model = sparse()
    nn.init.constant_(model.norm.weight, in_file)
    sparse24.export(model, tmp_path / "file")
    nn.init.constant_(model.norm.weight, in_model)
    report = sparse24.verify(model, tmp_path / "file")
    assert report.problems == [("norm.weight", "is another tensor in the file")]
    nn.init.constant_(model.norm.weight, in_file)
    assert sparse24.verify(model, tmp_path / "file")


@pytest.mark.parametrize("in_weight, packed", [(1.0, float("nan")), (torch.finfo(torch.float32).max, float("inf"))])
def test_nan_and_infinity_in_packed_values_are_no_other_number(in_weight, packed):
    model = sparse()
    nn.init.constant_(model.mlp.fc1.weight, in_weight)
    sparse24.refresh(model)
    assert sparse24.verify(model)
    model.mlp.fc1.packed[0, 0] = packed
    assert [name for name, _ in sparse24.verify(model).problems] == ["mlp.fc1"]


def test_nan_and_infinity_in_the_buffer_of_gate_and_up_are_no_other_number():
    model = nn.Sequential(sparse24.SparseGatedMLP(16, 64))
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            getattr(model[0], name).weight.fill_(1.0)
    sparse24.refresh(model)
    assert sparse24.verify(model)
    model[0].packed.view(-1)[0] = float("nan")
    assert "gate and up" in str(sparse24.verify(model))


@pytest.mark.parametrize("name", ["packed", "packed_t"])
def test_each_direction_is_compared(name):
    model = sparse()
    getattr(model.mlp.fc1, name)[0, 0] += 1
    problem = f"{name} is not weight * mask; call sparse24.refresh(model) after writing weights"
    assert sparse24.verify(model).problems == [("mlp.fc1", problem)]


@pytest.mark.parametrize("name", ["E", "E_t"])
def test_metadata_of_a_zero_weight_are_compared_too(name):
    """Where all values are zero, misplaced positions unpack to the same weight."""
    model = sparse()
    nn.init.zeros_(model.mlp.fc1.weight)
    sparse24.refresh(model)
    assert sparse24.verify(model)
    E = getattr(model.mlp.fc1, name)
    E[0] = 0x99 if int(E[0]) != 0x99 else 0x88
    assert sparse24.verify(model).problems == [("mlp.fc1", f"{name} does not match the mask")]


def test_masks_are_searched_in_the_dtype_of_the_weights_whatever_is_packed():
    """bf16 would rank close fp32 weights as equal: at this size its masks differ in some blocks."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256)
    model = nn.Sequential(nn.Module())
    model[0].fc1, model[0].fc2 = layer, nn.Linear(256, 256)
    exact = sparse24.ops.transposable_mask(layer.weight.detach())
    rounded = sparse24.ops.transposable_mask(layer.weight.detach().bfloat16())
    assert not torch.equal(exact.view(torch.uint8), rounded.view(torch.uint8))
    sparse24.sparsify(model, include=("*fc*",), dtype=torch.bfloat16, backend="sparse")
    found = model[0].fc1
    assert found.packed.dtype == torch.bfloat16
    assert torch.equal(found.mask.view(torch.uint8).flatten(), exact.view(torch.uint8).flatten())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse24.Recipe(model, optimizer, total_steps=4, mask_interval=1, decay=0.0, dense_fraction=0)
    for layer in (model[0].fc1, model[0].fc2):
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.equal(found.mask.view(torch.uint8).flatten(), exact.view(torch.uint8).flatten())


@pytest.mark.parametrize("form", [dict(masked=True), dict(format="compressed")], ids=str)
def test_three_of_four_kept_are_not_exported(form, tmp_path):
    model = sparse()
    nn.init.ones_(model.mlp.fc1.weight)
    sparse24.refresh(model)
    bits = sparse24.ops.transposable_mask(model.mlp.fc1.weight.detach()).view(torch.uint8)
    model.mlp.fc1.mask.copy_(bits.reshape(model.mlp.fc1.mask.shape))
    first = model.mlp.fc1.mask.view(-1)[:1]
    first |= 0b0001 if not int(first) & 1 else 0b0010 if not int(first) & 2 else 0b0100  # a third in the first row
    with pytest.raises(Sparse24Error, match="mlp.fc1 keeps 3 of 4 weights under its mask"):
        sparse24.export(model, tmp_path / "file", **form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(46)
def test_a_plain_file_of_another_phase_or_other_masks_is_told_by_name(tmp_path):
    """The weights are equal to the last bit; what the model computes with them is not."""
    model, path = sparse(), tmp_path / "plain"
    sparse24.export(model, path)
    assert sparse24.verify(model, path)
    layer = model.mlp.fc1
    layer.take_state("dense", layer.mask, None)
    report = sparse24.verify(model, path)
    assert [name for name, _ in report.problems] == ["mlp.fc1"] and "another phase or mask" in str(report)
    layer.take_state("sparse", layer.mask.roll(1, 0), None)
    assert [name for name, _ in sparse24.verify(model, path).problems] == ["mlp.fc1"]
    layer.take_state("sparse", layer.mask.roll(-1, 0), None)
    assert sparse24.verify(model, path)


def test_verify_tells_the_phase_and_what_is_wrong():
    model = MLP()
    assert not sparse24.verify(model) and "no sparse layers" in str(sparse24.verify(model))
    sparse24.sparsify(model)
    assert sparse24.verify(model).phase == "sparse"
    model.fc1.E[0] ^= 0x11
    report = sparse24.verify(model)
    assert not report and ("fc1", "E does not match the mask") in report.problems
    sparse24.refresh(model)
    model.fc2.mask[0, 0] = 255
    assert "fc2: its mask has a block" in str(sparse24.verify(model))
    sparse24.refresh(model, search=True)
    for layer in (model.fc1, model.fc2):
        layer.phase = "dense"
    report = sparse24.verify(model)
    assert report and report.phase == "dense" and "masks are not applied" in str(report)
