"""sparsify, densify, refresh: which layers are found in real models, what is refused and how the report says it."""

import pickle
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from rounding import MANY_SUMS
from tiny_models import MLP, VOCAB, from_config, gpt2, llama, tokens
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import sparse24
from sparse24 import SparseLinear
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.layers.modules import SparseLayer

SMALL = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=0, eos_token_id=0)
DECODER = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **SMALL
)
T5 = dict(
    d_model=32, d_ff=64, d_kv=16, num_layers=2, num_decoder_layers=2, num_heads=2, decoder_start_token_id=0, **SMALL
)
ENCODER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **SMALL)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
WHISPER = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2,
    decoder_attention_heads=2, max_source_positions=8, max_target_positions=16, decoder_start_token_id=0,
    suppress_tokens=None, begin_suppress_tokens=None, **SMALL,
)  # fmt: skip

# architecture -> settings, and the FFN layers of one block by the end of their names; all have 2 blocks (a stack)
FAMILIES = {
    ("LlamaConfig", "LlamaForCausalLM"): (DECODER, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], 2),
    ("MistralConfig", "MistralForCausalLM"): (DECODER, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], 2),
    ("Qwen2Config", "Qwen2ForCausalLM"): (DECODER, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], 2),
    ("Gemma2Config", "Gemma2ForCausalLM"): (
        dict(DECODER, head_dim=16), ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], 2
    ),
    ("Phi3Config", "Phi3ForCausalLM"): (DECODER, ["mlp.gate_up_proj", "mlp.down_proj"], 2),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM"): (ENCODER, ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"], 2),
    ("GPT2Config", "GPT2LMHeadModel"): (
        dict(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0),
        ["mlp.c_fc", "mlp.c_proj"], 2,
    ),
    ("OPTConfig", "OPTForCausalLM"): (
        dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32, **SMALL),
        ["fc1", "fc2"], 2,
    ),
    ("BertConfig", "BertForMaskedLM"): (ENCODER, ["intermediate.dense", "output.dense"], 2),
    ("RobertaConfig", "RobertaForMaskedLM"): (ENCODER, ["intermediate.dense", "output.dense"], 2),
    ("ModernBertConfig", "ModernBertForMaskedLM"): (ENCODER, ["mlp.Wi", "mlp.Wo"], 2),
    ("DistilBertConfig", "DistilBertForMaskedLM"): (
        dict(dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=VOCAB, pad_token_id=0), ["ffn.lin1", "ffn.lin2"],
        2,
    ),
    ("ViTConfig", "ViTForImageClassification"): (VISION, None, 2),
    ("CLIPVisionConfig", "CLIPVisionModel"): (VISION, ["mlp.fc1", "mlp.fc2"], 2),
    ("WhisperConfig", "WhisperForConditionalGeneration"): (WHISPER, ["fc1", "fc2"], 4),
    ("T5Config", "T5ForConditionalGeneration"): (T5, ["DenseReluDense.wi", "DenseReluDense.wo"], 4),
    ("T5Config", "T5ForConditionalGeneration", "gated"): (
        dict(T5, feed_forward_proj="gated-gelu"),
        ["DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"], 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_feed_forward_layers_of_every_family_are_found_and_nothing_else(family):
    settings, endings, blocks = FAMILIES[family]
    model = from_config(family[:2], **settings)
    keys = list(model.state_dict())
    report = sparse24.sparsify(model)
    layers = [name for name, m in model.named_modules() if isinstance(m, SparseLayer)]
    assert sorted(layers) == sorted(report.converted) and not report.skipped
    if endings is not None:
        assert len(layers) == blocks * len(endings)
        assert all(any(name.endswith("." + end) for end in endings) for name in layers)
    else:
        assert len(layers) == 2 * blocks
    assert not any("attention.output" in name or "attn" in name or "lm_head" in name for name in layers)
    assert list(model.state_dict()) == keys
    assert sparse24.verify(model)


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
        (dict(include=("transformer.h.0.mlp.c_pro",)), "closest are.*transformer.h.0.mlp.c_proj"),
        (dict(exclude=("*mpl*",)), "exclude pattern '\\*mpl\\*' matches no layer.*mlp"),
        (dict(include=("*zzzzzzz*",)), "names here: .*c_attn"),
        (dict(include=()), "no layer of GPT2LMHeadModel"),
        (dict(include=(3,)), "include must be patterns"),
        (dict(backend="fast"), "backend must be one of auto, sparse, got 'fast'"),
        (dict(dtype=torch.int8), "dtype must be one of .*int8"),
    ],
)
def test_bad_settings_name_what_is_wrong_and_change_nothing(settings, words):
    """A pattern that matches nothing raises with the closest names."""
    model = gpt2(1)
    with pytest.raises(Sparse24Error, match=words):
        sparse24.sparsify(model, **settings)
    assert not any(isinstance(m, SparseLayer) for m in model.modules())


