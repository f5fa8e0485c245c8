"""Packing the weights of a model in place: many in few launches, and one direction alone for lean layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import META_BLOCK, as_major, mask_as_uint16, metadata_bytes
from ._common import check_packed_operand, check_same_device, check_weight, define_op, where
from .arguments import check_no_shared_memory, check_writable, names_wrong_types
from .mask import pack_item
from .packing import check_packable, packed_dtype


def _check_lists(weights, masks, packed, E, packed_t, E_t) -> None:
    lengths = {len(part) for part in (weights, masks, packed, E, packed_t, E_t)}
    if lengths == {0} or len(lengths) != 1:
        raise Sparse24Error(
            "weights, masks, packed, E, packed_t and E_t must be non-empty lists of one length, got "
            f"{[len(part) for part in (weights, masks, packed, E, packed_t, E_t)]}"
        )
    for w, mask, p, e, pt, et in zip(weights, masks, packed, E, packed_t, E_t, strict=True):
        check_packable(w, mask)
        rows, cols = w.shape
        if p.numel() or e.numel():  # an empty pair is not written
            check_packed_operand(p, e, "packed", (rows, cols // 2), rows, cols)
        if pt.numel() or et.numel():
            check_packed_operand(pt, et, "packed_t", (rows // 2, cols), cols, rows)
        if p.numel() and pt.numel() and p.dtype != pt.dtype:
            raise Sparse24DtypeError(
                f"packed and packed_t of a weight must have one dtype, got {p.dtype} and {pt.dtype}; pack each "
                "direction in a call of its own, or both in one dtype"
            )
        check_same_device(weights[0], "weights[0]", weights=w, packed=p, packed_t=pt)


def _check_memory(search: bool, weights, masks, packed, E, packed_t, E_t) -> None:
    """Outputs have memory of their own: kernels read weights and masks while they write."""
    lists = {"packed": packed, "E": E, "packed_t": packed_t, "E_t": E_t, "masks": masks, "weights": weights}
    named = {name: [(f"{name}[{i}]", t) for i, t in enumerate(part)] for name, part in lists.items()}
    written = [pair for name in ("packed", "E", "packed_t", "E_t") for pair in named[name]]
    if search:
        check_no_shared_memory(written + named["masks"], named["weights"])
    else:
        check_no_shared_memory(written, named["weights"] + named["masks"])


def _written_dtype(out: tuple[Tensor, ...]) -> torch.dtype:
    """Of the values of (packed, E, packed_t, E_t). A direction that is left out is empty: its dtype says nothing."""
    packed, _, packed_t, _ = out
    return packed.dtype if packed.numel() else packed_t.dtype


def _pack_lists(search: bool, weights, masks, packed, E, packed_t, E_t) -> None:
    _check_lists(weights, masks, packed, E, packed_t, E_t)
    _check_memory(search, weights, masks, packed, E, packed_t, E_t)
    library, *place = where(weights[0])
    if library is None or any(w.dtype == torch.float64 for w in weights):
        for w, mask, *out in zip(weights, masks, packed, E, packed_t, E_t, strict=True):
            if search:
                mask.copy_(reference.transposable_mask(w))
            for target, value in zip(out, reference.compress(w, mask, _written_dtype(out)), strict=True):
                if target.numel():
                    target.copy_(value)
        return
    # One launch takes weights of one dtype and layout class; the library groups nothing, so group here.
    groups: dict[tuple, list] = {}
    kept_alive = []  # copies of weights with odd strides must outlive the launch
    for w, mask, *out in zip(weights, masks, packed, E, packed_t, E_t, strict=True):
        w = as_major(w)
        kept_alive.append(w)
        dtype = _written_dtype(out)
        key = (w.dtype, dtype, w.stride(1) == 1)
        groups.setdefault(key, []).append(pack_item(w, mask, dtype, tuple(out)))
    run = library.search_and_pack if search else library.pack_by_mask
    for items in groups.values():
        run(items, *place)


def _prune_compress_(weights, masks, packed, E, packed_t, E_t) -> None:
    _pack_lists(True, weights, masks, packed, E, packed_t, E_t)


def _compress_(weights, masks, packed, E, packed_t, E_t) -> None:
    _pack_lists(False, weights, masks, packed, E, packed_t, E_t)


_op_prune_compress_ = define_op(
    "prune_compress_",
    "(Tensor[] weights, Tensor(a!)[] masks, Tensor(b!)[] packed, Tensor(c!)[] E, Tensor(d!)[] packed_t, "
    "Tensor(e!)[] E_t)"
    " -> ()",
    _prune_compress_,
    _check_lists,
)
_op_compress_ = define_op(
    "compress_",
    "(Tensor[] weights, Tensor[] masks, Tensor(b!)[] packed, Tensor(c!)[] E, Tensor(d!)[] packed_t, Tensor(e!)[] E_t)"
    " -> ()",
    _compress_,
    _check_lists,
)


def _refuse_no_weights(weights, *others) -> None:
    """The check of the op, for lists without which torch finds no implementation to run it in."""
    if not weights:
        _check_lists(weights, *others)


def _check_lists_writable(packed, E, packed_t, E_t, masks=()) -> None:
    lists = {"packed": packed, "E": E, "packed_t": packed_t, "E_t": E_t, "masks": masks}
    check_writable(*((f"{name}[{i}]", t) for name, part in lists.items() for i, t in enumerate(part)))


@names_wrong_types
@torch.no_grad()
def prune_compress_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    packed: Sequence[Tensor],
    E: Sequence[Tensor],
    packed_t: Sequence[Tensor],
    E_t: Sequence[Tensor],
) -> None:
    """Search and pack many weights in place, into buffers that keep their addresses; few launches for all of them.

    Six lists of one length: weights (rows, cols), masks (written), and the four outputs of `empty_packed` (written).
    Where packed and E of a weight are empty tensors, or packed_t and E_t, that direction is left out.

    Raises Sparse24Error for lists that are empty or of several lengths and, naming the argument, for a shape, size,
    stride or device that does not fit, and for outputs that share memory with one another or with an input;
    Sparse24DtypeError for a dtype, and for packed and packed_t of two. Nothing is written then.
    """
    _refuse_no_weights(weights, masks, packed, E, packed_t, E_t)
    _check_lists_writable(packed, E, packed_t, E_t, masks)
    _op_prune_compress_(
        [w.detach() for w in weights],
        [mask_as_uint16(mask) for mask in masks],
        *map(list, (packed, E, packed_t, E_t)),
    )
    torch.autograd.graph.increment_version([*masks, *packed, *E, *packed_t, *E_t])


@names_wrong_types
@torch.no_grad()
def compress_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    packed: Sequence[Tensor],
    E: Sequence[Tensor],
    packed_t: Sequence[Tensor],
    E_t: Sequence[Tensor],
) -> None:
    """Pack many weights by their masks in place; arguments and errors as `prune_compress_`, the masks only read."""
    _refuse_no_weights(weights, masks, packed, E, packed_t, E_t)
    _check_lists_writable(packed, E, packed_t, E_t)
    _op_compress_(
        [w.detach() for w in weights],
        [mask_as_uint16(mask) for mask in masks],
        *map(list, (packed, E, packed_t, E_t)),
    )
    torch.autograd.graph.increment_version([*packed, *E, *packed_t, *E_t])


def _check_stack(weights, masks) -> None:
    if not weights or len(weights) != len(masks):
        raise Sparse24Error(
            f"weights and masks must be non-empty and equally long, got {len(weights)} and {len(masks)}"
        )
    for w in weights:
        check_weight(w)
    shapes = [tuple(w.shape) for w in weights]
    if len(weights) > 1 and any(rows % META_BLOCK or cols != shapes[0][1] for rows, cols in shapes):
        raise Sparse24Error(
            f"stacked weights must have equal columns and rows in multiples of {META_BLOCK}, in which metadata is "
            f"written, got shapes {shapes}; pack them as one weight (torch.cat) with one mask"
        )


@names_wrong_types
def compress_transposed(
    weights: Sequence[Tensor], masks: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(packed_t, E_t) of weights stacked by rows, for an input gradient that does without stored ones.

    weights  one (rows, cols), or several of equal columns whose rows are multiples of 64
    masks    their masks
    dtype    of the packed values, as `compress` has it

    Reads a weight and writes half of it: the pass of `compress` with one output.

    Raises Sparse24Error for lists that are empty or of two lengths, weights that cannot be stacked, and a mask or
    device that does not fit; Sparse24DtypeError for a dtype.
    """
    _check_stack(weights, masks)
    values, metadata = [], []
    for w, mask in zip(weights, masks, strict=True):
        kind, (rows, cols) = packed_dtype(w, dtype), w.shape
        nothing, no_E = (w.new_empty(0, dtype=t) for t in (kind, torch.uint8))
        packed_t = w.new_empty((rows // 2, cols), dtype=kind)
        E_t = w.new_empty(metadata_bytes(cols, rows), dtype=torch.uint8)
        compress_([w], [mask], [nothing], [no_E], [packed_t], [E_t])
        values.append(packed_t)
        metadata.append(E_t)
    return (values[0], metadata[0]) if len(values) == 1 else (torch.cat(values), torch.cat(metadata))
