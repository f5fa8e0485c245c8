"""What a sparse layer asks of its weight and settings, and where it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import Sparse24Error
from ..formats import REFERENCE_DTYPES, WEIGHT_DTYPES
from .packing import is_dtensor

#: dtypes of weights, and of packed values on a CPU
DTYPES = WEIGHT_DTYPES + REFERENCE_DTYPES


def check_module(value, argument: str = "model") -> None:
    if not isinstance(value, nn.Module):
        raise Sparse24Error(f"{argument} must be a torch.nn.Module, got {type(value).__name__}")


def is_exporting() -> bool:
    """Whether torch.export is at work. Dynamo before torch 2.13 answers the public function by True in any graph."""
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def distributed_rank() -> int:
    """This process's rank, 0 outside torch.distributed. It is mixed into the noise, which must differ by rank."""
    return torch.distributed.get_rank() if is_distributed() else 0


def check_extents(weight: Tensor) -> None:
    """Raises Sparse24Error for a weight that has no mask of whole 4x4 blocks."""
    if weight.dim() != 2 or any(extent == 0 or extent % 4 for extent in weight.shape):
        raise Sparse24Error(
            f"a 2:4 weight needs rows and columns that are positive multiples of 4, got "
            f"{' x '.join(map(str, weight.shape))}; keep this layer dense or change its width"
        )


def check_weight(weight: nn.Parameter) -> None:
    """Before a sparse layer gets another Parameter. Raises Sparse24Error for one that cannot be packed."""
    check_extents(weight)
    if not is_plain_parameter(weight):
        raise Sparse24Error(
            f"a sparse layer cannot hold a weight of type {type(weight).__name__} (quantised, perhaps): its packed "
            "form is made from plain numbers; call sparse24.densify(model, masked=True) first, which keeps what the "
            "model computes"
        )
    if weight.dtype not in DTYPES:
        raise Sparse24Error(
            f"a sparse layer cannot hold a weight of {weight.dtype}; supported are {', '.join(map(str, DTYPES))}"
        )


def check_bias(layer, bias: nn.Parameter | None) -> None:
    """Before a sparse layer gets another bias. Raises Sparse24Error for one of another shape, which dense layers would
    broadcast or refuse in the next forward pass.
    """
    weight = layer._parameters.get("weight")
    if type(bias) is not nn.Parameter or type(weight) is not nn.Parameter or weight.dim() != 2:
        return  # FSDP1 puts flat shards there; what is right then is not for a layer to say
    out_features = layer.as_kernel_sees(weight.detach()).shape[0]
    if bias.shape != (out_features,):
        raise Sparse24Error(
            f"the bias of this sparse layer must have shape ({out_features},), got {tuple(bias.shape)}; give it one "
            "value for each output feature"
        )


def is_plain_parameter(weight: Tensor | None) -> bool:
    """Whether a weight is a Parameter of plain numbers: no quantised or other tensor subclass. Fake tensors pass."""
    return type(weight) is nn.Parameter or isinstance(weight, FakeTensor) or is_dtensor(weight)
