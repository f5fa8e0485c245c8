"""sparsify, densify, refresh: what they change in a model, what they leave, and what is refused."""

import copy
import pickle
import pkgutil
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.distributed as dist
from rounding import MANY_SUMS
from tiny_models import MLP, gpt2, llama, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparse24
from sparse24 import SparseLinear
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.layers.modules import SparseLayer


@pytest.mark.parametrize("make", [gpt2, llama])
def test_converted_model_is_the_model_with_masked_weights(make):
    model, ids = make(), tokens()
    sparse24.sparsify(model)
    sparse = model(input_ids=ids).logits
    bits = {n: sparse24.ops.unpack_mask(m.mask) for n, m in model.named_modules() if isinstance(m, SparseLayer)}
    for name in sparse24.densify(model):
        layer = model.get_submodule(name)
        mask = bits[name] if isinstance(layer, nn.Linear) else bits[name].t()
        with torch.no_grad():
            layer.weight.mul_(mask)
    torch.testing.assert_close(model(input_ids=ids).logits, sparse, **MANY_SUMS)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_densify_restores_classes_and_keeps_the_parameter_objects(make):
    model = make()
    classes = [type(m) for m in model.modules()]
    parameters, attributes = list(model.parameters()), [sorted(m.__dict__) for m in model.modules()]
    converted = sparse24.sparsify(model).converted
    assert sparse24.densify(model) == converted
    assert [type(m) for m in model.modules()] == classes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert not list(model.transformer.h[0].mlp.buffers() if make is gpt2 else model.model.layers[0].mlp.buffers())
    assert sparse24.densify(model) == []


@pytest.mark.fault(77)
def test_sparsify_twice_changes_nothing_the_second_time():
    """Idempotent, and the report says why nothing was converted."""
    model = MLP()
    sparse24.sparsify(model)
    mask = model.fc1.mask
    again = sparse24.sparsify(model)
    assert not again.converted and {s.reason for s in again.skipped} == {"already sparse"}
    assert model.fc1.mask is mask


@pytest.mark.fault(77)
@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(precision="fp8"), "already sparse, with precision=None"),
        (dict(lean=True), "already sparse, with lean=False"),
        (dict(dtype=torch.float16), "already sparse, with dtype=torch.float32"),
    ],
)
def test_sparsify_with_other_settings_says_that_layers_keep_theirs(asked, words):
    model = MLP(32, 64)
    sparse24.sparsify(model)
    with pytest.warns(Sparse24Warning, match=f"2 layers as they are, such as fc1: {words}. To give them .*densify"):
        report = sparse24.sparsify(model, **asked)
    assert {skip.reason for skip in report.skipped} == {words} and "fc1    2:4  already sparse, with" in str(report)
    sparse24.densify(model)
    assert sparse24.sparsify(model, **asked).converted == ["fc1", "fc2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse24.sparsify(model, **asked)
        sparse24.sparsify(model)  # what is left out asks for nothing


@pytest.mark.fault(50)
def test_a_model_that_became_sparse_in_inference_mode_can_be_trained():
    model = MLP()
    with torch.inference_mode():
        sparse24.sparsify(model)
        model(torch.randn(4, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse24.Recipe(model, optimizer, total_steps=4)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    assert sparse24.verify(model)


def test_own_gated_block_counts_as_converted_already():
    model = nn.ModuleDict({"ffn": sparse24.SparseGatedMLP(8, 16)})
    assert [s.name for s in sparse24.sparsify(model).skipped] == ["ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"]
    sparse24.densify(model)
    assert model["ffn"](torch.randn(2, 8)).shape == (2, 8)
    assert len(sparse24.sparsify(model).converted) == 3


def test_patterns_choose_and_exclude():
    model = gpt2()
    report = sparse24.sparsify(model, include=("*.mlp.*",), exclude="*.h.1.*")
    assert report.converted == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    model = gpt2()
    assert len(sparse24.sparsify(model, include="*attn.c_attn").converted) == 2
    model = gpt2()
    assert len(sparse24.sparsify(model, exclude=("*c_fc",)).converted) == 2


@pytest.mark.fault(76)
@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(include=("*c_fx*",)), "include pattern '\\*c_fx\\*' matches no layer.*c_fc"),
        (
            dict(include=("mlp.c_fc",)),
            "pattern 'mlp.c_fc' matches no layer; it must match whole names, as '\\*mlp.c_fc\\*' does",
        ),
        (dict(include=("transformer.h.0.mlp.c_pro",)), "closest are.*transformer.h.0.mlp.c_proj"),
        (dict(exclude=("*mpl*",)), "exclude pattern '\\*mpl\\*' matches no layer.*mlp"),
        (dict(include=("*zzzzzzz*",)), "names here: .*c_attn"),
        (dict(include=()), "no layer of GPT2LMHeadModel"),
        (dict(include=(3,)), "include must be patterns"),
        (dict(backend="fast"), "backend must be one of auto, sparse, got 'fast'"),
        (dict(dtype=torch.int8), "dtype must be one of .*int8"),
        (dict(dtype="bfloat16"), "dtype must be one of torch.float32, .*got 'bfloat16'"),
        (dict(dtype=torch.float8_e4m3fn), 'dtype must be one of .*; for 8-bit products say precision="fp8"'),
    ],
)
def test_bad_settings_name_what_is_wrong_and_change_nothing(settings, words):
    """A pattern that matches nothing raises with the closest names."""
    model = gpt2(1)
    with pytest.raises(Sparse24Error, match=words):
        sparse24.sparsify(model, **settings)
    assert not any(isinstance(m, SparseLayer) for m in model.modules())


