"""to_semi_structured: PyTorch's sparse tensors compute what the sparse layers did, and hold exactly their weights.

On the CPU with PyTorch's own CUTLASS format and conversions, of which only the check for a GPU and the product are
replaced; on the GPU with its kernels.
"""

import pytest
import torch
from rounding import ROUNDED_TO_16
from safetensors.torch import load_file
from tiny_models import MLP, gpt2, tokens
from torch import nn

import sparse24
from sparse24 import Sparse24DtypeError, Sparse24Error, Sparse24Warning, to_semi_structured
from sparse24.layers.modules import SparseLayer
from sparse24.save import semi_structured
from sparse24.testing import assert_as_accurate


class OnCpu(torch.sparse.SparseSemiStructuredTensorCUTLASS):
    @classmethod
    def _validate_device_dim_dtype_shape(cls, original_tensor):
        pass

    def _mm(self, B, *, bias=None, should_transpose_dense=False, **kwargs):
        assert should_transpose_dense
        return nn.functional.linear(B, self.to_dense(), bias)


class Lossy(OnCpu):
    def to_dense(self):
        return super().to_dense() * 1.5


@pytest.fixture
def on_cpu(monkeypatch):
    def use(kind):
        monkeypatch.setattr(semi_structured, "_tensor_class", lambda layers, backend: kind)

    use(OnCpu)
    return use


def sparse(width=64, hidden=128, dtype=torch.bfloat16, **settings):
    model = MLP(width, hidden).to(dtype)
    sparse24.sparsify(model, **settings)
    return model


@pytest.mark.parametrize(
    "make", [sparse, lambda: sparse(lean=True), lambda: sparse(dtype=torch.float16), lambda: sparse(16, 32)]
)
def test_the_converted_model_computes_what_the_sparse_one_did(on_cpu, make):
    """Layers that PyTorch's tiles do not fit are dense afterwards, with their zeros, and the report names them."""
    model = make()
    x = torch.randn(3, 5, model.fc1.in_features, dtype=model.fc1.weight.dtype)
    expected = model(x)
    report = to_semi_structured(model)
    torch.testing.assert_close(model(x), expected)
    assert type(model.fc1) is type(model.fc2) is nn.Linear and not list(model.buffers())
    if model.fc1.in_features == 64:
        assert report.converted == ["fc1", "fc2"] and not report.skipped and report.backend == "cutlass"
        assert all(isinstance(m.weight, torch.sparse.SparseSemiStructuredTensor) for m in (model.fc1, model.fc2))
    else:
        assert not report and [name for name, _ in report.skipped] == ["fc1", "fc2"]
        assert "32 x 16 is not a multiple of 32 x 64, as cutlass needs" in str(report)
        assert (model.fc1.weight == 0).sum() >= model.fc1.weight.numel() // 2


def test_transposed_weights_of_gpt2_become_linear_layers(on_cpu, tmp_path):
    """The same bits as the dense model with the masked weights; ours run the block as one function."""
    model, dense = gpt2(1, 64).bfloat16().eval(), gpt2(1, 64).bfloat16().eval()
    sparse24.sparsify(model)
    sparse24.export(model, tmp_path / "masked", masked=True)
    dense.load_state_dict(load_file(tmp_path / "masked"), strict=False)  # tied names are stored once
    assert len(to_semi_structured(model).converted) == 2
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits)
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is nn.Linear and (layer.in_features, layer.out_features) == (64, 256)
    assert "in_features=64, out_features=256" in repr(layer)
    assert not any(isinstance(m, SparseLayer) or "sparse24" in type(m).__module__ for m in model.modules())


def test_weights_are_exactly_the_packed_ones_and_kept_zeros_do_not_matter(on_cpu):
    model = sparse(dtype=torch.float32)
    with torch.no_grad():
        model.fc1.weight[:8].zero_()
        model.fc1.weight[8:16] = -0.0
    sparse24.refresh(model, search=True)
    expected = torch.where(sparse24.ops.unpack_mask(model.fc1.mask), model.fc1.weight.bfloat16(), 0)
    to_semi_structured(model, dtype=torch.bfloat16)
    assert torch.equal(model.fc1.weight.to_dense(), expected)


def test_own_gated_block_and_hooks_survive(on_cpu):
    block = sparse24.SparseGatedMLP(64, 128, dtype=torch.bfloat16)
    x, seen = torch.randn(4, 64).bfloat16(), []
    block.down_proj.register_forward_hook(lambda *_: seen.append(1))
    expected = block(x)  # layer by layer, because of the hook
    assert len(to_semi_structured(block).converted) == 3
    torch.testing.assert_close(block(x), expected)
    assert seen == [1, 1] and not isinstance(block, sparse24.SparseGatedMLP)


def test_pytorchs_encoder_layer_keeps_off_its_fast_path(on_cpu):
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True).eval().bfloat16()
    model = nn.Sequential(layer)
    sparse24.sparsify(model)
    x = torch.randn(2, 5, 64).bfloat16()
    with torch.no_grad():
        expected = model(x)
        to_semi_structured(model)
        torch.testing.assert_close(model(x), expected)


def test_verify_unpacks_the_tensors_and_compares_files_with_them(on_cpu, tmp_path):
    model = sparse()
    sparse24.export(model, tmp_path / "masked", masked=True)
    sparse24.export(model, tmp_path / "compressed", format="compressed")
    sparse24.export(model, tmp_path / "dense")
    to_semi_structured(model)
    report = sparse24.verify(model)
    assert report and report.phase == "semi-structured" and "PyTorch's semi-structured tensors" in str(report)
    for name in ("masked", "compressed"):
        report = sparse24.verify(model, tmp_path / name)
        assert report and report.file == "masked", str(report)
    assert not sparse24.verify(model, tmp_path / "dense")
    values = model.fc2.weight.packed
    values[3, 3] += 1
    assert sparse24.verify(model, tmp_path / "masked").problems == [("fc2.weight", "is another tensor in the file")]


