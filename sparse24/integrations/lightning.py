"""Lightning: one callback converts the module, makes the recipe, logs, saves and resumes.

    trainer = lightning.Trainer(..., callbacks=[Sparse24Callback(decay=6e-5)])

Lightning hands the optimizer a closure that runs forward, backward and clipping; the recipe adds its decay right
after it.
"""

from __future__ import annotations

import math

try:
    from lightning.pytorch import Callback
except ImportError:  # the same library under its older name
    from pytorch_lightning import Callback

from ..convert import sparse_layers, sparsify
from ..errors import Sparse24Error
from ..recipe import Recipe


class Sparse24Callback(Callback):
    """Trains the FFNs of a LightningModule 2:4 sparse.

    include, exclude, backend   as in `sparse24.sparsify`
    total_steps                 optimizer steps; default: the Trainer's estimate
    log                         log `recipe.metrics()` with the module's own logs
    recipe settings             decay, mask_interval, dense_fraction, mvue, method, ... as in `sparse24.Recipe`

    The module is converted in `setup`, before its optimizers are made. The state travels in Lightning's checkpoints.
    """

    def __init__(
        self,
        include="auto",
        exclude=(),
        backend: str = "auto",
        *,
        total_steps: int | None = None,
        tokens: int | None = None,
        log: bool = True,
        **settings,
    ):
        self.include, self.exclude, self.backend, self.tokens = include, exclude, backend, tokens
        self.total_steps, self.log_metrics, self.settings = total_steps, log, settings
        self.report = None
        self.recipe: Recipe | None = None
        self._loaded: dict | None = None

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit" and not sparse_layers(pl_module):
            mvue = self.settings.get("mvue", True)
            self.report = sparsify(pl_module, self.include, self.exclude, self.backend, tokens=self.tokens, mvue=mvue)

    def on_train_start(self, trainer, pl_module) -> None:
        steps = self.total_steps or trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise Sparse24Error("Lightning cannot tell how many steps this run has; give Sparse24Callback total_steps")
        self.recipe = Recipe(pl_module, trainer.optimizers, int(steps), **self.settings)
        if self._loaded is not None:
            self.recipe.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.log_metrics and trainer.global_step % trainer.log_every_n_steps == 0:
            metrics = self.recipe.metrics()
            pl_module.log_dict({f"sparse24/{name}": value for name, value in metrics.items()}, rank_zero_only=True)

    def state_dict(self) -> dict:
        return {} if self.recipe is None else self.recipe.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        if state_dict:  # the recipe is made, and takes it up, when training starts
            self._loaded = state_dict

    def on_train_end(self, trainer, pl_module) -> None:
        if self.recipe is not None:
            self.recipe.detach()
