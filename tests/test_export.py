"""export: what the files hold, that masked ones are 2:4, and that damaged ones are refused."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import MLP, gpt2, llama, tokens

import sparse24
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.layers.modules import SparseLayer
from sparse24.save.exporting import load_compressed


def sparse(make=MLP):
    model = make()
    sparse24.sparsify(model)
    return model


def most_kept(weight):
    """The most non-zeros in any group of four, along rows and along columns."""
    return max(int((w.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) for w in (weight, weight.t()))


@pytest.mark.parametrize("make", [MLP, gpt2, llama])
def test_plain_export_is_the_dense_state_dict(make, tmp_path):
    model = sparse(make)
    sparse24.export(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    missing, unexpected = make().load_state_dict(saved, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied with the embedding


def test_tensors_that_share_memory_in_part_are_each_written_whole(tmp_path):
    model = sparse()
    table = torch.arange(16.0)
    model.register_buffer("head", table[:10])
    model.register_buffer("tail", table[6:])
    sparse24.export(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["head"], table[:10]) and torch.equal(saved["tail"], table[6:])


@pytest.mark.fault(75)
@pytest.mark.parametrize("make", [MLP, gpt2, llama])
def test_masked_export_is_two_of_four_and_computes_what_the_sparse_model_does(make, tmp_path):
    """A checkpoint that is called sparse is sparse."""
    model = sparse(make)
    sparse24.export(model, tmp_path / "masked.safetensors", masked=True)
    saved = load_file(tmp_path / "masked.safetensors")
    names = [name for name, m in model.named_modules() if isinstance(m, SparseLayer)]
    assert all(most_kept(saved[f"{name}.weight"]) == 2 for name in names)
    assert most_kept(model.state_dict()[f"{names[0]}.weight"]) == 4  # the model itself is untouched
    twin = make()
    twin.load_state_dict(saved, strict=False)
    if make is MLP:
        x = torch.randn(3, 16)
        torch.testing.assert_close(twin(x), model(x))
    else:
        torch.testing.assert_close(twin(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [MLP, gpt2, lambda: MLP(12, 20)])
def test_compressed_file_gives_the_masked_weights_back(make, dtype, tmp_path):
    model = sparse(lambda: make().to(dtype))
    sparse24.export(model, tmp_path / "masked.safetensors", masked=True)
    sparse24.export(model, tmp_path / "compressed.safetensors", format="compressed")
    masked, unpacked = load_file(tmp_path / "masked.safetensors"), load_compressed(tmp_path / "compressed.safetensors")
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in masked.items())
    assert set(unpacked) == set(model.state_dict())
    model.load_state_dict(unpacked)


def test_compressed_file_is_smaller():
    rows, cols = 64, 128
    weight = torch.randn(rows, cols).bfloat16()
    weight = torch.where(sparse24.ops.unpack_mask(sparse24.ops.transposable_mask(weight)), weight, 0)
    values, positions = sparse24.save.exporting._pack_positions(weight)
    assert values.nbytes + positions.nbytes == weight.nbytes * 9 // 16


def test_kept_zeros_and_empty_groups_survive_compression():
    weight = torch.tensor([[0.0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 5], [1, 0, 0, 2, 0, 0, 3, 4, 0, 0, 0, 0]])
    values, positions = sparse24.save.exporting._pack_positions(weight)
    assert torch.equal(sparse24.save.exporting._unpack_positions(values, positions, 2, 12, "w"), weight)


def test_dense_phase_exports_plainly_and_warns_when_masked(tmp_path):
    model = sparse()
    for layer in (model.fc1, model.fc2):
        layer.phase = "dense"
    sparse24.export(model, tmp_path / "plain.safetensors")
    with pytest.warns(Sparse24Warning, match="dense phase"):
        sparse24.export(model, tmp_path / "masked.safetensors", masked=True)
    assert most_kept(load_file(tmp_path / "masked.safetensors")["fc1.weight"]) == 2


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(Sparse24Error, match="format must be one of safetensors, compressed, got 'onnx'"):
        sparse24.export(sparse(), tmp_path / "x", format="onnx")
    with pytest.raises(Sparse24Error, match="no sparse layers"):
        sparse24.export(MLP(), tmp_path / "x", masked=True)
    with pytest.raises(OSError):
        sparse24.export(sparse(), tmp_path / "no" / "such" / "folder")
    model = sparse()
    model.fc1.mask.fill_(255)
    with pytest.raises(Sparse24Error, match="fc1 keeps 4 of 4"):
        sparse24.export(model, tmp_path / "x", masked=True)
    assert list(tmp_path.iterdir()) == []


def rewrite(path, change):
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["sparse24"])
        state = {key: file.get_tensor(key) for key in file.keys()}
    change(state, header)
    save_file(state, path, metadata={"sparse24": json.dumps(header)})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state, header: header.update(version=7), "version 7, this sparse24 reads 1"),
        (lambda state, header: header.update(format="safetensors"), "not a compressed sparse24 file"),
        (lambda state, header: state.pop("fc1.weight.values"), "lacks the values or positions of fc1.weight"),
        (lambda state, header: state["fc1.weight.positions"].fill_(0x55), "corrupt: a group does not hold two rising"),
        (lambda state, header: header["layers"]["fc1.weight"].update(rows=8), "do not fit a 8 x 16 weight"),
        (lambda state, header: header["layers"].update({"fc1.weight": 7}), "corrupt: fc1.weight has the shape 7"),
        (lambda state, header: header["layers"]["fc1.weight"].update(cols="16"), "corrupt: fc1.weight has the shape"),
        (lambda state, header: header["same"].update({"head": "nothing"}), "head is to be 'nothing', which is not in"),
    ],
)
@pytest.mark.fault(44, 45, 46, 47)
def test_damaged_compressed_files_are_refused(change, words, tmp_path):
    """Positions and sizes of a file are checked, and its version."""
    path = tmp_path / "c.safetensors"
    sparse24.export(sparse(), path, format="compressed")
    rewrite(path, change)
    with pytest.raises(Sparse24Error, match=words):
        load_compressed(path)


@pytest.mark.fault(44, 47)
def test_a_compressed_file_with_anything_in_any_place_is_refused_or_read(tmp_path):
    """Every place of the header, and every tensor, replaced by junk: a Sparse24Error or a state_dict, nothing else."""
    whole, path = tmp_path / "whole.safetensors", tmp_path / "junk.safetensors"
    model = sparse()
    model.register_parameter("scale", model.fc2.bias)  # names that share a tensor
    sparse24.export(model, whole, format="compressed")
    with safe_open(str(whole), framework="pt") as file:
        header = json.loads(file.metadata()["sparse24"])
        state = {key: file.get_tensor(key) for key in file.keys()}
    assert header["same"]
    places = [(key,) for key in header]
    places += [(group, key) for group in ("layers", "same") for key in header[group]]
    places += [("layers", key, field) for key in header["layers"] for field in header["layers"][key]]
    junk = [None, -1, 10**9, 0.5, True, "x", [], {}, [1], {"rows": 4, "cols": 4, "transposed": False}]
    refused = 0
    for place in places:
        for value in junk:
            changed = json.loads(json.dumps(header))
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = value
            save_file(state, path, metadata={"sparse24": json.dumps(changed)})
            refused += not reads(path)
    for value in junk:
        save_file(state, path, metadata={"sparse24": json.dumps(value)})
        assert not reads(path)
    for key, tensor in state.items():
        for other in (tensor.flatten()[:-1].clone(), tensor.to(torch.float64), tensor.unsqueeze(0), tensor[:0].clone()):
            save_file(state | {key: other}, path, metadata={"sparse24": json.dumps(header)})
            reads(path)
    assert refused > len(places) * len(junk) // 2


def reads(path) -> bool:
    try:
        state = load_compressed(path)
    except Sparse24Error:
        return False
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    return True


@pytest.mark.fault(47)
def test_truncated_file_is_refused(tmp_path):
    """Half a file is not a file."""
    path = tmp_path / "c.safetensors"
    sparse24.export(sparse(), path, format="compressed")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Sparse24Error, match="not a whole safetensors file"):
        load_compressed(path)


@pytest.mark.fault(114)
def test_a_file_that_is_not_there_or_is_none_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, missing = sparse(), re.escape(str(tmp_path / "missing"))
    for read in (load_compressed, lambda path: sparse24.verify(model, path)):
        with pytest.raises(Sparse24Error, match=rf"no file {missing}; sparse24.export\(model, path\)") as caught:
            read("missing")
        assert isinstance(caught.value, FileNotFoundError)
        with pytest.raises(Sparse24Error, match="cannot be read .*must be a file") as caught:
            read(tmp_path)
        assert isinstance(caught.value, OSError)


@pytest.mark.fault(62)
def test_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    """Written under another name, then renamed."""
    path, model = tmp_path / "m.safetensors", sparse()
    sparse24.export(model, path)
    old = path.read_bytes()

    def failing(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        sparse24.export(model, path, masked=True)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


# -- verify against a file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [dict(), dict(masked=True), dict(format="compressed")], ids=str)
@pytest.mark.parametrize("make", [MLP, gpt2, lambda: MLP().bfloat16()])
def test_verify_accepts_what_was_exported_and_finds_what_changed(make, form, tmp_path):
    model, path = sparse(make), tmp_path / "exported"
    sparse24.export(model, path, **form)
    report = sparse24.verify(model, path)
    assert report and report.file == ("masked" if form else "dense"), str(report)
    assert f"the file holds its {report.file} weights" in str(report)
    layer = next(m for m in model.modules() if isinstance(m, SparseLayer))
    with torch.no_grad():
        layer.weight.mul_(1.5)
    sparse24.refresh(model)
    report = sparse24.verify(model, path)
    assert not report and [what for _, what in report.problems] == ["is another tensor in the file"]


@pytest.mark.fault(75)
def test_verify_finds_a_masked_file_that_is_not_sparse(tmp_path):
    """A file that calls itself masked and holds dense weights."""
    model, path = sparse(), tmp_path / "liar"
    sparse24.export(model, path, masked=True)
    rewrite(path, lambda state, header: state["fc1.weight"].copy_(model.fc1.weight))
    assert sparse24.verify(model, path).problems == [("fc1.weight", "is another tensor in the file")]


def test_verify_names_tensors_that_only_one_side_has(tmp_path):
    model, path = sparse(), tmp_path / "other"
    sparse24.export(model, path)
    rewrite(path, lambda state, header: state.update({"fc3.bias": state.pop("fc2.bias")}))
    assert sparse24.verify(model, path).problems == [
        ("fc2.bias", "is in the model, not in the file"),
        ("fc3.bias", "is in the file, not in the model"),
    ]


def test_verify_compares_dense_models_with_plain_files_too(tmp_path):
    model, path = MLP(), tmp_path / "plain"
    sparse24.export(model, path)
    assert sparse24.verify(model, path) and not sparse24.verify(model)
    assert "no sparse layers; the file holds its dense weights" in str(sparse24.verify(model, path))


def test_soft_thresholded_weights_export_and_verify(tmp_path):
    """Method s-ste: two of four along rows only."""
    model, path = sparse(), tmp_path / "soft"
    sparse24.Recipe(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4, method="s-ste")
    sparse24.export(model, path, format="compressed")
    assert torch.equal(load_compressed(path)["fc1.weight"], model.fc1.soft)
    assert sparse24.verify(model, path)


def test_a_single_layer_is_a_model_too(tmp_path):
    layer = sparse24.SparseLinear(16, 32)
    for form in (dict(), dict(masked=True), dict(format="compressed")):
        sparse24.export(layer, tmp_path / "layer", **form)
        assert sparse24.verify(layer, tmp_path / "layer")
    assert set(load_compressed(tmp_path / "layer")) == {"weight", "bias"}
