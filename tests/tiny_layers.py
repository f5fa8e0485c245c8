"""Tiny sparse layers, and what they must compute: what the tests of modules share."""

import torch
from tiny_models import ActivatedMLP
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparse24
from sparse24 import SparseLinear, ops
from sparse24.layers.modules import SparseLayer


def masked(layer):
    """weight * mask, as the kernels see it: [out, in]."""
    return torch.where(ops.unpack_mask(layer.mask), layer.kernel_weight(), 0)


def sparse_linear(width=16, out=24, seed=0, **settings):
    torch.manual_seed(seed)
    return SparseLinear(width, out, **settings)


def sparse_conv1d(width=16, out=24):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(out, width))
    sparse24.sparsify(model, include=("0",))
    return model[0]


def assert_packed_is_current(layer):
    report = sparse24.verify(nn.Sequential(layer))
    assert report, str(report)


def sparse_mlp():
    """A model of one 2:4 feed-forward block, 32 wide."""
    model = nn.Sequential(ActivatedMLP())
    sparse24.sparsify(model)
    return model


def sparse_names(model):
    """Names of the sparse layers of a model."""
    return [name for name, m in model.named_modules() if isinstance(m, SparseLayer)]
