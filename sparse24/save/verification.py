"""verify: do sparse layers multiply with what they should, and does a file hold what the model has?"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import ops
from ..convert import plain_name, sparse_layers, unwrap
from ..layers import DENSE, SparseLayer, mask_of, packing, state_of
from ..layers.fused.feedforward import FusedFeedForward, ffn_layers
from ..layers.fused.sparse_activation import activation_blocks, runs_dense
from ..layers.parallel import packed_gather, sharding
from ..layers.state import METADATA, METADATA_T, PACKED, PACKED_BUFFERS, PACKED_T, SOFT, division_of
from ..layers.watch.copies import fingerprint_of, same_function
from .exporting import load_exported, masked_weight, plain_state, weight_key
from .semi_structured import semi_structured_layers

SEMI_STRUCTURED = "semi-structured"


@dataclass
class VerifyReport:
    """Truthy when there was something to check and all of it is in order.

    problems  (layer or key in the file, what is wrong)
    layers    names of the sparse layers that were checked
    phase     "sparse", "dense" (masks are kept but not applied), "semi-structured" (PyTorch's tensors) or "mixed"
    file      what the file holds, "dense" or "masked"; "" if none was given
    pruned    names of blocks that prune their activation
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    phase: str = ""
    file: str = ""
    pruned: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.layers or self.file or self.pruned) and not self.problems

    def __str__(self) -> str:
        if self.problems:
            return "verify: " + "; ".join(f"{name}: {what}" for name, what in self.problems)
        file = f"; the file holds its {self.file} weights" if self.file else ""
        if not self.layers:
            pruned = f", {len(self.pruned)} blocks that prune their activation" if self.pruned else ""
            return f"verify: no sparse layers{pruned}{file}"
        what = {
            DENSE: "in the dense phase: weights are dense, masks are not applied",
            SEMI_STRUCTURED: "of PyTorch's semi-structured tensors, 2:4",
        }.get(self.phase, "2:4: masks valid, packed values and metadata equal weight * mask")
        return f"verify: {len(self.layers)} layers {what}{file}"


def verify(model: nn.Module, path: str | os.PathLike | None = None, *, like: nn.Module | None = None) -> VerifyReport:
    """Check every sparse layer of `model`, the blocks that run as one function, and a file that was exported from it.

    The mask is a transposable 2:4 mask, and the packed forms, both ways, hold exactly the weight under that mask, with
    the metadata in their places. In the dense phase only the masks are checked, and the report says so. Weights that
    `to_semi_structured` made are unpacked, and must be 2:4.

    path  a file that `export` made, plain, masked or compressed: each tensor must equal the model's, masked where the
          file is, and masked ones must be 2:4. For a plain file, the model must have the phase and masks that the
          weights had when they were saved. For a model made by `to_semi_structured`, masked files are compared in the
          dtype of its weights. Raises as `load_compressed` for a file that is damaged or of another version
    like  another model with these weights, such as the one that `model` is an average of: it must have the same phase
          and masks, or the two compute different functions of their weights

    Blocks that prune their activation have nothing packed. They must be what `sparsify` found, and the same ones as in
    the file or the other model.
    """
    sharding.reshard(sharding.sharded_modules(model))
    layers, semi = sparse_layers(model), semi_structured_layers(model)
    report = VerifyReport(layers=[*layers, *semi])
    phases = {state_of(layer).phase for layer in layers.values()} | ({SEMI_STRUCTURED} if semi else set())
    for name, block in activation_blocks(unwrap(model)).items():
        report.pruned.append(plain_name(name))
        if runs_dense(block):
            problem = "is not what sparsify(operand='activation') found, and runs dense; densify, and sparsify again"
            report.problems.append((plain_name(name), problem))
    report.phase = phases.pop() if len(phases) == 1 else "mixed" if phases else ""
    for name, layer in layers.items():
        with packed_gather.whole_forms([layer]):
            report.problems += [(name, problem) for problem in _problems(layer)]
    for name, block in unwrap(model).named_modules():
        if not isinstance(block, FusedFeedForward):
            continue
        with packed_gather.whole_forms([layer for layer in ffn_layers(block) if isinstance(layer, SparseLayer)]):
            is_current = _fused_is_current(block)
        if not is_current:
            report.problems.append((name, "the buffer of gate and up is not that of its layers; call sparse24.refresh"))
    report.problems += [
        (name, "its weight is not 2:4") for name, layer in semi.items() if _most_kept(layer.weight.to_dense()) > 2
    ]
    if like is not None:
        report.problems += _differences(layers, sparse_layers(like))
        theirs = [plain_name(name) for name in activation_blocks(unwrap(like))]
        report.problems += _pruned_elsewhere(report.pruned, theirs, "the other model")
    if path is not None:
        _check_file(model, path, report)
    return report


