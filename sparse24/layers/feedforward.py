"""Whole feed-forward blocks in one function: fewer kernels than their layers one by one, and less to save.

`sparsify` looks at the class of a module that holds an FFN. Where the source of its forward is exactly
down(act(gate(x)) * up(x)), or down(act(up(x))) and perhaps a dropout, and the activation is one that we have, the
module gets a class whose forward is `functional.gated_mlp` or `functional.mlp`. Everything else about the module
stays; its layers stay the sparse layers that they are, and hold the parameters. Whenever a layer is no longer what
it was (dense phase, hooks, adapters, another dtype), forward is the module's own again.

Gate and up are packed into one buffer of the module: their own packed forms are its halves, so that one product reads
both and nothing is held twice. Only E of the forward product is copied after packing, its rows being interleaved.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import weakref
from functools import cache

import torch
from torch import Tensor, nn

from .. import functional, ops
from ..errors import Sparse24Error
from ..formats import META_BLOCK
from .modules import ACTIVATIONS, SPARSE, SparseLayer
from .packing import PACKED_NAMES, TRANSPOSED_NAMES, blocks, mask_bits

_CALL = r"self\.(\w+)"
GATED_FORWARD = re.compile(rf"(?:(\w+) = {_CALL}\({_CALL}\({_CALL}\(x\)\) \* {_CALL}\(x\)\)\nreturn \1)")
GATED_RETURN = re.compile(rf"return {_CALL}\({_CALL}\({_CALL}\(x\)\) \* {_CALL}\(x\)\)")
PLAIN_FORWARD = re.compile(rf"x = {_CALL}\(x\)\nx = {_CALL}\(x\)\nx = {_CALL}\(x\)\n(?:x = {_CALL}\(x\)\n)?return x")
PLAIN_RETURN = re.compile(rf"return {_CALL}\({_CALL}\({_CALL}\(x\)\)\)()")


class FusedFeedForward:
    """What a fused block adds to its class. A mixin, left of the class; see `fuse`.

    _ffn  the names of (gate, up, down) or (up, down), the kind of activation, the name of a dropout at the end or None
    """

    _ffn: tuple[tuple[str, ...], str, str | None]

    def _init_fused(self, names: tuple[str, ...], kind: str, dropout: str | None) -> None:
        self._ffn = (names, kind, dropout)
        for name in PACKED_NAMES:
            self.register_buffer(name, None, persistent=False)
        self.link()

    def _drop_fused(self) -> None:
        for layer in self.ffn_layers()[:-1]:
            blocks.pop(layer, None)
        for name in PACKED_NAMES:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self.__dict__.pop("_ffn", None)
        self.__dict__.pop("_halves", None)

    def ffn_layers(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self, name) for name in self._ffn[0])

    # -- one buffer for gate and up ---------------------------------------------------------------------------------

    def link(self) -> None:
        """Make the packed forms of gate and up halves of one buffer, if they are not already."""
        if len(self._ffn[0]) == 2:
            return
        gate, up, _ = self.ffn_layers()
        if self._linked(gate, up):
            return
        self._halves = None
        sparse = isinstance(gate, SparseLayer) and isinstance(up, SparseLayer)
        if not sparse or _form(gate) != _form(up) or gate.packed.shape[0] % META_BLOCK:
            self.packed = None  # forward falls back to the layers
            return
        rows, cols = gate.kernel_weight().shape
        whole = ops.empty_packed(2 * rows, cols, gate.packed.dtype, gate.packed.device)
        for name, tensor in zip(PACKED_NAMES, whole, strict=True):
            setattr(self, name, tensor.new_empty(0) if gate.lean and name in TRANSPOSED_NAMES else tensor)
        # E orders columns by 64 first and rows within: of each 64 columns the two halves have a piece.
        pieces = self.E.view(-(-cols // META_BLOCK), 2, -1)
        halves = []
        for index, layer in enumerate((gate, up)):
            for name in ("packed",) if gate.lean else ("packed", "packed_t", "E_t"):
                half = getattr(self, name).chunk(2)[index]
                half.copy_(getattr(layer, name))
                setattr(layer, name, half)
            piece = pieces[:, index]
            piece.copy_(layer.flat_E().view(piece.shape))
            layer.E = piece
            halves.append({name: layer._buffers[name] for name in PACKED_NAMES})
            blocks[layer] = weakref.ref(self)
        self._halves = (self._buffers["packed"], *halves)

    def _linked(self, gate: nn.Module, up: nn.Module) -> bool:
        """Whether the layers' packed forms are still the halves that `link` gave them: this runs after each step."""
        if self.__dict__.get("_halves") is None:
            return False
        whole, gates, ups = self._halves
        return self._buffers["packed"] is whole and all(
            layer._buffers.get(name) is half
            for layer, halves in ((gate, gates), (up, ups))
            for name, half in halves.items()
        )

    # -- what may happen to a module ----------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.link()
        return self

    def __reduce_ex__(self, protocol):
        # The class is made at run time: copies and pickles name its parts instead.
        state = self.__dict__.copy()
        state["_buffers"] = {k: v for k, v in state["_buffers"].items() if k not in PACKED_NAMES}
        state.pop("_halves", None)
        return _empty_fused, (_own_class(self),), state

    def __setstate__(self, state):
        super().__setstate__(state)
        for name in PACKED_NAMES:
            self._buffers[name] = None
        self.link()

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        names, kind, dropout = self._ffn
        # Past nn.Module's own attribute access, which costs as much as a launch: this runs for each block of a model.
        modules = self._modules
        *ups, down = layers = [modules[name] for name in names]
        if not torch.compiler.is_compiling():
            for layer in layers:
                if layer.__dict__.get("_watch") is not None:
                    layer.look()
        if not self._runs_fused(x, layers):
            return super().forward(x)
        if not torch.compiler.is_compiling():
            for layer in layers:
                layer.check_weight_is_packed()
        gated = len(ups) == 2
        up_weights, down_weight = [up._parameters["weight"] for up in ups], down._parameters["weight"]
        bias_up, bias_down = ups[0]._parameters["bias"], down._parameters["bias"]
        if bias_up is not None and gated:
            bias_up = torch.cat([up._parameters["bias"] for up in ups])
        decay = down._buffers["decay_factor"]
        packed_up = _packed_forms(self if gated else ups[0], ups, decay)
        packed_down = _packed_forms(down, [down], decay)
        weights = tuple(up.as_kernel_sees(w) for up, w in zip(ups, up_weights, strict=True))
        down_weight = down.as_kernel_sees(down_weight)
        settings = dict(bias_down=bias_down, mvue=down.mvue, rank=down.rank, decay=decay)
        if gated:
            y = functional.gated_mlp(
                x, weights, packed_up, down_weight, packed_down, kind, bias_gate_up=bias_up, **settings
            )
        else:
            y = functional.mlp(x, weights[0], packed_up, down_weight, packed_down, kind, bias_up=bias_up, **settings)
        return y if dropout is None else modules[dropout](y)

    def _runs_fused(self, x: Tensor, layers: list[nn.Module]) -> bool:
        """Whether the layers are still bare sparse layers that compute in the dtype that x has, or autocast gives
        it.
        """
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if len(layers) == 3 and self._buffers["packed"] is None:
            return False
        if not isinstance(layers[-1], SparseLayer):
            return False
        mvue, decays = layers[-1].mvue, layers[-1]._buffers["decay_factor"] is not None
        for layer in layers:
            if not isinstance(layer, SparseLayer) or layer.phase != SPARSE or layer.mvue != mvue:
                return False
            if (layer._buffers["decay_factor"] is not None) != decays:
                return False
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                return False
            buffers, weight = layer._buffers, layer._parameters.get("weight")
            if buffers["soft"] is not None or buffers["packed"].dtype not in (dtype, torch.float32) or weight is None:
                return False
            if weight is not layer._packed_from and layer.weight_is_lent():
                return False
            if not autocast and dtype != weight.dtype:
                return False  # the layers themselves say what does not fit
        return True


