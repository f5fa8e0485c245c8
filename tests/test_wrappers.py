"""Names of layers and states do not depend on what a model is wrapped in."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sparse24
from sparse24 import Recipe
from sparse24.convert import plain_name, sparse_layers, unwrap


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Engine(nn.Module):
    """Holds its model as `module`, as DDP, DataParallel and many trainers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class DeepSpeedEngine(Engine):
    def __init__(self, module):
        super().__init__(module)
        self.timers = nn.Identity()


class Fabric(nn.Module):
    """Lightning Fabric's: the strategy's module and the user's own."""

    def __init__(self, module):
        super().__init__()
        self._forward_module, self._original_module = Engine(module), module

    def forward(self, x):
        return self._forward_module(x)


class LoraLayer(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.lora_A = base_layer, nn.Linear(16, 2)

    def forward(self, x):
        return self.base_layer(x)


def adapted(model):
    model[0].fc1 = LoraLayer(model[0].fc1)
    return model


class LoraModel(nn.Module):
    __module__ = "peft.tuners.lora.model"

    def __init__(self, model):
        super().__init__()
        self.model = model


class PeftModel(nn.Module):
    __module__ = "peft.peft_model"

    def __init__(self, model):
        super().__init__()
        self.base_model = LoraModel(model)


WRAPPERS = {
    "module": Engine,
    "twice": lambda model: Engine(Engine(model)),
    "DeepSpeed": DeepSpeedEngine,
    "Fabric": Fabric,
    "DataParallel": nn.DataParallel,
    "average": AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled inside": lambda model: Engine(torch.compile(model, backend="eager")),
    "adapters": adapted,
    "PEFT": lambda model: PeftModel(adapted(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_layers_keep_their_names(name):
    model = nn.Sequential(MLP(), MLP())
    sparse24.sparsify(model)
    expected = ["0.fc1", "0.fc2", "1.fc1", "1.fc2"]
    wrapped = WRAPPERS[name](model)
    assert [*sparse_layers(wrapped)] == [*sparse_layers(model)] == expected
    if name != "average":
        assert unwrap(wrapped) is model
    assert {plain_name(key) for key in wrapped.state_dict() if "lora" not in key} >= {f"{n}.weight" for n in expected}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_recipes_state_fits_the_wrapped_and_the_bare_model(name):
    bare = nn.Sequential(MLP(), MLP())
    sparse24.sparsify(bare)
    wrapped = nn.Sequential(MLP(), MLP())
    sparse24.sparsify(wrapped)
    wrapped = WRAPPERS[name](wrapped)
    states = []
    for model in (bare, wrapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        states.append((Recipe(model, optimizer, total_steps=4), optimizer))
    (one, _), (other, _) = states
    other.load_state_dict(one.state_dict())
    one.load_state_dict(other.state_dict())


def test_containers_and_own_children_called_module_are_no_wrappers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.fc1, self.fc2 = MLP(), nn.Linear(16, 32), nn.Linear(32, 16)

    model = Own()
    sparse24.sparsify(model)
    assert unwrap(model) is model and len(sparse_layers(model)) == 4  # "module.fc1" and "fc1" are two
    container = nn.ModuleDict({"module": MLP()})
    assert unwrap(container) is container
