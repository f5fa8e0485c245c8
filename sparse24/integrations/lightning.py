"""Lightning: one callback converts the module, makes the recipe, logs, saves and resumes.

    trainer = lightning.Trainer(..., callbacks=[Sparse24Callback(decay=6e-5)])

Lightning hands the optimizer a closure that runs forward, backward and clipping; the recipe adds its decay right
after it.
"""

from __future__ import annotations

import math

import torch

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError:  # the same library under its older name
    from pytorch_lightning import Callback
    from pytorch_lightning.utilities.model_helpers import is_overridden

from ..convert import sparse_layers, sparsify
from ..errors import Sparse24Error
from ..recipe import Recipe
from .settings import check_decay_in, split_settings

#: Strategies that place a module's parameters themselves.
SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def packed_dtype(trainer) -> torch.dtype | None:
    """What products will take under the Trainer's precision on a GPU; None: what the weights' own dtype asks for."""
    if trainer.strategy.root_device.type != "cuda":
        return None
    return {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(str(trainer.precision))


def is_scaled(trainer) -> bool:
    """Whether the Trainer's precision comes with a gradient scaler."""
    return str(trainer.precision) == "16-mixed"


class Sparse24Callback(Callback):
    """Trains the FFNs of a LightningModule 2:4 sparse.

    include, exclude, backend   as in `sparse24.sparsify`
    total_steps     optimizer steps; default: the Trainer's estimate
    log             log `recipe.metrics()` with the module's own logs
    settings        all others of `sparsify` (tokens, lean, ...) and of `Recipe` (decay, mask_interval, ...). The
                    Trainer gives dtype (what its precision multiplies in) and micro_batches if they are left out

    The module is converted in `setup`, before its optimizers are made; one that makes its layers in `configure_model`,
    when fitting starts. The state travels in Lightning's checkpoints.
    """

    def __init__(
        self,
        include="auto",
        exclude=(),
        backend: str = "auto",
        *,
        total_steps: int | None = None,
        log: bool = True,
        **settings,
    ):
        self.include, self.exclude, self.backend = include, exclude, backend
        self.total_steps, self.log_metrics = total_steps, log
        self.sparsify_settings, self.recipe_settings = split_settings(settings)
        self.report = None
        self.recipe: Recipe | None = None
        self._loaded: dict | None = None

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage != "fit":
            return
        clips = "gradient_clip_val=0" if trainer.gradient_clip_val else None
        check_decay_in(self.recipe_settings, clips, 'precision="bf16-mixed"' if is_scaled(trainer) else None)
        if not is_overridden("configure_model", pl_module):
            self._convert(trainer, pl_module)

    def on_fit_start(self, trainer, pl_module) -> None:
        if is_overridden("configure_model", pl_module):  # Lightning has called it after `setup`
            self._convert(trainer, pl_module)

    def _convert(self, trainer, pl_module) -> None:
        if sparse_layers(pl_module):
            return
        if type(trainer.strategy).__name__ not in SHARDING:
            # Lightning moves it later; which layers gain from being 2:4 depends on the device.
            pl_module.to(trainer.strategy.root_device)
        given = {"dtype": packed_dtype(trainer), "micro_batches": trainer.accumulate_grad_batches}
        self.report = sparsify(pl_module, self.include, self.exclude, self.backend, **(given | self.sparsify_settings))

    def on_train_start(self, trainer, pl_module) -> None:
        if not sparse_layers(pl_module):
            return  # backend="auto" has left the module dense, and has said so
        steps = self.total_steps or trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise Sparse24Error("Lightning cannot tell how many steps this run has; give Sparse24Callback total_steps")
        settings = {"micro_batches": trainer.accumulate_grad_batches} | self.recipe_settings
        self.recipe = Recipe(pl_module, trainer.optimizers, int(steps), **settings)
        if self._loaded is not None:
            self.recipe.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        every = trainer.log_every_n_steps  # 0: no logs
        if self.recipe is not None and self.log_metrics and every and trainer.global_step % every == 0:
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