def _packed_forms(module: nn.Module, layers: list[SparseLayer], decay: Tensor | None) -> functional.PackedWeight:
    buffers = module._buffers
    masks = ()
    if layers[0].lean or decay is not None:
        masks = tuple(mask_bits(layer._buffers["mask"]) for layer in layers)
    return functional.PackedWeight(buffers["packed"], buffers["E"], buffers["packed_t"], buffers["E_t"], masks)


def _form(layer: SparseLayer) -> tuple:
    return (layer.packed.shape, layer.packed.dtype, layer.packed.device, layer.lean)


def _own_class(module: FusedFeedForward) -> type:
    """The class of the module before it was fused."""
    mixin, *own = type(module).__bases__
    if mixin is not FusedFeedForward:
        raise Sparse24Error(
            f"{type(module).__name__} was wrapped after sparsify (by fully_shard, perhaps); densify before wrapping"
        )
    return own[0]


@cache
def _fused_class(own: type) -> type:
    for known in FusedFeedForward.__subclasses__():
        if known.__bases__ == (FusedFeedForward, own):
            return known  # SparseGatedMLP
    return type(f"Fused{own.__name__}", (FusedFeedForward, own), {"__module__": own.__module__})


def _empty_fused(own: type) -> FusedFeedForward:
    cls = _fused_class(own)
    return cls.__new__(cls)


