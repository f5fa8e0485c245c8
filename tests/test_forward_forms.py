"""Which ways of writing a feed-forward block's forward are read, and which activations they are read as."""

import pytest
import torch
import torch.nn.functional as F
from rounding import MANY_SUMS
from tiny_models import VOCAB, from_config
from torch import nn, relu
from torch.nn.functional import gelu

import sparse24
from sparse24.layers.fused.feedforward import FusedFeedForward


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c_fc, self.c_proj = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
        self.act, self.relu, self.drop, self.norm = nn.GELU(), nn.ReLU(), nn.Dropout(0.0), nn.Identity()


class Nanochat(Block):
    def forward(self, x):
        x = self.c_fc(x)
        x = F.relu(x).square()
        x = self.c_proj(x)
        return x


class ModdedNanoGPT(Block):
    def forward(self, x: torch.Tensor):
        """relu(x)^2: as in https://arxiv.org/abs/2109.08668"""
        return self.c_proj(F.relu(self.c_fc(x)).square())


class PowerOperator(Block):
    def forward(self, x):
        return self.c_proj(relu(self.c_fc(x)) ** 2)


class PowerMethod(Block):
    def forward(self, hidden):
        hidden = torch.relu(self.c_fc(hidden)).pow(2)
        return self.c_proj(hidden)


class TorchSquare(Block):
    def forward(self, x):
        return self.c_proj(torch.square(F.relu(self.c_fc(x))))


class TimesItself(Block):
    def forward(module, inputs):
        h = module.relu(module.c_fc(inputs))
        return module.c_proj(h * h)


class ModuleSquare(Block):
    def forward(self, x):
        h = self.c_fc(x)
        a = self.relu(h)
        out = self.c_proj(a.square())
        return self.drop(out)


class Function(Block):
    def forward(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


class FunctionTanh(Block):
    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Method(Block):
    def forward(self, x):
        return self.c_proj(self.c_fc(x).relu())


class Timm(Block):
    """As timm's Mlp, with dropouts of 0 and no norm."""

    def forward(self, x):
        x = self.c_fc(x)
        x = self.act(x)
        x = self.drop(x)
        x = self.norm(x)
        x = self.c_proj(x)
        x = self.drop(x)
        return x


class ByHand(Block):
    def forward(self, x):
        h = self.c_fc(x)
        return self.c_proj(h * torch.sigmoid(h))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w1, self.w3, self.w2 = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)


class LlamaAsPublished(Gated):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class OtherOrder(Gated):
    def forward(self, x):
        gate, up = self.w1(x), self.w3(x)
        return self.w2(up * F.gelu(gate))


class OtherOrderInLines(Gated):
    def forward(self, x):
        gate = self.w1(x)
        up = self.w3(x)
        return self.w2(up * F.gelu(gate))


READ = {
    Nanochat: "squared_relu",
    ModdedNanoGPT: "squared_relu",
    PowerOperator: "squared_relu",
    PowerMethod: "squared_relu",
    TorchSquare: "squared_relu",
    TimesItself: "squared_relu",
    ModuleSquare: "squared_relu",
    Function: "gelu",
    FunctionTanh: "gelu_tanh",
    Method: "relu",
    Timm: "gelu",
    ByHand: "silu",
    LlamaAsPublished: "silu",
    OtherOrder: "gelu",
    OtherOrderInLines: "gelu",
}


@pytest.mark.parametrize("block", READ, ids=lambda block: block.__name__)
def test_form_is_read_and_computes_the_same(block, monkeypatch):
    kinds, results = [], []
    for name in ("mlp", "gated_mlp"):
        real = getattr(sparse24.functional, name)
        monkeypatch.setattr(sparse24.functional, name, lambda *a, _real=real, **k: kinds.append(a[5]) or _real(*a, **k))
    x, dy = torch.randn(5, 32), torch.randn(5, 32)
    for fuse in (True, False):
        root = nn.ModuleDict({"mlp": block()})
        report = sparse24.sparsify(root, fuse=fuse, mvue=False)
        assert report.fused == ({"mlp": ""} if fuse else {})
        y = root["mlp"](x)
        y.backward(dy)
        results.append([y.detach(), *(p.grad for p in root.parameters())])
    assert kinds == [READ[block]]
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, **MANY_SUMS)


class Cubed(Block):
    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)) ** 3)


class Residual(Block):
    def forward(self, x):
        return x + self.c_proj(F.relu(self.c_fc(x)))


class KnowsInput(Block):
    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)) * x.mean())


class TwoStatements(Block):
    def forward(self, x):
        if x.dim() == 3:
            return x
        return self.c_proj(self.act(self.c_fc(x)))


class Learned(Block):
    def __init__(self):
        super().__init__()
        self.act = nn.PReLU(init=0.0)  # a ReLU as long as nobody trains it

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class InTrainingOnly(nn.Module):
    def forward(self, x):
        return F.relu(x) if self.training else F.gelu(x)


class DependsOnMode(Block):
    def __init__(self):
        super().__init__()
        self.act = InTrainingOnly()

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Dropping(Block):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.c_proj(self.drop(self.act(self.c_fc(x))))


class OwnMethod(Block):
    power = 2

    def activate(self, h):
        return F.relu(h) ** self.power

    def forward(self, x):
        return self.c_proj(self.activate(self.c_fc(x)))


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class MoreArguments(Block):
    def forward(self, x, scale=1.0):
        return self.c_proj(self.act(self.c_fc(x)))


class Attribute(Block):
    scale = 1.0

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)) * self.scale)


NOT_READ = (Cubed, Residual, KnowsInput, TwoStatements, Learned, DependsOnMode, Dropping, OwnMethod, Decorated)
NOT_READ += (MoreArguments, Attribute)


@pytest.mark.parametrize("block", NOT_READ, ids=lambda block: block.__name__)
def test_anything_else_runs_as_it_is_written(block):
    root = nn.ModuleDict({"mlp": block()})
    (why,) = sparse24.sparsify(root).fused.values()
    assert why and not isinstance(root["mlp"], FusedFeedForward) and root["mlp"].training
    root["mlp"](torch.randn(5, 32))


def test_nemotron_is_fused():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    names = ("NemotronConfig", "NemotronForCausalLM")
    model = from_config(names, **sizes, num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    assert list(sparse24.sparsify(model).fused.values()) == [""]
    assert model.model.layers[0].mlp._sparse24.kind == "squared_relu"


class Packed(nn.Module):
    """timm's GluMlp, SwiGLU of DINOv2-g and EVA-02: gate and up in one fc1."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, x):
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * up)


def test_packed_gates_are_found():
    root = nn.ModuleDict({"mlp": Packed()})
    report = sparse24.sparsify(root)
    assert report.converted == ["mlp.fc1", "mlp.fc2"]
    assert sparse24.convert.structure.find_feed_forwards(root)[0].sizes(root) == (32, 64, True)


def test_albert_is_found():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = from_config(("AlbertConfig", "AlbertModel"), **sizes, embedding_size=16)
    converted = sparse24.sparsify(model).converted
    assert len(converted) == 2 and converted[0].endswith(".ffn") and converted[1].endswith(".ffn_output")


@pytest.mark.parametrize("options", [dict(), dict(bias=True)])
def test_squared_relu_block_of_our_own(options):
    block, x = sparse24.SparseGatedMLP(32, 64, activation="squared_relu", **options), torch.randn(3, 32)
    expected = block.down_proj(F.relu(block.gate_proj(x)).square() * block.up_proj(x))
    torch.testing.assert_close(block(x), expected)