@pytest.mark.fault(76)
def test_models_without_an_ffn_say_what_they_have():
    """An empty list of layers is an error."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(Sparse24Error, match="no FFN was recognised.*linear layers here: 0, 1"):
        sparse24.sparsify(model)
    with pytest.raises(Sparse24Error, match="must be a torch.nn.Module, got list"):
        sparse24.sparsify([model])


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


def test_mixture_models_report_their_experts_and_convert_the_rest():
    mixtral = from_config(
        ("MixtralConfig", "MixtralForCausalLM"), **dict(DECODER, num_local_experts=2, num_experts_per_tok=1)
    )
    with pytest.raises(Sparse24Error, match="mlp.experts: experts of a mixture"):
        sparse24.sparsify(mixtral)
    deepseek = from_config(
        ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
        **dict(
            DECODER, moe_intermediate_size=16, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=16,
        ),
    )  # fmt: skip
    report = sparse24.sparsify(deepseek)
    converted = " ".join(report.converted)
    assert "layers.0.mlp.gate_proj" in converted and "shared_experts.down_proj" in converted
    assert any(name.endswith("mlp.experts") for name, _ in report.skipped)


def test_report_is_a_table_with_reasons():
    report = sparse24.sparsify(Skipper(MLP(6, 8)))
    text = str(report)
    assert "2 layers 2:4 (1,024 weights), 2 skipped" in text
    assert any(line.split()[:5] == ["good.fc1", "32", "x", "16", "2:4"] for line in text.splitlines())
    assert "8 x 6 is not a multiple of 4" in text
    assert report and report.shapes["good.fc1"] == (32, 16) and "cpu" in report.reasons["good.fc1"]


def test_hooks_and_references_survive_conversion():
    model, seen = MLP(), []
    layer = model.fc1
    layer.register_forward_hook(lambda module, args, out: seen.append(module))
    sparse24.sparsify(model)
    model(torch.randn(2, 16))
    assert model.fc1 is layer and isinstance(layer, SparseLinear) and seen == [layer]


@pytest.mark.fault(40)
def test_failure_on_a_later_layer_leaves_the_model_dense(monkeypatch):
    """Out of memory in a packed copy changes nothing, and the next attempt works."""
    model, calls = MLP(), []
    real = sparse24.ops.empty_packed

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args)

    monkeypatch.setattr(sparse24.ops, "empty_packed", failing)
    with pytest.raises(torch.OutOfMemoryError):
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


@pytest.mark.fault(36)
def test_gpus_without_sparse_kernels_stay_dense_with_a_warning_or_raise_when_forced(monkeypatch):
    """The reason is told, and only backend='sparse' makes it an error."""
    monkeypatch.setattr(
        sparse24.convert.convert, "_why_unavailable", lambda *asked: "no 2:4 products on cuda:0: sm_75 is too old"
    )
    model = MLP()
    with pytest.warns(Sparse24Warning, match="left the model dense.*sm_75"):
        report = sparse24.sparsify(model)
    assert not report and [s.name for s in report.skipped] == ["fc1", "fc2"]
    with pytest.raises(Sparse24Error, match="sm_75"):
        sparse24.sparsify(model, backend="sparse")


@pytest.mark.fault(99)
def test_a_gpu_without_8_bit_products_leaves_models_dense_and_says_what_else_there_is(monkeypatch):
    model = MLP()
    on_gpu = [type("OnGpu", (), {"device": torch.device("cuda:0")})()]
    monkeypatch.setattr(sparse24.convert.convert, "is_available", lambda device: True)
    monkeypatch.setattr(sparse24.convert.convert, "why_no_float8", lambda index: "no kernel is compiled for float8")
    why = sparse24.convert.convert._why_unavailable
    monkeypatch.setattr(model, "parameters", lambda: on_gpu)
    assert why(model, None) is None
    assert why(model, "fp8") == (
        "no 8-bit 2:4 products on cuda:0: no kernel is compiled for float8; precision=None trains in 16 bits"
    )


def on_gpu(out_features, in_features, dtype=torch.bfloat16):
    """What the decision reads of a layer that is on a GPU."""
    weight = type("Weight", (), {"device": torch.device("cuda:0"), "dtype": dtype})()
    return type("Layer", (), {"weight": weight, "in_features": in_features, "out_features": out_features})()


@pytest.fixture
def h200(monkeypatch):
    """A GPU to decide for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    info = {"multiprocessors": 132, "memory_bandwidth": 4.9e12, "capability_major": 9, "capability_minor": 0}
    monkeypatch.setattr(sparse24._library, "device_info", lambda index: info)
    return info