# -- which blocks ---------------------------------------------------------------------------------------------------


def fuse(block: nn.Module) -> str:
    """Give `block` the fused forward if it is safe; returns "" or why not.

    The layers must be sparse already, and bare: no hooks, adapters or parametrizations on them.
    """
    if isinstance(block, FusedFeedForward):
        return ""
    if "forward" in block.__dict__:
        return "its forward is replaced on the instance"
    found = _read_forward(type(block))
    if found is None:
        return f"the forward of {type(block).__name__} is not one that is known"
    names, activation, dropout = found
    layers = [getattr(block, name, None) for name in names]
    if not all(isinstance(layer, SparseLayer) for layer in layers):
        return "not all of its layers are sparse"
    if len(names) == 3 and layers[0].packed.shape[0] % META_BLOCK:
        return f"gate and up have {layers[0].packed.shape[0]} rows, not a multiple of {META_BLOCK}"
    if len(names) == 3 and (layers[0].bias is None) != (layers[1].bias is None):
        return "only one of gate and up has a bias"
    kind = activation_kind(getattr(block, activation, None))
    if kind is None:
        return f"its activation {activation} is not one of {', '.join(ACTIVATIONS)}"
    block.__class__ = _fused_class(type(block))
    block._init_fused(names, kind, dropout)
    return ""


def unfuse(model: nn.Module) -> None:
    """Give every fused block of `model` its own class back."""
    for block in list(model.modules()):
        if isinstance(block, FusedFeedForward):
            own = _own_class(block)
            block._drop_fused()
            block.__class__ = own


def activation_kind(activation) -> str | None:
    """Which of our activations a module or function is, told by its values; None for another."""
    if not callable(activation) or (isinstance(activation, nn.Module) and any(True for _ in activation.parameters())):
        return None
    x = torch.linspace(-6, 6, 49, device="cpu")
    try:
        values = activation(x)
    except Exception:  # noqa: BLE001 - anything that is not a function of one tensor is not ours
        return None
    for kind, candidate in ACTIVATIONS.items():
        if isinstance(values, Tensor) and values.shape == x.shape and torch.allclose(values, candidate(x), 1e-6, 1e-6):
            return kind
    return None


@cache
def _read_forward(cls: type) -> tuple[tuple[str, ...], str, str | None] | None:
    """(names of layers, name of the activation, name of a dropout at the end) by the source of cls.forward, or None."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(cls.forward))).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    arguments = [argument.arg for argument in getattr(function, "args", ast.arguments(args=[])).args]
    if len(arguments) != 2:
        return None
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    source = "\n".join(map(ast.unparse, body))
    source = re.sub(rf"(?<![\w.]){arguments[1]}\b", "x", source)
    if match := GATED_FORWARD.fullmatch(source):
        _, down, activation, gate, up = match.groups()
        return (gate, up, down), activation, None
    if match := GATED_RETURN.fullmatch(source):
        down, activation, gate, up = match.groups()
        return (gate, up, down), activation, None
    if match := PLAIN_FORWARD.fullmatch(source):
        up, activation, down, dropout = match.groups()
        return (up, down), activation, dropout
    if match := PLAIN_RETURN.fullmatch(source):
        down, activation, up, _ = match.groups()
        return (up, down), activation, None
    return None
