"""Where a sparse layer keeps what it adds to a user's module, under names that clash with nobody's.

Constants are in one object, the attribute `_sparse24`; tensors are non-persistent buffers whose names begin with
`_sparse24_`. `layer.mask`, `layer.phase` and the like show them under plain names, unless the module has an attribute
of that name itself, which then stays what it was. Code of this package reads by `state_of` and `mask_of`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOLDER = "_sparse24"
SPARSE, DENSE = "sparse", "dense"

# The packed forms of a layer, in the order in which every op takes and gives them, and the names of their buffers.
PACKED_NAMES = ("packed", "E", "packed_t", "E_t")
MASK, SOFT, DECAY = f"{HOLDER}_mask", f"{HOLDER}_soft", f"{HOLDER}_decay_factor"
PACKED, METADATA, PACKED_T, METADATA_T = PACKED_BUFFERS = tuple(f"{HOLDER}_{name}" for name in PACKED_NAMES)
TRANSPOSED_BUFFERS = PACKED_BUFFERS[2:]  # empty in a lean layer, and then not written
LAYER_BUFFERS = (MASK, *PACKED_BUFFERS, SOFT, DECAY)

#: in place of `LayerState.packed_weight`: what was packed is no Parameter (parametrized, pruned, normalised)
COMPUTED = "computed"


@dataclass(eq=False)
class LayerState:
    """The constants of a sparse layer.

    phase          "sparse" or "dense" (the plain dense layer)
    mvue           prune the output gradient without bias for the weight gradient
    rank           of the process; mixed into the noise of MVUE
    lean           packed_t and E_t stay empty; backward makes them anew from the weight and the mask
    compute_dtype  of packed values; None: see `packed_dtype`
    mask_is_state  training has advanced the mask: loading weights keeps it
    soft_scale     set: the layer is S-STE's, and this is the scale of its thresholded weight
    dense_mvue     in the dense phase prune output gradients for the weight gradient too (`method="mvue"`)
    packed_weight  the Parameter that was packed last; COMPUTED; None: a shard of FSDP2, which forward does not see
    stamp          its address and version then, for the alarm in forward
    watch          what to look at before the next forward pass; see `copies`
    generation     how often mask, scale or phase have changed: copies compare it
    packs          how often the weight has been packed: copies compare it too
    has_owner      a recipe trains it
    passed         `packs` at the last eager forward pass
    fingerprint    (generation, text that stands for phase and mask), once somebody has asked for it
    copied_from    of a copy: the layer that it was made of, until the copy is packed
    precision      None: 16-bit products; "fp8-hybrid", "fp8": see `float8`
    scales_known   the scales of 8-bit casts are those of a step; until then each cast looks at its tensor
    scale_partner  weak reference to the other half of a fused gate and up, whose weights have one scale
    cut            how a tensor-parallel plan has cut the weight, `tensor_parallel.Cut`; None: it has not
    shards         the rows of this rank of FSDP2, where packed forms are gathered, `row_shards.RowShards`; or None
    adapter        weak reference to the adapter around it, which may be merged into it: see `merges`
    lookout        `unseen.Lookout`, shared by the layers of a model
    looked         the lookout's `evaluation` or `training`: the one in which the layer last compared its weight
    keeps_looking  compare in each pass until the next packing
    """

    mvue: bool
    rank: int
    lean: bool = False
    compute_dtype: torch.dtype | None = None
    phase: str = SPARSE
    mask_is_state: bool = False
    soft_scale: Tensor | None = None
    dense_mvue: bool = False
    packed_weight: nn.Parameter | str | None = None
    stamp: tuple[int, int] | None = None
    watch: Any = None
    generation: int = 0
    packs: int = 0
    has_owner: bool = False
    passed: int = 0
    fingerprint: tuple[int, str] | None = None
    copied_from: Any = None
    precision: str | None = None
    scales_known: bool = False
    scale_partner: Any = None
    cut: Any = None
    shards: Any = None
    adapter: Any = None
    lookout: Any = None
    looked: object = None
    keeps_looking: bool = False

    def for_copy(self, origin) -> LayerState:
        """What a copy or a pickle of the layer begins with: it packs its own weight, and may follow its origin."""
        scale = None if self.soft_scale is None else self.soft_scale.clone()
        constants = (self.mvue, self.rank, self.lean, self.compute_dtype, self.phase, self.mask_is_state)
        settings = dict(dense_mvue=self.dense_mvue, precision=self.precision, lookout=self.lookout, cut=self.cut)
        # scales_known stays False: a copy may be used long after the step that told them.
        return LayerState(*constants, soft_scale=scale, copied_from=origin, **settings)


def state_of(layer: nn.Module) -> LayerState:
    """The constants of a sparse layer, whatever attributes of its own the module has."""
    return layer.__dict__[HOLDER]


def division_of(layer: nn.Module) -> Any:
    """How a sparse layer's mask is divided among ranks, a `tensor_parallel.Cut`, or None: every rank has all of it."""
    state = layer.__dict__[HOLDER]
    return state.cut or state.shards


