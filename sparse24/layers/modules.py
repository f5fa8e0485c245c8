"""Layers whose weight is 2:4 sparse in training: SparseLinear, and what its siblings share with it.

A sparse layer is its dense class plus five buffers and a few constants. The dense weight stays the only truth: the
state_dict is that of the dense layer, and the buffers (mask and packed forms) are non-persistent. Whoever changes the
weight re-packs it: the recipe after each optimizer step; the hooks below after load_state_dict, a move, a copy or a
new Parameter; `sparse24.refresh(model)` after anything else. Forward only reads, so it compiles without graph breaks,
replays in CUDA graphs and may be run twice by activation checkpointing. A weight that somebody else lends it for a
call, as `torch.func.functional_call` does, is packed for that call.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, ops
from ..errors import Sparse24DtypeError, Sparse24Error, Sparse24Warning
from ..functional.soft import soft_linear, soft_scale
from . import copies, packing

SPARSE, DENSE = "sparse", "dense"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}


def packed_dtype(weight: Tensor, compute_dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of packed values: `compute_dtype` if given; else the weight's, but 16 bits on a GPU.

    The sparse tensor cores multiply 16-bit values. A float32 weight on a GPU is a master weight for autocast, whose
    usual dtype there is bfloat16; on a CPU it is packed as it is and cast like any other weight when autocast is on.
    """
    if compute_dtype is not None:
        return compute_dtype
    if weight.device.type == "cuda" and weight.dtype not in (torch.bfloat16, torch.float16):
        return torch.bfloat16
    return weight.dtype


def check_switch(name: str, value) -> None:
    if not isinstance(value, bool):
        raise Sparse24Error(f"{name} must be True or False, got {value!r}")


