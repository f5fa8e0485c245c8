"""SparseConv1D: the sparse form of transformers' Conv1D, the linear layer of GPT-2, whose weight is [in, out].

Kernels see the transposed view, a column-major [out, in] weight; the mask of the transpose is the transposed mask, so
nothing else differs. A file of its own, since it imports transformers; `sparsify` imports it when it meets a Conv1D.
"""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .sparse_layer import SparseLayer
from .state import DENSE, state_of


class SparseConv1D(SparseLayer, Conv1D):
    """transformers' Conv1D with a transposable 2:4 mask; made by `sparsify`. x [..., nx] -> [..., nf]."""

    def as_kernel_sees(self, tensor: Tensor) -> Tensor:
        return tensor.t()

    def forward(self, x: Tensor) -> Tensor:
        self.look_in_forward()
        state = state_of(self)
        if state.phase == DENSE:
            return self._dense_forward(x, self.weight.t(), self.bias) if state.dense_mvue else super().forward(x)
        return self._sparse_forward(x, self.weight.t(), self.bias)

    def __repr__(self) -> str:
        state = state_of(self)
        precision = "" if state.precision is None else f", precision={state.precision}"
        return f"SparseConv1D(nf={self.nf}, nx={self.nx}, 2:4, phase={state.phase}, mvue={state.mvue}{precision})"
