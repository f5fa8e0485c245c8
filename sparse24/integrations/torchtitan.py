"""2:4 training behind the interface of torchtitan's model converters: `convert(model)` before parallelism is applied,
`post_optimizer_hook(model)` after each optimizer step. It imports nothing of torchtitan, and serves plain loops too.

What a recipe does happens in the hooks of the optimizer. A trainer that knows converters but no recipes need not hand
the optimizer over: the converter finds it when it steps for the first time. `attach` is for loops that can.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..convert import SparsifyReport, sparse_layers, sparsify
from ..errors import Sparse24Error
from ..layers.parallel import packed_gather, sharding
from ..layers.watch.optimizer_steps import parameters_of
from ..options import checked_options
from ..recipe import Recipe, load_masks
from .settings import split_settings


class Sparse24Converter:
    """Makes the feed-forward layers of models 2:4 and trains them by a `Recipe` each.

    total_steps  optimizer steps of the whole run
    settings     keyword arguments of `sparsify` and of `Recipe`; what both take, such as mvue, goes to both

    reports  of `sparsify`, one a model; recipes  one a model, from the first step or from `attach` on

    Raises Sparse24Error for a setting that neither takes.
    """

    @dataclass(kw_only=True)
    class Config:
        """What torchtitan lists under its model converters, where these are built from configs."""

        total_steps: int
        settings: dict[str, Any] = field(default_factory=dict)

        def build(self, *, parallel_dims: Any = None, model_compile_enabled: bool = False) -> Sparse24Converter:
            """The converter; it needs to know neither of the two."""
            return Sparse24Converter(self.total_steps, **self.settings)

    @checked_options()
    def __init__(self, total_steps: int, **settings: Any):
        self.total_steps = total_steps
        self._sparsify_settings, self._recipe_settings = split_settings(settings, type(self).__name__)
        self.reports: list[SparsifyReport] = []
        self.recipes: list[Recipe] = []
        self._waiting: list[nn.Module] = []  # converted, and without a recipe
        self._recipe_of: dict[int, Recipe] = {}
        self._first_forward: dict[int, Any] = {}
        self._saved: list[dict] = []  # states that came before their recipes
        self._hook: Any = None

    # -- torchtitan's interface

    def convert(self, model: nn.Module) -> None:
        """Sparsify `model`, in place; on the meta device too. Call it before parallelize_module and fully_shard."""
        self.reports.append(sparsify(model, **self._sparsify_settings))
        if not sparse_layers(model):
            return  # left dense, as the report says
        self._waiting.append(model)
        # Trainers make the weights after they have converted and sharded the model: pack what the first pass reads.
        self._first_forward[id(model)] = model.register_forward_pre_hook(self._before_first_forward)
        if self._hook is None:
            self._hook = register_optimizer_step_pre_hook(self._before_step)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """After the optimizer's step, in which the recipes do their part: check that there was a recipe to do it.

        Raises Sparse24Error where the optimizer of a converted model runs no hooks, or does not hold its weights.
        """
        missing = [m for m in (model if isinstance(model, list) else [model]) if any(m is w for w in self._waiting)]
        if missing:
            raise Sparse24Error(
                f"an optimizer step is over, and no recipe trains the 2:4 layers of {type(missing[0]).__name__}: the "
                "optimizer runs no hooks, or does not hold their weights; call converter.attach(model, optimizer) "
                "before training"
            )

    # -- a loop of one's own

    def attach(self, model: nn.Module | list[nn.Module], optimizer: Any) -> list[Recipe]:
        """Make the recipes now: after sharding and after the weights are made or loaded, before the first step.

        model, optimizer  one of each, or lists of the same length, as pipeline stages have them
        """
        models = model if isinstance(model, list) else [model]
        optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer] * len(models)
        if len(models) != len(optimizers):
            raise Sparse24Error(
                f"attach takes an optimizer a model, got {len(models)} models, {len(optimizers)} optimizers"
            )
        return [self._make_recipe(one, its) for one, its in zip(models, optimizers, strict=True)]

    def detach(self) -> None:
        """Training is over: take all hooks off."""
        for handle in (*self._first_forward.values(), *([self._hook] if self._hook is not None else [])):
            handle.remove()
        self._first_forward, self._hook = {}, None
        for recipe in self.recipes:
            recipe.detach()

    def metrics(self) -> dict[str, float]:
        """`Recipe.metrics` of the first model; nothing before the first step. Collective where weights are sharded."""
        return self.recipes[0].metrics() if self.recipes else {}

    # -- checkpoints: what torch.distributed.checkpoint calls a Stateful

    def state_dict(self) -> dict[str, bytes]:
        """The states of the recipes, as bytes: their tensors grow in training, and checkpoints load into equal shapes.

        Collective where weights are cut by tensor parallel or FSDP2.
        """
        file = io.BytesIO()
        torch.save([recipe.state_dict() for recipe in self.recipes] or self._saved, file)
        return {"recipes": file.getvalue()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        """Take up what `state_dict` returned; recipes that are made later take theirs up then.

        Generators of random numbers stay as they are: the state is one for all ranks.
        """
        self._saved = torch.load(io.BytesIO(state["recipes"]), weights_only=True)
        for recipe, saved in zip(self.recipes, self._saved, strict=False):  # states may come first
            recipe.load_state_dict(saved, rng=False)

    # -- hooks

    def _before_first_forward(self, model: nn.Module, args: tuple) -> None:
        self._first_forward.pop(id(model)).remove()
        if id(model) in self._recipe_of:
            return
        packed_gather.divide_rows(sparse_layers(model), sharding.sharded_modules(model))
        place = len(self.recipes) + next(i for i, waiting in enumerate(self._waiting) if waiting is model)
        if place < len(self._saved):
            load_masks(model, self._saved[place])
            return
        for layer in sparse_layers(model).values():
            layer._repack(search=True)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._waiting:  # each converted model has its recipe
            return
        held = parameters_of(optimizer)
        for model in list(self._waiting):
            weights = [layer.weight for layer in sparse_layers(model).values() if layer.weight.requires_grad]
            if weights and all(id(weight) in held for weight in weights):
                self._make_recipe(model, optimizer)

    def _make_recipe(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Recipe:
        if id(model) in self._recipe_of:
            raise Sparse24Error(f"this {type(model).__name__} has its recipe already; attach it once, before training")
        recipe = Recipe(model, optimizer, self.total_steps, **self._recipe_settings)
        self._waiting = [other for other in self._waiting if other is not model]
        self._recipe_of[id(model)] = recipe
        self.recipes.append(recipe)
        if len(self._saved) >= len(self.recipes):
            recipe.load_state_dict(self._saved[len(self.recipes) - 1], rng=False)
        return recipe
