"""What leaves a model that prunes its activation: programs with the pruned function, and weights with a note of it."""

from __future__ import annotations

import io
import json

import pytest
import torch
import torch.nn.functional as F
from rounding import MANY_SUMS
from torch import nn

import sparse24
from sparse24 import Sparse24Error
from sparse24.testing import assert_same_bits


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


def by_hand(block, x):
    """Two of each four of what the activation makes, by sorting; there are no ties but zeros."""
    h = F.relu(block.up_proj(x)).square()
    groups = h.unflatten(-1, (-1, 4))
    return block.down_proj(h * torch.zeros_like(groups).scatter(-1, groups.topk(2).indices, 1).flatten(-2))


def made():
    torch.manual_seed(0)
    model = nn.Sequential(Block())
    sparse24.sparsify(model, operand="activation")
    return model


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_computes_the_pruned_function_without_ops_of_ours(strict):
    model, x = made(), torch.randn(5, 16)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},), strict=strict)
    assert not any("sparse24" in str(node.target) for node in program.graph.nodes)
    file, other = io.BytesIO(), torch.randn(9, 16)
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(other), by_hand(model[0], other), **MANY_SUMS)


def test_aot_inductor_and_onnx_decompositions_keep_it():
    """Both begin with `run_decompositions`; neither a compiler nor onnx is needed to see what they are given."""
    model, x = made(), torch.randn(5, 16)
    program = torch.export.export(model, (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), by_hand(model[0], x), **MANY_SUMS)


@pytest.mark.fault(115)
def test_save_pretrained_notes_in_the_config_that_the_activation_was_pruned(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=32, activation_function="relu", bos_token_id=0, eos_token_id=0
    )
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.arange(8)[None]
    dense = model(ids).logits
    sparse24.sparsify(model, operand="activation")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sparse24"] == {"operand": "activation"}
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_same_bits(loaded(ids).logits, dense)  # plain transformers
    sparse24.sparsify(loaded, operand=loaded.config.sparse24["operand"])
    assert_same_bits(loaded(ids).logits, model(ids).logits)
    sparse24.densify(loaded)
    assert not hasattr(loaded.config, "sparse24") and "sparse24" not in loaded.config.to_dict()


@pytest.mark.fault(115)
def test_verify_tells_a_model_that_does_not_prune_from_one_that_does(tmp_path):
    model, path = made(), tmp_path / "weights.safetensors"
    sparse24.export(model, path)
    assert sparse24.verify(model) and "1 blocks that prune their activation" in str(sparse24.verify(model, path))
    dense = nn.Sequential(Block())
    dense.load_state_dict(model.state_dict())
    for report in (sparse24.verify(dense, path), sparse24.verify(dense, like=model)):
        ((name, problem),) = report.problems
        assert name == "0" and "sparsify(model, operand='activation')" in problem and not report
    sparse24.sparsify(dense, operand="activation")
    assert sparse24.verify(dense, path) and sparse24.verify(dense, like=model)
    sparse24.densify(model)
    ((name, problem),) = sparse24.verify(dense, like=model).problems
    assert name == "0" and "prunes its activation, and does not in the other model" in problem


@pytest.mark.fault(109)
def test_verify_names_a_block_that_runs_dense():
    model = made()
    model[0].down_proj = None
    ((name, problem),) = sparse24.verify(model).problems
    assert name == "0" and "runs dense" in problem


@pytest.mark.fault(46)
@pytest.mark.parametrize("pruned", ["0", [0], {"0": True}])
def test_a_header_that_says_nonsense_of_pruned_blocks_is_refused(tmp_path, pruned):
    from safetensors.torch import save_file

    save_file(made().state_dict(), path := tmp_path / "w", {"sparse24": json.dumps({"version": 1, "pruned": pruned})})
    with pytest.raises(Sparse24Error, match="corrupt: pruned must be a list of names"):
        sparse24.verify(made(), path)