def _differences(layers: dict[str, SparseLayer], others: dict[str, SparseLayer]) -> list[tuple[str, str]]:
    problems = [(name, "is sparse in one of the two models only") for name in layers.keys() ^ others.keys()]
    remedy = "call sparse24.follow(model, like=...)"
    for name in layers.keys() & others.keys():
        layer, other = layers[name], others[name]
        phase, theirs = state_of(layer).phase, state_of(other).phase
        if phase != theirs:
            problems.append((name, f"is in the {phase} phase, and {theirs} in the other model; {remedy}"))
        elif not same_function(layer.fingerprint(), other.fingerprint()):
            problems.append((name, f"has another mask or scale than the other model; {remedy}"))
    return sorted(problems)


def _pruned_elsewhere(ours: list[str], theirs: list[str], where: str) -> list[tuple[str, str]]:
    """Problems of blocks that prune their activation on one side only."""
    remedies = {
        True: f"prunes its activation, and does not in {where}; call sparse24.densify(model)",
        False: f"does not prune its activation as in {where}; call sparse24.sparsify(model, operand='activation')",
    }
    return [(name, remedies[name in ours]) for name in sorted({*ours} ^ {*theirs})]


@torch.no_grad()
def _check_file(model: nn.Module, path: str | os.PathLike, report: VerifyReport) -> None:
    """Compare what the file holds with what the model has, tensor by tensor."""
    saved, masked, fingerprints, pruned = load_exported(path)
    report.file = "masked" if masked else "dense"
    layers, semi = sparse_layers(model), semi_structured_layers(model)
    for name in layers.keys() & fingerprints.keys():
        if division_of(layers[name]) is not None:
            continue  # the file's are of whole masks
        theirs, ours = fingerprints[name], fingerprint_of(layers[name])
        if isinstance(theirs, str) and ours is not None and not same_function(ours, theirs):
            problem = "the file's weights are of another phase or mask; sparse24.load_masks gives the model theirs"
            report.problems.append((name, problem))
    if pruned is not None:
        report.problems += _pruned_elsewhere(report.pruned, pruned, "the file")
    expected = plain_state(model)
    for name, layer in semi.items():
        expected[weight_key(name)] = layer.weight.to_dense().cpu()
    for name, layer in layers.items() if masked else ():
        weight = masked_weight(name, layer).cpu()
        expected[weight_key(name)] = weight.t() if layer.as_kernel_sees(layer.weight) is not layer.weight else weight
        if layer._buffers[SOFT] is None and _most_kept(weight.t()) > 2:
            report.problems.append((name, "its masked weight is not 2:4 along columns"))
    for key in expected.keys() | saved.keys():
        if key not in saved or key not in expected:
            where, other = ("model", "file") if key in expected else ("file", "model")
            report.problems.append((key, f"is in the {where}, not in the {other}"))
        elif not _same(saved[key], expected[key], converted=bool(semi)):
            report.problems.append((key, "is another tensor in the file"))
    report.problems.sort()


def _same(saved: Tensor, tensor: Tensor, converted: bool) -> bool:
    """`converted`: by to_semi_structured, which casts weights, and transposes those of Conv1D."""
    saved, tensor = saved.cpu(), tensor.cpu()
    if converted:
        saved = saved.to(tensor.dtype)
    return _equal(saved, tensor) or (converted and saved.dim() == 2 and _equal(saved.t(), tensor))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every number; NaN, which weights keep so that it shows, equals NaN and nothing else."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    nan, other = a.isnan(), b.isnan()
    return torch.equal(nan, other) and torch.equal(a.masked_fill(nan, 0), b.masked_fill(other, 0))


