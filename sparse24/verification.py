"""verify: is what the sparse layers multiply with what it should be?"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from . import ops, packing
from .convert import sparse_layers, unwrap
from .feedforward import FusedFeedForward
from .modules import DENSE, SparseLayer


@dataclass
class VerifyReport:
    """Truthy when every sparse layer is in order.

    problems  (layer, what is wrong)
    layers    names of the layers that were checked
    phase     "sparse", "dense" (masks are kept but not applied) or "mixed"
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    phase: str = ""

    def __bool__(self) -> bool:
        return bool(self.layers) and not self.problems

    def __str__(self) -> str:
        if not self.layers:
            return "verify: no sparse layers"
        if self.problems:
            return "verify: " + "; ".join(f"{name}: {what}" for name, what in self.problems)
        if self.phase == DENSE:
            return f"verify: {len(self.layers)} layers in the dense phase: weights are dense, masks are not applied"
        return f"verify: {len(self.layers)} layers 2:4: masks valid, packed values and metadata equal weight * mask"


def verify(model: nn.Module) -> VerifyReport:
    """Check every sparse layer of `model`, and the blocks that run as one function.

    The mask is a transposable 2:4 mask, and the packed forms, both ways, hold exactly the weight under that mask, with
    the metadata in their places. In the dense phase only the masks are checked, and the report says so.
    """
    layers = sparse_layers(model)
    report = VerifyReport(layers=list(layers))
    phases = {layer.phase for layer in layers.values()}
    report.phase = phases.pop() if len(phases) == 1 else "mixed" if phases else ""
    for name, layer in layers.items():
        report.problems += [(name, problem) for problem in _problems(layer)]
    for name, block in unwrap(model).named_modules():
        if isinstance(block, FusedFeedForward) and not _fused_is_current(block):
            report.problems.append((name, "the buffer of gate and up is not that of its layers; call sparse24.refresh"))
    return report


@torch.no_grad()
def _fused_is_current(block: FusedFeedForward) -> bool:
    """Whether the one buffer of gate and up holds what the two layers packed together would."""
    *ups, _ = block.ffn_layers()
    if len(ups) == 1 or block.packed is None or any(layer.phase == DENSE or layer.soft is not None for layer in ups):
        return True
    weight = torch.cat([packing.full_weight(layer) for layer in ups])
    mask = torch.cat([layer.mask for layer in ups])
    fresh = ops.compress(weight, mask, dtype=block.packed.dtype)
    return all(
        torch.equal(getattr(block, name).nan_to_num(nan=1.0), tensor.nan_to_num(nan=1.0))
        for name, tensor in zip(packing.PACKED_NAMES, fresh, strict=True)
    )


@torch.no_grad()
def _problems(layer: SparseLayer) -> list[str]:
    if layer.weight.is_meta:
        return ["its weight is on the meta device"]
    if layer.soft is not None:
        per_group = (layer.soft.unflatten(-1, (-1, 4)) != 0).sum(-1)
        return ["its soft-thresholded weight is not 2:4"] if int(per_group.max()) > 2 else []
    if not ops.is_transposable(layer.mask):
        return ["its mask has a block that does not keep two of each row and column"]
    if layer.phase == DENSE:
        return []
    problems = []
    weight, bits = packing.full_weight(layer), packing.mask_bits(layer.mask)
    rows, cols = weight.shape
    kept = torch.where(ops.unpack_mask(bits), weight.to(layer.packed.dtype), 0)
    for values, E, transposed in ((layer.packed, layer.E, False), (layer.packed_t, layer.E_t, True)):
        unpacked = ops.decompress(values, E, rows, cols, transposed=transposed)
        # Kept NaN are equal to themselves here: they are to stay visible.
        if not torch.equal(unpacked.nan_to_num(nan=1.0), kept.nan_to_num(nan=1.0)):
            which = "packed_t" if transposed else "packed"
            problems.append(f"{which} is not weight * mask; call sparse24.refresh(model) after writing weights")
    # Zeros hide misplaced metadata from the comparison above: the bytes themselves must be those of a fresh packing.
    fresh = ops.compress(weight, bits, dtype=layer.packed.dtype)
    for name, tensor in zip(("E", "E_t"), fresh[1::2], strict=True):
        if not torch.equal(getattr(layer, name), tensor):
            problems.append(f"{name} does not match the mask")
    return problems
