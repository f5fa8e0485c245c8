"""SparseGatedMLP: a gated feed-forward block to build models from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..options import checked_options, one_of
from .fused.activations import ACTIVATIONS
from .fused.feedforward import BlockState, FusedFeedForward, attach
from .fused.replaced import Child
from .linear import SparseLinear


class GatedMLP(nn.Module):
    """The formula of SparseGatedMLP over whatever its layers are; what `densify` leaves."""

    def act_fn(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def _sparse24_block(self) -> BlockState:
        """What `feedforward.look_at` would find, known here without looking; another `activation` runs unfused."""
        children = (Child("act_fn", GatedMLP.act_fn, ()),)
        constants = (("activation", self.activation),)
        return BlockState(
            ("gate_proj", "up_proj", "down_proj"), self.activation, (), children, GatedMLP.forward, constants
        )


class SparseGatedMLP(FusedFeedForward, GatedMLP):
    """A gated feed-forward block with 2:4 weights: down_proj(act(gate_proj(x)) * up_proj(x)).

    d_model, d_ff  multiples of 4, d_ff better of 64;  x [..., d_model] -> [..., d_model]
    bias           biases on all three layers
    activation     "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), "relu" (ReGLU), "squared_relu"; of the gate

    Parameters are named as in Llama: gate_proj, up_proj, down_proj. Raises Sparse24Error as SparseLinear does, and
    for an unknown activation.
    """

    @checked_options(activation=one_of(ACTIVATIONS))
    def __init__(
        self,
        d_model: int,
        d_ff: int,
        bias: bool = False,
        activation: str = "silu",
        device=None,
        dtype=None,
        *,
        mvue: bool | str = True,
        compute_dtype: torch.dtype | None = None,
        precision: str | None = None,
    ):
        super().__init__()
        options = dict(device=device, dtype=dtype, mvue=mvue, compute_dtype=compute_dtype, precision=precision)
        self.activation = activation
        self.gate_proj = SparseLinear(d_model, d_ff, bias, **options)
        self.up_proj = SparseLinear(d_model, d_ff, bias, **options)
        self.down_proj = SparseLinear(d_ff, d_model, bias, **options)
        attach(self, self._sparse24_block())