def distributed_rank() -> int:
    """This process's rank, 0 outside torch.distributed. It is mixed into the noise, which must differ by rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


class _MaskedWeight(torch.autograd.Function):
    """weight * mask forward, the gradient straight through to every entry of the weight, with its decay if any."""

    @staticmethod
    def forward(ctx, weight: Tensor, bits: Tensor, decay: Tensor | None) -> Tensor:
        ctx.decays = decay is not None
        if ctx.decays:
            ctx.save_for_backward(weight, bits, decay)
        return torch.where(ops.unpack_mask(bits), weight, 0)

    @staticmethod
    def backward(ctx, d_weight: Tensor):
        if ctx.decays:
            weight, bits, decay = ctx.saved_tensors
            d_weight = ops.masked_decay_(d_weight.clone(), weight, bits, 1.0, grad_scale=decay)
        return d_weight, None, None


class _SoftWeight(torch.autograd.Function):
    """The soft-thresholded weight forward (S-STE), the gradient straight through."""

    @staticmethod
    def forward(ctx, weight: Tensor, soft: Tensor) -> Tensor:
        return soft.to(weight.dtype, copy=True)

    @staticmethod
    def backward(ctx, d_weight: Tensor):
        return d_weight, None


class SparseLayer:
    """What the sparse classes add to a dense layer that has one 2-D weight. A mixin, left of the dense class.

    Buffers, all non-persistent, for a weight seen by the kernels as [rows, cols] = [out_features, in_features]:
      mask          uint8 [rows/4, cols/2], the bytes of a uint16 mask of 4x4 blocks
      packed, E     kept values [rows, cols/2] and their metadata (forward); E in 2-D pieces in a fused block
      packed_t, E_t the same weight packed along rows, [rows/2, cols], and its metadata (input gradient)
      decay_factor  one float32, what backward multiplies masked decay by (`Recipe(decay_in="backward")`), or None
    Constants that forward reads:
      phase         "sparse" or "dense" (the plain dense layer)
      mvue          prune the output gradient without bias for the weight gradient
      rank          mixed into the noise of MVUE
      lean          packed_t and E_t stay empty; backward makes them anew from the weight and the mask
    """

    phase: str
    mvue: bool
    rank: int
    lean: bool = False

    # -- life cycle ---------------------------------------------------------------------------------------------

    def _init_sparse(self, *, mvue: bool = True, compute_dtype: torch.dtype | None = None, lean: bool = False) -> None:
        self.phase = SPARSE
        self.mvue = mvue
        self.lean = lean
        self.rank = distributed_rank()
        self.compute_dtype = compute_dtype
        # Once training has advanced the mask it belongs to the training state: loading weights then keeps it.
        self.mask_is_state = False
        self._stamp = self._packed_from = None
        self._watch: copies.Watch | None = None  # what to look at before the next forward pass
        self._generation = self._packs = 0  # changes of mask, scale or phase; packings: what copies look at
        self._fingerprint: tuple[int, str] | None = None  # with its generation
        for name in packing.SPARSE_BUFFERS:
            self.register_buffer(name, None, persistent=False)
        # S-STE's thresholded, scaled weight, [rows, cols]: what its packed form holds.
        self.register_buffer("soft", None, persistent=False)
        self.register_buffer("decay_factor", None, persistent=False)
        self.soft_scale: Tensor | None = None  # set: this layer is S-STE's
        self._repack()

    def _drop_sparse(self) -> None:
        """Forget everything that `_init_sparse` added; the class is the caller's business."""
        for name in (*packing.SPARSE_BUFFERS, "soft", "decay_factor"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        constants = ("phase", "mvue", "rank", "compute_dtype", "mask_is_state", "soft_scale", "lean")
        for name in (*constants, "_stamp", "_packed_from", "_watch", "_generation", "_packs", "_fingerprint"):
            self.__dict__.pop(name, None)

    # -- what a recipe asks for -------------------------------------------------------------------------------------

    def train_as(self, *, mvue: bool | None = None, rank: int | None = None, soft: bool = False) -> None:
        """Begin a training: no decay in backward, a mask that belongs to the weight until `keep_mask` says otherwise.

        mvue  as the constant; None leaves it as it is
        rank  as the constant; None leaves it as it is
        soft  S-STE: the layer multiplies with its soft-thresholded weight, at the scale that fits the weight now
        """
        if mvue is not None:
            self.set_mvue(mvue)
        if rank is not None:
            self.rank = rank
        self.mask_is_state = False
        self._watch = None
        self.decay_factor = None
        self.set_soft_scale(soft_scale(packing.full_weight(self)) if soft else None)

    def set_mvue(self, mvue: bool) -> None:
        """Prune output gradients for the weight gradient, or not; may change between two steps of a training."""
        check_switch("mvue", mvue)
        self.mvue = mvue

    def set_soft_scale(self, scale: Tensor | None) -> None:
        """The fixed scale of S-STE, one float, or None for hard masks; the next packing uses it."""
        self._generation += 1
        self.soft = None
        self.soft_scale = None if scale is None else scale.to(self.mask.device)

    def set_decay(self, factor: Tensor | None) -> None:
        """What backward multiplies masked decay by: float32 [1], shared and written by its owner; None: no decay."""
        self.decay_factor = factor

    def enter(self, phase: str) -> None:
        """Compute the 2:4 function from here on ("sparse"), or the plain dense one ("dense"). Packs nothing."""
        if phase not in (SPARSE, DENSE):
            raise Sparse24Error(f"phase must be {SPARSE!r} or {DENSE!r}, got {phase!r}")
        if phase != self.phase:
            self._generation += 1
            self.phase = phase

    def take_mask(self, mask: Tensor) -> None:
        """Copy `mask`, uint8 [rows/4, cols/2] or its uint16 form, into the layer's own. Packs nothing."""
        self._generation += 1
        self.mask.copy_(packing.mask_bytes(mask))

    def take_state(self, phase: str, mask: Tensor, soft_scale: Tensor | None = None) -> None:
        """Be in `phase` under `mask` (and S-STE's scale), those of the training that the weights come from; packs.

        mask  as in `take_mask`, on any device
        """
        self.take_mask(mask)
        self.set_soft_scale(soft_scale)
        self.enter(phase)
        self.keep_mask()
        self._repack()

    def fingerprint(self) -> str | None:
        """Phase and mask as a short text; None where there is no mask to read (meta and fake tensors).

        It waits for the device, once for each mask.
        """
        if self._fingerprint is None or self._fingerprint[0] != self._generation:
            if self.mask is None or self.mask.is_meta or type(self.mask) is not Tensor:
                return None
            scales = [] if self.soft_scale is None else [self.soft_scale]
            self._fingerprint = (self._generation, copies.fingerprint(self.phase, [self.mask], scales))
        return self._fingerprint[1]

    def accept_weights(self) -> None:
        """The weights are to run under the masks of now, wherever they come from."""
        if self._watch is not None:
            self._watch.arrival = None

    def keep_mask(self) -> None:
        """From here on the mask is training state: loading weights keeps it, where it was searched anew before."""
        if not self.mask_is_state:  # after each step: nn.Module's setattr costs microseconds
            self.mask_is_state = True

    def as_kernel_sees(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape, such as its gradient, as [out_features, in_features]."""
        return tensor

    def flat_E(self) -> Tensor:
        """E as products take it, 1-D; a copy where it lies in pieces inside that of a fused block."""
        return self.E.reshape(-1)

    def kernel_weight(self) -> Tensor:
        """The weight as kernels see it: [out_features, in_features], detached."""
        return self.as_kernel_sees(self.weight.detach())

    def _fit_buffers(self) -> bool:
        """Give the buffers the shapes, dtype and device that the weight asks for; keep those that fit already.

        True when there is no mask yet that belongs to this weight: it must be searched.
        """
        weight = self.kernel_weight()
        rows, cols = weight.shape
        if rows % 4 or cols % 4 or rows == 0 or cols == 0:
            raise Sparse24Error(
                f"a 2:4 weight needs rows and columns that are positive multiples of 4, got {rows} x {cols}; "
                "keep this layer dense or change its width"
            )
        device, dtype = weight.device, packed_dtype(weight, self.compute_dtype)
        mask = self.mask
        no_mask = mask is None or mask.shape != (rows // 4, cols // 2) or (mask.is_meta and device.type != "meta")
        if no_mask:
            self.mask = packing.empty_mask(rows, cols, device)
        elif mask.device != device:
            self.mask = mask.to(device)
        packed = self.packed
        if packed is None or (packed.device, packed.dtype, packed.shape) != (device, dtype, (rows, cols // 2)):
            for name, tensor in zip(packing.PACKED_NAMES, ops.empty_packed(rows, cols, dtype, device), strict=True):
                left_out = self.lean and name in packing.TRANSPOSED_NAMES
                setattr(self, name, tensor.new_empty(0) if left_out else tensor)
        return no_mask

    def _repack(self, *, search: bool = False) -> None:
        """After the weight has changed behind the recipe's back: fit the buffers, pack, and search a missing mask."""
        search |= self._fit_buffers()
        packing.pack([self], search=search)

    def note_packed(self, *, searched: bool = False) -> None:
        """Remember which weight was packed last, for `weight_is_lent`, the alarm in forward and copies."""
        own = self.__dict__
        own["_packs"] += 1
        if searched:
            own["_generation"] += 1
        weight = self._parameters["weight"]
        # Past nn.Module's own setattr, which would make a second parameter of the weight, and costs microseconds: this
        # runs for each layer after each step.
        own["_packed_from"] = None if packing.is_dtensor(weight) else weight  # forward sees no FSDP2 shard
        own["_stamp"] = _stamp(weight) if type(weight) is nn.Parameter else None

    # -- hooks: whatever changes the weight behind the recipe's back ----------------------------------------------

    def _apply(self, fn, recurse=True):
        # `.to()`, `.half()`, `.cuda()`, `to_empty()`: move the weight, bring the mask along, pack again. The buffers
        # are taken out meanwhile: fn would cast packed values that are about to be rewritten, or empty the mask.
        self.look(forward=False)  # moving a copy must not hide that its weight was written
        buffers = {name: self._buffers[name] for name in (*packing.SPARSE_BUFFERS, "soft", "decay_factor")}
        for name in buffers:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in buffers.items():
                self._buffers[name] = tensor
        if self.soft is not None:
            self.soft = self.soft.to(self.weight.device)
        if self.decay_factor is not None:
            self.decay_factor = self.decay_factor.to(self.weight.device)
        self._repack()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata") and (mine := self.fingerprint()) is not None:
            destination._metadata.setdefault(prefix[:-1], {})[copies.METADATA_KEY] = mine

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args, **kwargs)
        self._take_weights()
        copies.note_arrival(self, prefix[:-1], local_metadata.get(copies.METADATA_KEY), missing_keys)

    def _take_weights(self) -> None:
        """The one rule for weights that arrive from elsewhere: training's mask stays, another is searched anew."""
        copies.note_written(self)
        self._repack(search=not self.mask_is_state)

    def __setattr__(self, name, value):
        old = self._parameters.get("weight") if name == "weight" and "_parameters" in self.__dict__ else None
        super().__setattr__(name, value)
        if old is None or value is old or not isinstance(value, nn.Parameter) or "phase" not in self.__dict__:
            return
        # FSDP2 swaps sharded and gathered parameters at each use; the recipe packs for it.
        if packing.is_dtensor(old) or packing.is_dtensor(value):
            self.__dict__["_packed_from"] = None
            return
        self._take_weights()

    def __getstate__(self):
        # Copies and pickles carry the mask; packed forms are rebuilt, since their layout may differ where they wake up.
        # The decay factor stays behind: no recipe would write to a copy's.
        state = self.__dict__.copy()
        state["_buffers"] = state["_buffers"].copy()
        for name in (*packing.PACKED_NAMES, "decay_factor"):
            state["_buffers"][name] = None
        state["_stamp"] = state["_packed_from"] = state["_fingerprint"] = None
        state["_watch"] = copies.origin_for_copies(self)
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if "decay_factor" not in self._buffers:  # pickled by a version without it
            self.register_buffer("decay_factor", None, persistent=False)
        origin = self.__dict__.get("_watch") or copies.Origin()
        self._watch, self._generation, self._packs, self._fingerprint = None, 0, 0, None
        self._repack()
        copies.watch_origin(self, origin)

    # -- forward --------------------------------------------------------------------------------------------------

    def check_weight_is_packed(self) -> None:
        """The alarm, eager only: say so when the weight is no longer the one that was packed.

        Not a safety net: fused optimizers, `.data` writes and graph replay do not show in versions.
        """
        weight = self._parameters.get("weight")
        if weight is self._packed_from:
            if self._stamp is not None and self._stamp != _stamp(weight):
                self._stamp = None  # once per layer
                warnings.warn(
                    "the weight of a sparse layer has changed since it was packed, and the packed form is what the "
                    "layer multiplies with; train with sparse24.Recipe, which re-packs after each optimizer step, or "
                    "call sparse24.refresh(model) after writing weights yourself",
                    Sparse24Warning,
                    stacklevel=4,
                )
        elif weight is not None and packing.is_dtensor(weight):
            raise Sparse24Error(
                f"the weight of this sparse layer is a DTensor with placements {tuple(weight.placements)} in forward; "
                "tensor-parallel plans on sparse layers are not supported: exclude the layer from the plan, or use "
                "FSDP2 (fully_shard), which gathers the weight"
            )

    def weight_has_changed(self) -> bool:
        """Whether the weight shows that it was written since it was packed; `.data` writes do not show."""
        return self._stamp is not None and self._stamp != _stamp(self._parameters["weight"])

    def is_packed(self) -> bool:
        """Whether the packed values are those of the weight, under the layer's own mask. Waits for the device."""
        forms = packing.pack_apart(self, packing.full_weight(self), self.packed.dtype)
        return torch.equal(forms["packed"].view(torch.uint8), self.packed.view(torch.uint8))

    def look(self, *, forward: bool = True) -> None:
        """Follow the layer that this one is a copy of; before a forward pass also tell of weights of other masks."""
        if self._watch is not None:
            copies.look(self, forward=forward)

    def weight_is_lent(self) -> bool:
        """Whether `weight` is another tensor than the one that was packed, and so the packed forms are not of it.

        Told by identity alone, since compilers trace that and it costs no time. `torch.export` is no lender: it puts
        tracers in place of the weight and of its packed forms.
        """
        if self._packed_from is None or self._parameters.get("weight") is self._packed_from:
            return False
        return torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting()

    def _sparse_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in_features] -> [..., out_features]; `weight` [out_features, in_features] receives the gradient."""
        if not torch.compiler.is_compiling():
            self.check_weight_is_packed()
        device = x.device.type
        if x.device != weight.device:
            raise Sparse24Error(
                f"x is on {x.device} and the weight on {weight.device}; move one of them (x.to(weight.device))"
            )
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
            bias = bias.to(x.dtype) if bias is not None else None
        elif x.dtype != weight.dtype:
            raise Sparse24DtypeError(
                f"mat1 and mat2 must have the same dtype, but x is {x.dtype} and the weight {weight.dtype}; "
                "cast one of them or run under torch.autocast"
            )
        forms, decay = self._buffers, self.decay_factor
        if self.weight_is_lent():
            functional.check_no_transform(x)
            forms = packing.pack_apart(self, weight, packed_dtype(weight, self.compute_dtype))
        packed, E, soft = forms["packed"], forms["E"].reshape(-1), forms["soft"]
        # Packed float32 values, a CPU's, serve every dtype; 16-bit ones serve their own.
        fits = packed.dtype == x.dtype or packed.dtype in (torch.float32, torch.float64)
        if soft is not None:
            if fits:
                return soft_linear(x, weight, packed, E, bias, mvue=self.mvue, rank=self.rank)
            return F.linear(x, _SoftWeight.apply(weight, soft).to(x.dtype), bias)
        if not fits:
            return self._masked_forward(x, weight, bias)
        return functional.sparse_linear(
            x,
            weight,
            packed,
            E,
            forms["packed_t"],
            forms["E_t"],
            bias,
            mvue=self.mvue,
            rank=self.rank,
            mask=packing.mask_bits(self.mask) if self.lean or decay is not None else None,
            decay=decay,
        )

    def _masked_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same 2:4 function by a dense product, where the packed dtype is not that of the product."""
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"packed for {self.packed.dtype} but called in {x.dtype}: dense products over the masked weight, "
                f"right but not fast; run under autocast to {self.packed.dtype}, or sparsify(..., dtype={x.dtype})",
                Sparse24Warning,
                stacklevel=3,
            )
        bits = packing.mask_bits(self.mask)
        return F.linear(x, _MaskedWeight.apply(weight, bits, self.decay_factor).to(x.dtype), bias)


def _stamp(weight: Tensor):
    return None if weight.is_inference() else (weight.data_ptr(), weight._version)


class SparseLinear(SparseLayer, nn.Linear):
    """nn.Linear with a transposable 2:4 mask on its weight; the same parameters, state_dict and call.

    in_features, out_features  multiples of 4
    bias           a bias as in nn.Linear
    mvue           prune the output gradient to 2:4 without bias, so that the weight gradient is a sparse product too
    compute_dtype  dtype of the packed values; default: that of the weight, and bfloat16 for float32 weights on a GPU

    The weight is dense and all of it is trained (straight-through); what multiplies is its masked, packed form.
    Train it with `sparse24.Recipe`, which re-packs it after each optimizer step.

    Raises Sparse24Error for sizes that are not multiples of 4; Sparse24DtypeError for dtypes that do not fit together.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        mvue: bool = True,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_sparse(mvue=mvue, compute_dtype=compute_dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "phase" in self.__dict__:
            self._repack(search=True)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._watch is not None:
            self.look()
        if self.phase == DENSE:
            return F.linear(input, self.weight, self.bias)
        return self._sparse_forward(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, 2:4, phase={self.phase}, mvue={self.mvue}"