def test_without_tokens_layers_are_chosen_as_with_8192(monkeypatch):
    asked = []

    def choose(weight, backend, training, *args, **kwargs):
        asked.append((training, kwargs.get("assumed", args[-1] if args else None)))
        return True, "asked"

    monkeypatch.setattr(sparse24.convert.convert, "choose_function", choose)
    for count in (None, 8192, 256):
        sparse24.sparsify(MLP(), tokens=count)
    by_default, as_said, few = (asked[i][0] for i in (0, 2, 4))
    assert by_default == as_said and by_default.tokens == 8192 and few.tokens == 256


def test_small_layers_and_few_tokens_are_dense_on_a_gpu_unless_forced(h200):
    """Which function a layer trains is decided at conversion, from shape, tokens and device."""
    choose, training = sparse24.convert.choose_function, sparse24.convert.cost_model.Training
    large, small = on_gpu(11008, 4096), on_gpu(1024, 256)
    converts, reason = choose(large, "auto", training(8192))
    assert converts and re.fullmatch(
        r"estimated 1\.\d\dx of a compiled dense layer of 11008 x 4096 at 8192 tokens a call, on GPU", reason
    )
    converts, reason = choose(large, "auto", training(256), assumed=True)
    assert not converts and "256 tokens a call (assumed: say tokens=)" in reason
    assert "backend='sparse' converts it anyway" in reason
    assert choose(large, "sparse", training(256)) == (True, "backend='sparse'")
    assert not choose(small, "auto", training(8192))[0] and choose(small, "sparse", training(8192))[0]
    converts, reason = choose(large, "auto", training(8192, 8), (4096, 11008, True))
    assert converts and "feed-forward layer of 4096 x 11008 at 8192 tokens a call and 8 calls a step" in reason


def test_estimates_for_gpus_that_nobody_has_measured_say_so_and_must_promise_more(h200):
    h200.update(multiprocessors=108, memory_bandwidth=1.555e12, capability_major=8)
    choose, training = sparse24.convert.choose_function, sparse24.convert.cost_model.Training
    converts, reason = choose(on_gpu(11008, 4096), "auto", training(8192), (4096, 11008, True))
    assert converts and "by published peaks (not measured by us), on GPU" in reason
    converts, reason = choose(on_gpu(3072, 768), "auto", training(8192), (768, 3072, True))
    assert not converts and "(not measured by us), less than the 1.20x asked for" in reason


def test_the_decision_knows_the_gpu(h200):
    """Slower memory makes passes over it dearer, and the gain smaller."""
    choose, training = sparse24.convert.choose_function, sparse24.convert.cost_model.Training(2048)
    speedups = []
    for bandwidth in (4.9e12, 3.35e12, 2.0e12):
        h200["memory_bandwidth"] = bandwidth
        _, reason = choose(on_gpu(11008, 4096), "auto", training, (4096, 11008, True))
        speedups.append(float(re.search(r"estimated (\d\.\d\d)x", reason)[1]))
    assert speedups == sorted(speedups, reverse=True) and speedups[0] > speedups[-1]


def test_a_part_of_a_tensor_parallel_block_is_judged_by_its_own_width(h200, monkeypatch):
    choose, training = sparse24.convert.choose_function, sparse24.convert.cost_model.Training(8192)
    cut = type("Cut", (), {"parts": 2, "dim": 0})()
    monkeypatch.setattr(sparse24.convert.choice.tensor_parallel, "cut_of", lambda module: cut)
    assert "layer of 4096 x 5504 at" in choose(on_gpu(11008, 4096), "auto", training, (4096, 11008, True))[1]
    assert "layer of 5504 x 4096 at" in choose(on_gpu(11008, 4096), "auto", training)[1], "a layer without a block"


@pytest.mark.parametrize(
    "make, sizes", [(gpt2, (32, 128, False)), (llama, (32, 64, True)), (lambda: nn.Sequential(MLP()), (16, 32, False))]
)
def test_a_block_knows_its_sizes_and_whether_it_is_gated(make, sizes):
    model = make()
    assert [block.sizes(model) for block in sparse24.convert.structure.find_feed_forwards(model)][0] == sizes


def test_whole_blocks_are_converted_or_none_of_their_layers(h200):
    """Gate and up are as large as down is not: a layer by itself would be judged otherwise."""
    choose, training = sparse24.convert.choose_function, sparse24.convert.cost_model.Training(8192)
    answers = {choose(on_gpu(*shape), "auto", training, (4096, 11008, True))[0] for shape in ((11008, 4096), (4, 4))}
    assert answers == {True}


@pytest.mark.parametrize("setting", [dict(tokens=0), dict(tokens=2.5), dict(micro_batches=0)])
def test_tokens_and_micro_batches_are_counts(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(Sparse24Error, match=f"{name} must be an integer, 1 or more, got {value}"):
        sparse24.sparsify(MLP(), **setting)


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


def test_conversion_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        sparse24.sparsify(MLP())


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
    # Made of a copy that knows no origin: else the average would take the masks of the model that it follows.
    averaged = torch.optim.swa_utils.AveragedModel(pickle.loads(pickle.dumps(model)), use_buffers=True)
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
