"""Which layers of real models are feed-forward: families of transformers, mixtures of experts, own blocks."""

import pytest
from tiny_models import MLP, VOCAB, from_config, gpt2, llama
from torch import nn

import sparse24
from sparse24.errors import Sparse24Error
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


@pytest.mark.parametrize(
    "make, sizes", [(gpt2, (32, 128, False)), (llama, (32, 64, True)), (lambda: nn.Sequential(MLP()), (16, 32, False))]
)
def test_a_block_knows_its_sizes_and_whether_it_is_gated(make, sizes):
    model = make()
    assert [block.sizes(model) for block in sparse24.convert.structure.find_feed_forwards(model)][0] == sizes


@pytest.mark.fault(76)
def test_models_without_an_ffn_say_what_they_have():
    """An empty list of layers is an error."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(Sparse24Error, match="no FFN was recognised.*linear layers here: 0, 1"):
        sparse24.sparsify(model)
    with pytest.raises(Sparse24Error, match="must be a torch.nn.Module, got list"):
        sparse24.sparsify([model])