def _most_kept(weight: Tensor) -> int:
    """The most non-zeros in a group of four along rows."""
    return int((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max())


@torch.no_grad()
def _fused_is_current(block: FusedFeedForward) -> bool:
    """Whether the one buffer of gate and up holds what the two layers packed together would."""
    *ups, _ = ffn_layers(block)
    if not all(isinstance(layer, SparseLayer) for layer in ups):
        return True  # an adapter is around a layer: the block's own forward runs
    if len(ups) == 1 or block._buffers[PACKED] is None:
        return True
    if any(state_of(layer).phase == DENSE or layer._buffers[SOFT] is not None for layer in ups):
        return True
    weight = torch.cat([packed_gather.packed_weight(layer) for layer in ups])
    mask = torch.cat([packed_gather.packed_mask(layer) for layer in ups])
    fresh = packing.pack_as(ups[0], weight, packing.mask_bits(mask))
    return all(
        _equal(packing.as_bits(block._buffers[name]), packing.as_bits(tensor))
        for name, tensor in zip(PACKED_BUFFERS, fresh, strict=True)
        if block._buffers[name].numel()  # a lean block has one direction
    )


@torch.no_grad()
def _problems(layer: SparseLayer) -> list[str]:
    if layer.weight_is_computed():
        return []  # packed for each call
    if layer.weight.is_meta:
        return ["its weight is on the meta device"]
    buffers, state = layer._buffers, state_of(layer)
    if buffers[SOFT] is not None:
        return ["its soft-thresholded weight is not 2:4"] if _most_kept(buffers[SOFT]) > 2 else []
    if not ops.is_transposable(mask_of(layer)):
        return ["its mask has a block that does not keep two of each row and column"]
    if state.phase == DENSE:
        return []
    weight, bits = packed_gather.packed_weight(layer), packing.mask_bits(packed_gather.packed_mask(layer))
    return (_packed_problems if state.precision is None else _float8_problems)(layer, weight, bits)


def _float8_problems(layer: SparseLayer, weight: Tensor, bits: Tensor) -> list[str]:
    buffers = layer._buffers
    fresh = packing.pack_as(layer, weight, bits)
    ours = (buffers[PACKED], layer.flat_E(), buffers[PACKED_T], buffers[METADATA_T])
    same = all(torch.equal(*map(packing.as_bits, pair)) for pair in zip(ours, fresh, strict=True))
    return [] if same else ["its packed values are not those of its weight in 8 bits: call sparse24.refresh"]


def _packed_problems(layer: SparseLayer, weight: Tensor, bits: Tensor) -> list[str]:
    buffers, state, problems = layer._buffers, state_of(layer), []
    rows, cols = weight.shape
    kept = torch.where(ops.unpack_mask(bits), weight.to(buffers[PACKED].dtype), 0)
    both = ((buffers[PACKED], layer.flat_E(), False), (buffers[PACKED_T], buffers[METADATA_T], True))
    for values, E, transposed in both[:1] if state.lean else both:
        unpacked = ops.decompress(values, E, rows, cols, transposed=transposed)
        if not _equal(unpacked, kept):
            which = "packed_t" if transposed else "packed"
            problems.append(f"{which} is not weight * mask; call sparse24.refresh(model) after writing weights")
    # Zeros hide misplaced metadata from the comparison above: the bytes themselves must be those of a fresh packing.
    fresh = ops.compress(weight, bits, dtype=buffers[PACKED].dtype)
    for name, tensor in zip((METADATA, METADATA_T), fresh[1::2], strict=True):
        if state.lean and name == METADATA_T:
            continue
        if not torch.equal(buffers[name].reshape(-1), tensor):
            problems.append(f"{'E' if name == METADATA else 'E_t'} does not match the mask")
    return problems
