"""to_semi_structured: a 2:4 model for inference by PyTorch's own sparse kernels.

Each sparse layer becomes an nn.Linear whose weight is a `torch.sparse.SparseSemiStructuredTensor`; no kernel of
sparse24 is needed any more. PyTorch has two backends: cuSPARSELt (sm_80 and later, Hopper among them) and CUTLASS,
whose kernels refuse Hopper. Both take 16-bit weights on a GPU, whole tiles only; layers of other sizes keep a dense
weight with the zeros written out, so that the model computes the same function.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..convert import Skipped, after_conversion, sparse_layers, unwrap
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import FORMATS, HALF_DTYPES
from ..layers import SparseLayer, packing
from ..layers.fused import feedforward
from ..layers.state import PACKED
from ..layers.watch.owners import end_recipes
from ..options import checked_options, one_of
from .exporting import masked_weight, warn_of_dense_phase

BACKENDS = ("auto", "cusparselt", "cutlass")


@dataclass
class SemiStructuredReport:
    """What `to_semi_structured` did. Truthy when it converted something.

    converted  names of the layers whose weight is now a SparseSemiStructuredTensor
    skipped    (name, reason) of those that are dense nn.Linear now, their zeros written out
    backend    "cusparselt" or "cutlass"
    """

    converted: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    backend: str = ""

    def __bool__(self) -> bool:
        return bool(self.converted)

    def __str__(self) -> str:
        lines = [f"to_semi_structured: {len(self.converted)} layers by {self.backend}, {len(self.skipped)} dense"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.skipped])


@checked_options(backend=one_of(BACKENDS))
@torch.no_grad()
def to_semi_structured(
    model: nn.Module, *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> SemiStructuredReport:
    """Turn the sparse layers of `model`, in place, into nn.Linear with PyTorch's semi-structured weights.

    dtype    of those weights, bfloat16 or float16; default: that of the packed values, so that the layer multiplies
             with what it multiplied with before. Biases keep their dtype: run the model under the same autocast
    backend  "cusparselt", "cutlass", or "auto": the first that runs on the GPU of the weights

    One way only: the master weights are gone afterwards, so keep a checkpoint. Every weight is unpacked again and
    compared before the model is touched. In the dense phase masks are not what the model computes with: they are then
    searched from the current weights, and a warning says so. Does not train: the weights take no gradient.

    Raises Sparse24Error for a model without sparse layers, weights that are not on one GPU or sharded, a GPU without a
    backend, and a weight that comes back different; Sparse24DtypeError for another dtype. The model is then unchanged.
    """
    layers = sparse_layers(model)
    if not layers:
        raise Sparse24Error(f"{type(model).__name__} has no sparse layers; there is nothing to convert")
    kind = _tensor_class(layers, backend)
    report = SemiStructuredReport(backend=kind.BACKEND)
    warn_of_dense_phase(layers, "converting")
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        masked = masked_weight(name, layer).to(_dtype_of(name, layer, dtype)).contiguous()
        reason = _why_dense(kind, masked)
        if reason is not None:
            report.skipped.append(Skipped(name, reason))
            weights[name] = masked
            continue
        weights[name] = kind.from_dense(masked)
        _check_equal(name, weights[name], masked)
        report.converted.append(name)
    feedforward.unfuse(model)
    end_recipes(layers.values())
    for name, layer in layers.items():
        _become_linear(layer, weights[name])
    after_conversion(model)
    _leave_fast_paths(model)
    return report


def semi_structured_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` whose weight is a SparseSemiStructuredTensor, by name."""
    return {
        name: module
        for name, module in unwrap(model).named_modules()
        if is_semi_structured(module._parameters.get("weight"))
    }


def is_semi_structured(tensor: Tensor | None) -> bool:
    return isinstance(tensor, torch.sparse.SparseSemiStructuredTensor)


def _tensor_class(layers: dict[str, SparseLayer], backend: str) -> type:
    """torch's tensor class for `backend` on the GPU that holds the weights."""
    devices = {layer.weight.device for layer in layers.values()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        raise Sparse24Error(
            f"SparseSemiStructuredTensor needs all weights on one GPU, these are on {found}; model.cuda() first, or "
            "export(masked=True) for a dense runtime"
        )
    if any(packing.is_dtensor(layer.weight) for layer in layers.values()):
        raise Sparse24Error(
            "the weights are sharded (DTensor): export(format='compressed'), then convert in a process that holds all"
        )
    reasons = _why_not_backends(next(iter(devices)))
    wanted = [name for name in BACKENDS[1:] if backend in ("auto", name)]
    for name in wanted:
        if reasons[name] is None:
            return getattr(torch.sparse, f"SparseSemiStructuredTensor{name.upper()}")
    why = "; ".join(f"{name}: {reasons[name]}" for name in wanted)
    raise Sparse24Error(f"{why}; export(masked=True) writes the zeros out for a dense runtime")


def _why_not_backends(device: torch.device) -> dict[str, str | None]:
    """Backend -> why PyTorch cannot multiply with it on `device`, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    missing = None if torch.backends.cusparselt.is_available() else "this PyTorch was built without cuSPARSELt"
    return {
        "cusparselt": missing if major >= 8 else f"needs sm_80 or later, {device} is sm_{major}{minor}",
        "cutlass": None if major == 8 else f"PyTorch has these kernels for sm_8x only, {device} is sm_{major}{minor}",
    }


def _dtype_of(name: str, layer: SparseLayer, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        packed = layer._buffers[PACKED].dtype
        dtype = FORMATS[packed].wide_dtype
    if dtype not in HALF_DTYPES:
        # PyTorch takes float32 too, but keeps one of two values there, which would drop half of what we keep.
        raise Sparse24DtypeError(
            f"the weight of {name} would be {dtype}; a 2:4 SparseSemiStructuredTensor is "
            f"{' or '.join(map(str, HALF_DTYPES))}: pass dtype="
        )
    return dtype


def _why_dense(kind: type, weight: Tensor) -> str | None:
    """Why torch's class cannot hold `weight`, or None."""
    rows, cols = weight.shape
    least = kind._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    if rows % least.sparse_min_rows or cols % least.sparse_min_cols:
        return (
            f"{rows} x {cols} is not a multiple of {least.sparse_min_rows} x {least.sparse_min_cols}, as "
            f"{kind.BACKEND} needs"
        )
    return None


def _check_equal(name: str, packed: Tensor, masked: Tensor) -> None:
    """The weight must come back from its packed form as it was; infinities and NaN have no product to show that."""
    if not bool(masked.isfinite().all()):
        raise Sparse24Error(f"the weight of {name} is not finite; mend the model before converting it")
    if not torch.equal(packed.to_dense(), masked):
        raise Sparse24Error(
            f"{type(packed).__name__} of {name} does not give the weight back; run sparse24.verify(model), and try the "
            "other backend"
        )


def _become_linear(layer: SparseLayer, weight: Tensor) -> None:
    """The same module object, now an nn.Linear with `weight`; hooks and references to it stay."""
    layer._drop_sparse()
    for name in ("nx", "nf"):  # of transformers' Conv1D, whose weight was transposed
        layer.__dict__.pop(name, None)
    layer.__class__ = nn.Linear
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)


def _leave_fast_paths(model: nn.Module) -> None:
    """torch's encoder layer would hand the weights to a kernel that takes plain tensors only."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            is_semi_structured(linear.weight) for linear in (module.linear1, module.linear2)
        ):
            module.activation_relu_or_gelu = 0
