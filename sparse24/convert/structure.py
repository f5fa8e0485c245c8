"""Finding the feed-forward blocks of a transformer by their structure.

An FFN is recognised by the names of a module's children together with how their sizes chain: the up projections take
what the down projection gives, and the down projection takes what the (gated) activation of the up projections gives.
Names alone would also find attention projections and classification heads; sizes alone would find anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..layers.parallel import tensor_parallel


@dataclass(frozen=True)
class Shape:
    """How one family of models names the layers of an FFN; a dot steps into a child's child."""

    up: tuple[str, ...]  # one layer, or gate and up
    down: str
    fused_gate: bool = False  # gate and up are the two halves of one layer
    family: str = ""


SHAPES = (
    Shape(("gate_proj", "up_proj"), "down_proj", family="Llama, Mistral, Qwen, Gemma; SparseGatedMLP"),
    Shape(("gate_up_proj",), "down_proj", fused_gate=True, family="Phi-3, GLM-4"),
    Shape(("up_proj",), "down_proj", family="MPT, Nemotron"),
    Shape(("c_fc",), "c_proj", family="GPT-2, GPT-Neo, StarCoder"),
    Shape(("fc1",), "fc2", fused_gate=True, family="OPT, BART, ViT, CLIP, timm's Mlp; packed: timm's GluMlp, DINOv2-g"),
    Shape(("fc1_g", "fc1_x"), "fc2", family="timm's SwiGLU"),
    Shape(("fc_in",), "fc_out", family="GPT-J, CodeGen"),
    Shape(("dense_h_to_4h",), "dense_4h_to_h", family="GPT-NeoX, BLOOM"),
    Shape(("intermediate.dense",), "output.dense", family="BERT, RoBERTa, ELECTRA"),
    Shape(("wi",), "wo", family="T5"),
    Shape(("wi_0", "wi_1"), "wo", family="T5 v1.1, mT5, UL2"),
    Shape(("Wi",), "Wo", fused_gate=True, family="ModernBERT"),
    Shape(("w1", "w3"), "w2", family="Llama as published, Mistral"),
    Shape(("lin1",), "lin2", family="DistilBERT, SAM"),
    Shape(("linear1",), "linear2", family="torch.nn.TransformerEncoderLayer"),
    Shape(("weights_in",), "weights_out", fused_gate=True, family="DINOv2's SwiGLU"),
    Shape(("w12",), "w3", fused_gate=True, family="DINOv2's SwiGLU as published"),
    Shape(("ffn",), "ffn_output", family="ALBERT"),
)
ADAPTED = "base_layer"  # where adapters of PEFT hold the layer that they adapt
EXPERT_NAMES = {"expert", "experts"}


@dataclass(frozen=True)
class FeedForward:
    """One FFN found in a model: the full names of its layers, up projections first."""

    name: str  # of the module that holds the layers
    layers: tuple[str, ...]
    shape: Shape
    is_expert: bool

    def sizes(self, model: nn.Module) -> tuple[int, int, bool]:
        """(d_model, d_ff, gated)."""
        hidden, out = features(model.get_submodule(self.layers[-1]))
        up = features(model.get_submodule(self.layers[0]))[1]
        return out, hidden, len(self.shape.up) == 2 or up == 2 * hidden


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, or a subclass, found out without importing transformers."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """A layer y = x W^T + b with a weight of its own: nn.Linear or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer."""
    return (module.nx, module.nf) if is_conv1d(module) else (module.in_features, module.out_features)


def part_features(module: nn.Module) -> tuple[int, int]:
    """As `features`, of the part that a tensor-parallel rank multiplies with."""
    extents, cut = list(features(module)), tensor_parallel.cut_of(module)
    if cut is not None:
        extents[1 - cut.dim] //= cut.parts
    return extents[0], extents[1]


def find_feed_forwards(model: nn.Module) -> list[FeedForward]:
    """The FFNs of `model`, in the order of its modules. Experts of mixtures are found too, and marked.

    Blocks may share layers, which then have one name: that of `model.named_modules()`, the first of several.
    """
    found, modules = [], dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    for name, module in modules.items():
        taken: set[int] = set()
        for shape in SHAPES:
            layers = _match(module, shape)
            # Of two shapes of a module that share layers the first in the table wins (gate, up, down before up, down).
            if layers and not taken & set(map(id, layers)):
                taken |= set(map(id, layers))
                is_expert = bool(EXPERT_NAMES & set(name.split(".")))
                found.append(FeedForward(name, tuple(names[id(layer)] for layer in layers), shape, is_expert))
    return found


def find_fused_experts(model: nn.Module) -> list[str]:
    """Names of modules that hold all experts in 3-D parameters: nothing here converts them, the report names them."""
    return [
        name
        for name, module in model.named_modules()
        if name.split(".")[-1] in EXPERT_NAMES
        and any(p is not None and p.dim() == 3 for p in module._parameters.values())
    ]


def _own_module(module: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` below `module`, inside its adapter. Not by getattr: wrappers pass attributes of their model
    on as their own.
    """
    for name in path.split("."):
        if module is None:
            return None
        module = module._modules.get(name)
    while module is not None and module._modules.get(ADAPTED) is not None:
        module = module._modules[ADAPTED]
    return module


def _match(module: nn.Module, shape: Shape) -> tuple[nn.Module, ...] | None:
    """The layers of `module` if it is an FFN of this shape."""
    *ups, down = (_own_module(module, path) for path in (*shape.up, shape.down))
    if not all(layer is not None and is_linear(layer) for layer in (*ups, down)):
        return None
    hidden, out = features(down)
    widths = {features(up) for up in ups}
    # Names of fused gates also exist without a gate: then the first layer is as wide as the second reads.
    allowed = {(out, 2 * hidden), (out, hidden)} if shape.fused_gate else {(out, hidden)}
    return (*ups, down) if len(widths) == 1 and widths <= allowed else None
