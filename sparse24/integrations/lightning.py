"""Lightning: one callback converts the module, makes the recipe, logs, saves, resumes and evaluates.

    trainer = lightning.Trainer(..., callbacks=[Sparse24Callback(decay=6e-5)])

Lightning hands the optimizer a closure that runs forward, backward and clipping; the recipe adds its decay right
after it.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError:  # the same library under its older name
    from pytorch_lightning import Callback
    from pytorch_lightning.utilities.model_helpers import is_overridden

from ..convert import refresh, sparse_layers
from ..errors import Sparse24Error, Sparse24Warning
from ..layers import decay_factor_of, mask_of
from ..options import checked_options, one_of
from ..recipe import Recipe, follow, load_masks
from .settings import check_decay_in, split_settings
from .states import MASKS, end, sparsify_once

#: strategies that place a module's parameters themselves
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

    include, exclude, backend   as in `sparse24.sparsify`; a module that is sparse already is left as it is
    total_steps     optimizer steps; default: the Trainer's estimate
    log             log `recipe.metrics()` with the module's own logs
    override        resume although the checkpoint's recipe had other settings, such as fewer steps; these ones rule
    masks           "load": resume with the masks of the checkpoint. "search": find them in its weights, as after a
                    dense run, and count on from the Trainer's step
    settings        all others of `sparsify` (tokens, lean, ...) and of `Recipe` (decay, mask_interval, ...). The
                    Trainer gives dtype (what its precision multiplies in) and micro_batches if they are left out

    The module is converted in `setup`, for `fit`, `validate`, `test` and `predict` alike, before its optimizers are
    made; one that makes its layers in `configure_model`, when fitting starts or its checkpoint is loaded. The state
    travels in Lightning's checkpoints: whatever is run with `ckpt_path` gets the masks and the phase of its weights. A
    second `fit` goes on where the first has ended.
    """

    @checked_options(masks=one_of(MASKS))
    def __init__(
        self,
        include="auto",
        exclude=(),
        backend: str = "auto",
        *,
        total_steps: int | None = None,
        log: bool = True,
        override: bool = False,
        masks: str = "load",
        **settings,
    ):
        self.include, self.exclude, self.backend = include, exclude, backend
        self.total_steps, self.log_metrics = total_steps, log
        self.override, self.masks = override, masks
        self.sparsify_settings, self.recipe_settings = split_settings(settings)
        self.report = None
        self.recipe: Recipe | None = None
        self._loaded: dict | None = None  # the state of the checkpoint that this run starts from
        self._masks_are_guessed = False  # they come from a search, and from no checkpoint or training
        self._masks: dict[str, torch.Tensor] | None = None  # while an averaging callback may write to buffers
        self._module: nn.Module | None = None
        self._is_training = False  # between on_train_start and the end of the fit, or its failure

    # -- conversion -----------------------------------------------------------------------------------------------

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":
            clips = "gradient_clip_val=0" if trainer.gradient_clip_val else None
            check_decay_in(self.recipe_settings, clips, 'precision="bf16-mixed"' if is_scaled(trainer) else None)
        self._loaded, self._masks, self._module, self._is_training = None, None, pl_module, False
        if not is_overridden("configure_model", pl_module):
            self._convert(trainer, pl_module)

    def on_fit_start(self, trainer, pl_module) -> None:
        self._convert(trainer, pl_module)  # where `configure_model`, which comes after `setup`, makes the layers

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state:
            return  # not saved by this callback, or of a module that backend="auto" had left dense
        self._convert(trainer, pl_module)
        self._loaded, self._masks_are_guessed = state, False
        if self.masks == "load" or trainer.state.fn != "fit":
            load_masks(pl_module, state)

    def load_state_dict(self, state_dict: dict) -> None:
        """Where training has begun, a checkpoint is put back under it: finders of learning rates do so."""
        if state_dict and self._is_training:
            self.recipe.load_state_dict(state_dict, override=self.override)
            self._loaded = None

    def _convert(self, trainer, pl_module) -> None:
        if sparse_layers(pl_module):
            return
        if type(trainer.strategy).__name__ not in SHARDING:
            # Lightning moves it later; which layers gain from being 2:4 depends on the device.
            pl_module.to(trainer.strategy.root_device)
        given = {"dtype": packed_dtype(trainer), "micro_batches": trainer.accumulate_grad_batches}
        choice = (self.include, self.exclude, self.backend)
        self.report = sparsify_once(pl_module, *choice, **(given | self.sparsify_settings))
        self._masks_are_guessed = bool(sparse_layers(pl_module))
        for copy in _copies(trainer, pl_module):  # a callback before this one has copied the dense module
            if self._masks_are_guessed and not sparse_layers(copy):
                follow(copy, like=pl_module)

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer, pl_module) -> None:
        if not sparse_layers(pl_module):
            return  # backend="auto" has left the module dense, and has said so
        steps = self.total_steps or trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise Sparse24Error("Lightning cannot tell how many steps this run has; give Sparse24Callback total_steps")
        settings = {"micro_batches": trainer.accumulate_grad_batches} | self.recipe_settings
        before = self._state_of_the_fit_before(trainer, pl_module)
        end(self.recipe)
        self.recipe = Recipe(pl_module, trainer.optimizers, int(steps), **settings)
        self._go_on(trainer.global_step, before)
        self._loaded, self._masks_are_guessed, self._is_training = None, False, True
        for copy in _copies(trainer, pl_module):
            follow(copy, like=pl_module)
            _pair_decay_buffers(copy, pl_module)

    def _state_of_the_fit_before(self, trainer, pl_module) -> dict | None:
        """That of this callback's recipe, if the Trainer goes on with the same module."""
        if self.recipe is None or trainer.global_step == 0 or self.recipe.layers != sparse_layers(pl_module):
            return None
        return self.recipe.state_dict()

    def _go_on(self, step: int, before: dict | None) -> None:
        """Take up what the Trainer has done already: `step` optimizer steps."""
        if self._loaded is not None and self.masks == "load":
            self.recipe.load_state_dict(self._loaded, override=self.override)
        elif self._loaded is None and before is not None:
            self.recipe.load_state_dict(before, override=True, rng=False)
        elif step > 0 and self.masks == "search":
            self.recipe.start_at(step)
        elif step > 0:
            raise Sparse24Error(
                f"training goes on at step {step}, and the checkpoint has no masks: it is not of a run with "
                "Sparse24Callback. Resume from one that is, or find masks in its weights, as after a dense run, by "
                'Sparse24Callback(masks="search")'
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        every = trainer.log_every_n_steps  # 0: no logs
        if self.recipe is not None and self.log_metrics and every and trainer.global_step % every == 0:
            metrics = self.recipe.metrics()
            pl_module.log_dict({f"sparse24/{name}": value for name, value in metrics.items()}, rank_zero_only=True)

    def on_train_end(self, trainer, pl_module) -> None:
        self._put_masks_back(pl_module)

    def on_fit_end(self, trainer, pl_module) -> None:  # callbacks after this one had their on_train_end meanwhile
        self._put_masks_back(pl_module)
        self._masks, self._module, self._is_training = None, None, False
        end(self.recipe)

    def state_dict(self) -> dict:
        if self.recipe is None:
            return {}
        self._put_masks_back(self._module)
        return self.recipe.state_dict()

    # -- callbacks that put other weights into the module ---------------------------------------------------------
    #
    # Averages are swapped in for validation and copied in at the end, by `.data`, which no layer sees, and often with
    # all buffers, masks among them. The callbacks' order is the user's; so masks are kept before any of them can write,
    # and put back, and weights packed, after all of them have.

    def _keep_masks(self, pl_module) -> None:
        self._masks = {name: mask_of(layer).clone() for name, layer in sparse_layers(pl_module).items()}

    def _put_masks_back(self, pl_module) -> None:
        if self._masks is None:
            return
        for name, layer in sparse_layers(pl_module).items():
            layer.take_mask(self._masks[name])
        refresh(pl_module)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._masks = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self._masks is not None:  # a validation was before
            self._put_masks_back(pl_module)
            self._masks = None

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._keep_masks(pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._before_evaluation(trainer, pl_module)
        self._keep_masks(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0 and dataloader_idx == 0:
            self._put_masks_back(pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        self._put_masks_back(pl_module)

    # -- evaluation without training ------------------------------------------------------------------------------

    def on_test_start(self, trainer, pl_module) -> None:
        self._before_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer, pl_module) -> None:
        self._before_evaluation(trainer, pl_module)

    def _before_evaluation(self, trainer, pl_module) -> None:
        if trainer.state.fn == "fit":
            return
        self._convert(trainer, pl_module)  # where `configure_model` has made the layers
        if self._masks_are_guessed:
            self._masks_are_guessed = False
            warnings.warn(
                f"trainer.{trainer.state.fn} runs a module that was dense, under masks that a search finds in its "
                "weights now: if it was trained 2:4, those were others. Name its checkpoint in ckpt_path=, or call "
                "sparse24.load_masks(module, state) before, with the recipe's state from "
                f'checkpoint["callbacks"]["{self.state_key}"]',
                Sparse24Warning,
                stacklevel=2,
            )


def _pair_decay_buffers(copy: nn.Module, like: nn.Module) -> None:
    """Give `copy` the decay buffers of `like`: averaging pairs buffers by order, and decay_in="backward" adds some."""
    made = {}
    layers = sparse_layers(copy)
    for name, layer in sparse_layers(like).items():
        factor = decay_factor_of(layer)
        if factor is not None:
            made.setdefault(id(factor), factor.to(mask_of(layers[name]).device, copy=True))
            layers[name].set_decay(made[id(factor)])


def _copies(trainer, pl_module: nn.Module) -> list[nn.Module]:
    """Modules of the same class that the Trainer's callbacks hold: averages of the weights."""
    held = [
        value for callback in trainer.callbacks for value in vars(callback).values() if isinstance(value, nn.Module)
    ]
    found = [next((m for m in module.modules() if type(m) is type(pl_module)), None) for module in held]
    return [module for module in found if module is not None and module is not pl_module]