def test_a_report_that_is_taken_for_the_model_says_so():
    """`model = sparsify(model)`, as other libraries have it."""
    report = sparse24.sparsify(MLP())
    with pytest.raises(Sparse24Error, match="in place and returns a report"):
        report(torch.randn(2, 16))
    with pytest.raises(AttributeError, match="'SparsifyReport' object has no attribute 'parameters'; .* in place"):
        report.parameters()
    with pytest.raises(AttributeError, match="has no attribute 'layers'$"):
        report.layers()
    assert copy.deepcopy(report) == pickle.loads(pickle.dumps(report)) == report


def test_hooks_and_references_survive_conversion():
    model, seen = MLP(), []
    layer = model.fc1
    layer.register_forward_hook(lambda module, args, out: seen.append(module))
    sparse24.sparsify(model)
    model(torch.randn(2, 16))
    assert model.fc1 is layer and isinstance(layer, SparseLinear) and seen == [layer]


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    "place, error",
    [
        ("sparse24.ops.empty_packed", torch.OutOfMemoryError),
        ("sparse24.layers.parallel.tensor_parallel.cut_of", KeyboardInterrupt),
    ],
)
def test_failure_on_a_later_layer_leaves_the_model_dense(monkeypatch, place, error):
    """Out of memory in a packed copy, or Ctrl-C as a layer begins, changes nothing, and the next attempt works."""
    model, calls = MLP(), []
    real = pkgutil.resolve_name(place)

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(place, failing)
    with pytest.raises(error):
        sparse24.sparsify(model)
    assert type(model.fc1) is type(model.fc2) is nn.Linear and not list(model.buffers())
    assert model(torch.randn(2, 16)).shape == (2, 16)
    assert len(sparse24.sparsify(model).converted) == 2


@pytest.mark.fault(40)
@pytest.mark.parametrize("op", ["compress_", "prune_compress_"])
def test_out_of_memory_while_packing_after_a_step_passes_through_and_the_next_step_works(monkeypatch, op):
    """The optimizer has stepped by then: the step counts, and its packing is made good when the recipe is asked for its
    state, or else before the next step; the run is then the one without the failure.
    """
    results = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = MLP()
        sparse24.sparsify(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        recipe = sparse24.Recipe(model, optimizer, total_steps=9, mask_interval=3, dense_fraction=0)
        for step in range(6):
            with monkeypatch.context() as patch:
                if fails and step == (1 if op == "compress_" else 2):
                    patch.setattr(sparse24.ops, op, out_of_memory)
                model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
                try:
                    optimizer.step()
                except torch.OutOfMemoryError:
                    patch.undo()
                    assert fails and recipe.state_dict()["step"] == step + 1
                optimizer.zero_grad()
        assert recipe.step == 6 and sparse24.verify(model)
        results.append((model.fc1.weight.detach(), model.fc1.mask))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def out_of_memory(*args):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.gpu
@pytest.mark.fault(40)
def test_a_full_gpu_leaves_the_model_dense_and_the_next_attempt_works():
    """Room for the weights, not for their packed forms; PyTorch's own error. In a process by itself."""
    script = """
        import torch
        from torch import nn

        import sparse24

        model = nn.ModuleDict({"fc1": nn.Linear(4096, 4096), "fc2": nn.Linear(4096, 4096)}).cuda().bfloat16()
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (30 << 20)) / total)
        try:
            sparse24.sparsify(model, backend="sparse")
        except torch.cuda.OutOfMemoryError:
            assert type(model.fc1) is type(model.fc2) is nn.Linear and not list(model.buffers())
        else:
            raise SystemExit("there was room")
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert len(sparse24.sparsify(model, backend="sparse").converted) == 2 and sparse24.verify(model)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pytorchs_encoder_layer_does_not_bypass_the_sparse_layers():
    """Its inference fast path multiplies with linear1.weight itself."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        dense = layer(x)
        assert sparse24.sparsify(nn.Sequential(layer)).converted == ["0.linear1", "0.linear2"]
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x.requires_grad_()))
    assert not torch.allclose(fast, dense, atol=1e-3)
    sparse24.densify(nn.Sequential(layer))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense)


