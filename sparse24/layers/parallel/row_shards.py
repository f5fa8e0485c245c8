"""Under FSDP2 a rank has rows of a weight, and of its mask; what is gathered for a pass is the packed form of them.

FSDP2 asks the local tensor of a sharded parameter what to send (`fsdp_pre_all_gather`), and hands it what all ranks
have sent (`fsdp_post_all_gather`). A rank packs its rows for the direction that is about to run, in the pass in which
FSDP2 would cast them: 1.125 bytes a weight in 16 bits where the dense weight has 2. The buffers that products read are
those of the whole weight, at addresses that stay, with memory only between a gather and the reshard that follows.

In place of the gathered weight the layer then has a stand-in, which has its shape and takes its gradient. Its numbers
are NaN: nothing of a 2:4 product reads them.

Only what FSDP2 keeps in `FSDPParam` is touched, as fully_shard allows ("allow monkey patch after init").
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...formats import FORMATS
from .. import packing
from ..state import METADATA, METADATA_T, PACKED, PACKED_BUFFERS, PACKED_T, SPARSE, state_of
from . import shard_metadata
from .tensor_parallel import Cut

FORWARD, TRANSPOSED = (PACKED, METADATA), (PACKED_T, METADATA_T)
PRE, POST = "fsdp_pre_all_gather", "fsdp_post_all_gather"


def let_go(shards: list[RowShards]) -> None:
    """Note how much memory the buffers of whole forms have, and free it until a gather fills them.

    shards  all that have their memory in common: those of the gate and up of a fused block
    """
    for each in shards:
        each._note_memory()
    for each in shards:
        each._free()


class RowShards(Cut):
    """The rows of one layer on the ranks of a mesh, and what FSDP2 gathers of them.

    layer   the sparse layer
    param   its FSDPParam
    group   the FSDPParamGroup that gathers it, afterwards `param_group`
    module  the FSDPModule that has the group

    `mesh` and `dim` are those of the cut: FSDP2's dimension of the mesh, and 0.
    """

    def __init__(self, layer: nn.Module, mesh, param, group, module: nn.Module):
        super().__init__(mesh, 0)
        self._layer, self.param, self.param_group = weakref.ref(layer), param, group
        self._module = weakref.ref(module)
        self.recomputes = False  # a forward pass has run in backward, as activation checkpointing does
        self._written: set[str] = set()  # first buffers of the directions that were filled since the last gather began
        self._bytes: dict[str, int] = {}  # of the memory of each buffer, which a fused block's halves share
        self._receivers: dict[str, Tensor] = {}  # by buffer: where FSDP2 copies what the last gather brings
        self._apart: dict[str, Tensor] = {}  # of them, those of what cannot be in the buffer as it comes

    def __deepcopy__(self, memo):
        return self  # hung on a local tensor, which may be copied; the copy is no parameter of FSDP2

    @property
    def layer(self) -> nn.Module:
        return self._layer()

    @property
    def gathers(self) -> bool:
        """Whether FSDP2 gathers packed forms now, and not the dense weight."""
        return PRE in self._local.__dict__

    @property
    def _local(self) -> Tensor:
        return self.param.sharded_param._local_tensor

    def own_rows(self) -> Tensor:
        """This rank's rows of the weight, [rows / ranks, cols], whatever is gathered at the moment."""
        return self._local.detach()

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Of packed values, from FSDP2's mixed precision; None: as the weight has it."""
        dtype = self.param.mp_policy.param_dtype
        return None if dtype == torch.float32 and self.param.device.type == "cuda" else dtype

    # -- on and off -------------------------------------------------------------------------------------------------

    def _note_memory(self) -> None:
        for name in PACKED_BUFFERS:
            storage = self.layer._buffers[name].untyped_storage()
            self._bytes[name] = storage.nbytes() or self._bytes[name]

    def _free(self) -> None:
        if self.param.sharded_state.name != "UNSHARDED":
            for name in PACKED_BUFFERS:
                self.layer._buffers[name].untyped_storage().resize_(0)

    def switch(self, on: bool) -> None:
        """Let FSDP2 gather packed forms from here on, or the dense weight, as the dense phase needs it."""
        if on == self.gathers:
            return
        self._module().reshard()
        param, local = self.param, self._local
        param.all_gather_outputs = []  # of other sizes
        if on:
            for name, hook in zip((PRE, POST), self._hooks(), strict=True):
                setattr(local, name, hook)
            param._unsharded_param = self._stand_in()
            param.alloc_all_gather_outputs = self._allocate_received
        else:
            delattr(local, PRE)
            delattr(local, POST)
            param.__dict__.pop("alloc_all_gather_outputs", None)
            if hasattr(param, "_unsharded_param"):
                del param._unsharded_param
        param._init_extensions()

    def _hooks(self):
        """What FSDP2 finds on the local tensor. They hold `self` weakly: views of that tensor hold it in C++, where the
        garbage collector does not look, so through it a model that nobody has any more would stay.
        """
        shards = weakref.ref(self)

        def fsdp_pre_all_gather(mesh, outer_size, outer_stride, module, mp_policy):
            return shards()._before_gather()

        def fsdp_post_all_gather(outputs, directions, param_dtype, *, out=None):
            shards()._after_gather(outputs, directions)

        return fsdp_pre_all_gather, fsdp_post_all_gather

    def renew(self) -> None:
        """After the layer's weight has moved: the hooks are on the local tensor that there was, and buffers are new."""
        self._apart.clear()
        let_go([self])
        self.switch(state_of(self.layer).phase == SPARSE)

    def _stand_in(self) -> nn.Parameter:
        sharded = self.param.sharded_param
        dtype = self.param.mp_policy.param_dtype or sharded.dtype
        nan = torch.full((), torch.nan, dtype=dtype, device=self.param.device)
        return nn.Parameter(nan.expand(sharded.shape), requires_grad=sharded.requires_grad)

    # -- what FSDP2 calls -------------------------------------------------------------------------------------------

    def _before_gather(self):
        """(what this rank sends, which directions that is)."""
        directions = self._directions()
        self._written.clear()
        self.param._unsharded_inner_tensors = []  # to be freed, not to be made: which ones, this gather decides
        inputs = [tensor for direction in directions for tensor in self._pack(direction)]
        names = [name for direction in directions for name in direction]
        self._receivers = {name: self._receiver(name, sent) for name, sent in zip(names, inputs, strict=True)}
        self.param.all_gather_outputs = list(self._receivers.values())
        return tuple(inputs), directions

    def _after_gather(self, outputs, directions) -> None:
        """Have what all ranks have sent in the buffers; what was received apart is not needed any more."""
        for direction, values, E in zip(directions, outputs[::2], outputs[1::2], strict=True):
            self._write(direction, values, E)
        for received in self._apart.values():
            received.untyped_storage().resize_(0)

    def _receiver(self, name: str, sent: Tensor) -> Tensor:
        """Where FSDP2 copies what ranks send for a buffer, 1-D: the buffer itself where their parts follow one another
        there. Without memory so far.
        """
        buffer = self.layer._buffers[name]
        if self._in_order(name, len(self.own_rows())) and buffer.is_contiguous():
            return buffer.view(-1)
        apart = self._apart.get(name)
        if apart is None or apart.numel() != self.parts * sent.numel() or apart.dtype != sent.dtype:
            apart = self._apart[name] = sent.new_empty(self.parts * sent.numel())
            apart.untyped_storage().resize_(0)
        return apart

    def _in_order(self, name: str, rows: int) -> bool:
        """Whether the rows of a rank are one piece of a buffer."""
        format_ = FORMATS[self.layer._buffers[PACKED].dtype]
        if name == METADATA_T:
            return rows % format_.meta_tile_k == 0
        return name == PACKED or (name == PACKED_T and format_.mn_major)

    def _allocate_received(self) -> None:
        """As FSDPParam does it, which does not know that buffers of a fused block share their memory."""
        for name, receiver in self._receivers.items():
            storage, apart = receiver.untyped_storage(), receiver is self._apart.get(name)
            size = receiver.numel() * receiver.itemsize if apart else self._bytes[name]
            if storage.nbytes() != size:
                storage.resize_(size)

    def _directions(self) -> tuple[tuple[str, str], ...]:
        """Which forms the pass needs that FSDP2 gathers for."""
        group = self.param_group
        if not group._reshard_after_forward:
            return FORWARD, TRANSPOSED
        if group._training_state.name != "PRE_BACKWARD":
            return (FORWARD,)
        return (FORWARD, TRANSPOSED) if self.recomputes else (TRANSPOSED,)

    # -- forms ------------------------------------------------------------------------------------------------------

    def _pack(self, direction: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """Values and positions of this rank's rows in one direction, as they are sent."""
        weight, dtype = self.own_rows(), self.layer._buffers[PACKED].dtype
        values, E = packing.pack_direction(self.layer, weight, dtype, transposed=direction is TRANSPOSED)
        if direction is FORWARD:
            return values, shard_metadata.take_forward(E, *weight.shape, dtype)
        return values, shard_metadata.take_transposed(E, len(weight), dtype)

    def _write(self, direction: tuple[str, str], values: Tensor, E: Tensor) -> None:
        into, positions = buffers = [self.layer._buffers[name] for name in direction]
        self._allocate(direction)
        self._written.add(direction[0])
        rows, cols = self.param.sharded_param.shape
        if direction is TRANSPOSED and not FORMATS[into.dtype].mn_major:  # [cols, rows / 2]: ranks lie side by side
            values, into = values.view(self.parts, cols, -1).transpose(0, 1), into.unflatten(1, (self.parts, -1))
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):
            if values.data_ptr() != into.data_ptr():  # else FSDP2 has put them there
                into.copy_(values.view(into.shape) if values.is_contiguous() else values)
            if direction is FORWARD:
                shard_metadata.put_forward(positions, E, self.parts, cols, buffers[0].dtype)
            elif E.data_ptr() != positions.data_ptr():
                shard_metadata.put_transposed(positions, E, self.parts, rows, buffers[0].dtype)

    def _allocate(self, direction: tuple[str, str]) -> None:
        for name in direction:
            buffer = self.layer._buffers[name]
            storage = buffer.untyped_storage()
            if storage.nbytes() != self._bytes[name]:
                storage.resize_(self._bytes[name])
            self.param._unsharded_inner_tensors.append(buffer)

    # -- when FSDP2 has not gathered what is needed -----------------------------------------------------------------

    def ensure_forward(self) -> None:
        """Before a forward pass. In backward FSDP2 has gathered the transposed form alone: a forward pass that runs
        there fetches the other one, and from then on both are gathered. Collective then.
        """
        if PACKED not in self._written:
            self._fetch(FORWARD)
            self.recomputes = True

    def _fetch(self, direction: tuple[str, str]) -> None:
        received = []
        for tensor in self._pack(direction):
            whole = tensor.new_empty(self.parts * tensor.shape[0], *tensor.shape[1:])
            flat = (t.view(torch.uint8).view(-1) for t in (whole, tensor))
            torch.distributed.all_gather_into_tensor(*flat, group=self.group)
            received.append(whole)
        self._write(direction, *received)

    @contextmanager
    def gathered(self):
        """The forms of the whole weight, both ways, for whoever looks at them between two passes. Collective."""
        if self.param.sharded_state.name == "SHARDED":
            self._written.clear()
        missing = [direction for direction in (FORWARD, TRANSPOSED) if direction[0] not in self._written]
        for direction in missing:
            self._fetch(direction)
        try:
            yield
        finally:
            for name in (name for direction in missing for name in direction):
                self._written.discard(name)
                self.layer._buffers[name].untyped_storage().resize_(0)