def test_verify_takes_the_file_of_a_transposed_weight(on_cpu, tmp_path):
    model = gpt2(1, 64).bfloat16()
    sparse24.sparsify(model)
    sparse24.export(model, tmp_path / "compressed", format="compressed")
    to_semi_structured(model)
    assert sparse24.verify(model, tmp_path / "compressed")


def test_dense_phase_converts_masks_of_the_current_weights_and_warns(on_cpu):
    model = sparse()
    for layer in (model.fc1, model.fc2):
        layer.phase = "dense"
    with torch.no_grad():
        model.fc1.weight.copy_(model.fc1.weight.flip(0))
    expected = torch.where(
        sparse24.ops.unpack_mask(sparse24.ops.transposable_mask(model.fc1.weight)), model.fc1.weight, 0
    )
    with pytest.warns(Sparse24Warning, match="converting masked weights of a model in its dense phase"):
        to_semi_structured(model)
    assert torch.equal(model.fc1.weight.to_dense(), expected)


def unchanged(model):
    return isinstance(model.fc1, SparseLayer) and isinstance(model.fc2, SparseLayer) and bool(sparse24.verify(model))


def test_what_cannot_be_converted_is_refused_and_the_model_unchanged(on_cpu):
    with pytest.raises(Sparse24Error, match="MLP has no sparse layers"):
        to_semi_structured(MLP())
    model = sparse(dtype=torch.float32)
    with pytest.raises(Sparse24DtypeError, match="weight of fc1 would be torch.float32; .*pass dtype="):
        to_semi_structured(model)
    assert unchanged(model)
    model = sparse()
    with pytest.raises(Sparse24Error, match="backend must be one of auto, cusparselt, cutlass, got 'cublas'"):
        to_semi_structured(model, backend="cublas")
    on_cpu(Lossy)
    with pytest.raises(Sparse24Error, match="Lossy of fc1 does not give the weight back"):
        to_semi_structured(model)
    assert unchanged(model)
    on_cpu(OnCpu)
    with torch.no_grad():
        model.fc2.weight[0, 0] = float("inf")
    sparse24.refresh(model, search=True)
    with pytest.raises(Sparse24Error, match="weight of fc2 is not finite"):
        to_semi_structured(model)
    assert unchanged(model)


def test_models_off_the_gpu_are_told_where_to_go():
    model = sparse()
    with pytest.raises(Sparse24Error, match="one GPU, these are on cpu; model.cuda"):
        to_semi_structured(model)
    assert unchanged(model)


@pytest.mark.parametrize(
    "capability, has_cusparselt, backend, outcome",
    [
        ((9, 0), True, "auto", "cusparselt"),
        ((9, 0), False, "auto", "without cuSPARSELt; cutlass: .* sm_8x only, cuda:0 is sm_90"),
        ((9, 0), True, "cutlass", "cutlass: .* sm_8x only, cuda:0 is sm_90"),
        ((8, 0), True, "auto", "cusparselt"),
        ((8, 6), False, "auto", "cutlass"),
        ((8, 0), True, "cutlass", "cutlass"),
        ((7, 5), True, "auto", "needs sm_80 or later, cuda:0 is sm_75"),
    ],
)
def test_backend_follows_the_gpu(monkeypatch, capability, has_cusparselt, backend, outcome):
    """CUTLASS kernels of PyTorch refuse Hopper; a pure function of capability and build, here with made-up GPUs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: has_cusparselt)

    class Layer:
        weight = type("Weight", (), {"device": torch.device("cuda", 0)})()

    if outcome in semi_structured.BACKENDS:
        assert semi_structured._tensor_class({"fc": Layer}, backend).BACKEND == outcome
    else:
        with pytest.raises(Sparse24Error, match=outcome):
            semi_structured._tensor_class({"fc": Layer}, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pytorchs_kernels_compute_what_ours_do(dtype, tmp_path):
    model = MLP(768, 3072).cuda().to(dtype)
    sparse24.sparsify(model, backend="sparse")
    sparse24.export(model, tmp_path / "compressed", format="compressed")
    x = torch.randn(256, 768, device="cuda", dtype=dtype)
    weights = [torch.where(sparse24.ops.unpack_mask(m.mask), m.weight, 0).detach() for m in (model.fc1, model.fc2)]
    report = to_semi_structured(model)
    assert report.converted == ["fc1", "fc2"]
    assert all(torch.equal(m.weight.to_dense(), w) for m, w in zip((model.fc1, model.fc2), weights, strict=True))
    for layer, weight in zip((model.fc1, model.fc2), weights, strict=True):
        x = torch.randn(256, weight.shape[1], device="cuda", dtype=dtype)
        exact = x.double() @ weight.double().t() + layer.bias.double()
        assert_as_accurate(layer(x), nn.functional.linear(x, weight, layer.bias), exact)
    assert sparse24.verify(model, tmp_path / "compressed")


@pytest.mark.gpu
def test_float32_master_weights_convert_to_the_packed_dtype_under_autocast():
    model = MLP(256, 512).cuda()
    sparse24.sparsify(model, backend="sparse")
    x = torch.randn(64, 256, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = model(x)
        to_semi_structured(model)
        assert model.fc1.weight.dtype == torch.bfloat16
        torch.testing.assert_close(model(x), expected, **ROUNDED_TO_16)