@pytest.mark.fault(66)
def test_ddp_neither_broadcasts_nor_checks_the_packed_forms():
    """They are as large as the model; each rank makes its own."""
    model = nn.Sequential(MLP())
    sparse24.sparsify(model)
    names = {name for name, _ in model.named_buffers()}
    assert names and names <= set(model._ddp_params_and_buffers_to_ignore)
    sparse24.densify(model)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_refresh_packs_every_layer_and_searches_only_when_asked():
    model = MLP()
    sparse24.sparsify(model)
    mask = model.fc1.mask.clone()
    model.fc1.weight.data = torch.randn_like(model.fc1.weight)
    assert sparse24.refresh(model) == 2
    assert torch.equal(model.fc1.mask, mask) and sparse24.verify(model)
    sparse24.refresh(model, search=True)
    assert not torch.equal(model.fc1.mask, mask) and sparse24.verify(model)


def test_refresh_packs_the_shards_where_a_forward_pass_has_left_gathered_weights():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = MLP()
        sparse24.sparsify(model)
        weight = fully_shard(model, mesh=init_device_mesh("cpu", (1,))).fc1.weight
        with torch.no_grad():
            model(torch.randn(4, 16))
            weight.to_local().copy_(written := torch.randn(32, 16))
        sparse24.refresh(model)
        kept = written * sparse24.ops.unpack_mask(model.fc1.mask)
        assert torch.equal(sparse24.ops.decompress(model.fc1.packed, model.fc1.E, 32, 16), kept)
    finally:
        dist.destroy_process_group()


def test_conversion_warns_of_nothing_and_takes_both_directions_and_16_bits_unless_told_otherwise():
    model = MLP()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        report = sparse24.sparsify(model)
    assert model.fc1.mvue and not model.fc1.lean and report.precision is None


@pytest.mark.parametrize("precision", [None, "fp8-hybrid", "fp8"])
def test_layers_whose_sizes_have_no_whole_blocks_stay_dense(precision):
    sizes = {"fits": (64, 96), "padded": (36, 100), "narrow": (46, 64), "short": (64, 46)}
    model = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
    report = sparse24.sparsify(model, include="*", precision=precision)
    assert report.converted == ["fits", "padded"] == [*report.shapes] == [*report.reasons]
    words = "is not a multiple of 4 on both sides; choose widths that are"
    assert dict(report.skipped) == {"narrow": f"64 x 46 {words}", "short": f"46 x 64 {words}"}


@pytest.mark.parametrize("count, last", [(8, "7$"), (9, "7 and 1 more$")])
def test_an_error_names_eight_layers_and_counts_the_others(count, last):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
    with pytest.raises(Sparse24Error, match=f"names here: 0, 1, .*, {last}"):
        sparse24.sparsify(model, include="zzzzzz")


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(include=None), "include must be patterns over module names, got None"),
        (dict(exclude=None), "exclude must be patterns over module names, got None"),
        (dict(exclude="*"), "leaves none of the layers that include='auto' names: fc1, fc2"),
        (dict(mvue="no"), "mvue must be True or False, got 'no'"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, words):
    with pytest.raises(Sparse24Error, match=re.escape(words)):
        sparse24.sparsify(MLP(), **settings)


def test_padding_masks_work_in_torchs_encoder():
    """Its nested tensors belong to a fast path that never calls the layers."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2).eval()
    nested = encoder.use_nested_tensor
    sparse24.sparsify(encoder)
    x, padding = torch.randn(2, 6, 16), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[1, :4], encoder(x, src_key_padding_mask=padding)[1, :4].detach())
    sparse24.densify(encoder)
    assert encoder.use_nested_tensor == nested and "_sparse24_nested" not in encoder.__dict__


def test_wrappers_that_pass_on_attributes_are_left_as_they_are():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    wrapper = Wrapper(MLP())
    sparse24.sparsify(wrapper)
    assert len(sparse24.densify(wrapper)) == 2


def test_refresh_finds_masks_anew_that_an_average_has_broken():
    model = MLP()
    sparse24.sparsify(model)
    # From a file it knows no origin: else it would take the masks of the model that it follows.
    averaged = pickle.loads(pickle.dumps(torch.optim.swa_utils.AveragedModel(model, use_buffers=True)))
    for _ in range(3):
        with torch.no_grad():
            model.fc1.weight.copy_(torch.randn_like(model.fc1.weight))
        sparse24.refresh(model, search=True)
        averaged.update_parameters(model)
    with pytest.warns(Sparse24Warning, match="fc1.* do not keep two in each row and column"):
        sparse24.refresh(averaged)
    assert sparse24.verify(averaged)


def test_sparse_weights_that_no_given_optimizer_holds_are_named():
    model = nn.Sequential(MLP(), MLP())
    sparse24.sparsify(model)
    with pytest.warns(Sparse24Warning, match=r"does not hold the weights of 1.fc1, 1.fc2 \(2 sparse layers\)"):
        sparse24.Recipe(model, torch.optim.SGD(model[0].parameters(), 0.1), 4)
