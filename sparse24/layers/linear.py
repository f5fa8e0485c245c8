"""SparseLinear: the sparse form of torch.nn.Linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..options import checked_options
from .sparse_layer import SparseLayer
from .state import DENSE, HOLDER, state_of


class SparseLinear(SparseLayer, nn.Linear):
    """nn.Linear with a transposable 2:4 mask on its weight; the same parameters, state_dict and call.

    in_features, out_features  multiples of 4
    bias           a bias as in nn.Linear
    mvue           True or "output": prune the output gradient to 2:4 without bias, so that the weight gradient is a
                   sparse product too; "input": prune the layer's input instead; False: neither
    compute_dtype  dtype of the packed values; default: that of the weight, and bfloat16 for float32 weights on a GPU
    precision      None: 16-bit products; "fp8-hybrid" or "fp8": 8-bit ones (docs/fp8.md)

    The weight is dense and all of it is trained (straight-through); what multiplies is its masked, packed form.
    Train it with `sparse24.Recipe`, which re-packs it after each optimizer step.

    Raises Sparse24Error for sizes that are not multiples of 4; Sparse24DtypeError for dtypes that do not fit together.
    """

    @checked_options()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        mvue: bool | str = True,
        compute_dtype: torch.dtype | None = None,
        precision: str | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_sparse(mvue=mvue, compute_dtype=compute_dtype, precision=precision)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if HOLDER in self.__dict__:
            self._repack(search=True)

    def forward(self, input: Tensor) -> Tensor:
        self.look_in_forward()
        state = state_of(self)
        if state.phase == DENSE:
            return self._dense_forward(input, self.weight, self.bias) if state.dense_mvue else super().forward(input)
        return self._sparse_forward(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        state = state_of(self)
        precision = "" if state.precision is None else f", precision={state.precision}"
        return f"{super().extra_repr()}, 2:4, phase={state.phase}, mvue={state.mvue}{precision}"