def mask_of(layer: nn.Module) -> Tensor:
    """The mask of a sparse layer, uint8 [rows/4, cols/2]; where ranks divide the layer, of this rank's part."""
    return layer._buffers[MASK]


def decay_factor_of(layer: nn.Module) -> Tensor | None:
    """What backward multiplies a sparse layer's masked decay by: float32 [1], or None."""
    return layer._buffers[DECAY]


def is_ours(name: str) -> bool:
    """Whether an attribute or buffer has a name that only this package gives."""
    return name.startswith(HOLDER)


def add_buffers(module: nn.Module, names: tuple[str, ...]) -> None:
    """Register empty buffers that no state_dict holds."""
    for name in names:
        module.register_buffer(name, None, persistent=False)


def drop_all(module: nn.Module) -> None:
    """Take off everything that this package has put on `module`."""
    for name in [name for name in module._buffers if is_ours(name)]:
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)
    module.__dict__.pop(HOLDER, None)


class Shown:
    """Shows something of ours under a plain name on a module of the user's, whose own attributes come first.

    read   module -> value
    write  (module, value), or None: an assignment is then an attribute of the user's
    """

    def __init__(self, read, write=None):
        self.read, self.write = read, write

    def __set_name__(self, owner: type, name: str):
        self.owner, self.name = owner, name

    def __get__(self, module: nn.Module | None, cls: type) -> Any:
        if module is None:
            return self
        if self._in_dict(module):
            return module.__dict__[self.name]
        for tensors_or_modules in (module._buffers, module._parameters, module._modules):
            if self.name in tensors_or_modules:
                return tensors_or_modules[self.name]
        behind = cls.__mro__[cls.__mro__.index(self.owner) + 1 :]
        if any(self.name in vars(base) for base in behind):
            return getattr(super(self.owner, module), self.name)
        if HOLDER not in module.__dict__:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self.name!r}")
        return self.read(module)

    def __set__(self, module: nn.Module, value) -> None:
        if self.write is None or self._in_dict(module) or HOLDER not in module.__dict__:
            module.__dict__[self.name] = value
        else:
            self.write(module, value)

    def __delete__(self, module: nn.Module) -> None:
        if not self._in_dict(module):
            raise AttributeError(f"{self.name!r} belongs to sparse24; sparse24.densify(model) takes it off")
        del module.__dict__[self.name]

    def _in_dict(self, module: nn.Module) -> bool:
        return self.name in module.__dict__


def shown_buffer(name: str, write=None) -> Shown:
    """Shows the buffer `name`."""
    return Shown(lambda module: module._buffers[name], write)


def shown_constant(name: str, write=None) -> Shown:
    """Shows a field of the `LayerState`."""
    return Shown(lambda module: getattr(module.__dict__[HOLDER], name), write)
