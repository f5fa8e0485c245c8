"""What a 2:4 model must give: the output of a plain one with its weights, under its masks."""

import torch
from rounding import ANOTHER_ORDER
from tiny_models import MLP

from sparse24 import ops
from sparse24.convert import sparse_layers

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(99))


def masked_output(model, x=X):
    """What a plain model gives that has the present weights under the present masks."""
    twin = MLP()
    twin.load_state_dict(model.state_dict())
    for name, layer in sparse_layers(model).items():
        weight = twin.get_submodule(name).weight
        weight.data.mul_(ops.unpack_mask(layer.mask.view(torch.uint16)))
    with torch.no_grad():
        return twin(x)


@torch.no_grad()
def evaluated(model):
    return model(X)


def assert_right(model, output):
    torch.testing.assert_close(output.detach(), masked_output(model), **ANOTHER_ORDER)
