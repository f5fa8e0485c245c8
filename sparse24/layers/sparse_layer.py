"""What the classes of sparse layers share: a dense weight, its mask, and its packed forms.

The dense weight stays the only truth: the state_dict is that of the dense layer, and mask and packed forms are
non-persistent. Whoever changes the weight re-packs it: the recipe after each optimizer step; the hooks below after
load_state_dict, a move, a copy or a new Parameter; `sparse24.refresh(model)` after anything else. Forward only reads,
so it compiles without graph breaks, replays in CUDA graphs and may be run twice by activation checkpointing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import Sparse24Error
from ..functional import pruned_operand
from ..functional.soft import soft_scale
from . import float8, packing
from .checks import check_bias, check_extents, check_weight, distributed_rank
from .forward import OTHER_WAYS, dense_forward, sparse_forward
from .packing import packed_dtype
from .parallel import tensor_parallel
from .state import (
    COMPUTED,
    DECAY,
    DENSE,
    HOLDER,
    LAYER_BUFFERS,
    MASK,
    METADATA,
    METADATA_T,
    PACKED,
    PACKED_BUFFERS,
    PACKED_T,
    SOFT,
    SPARSE,
    TRANSPOSED_BUFFERS,
    LayerState,
    add_buffers,
    division_of,
    drop_all,
    is_ours,
    mask_of,
    shown_buffer,
    shown_constant,
    state_of,
)
from .watch import copies, unseen
from .watch.owners import model_changed, watch_steps
from .watch.replacements import watch_replacements
from .watch.watched_weight import WatchedWeight


class SparseLayer(WatchedWeight):
    """What the sparse classes add to a dense layer that has one 2-D weight. A mixin, left of the dense class.

    Tensors, for a weight seen by the kernels as [rows, cols] = [out_features, in_features]:
      mask          uint8 [rows/4, cols/2], the bytes of a uint16 mask of 4x4 blocks
      packed, E     kept values [rows, cols/2] and their metadata (forward); E in 2-D pieces in a fused block
      packed_t, E_t the same weight packed along rows, [rows/2, cols], and its metadata (input gradient)
      soft          S-STE's thresholded, scaled weight [rows, cols], which its packed form holds; or None
      decay_factor  one float32, what backward multiplies masked decay by (`Recipe(decay_in="backward")`), or None
    Constants: see `LayerState`.
    """

    _sparse24_forward = None  # of a class of ours: the forward that it was defined with, see `replaced`

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._sparse24_forward = vars(cls).get("forward") if SparseLayer in cls.__bases__ else None

    # -- what a recipe asks for -------------------------------------------------------------------------------------

    def train_as(
        self, *, mvue: bool | None = None, rank: int | None = None, soft: bool = False, dense_mvue: bool = False
    ) -> None:
        """Begin a training: no decay in backward, a mask that belongs to the weight until `keep_mask` says otherwise.

        mvue  as the constant; None leaves it as it is
        rank  as the constant; None leaves it as it is
        soft  S-STE: the layer multiplies with its soft-thresholded weight, at the scale that fits the weight now
        dense_mvue  as the constant
        """
        if mvue is not None:
            self.set_mvue(mvue)
        if rank is not None:
            self._set_rank(rank)
        state = state_of(self)
        if state.precision is not None and (soft or dense_mvue):
            raise Sparse24Error(
                f"this layer has precision={state.precision!r}, and methods 's-ste' and 'mvue' multiply in 16 bits; "
                "convert it without precision, or take another method"
            )
        state.mask_is_state, state.watch, state.dense_mvue = False, None, dense_mvue
        self.set_decay(None)
        self.set_soft_scale(soft_scale(packing.whole_weight(self)) if soft else None)

    def set_mvue(self, mvue: bool | str) -> None:
        """Prune an operand of the weight gradient, or none; may change between two steps of a training.

        mvue  True or "output": the output's gradient; "input": the layer's input; False
        """
        if pruned_operand(mvue) == "input" and state_of(self).precision is not None:
            raise Sparse24Error(
                f"mvue='input' is for 16-bit products, and this layer has precision={state_of(self).precision!r}; "
                "use mvue='output', or convert it without precision"
            )
        state_of(self).mvue = mvue

    def set_soft_scale(self, scale: Tensor | None) -> None:
        """The fixed scale of S-STE, one float, or None for hard masks; the next packing uses it."""
        state = state_of(self)
        state.generation += 1
        self._buffers[SOFT] = None
        state.soft_scale = None if scale is None else scale.to(mask_of(self).device)

    def set_decay(self, factor: Tensor | None) -> None:
        """What backward multiplies masked decay by: float32 [1], shared and written by its owner; None: no decay."""
        if factor is not None and state_of(self).precision is not None:
            raise Sparse24Error(
                "decay_in='backward' is for 16-bit products, and this layer has precision="
                f"{state_of(self).precision!r}; use decay_in='step'"
            )
        self._buffers[DECAY] = factor

    def enter(self, phase: str) -> None:
        """Compute the 2:4 function from here on ("sparse"), or the plain dense one ("dense"). Packs nothing."""
        if phase not in (SPARSE, DENSE):
            raise Sparse24Error(f"phase must be {SPARSE!r} or {DENSE!r}, got {phase!r}")
        state = state_of(self)
        if phase != state.phase:
            state.generation += 1
            state.phase = phase
        if state.shards is not None:
            state.shards.switch(phase == SPARSE)

    def take_mask(self, mask: Tensor) -> None:
        """Copy `mask`, uint8 [rows/4, cols/2] or its uint16 form, into the layer's own. Packs nothing.

        mask  of the whole weight, or where ranks divide the layer also of this rank's part
        """
        state_of(self).generation += 1
        mask_of(self).copy_(tensor_parallel.part_of_mask(self, mask))

    @torch.inference_mode(False)  # as in `packing.pack`
    def take_state(self, phase: str, mask: Tensor, soft_scale: Tensor | None = None) -> None:
        """Be in `phase` under `mask` (and S-STE's scale), those of the training that the weights come from; packs.

        mask  as in `take_mask`, on any device
        """
        self.take_mask(mask)
        self.set_soft_scale(soft_scale)
        self.enter(phase)
        self.keep_mask()
        self._repack()

    def keep_mask(self, keep: bool = True) -> None:
        """From here on the mask is training state: loading weights keeps it, where it was searched anew before."""
        state_of(self).mask_is_state = keep

    def _set_rank(self, rank: int) -> None:
        state_of(self).rank = rank

    # -- what is read under plain names -----------------------------------------------------------------------------

    mask, soft = shown_buffer(MASK), shown_buffer(SOFT)
    packed, E, packed_t, E_t = (shown_buffer(name) for name in (PACKED, METADATA, PACKED_T, METADATA_T))
    decay_factor = shown_buffer(DECAY, set_decay)
    phase, mvue = shown_constant("phase", enter), shown_constant("mvue", set_mvue)
    rank, mask_is_state = shown_constant("rank", _set_rank), shown_constant("mask_is_state", keep_mask)
    lean, soft_scale = shown_constant("lean"), shown_constant("soft_scale", set_soft_scale)
    compute_dtype = shown_constant("compute_dtype")

    # -- life cycle -------------------------------------------------------------------------------------------------

    def _init_sparse(
        self,
        *,
        mvue: bool | str = True,
        compute_dtype: torch.dtype | None = None,
        lean: bool = False,
        precision: str | None = None,
    ) -> None:
        if precision is not None:
            float8.check_settings(precision, lean, compute_dtype)
            compute_dtype = ops.float8.E4M3
        watch_replacements()
        cut = tensor_parallel.cut_of(self)
        self.__dict__[HOLDER] = LayerState(mvue, distributed_rank(), lean, compute_dtype, precision=precision, cut=cut)
        self.set_mvue(mvue)
        unseen.share_lookout([self])
        add_buffers(self, (*LAYER_BUFFERS, *(float8.ALL_BUFFERS if precision else ())))
        self._repack()
        watch_steps(self)

    def _drop_sparse(self) -> None:
        """Forget everything that `_init_sparse` added; the class is the caller's business."""
        state = self.__dict__.get(HOLDER)  # none yet where `_init_sparse` was interrupted
        if state is not None and state.shards is not None:
            state.shards.switch(False)
        drop_all(self)

    def as_kernel_sees(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape, such as its gradient, as [out_features, in_features]."""
        return tensor

    def flat_E(self) -> Tensor:
        """E as products take it, 1-D; a copy where it lies in pieces inside that of a fused block."""
        return self._buffers[METADATA].reshape(-1)

    def kernel_weight(self) -> Tensor:
        """The weight as kernels see it: [out_features, in_features], detached; of a divided one, this rank's."""
        if (shards := state_of(self).shards) is not None:
            return shards.own_rows()
        return self.as_kernel_sees(self.own_part(self.weight.detach()))

    def own_part(self, tensor: Tensor) -> Tensor:
        """Of a tensor of the weight's shape what this rank holds, where ranks divide the layer; else the tensor."""
        if state_of(self).shards is not None:
            return tensor.to_local() if packing.is_dtensor(tensor) else tensor
        return tensor_parallel.own_part(tensor, state_of(self).cut)

    def largest_of_parts(self, largest: Tensor) -> None:
        """The maximum of a value over the tensor-parallel parts of the layer, in place. Collective."""
        tensor_parallel.largest_of_parts(self, largest)

    def _fit_buffers(self) -> bool:
        """Give the buffers the shapes, dtype and device that the weight asks for; keep those that fit already.

        True when there is no mask yet that belongs to this weight: it must be searched.
        """
        weight, state, buffers = self.kernel_weight(), state_of(self), self._buffers
        check_extents(weight)
        rows, cols = weight.shape
        parts, as_gathered = (1, None) if state.shards is None else (state.shards.parts, state.shards.compute_dtype)
        device, dtype = weight.device, packed_dtype(weight, state.compute_dtype or as_gathered)
        mask = buffers[MASK]
        no_mask = mask is None or mask.shape != (rows // 4, cols // 2) or (mask.is_meta and device.type != "meta")
        if no_mask:
            buffers[MASK] = packing.empty_mask(rows, cols, device)
        elif mask.device != device:
            buffers[MASK] = mask.to(device)
        if state.precision is not None and buffers[float8.CAST_BUFFERS[0]] is None:
            float8.add_casts(self, device)
        packed = buffers[PACKED]
        if packed is None or (packed.device, packed.dtype, packed.shape) != (device, dtype, (parts * rows, cols // 2)):
            for name, tensor in zip(PACKED_BUFFERS, ops.empty_packed(parts * rows, cols, dtype, device), strict=True):
                left_out = state.lean and name in TRANSPOSED_BUFFERS
                buffers[name] = tensor.new_empty(0) if left_out else tensor
        return no_mask

    @torch.inference_mode(False)  # as in `packing.pack`
    def _repack(self, *, search: bool = False) -> None:
        """After the weight has changed behind the recipe's back: fit the buffers, pack, and search a missing mask."""
        search |= self._fit_buffers()
        if state_of(self).precision is not None and not self.weight.is_meta:
            for partner in packing.set_weight_scale(self):
                written, stamp = partner.weight_has_changed(), state_of(partner).stamp
                packing.pack([partner], search=False)
                if written:
                    state_of(partner).stamp = stamp  # it has yet to find that out, and what follows from it
        packing.pack([self], search=search)
        unseen.look_again(self)
        if state_of(self).shards is not None:
            state_of(self).shards.renew()

    def note_packed(self, *, searched: bool = False) -> None:
        """Remember which weight was packed last, for `has_substituted_weight`, the alarm in forward and copies."""
        weight, state = self._parameters.get("weight"), state_of(self)
        state.packs += 1
        state.generation += searched
        state.keeps_looking = False
        if weight is None:
            state.packed_weight = COMPUTED
        else:
            state.packed_weight = None if packing.is_dtensor(weight) else weight  # forward sees no FSDP2 shard
        before, state.stamp = state.stamp, packing.stamp(weight) if type(weight) is nn.Parameter else None
        moved = state.stamp is not None and (before is None or before[0] != state.stamp[0])
        if moved and weight.device.type == "cpu" and weight.is_shared():
            state.stamp = packing.SHARED  # equal to that of no weight: it may have changed at any time

    # -- hooks: whatever changes the weight behind the recipe's back ------------------------------------------------

    def _apply(self, fn, recurse=True):
        # `.to()`, `.half()`, `.cuda()`, `to_empty()`: move the weight, bring the mask along, pack again. The buffers
        # are taken out meanwhile: fn would cast packed values that are about to be rewritten, or empty the mask.
        self.look(forward=False)  # moving a copy must not hide that its weight was written
        dtype = self.weight.dtype
        casts = float8.ALL_BUFFERS if state_of(self).precision else ()
        buffers = {name: self._buffers[name] for name in (*LAYER_BUFFERS, *casts)}
        self._buffers.update(dict.fromkeys(buffers))
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(buffers)
        for name in (SOFT, DECAY, *casts):
            if (tensor := self._buffers[name]) is not None:  # scales on the meta device are none: new ones are made
                lost = tensor.is_meta and name in casts
                self._buffers[name] = None if lost else tensor.to(self.weight.device)
        self._repack()
        if self.weight.dtype != dtype:
            model_changed([self])
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        copies.follow_now(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        is_part = division_of(self) is not None  # its fingerprint says nothing where weights are cut another way
        if not is_part and hasattr(destination, "_metadata") and (mine := self.fingerprint()) is not None:
            destination._metadata.setdefault(prefix[:-1], {})[copies.METADATA_KEY] = mine

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args, **kwargs)
        if not self.weight_is_computed() and prefix + "weight" not in state_dict:
            return  # strict=False: of other layers only
        self._take_weights()
        copies.note_arrival(self, prefix[:-1], local_metadata.get(copies.METADATA_KEY), missing_keys)

    def _take_weights(self) -> None:
        """The one rule for weights that arrive from elsewhere: training's mask stays, another is searched anew."""
        copies.note_written(self)
        self._repack(search=not state_of(self).mask_is_state)

    def __setattr__(self, name, value):
        if name == "weight" and packing.is_dtensor(value) and HOLDER in self.__dict__:
            self._take_shard(value)  # FSDP2's way; a plan of parallelize_module calls `register_parameter` itself
            return
        super().__setattr__(name, value)
        if name == tensor_parallel.APPLIED and HOLDER in self.__dict__:
            tensor_parallel.after_plan(self)

    def _take_shard(self, param: nn.Parameter) -> None:
        """FSDP2 swaps sharded and gathered parameters at each use; the recipe packs for it."""
        super().register_parameter("weight", param)
        state_of(self).packed_weight = None

    def register_parameter(self, name, param):
        # What `layer.weight = Parameter(...)` comes to, and the removal of weight norm, pruning and parametrizations.
        if name != "weight" or param is None or HOLDER not in self.__dict__:
            if name == "bias" and HOLDER in self.__dict__:
                check_bias(self, param)
            super().register_parameter(name, param)
            return
        old = self._parameters.get("weight")
        if packing.is_dtensor(param) and not packing.is_dtensor(old):
            tensor_parallel.before_plan(self)
        if packing.is_dtensor(old) or packing.is_dtensor(param):
            self._take_shard(param)
            return
        check_weight(param)
        super().register_parameter(name, param)
        if param is not old:
            self._take_weights()

    def __getstate__(self):
        # Copies and pickles carry the mask; packed forms are rebuilt, since their layout may differ where they wake up.
        # The decay factor stays behind: no recipe would write to a copy's.
        copies.follow_now(self)
        state = self.__dict__.copy()
        state["_buffers"] = {**state["_buffers"], **dict.fromkeys((*PACKED_BUFFERS, DECAY))}
        state[HOLDER] = state[HOLDER].for_copy(copies.origin_for_copies(self))
        return state

    @torch.inference_mode(False)  # as in `packing.pack`
    def __setstate__(self, state):
        super().__setstate__(state)
        for name, tensor in self._buffers.items():
            if is_ours(name) and tensor is not None and tensor.is_inference():  # copied inside of that mode
                self._buffers[name] = tensor.clone()
        watch_replacements()
        self._repack()
        copies.watch_origin(self)
        watch_steps(self)

    def __prepare_scriptable__(self):
        raise Sparse24Error(f"2:4 layers cannot be compiled by torch.jit.script{OTHER_WAYS}")

    # -- forward ----------------------------------------------------------------------------------------------------

    def _dense_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain dense layer; with `dense_mvue` its weight gradient is a 2:4 product all the same."""
        return dense_forward(self, x, weight, bias)

    def _sparse_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in_features] -> [..., out_features]; `weight` [out_features, in_features] receives the gradient."""
        return sparse_forward(self, x, weight, bias)
