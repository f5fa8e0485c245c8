"""Recipe: everything that 2:4 training does around the optimizer's step.

    backward over all micro-batches -> unscale -> clip -> [masked decay -> optimizer step -> masks, packing, phase]

The bracket is one call of `optimizer.step()`; the recipe hooks in before and after it, so the training loop stays as it
was. Forward passes count nothing, so accumulation, evaluation and skipped steps change nothing here. Each part has a
file, and assembly.py puts them together: hooks.py (order), steps.py (count, phases), search.py (masks), decay.py,
capture.py, state.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from ..errors import Sparse24Error
from ..layers.parallel import packed_gather, sharding
from ..layers.watch.owners import forget_owner
from ..layers.watch.unseen import share_lookout
from ..options import Rule, at_least, checked_options, one_of
from . import state
from .assembly import assemble, begin, reads_whole_weights
from .capture import Capture
from .decay import DECAY, DECAY_IN, MUON_DECAY, SCHEDULES, check_decay, orthogonalizes
from .hooks import StepHooks
from .methods import METHODS
from .optimizers import chain_of
from .phases import DENSE_FRACTION, PLACES, TOTAL_STEPS
from .presets import PRESETS, filled
from .readings import Readings
from .scaling import CastScales
from .surgery import ModelCheck
from .takeover import pack_moved, take_over, trainable_layers, warn_of_frozen

#: arguments of `Recipe` that nothing reads again: setting one later would change nothing
FIXED = (
    *("model", "optimizer", "total_steps", "mask_interval", "dense_fraction", "mvue", "method", "preset"),
    *("decay_schedule", "dense_at", "track_blocks", "decay_in", "micro_batches", "takeover", "count_casts"),
)


class Recipe(Readings):
    """Trains the sparse layers of `model` with `optimizer`, from here to `total_steps` optimizer steps.

    model          a model that `sparsify` has converted, wrapped (DDP, FSDP2, torch.compile) or not; make the recipe
                   after wrapping, since wrapping may overwrite weights
    optimizer      any torch optimizer over its parameters; only `.grad` is touched, so fused, foreach, capturable and
                   8-bit ones work, and SAM, Lookahead and Schedule-Free around or in place of them. Of a list, the one
                   that holds the sparse weights is taken
    total_steps    optimizer steps of the whole run
    decay          masked decay, added to gradients as decay * (1 - mask) * weight; see `tune_decay`. Default 6e-5;
                   with Muon it goes beside the update, as lr * decay * (1 - mask) * weight, and the default is 1
    mask_interval  optimizer steps between two searches of the masks. Default 40
    dense_fraction part of the steps that is dense (the last ones, for the paper's method); 0 leaves a 2:4 model.
                   Default 1/6
    mvue           True or "output": weight gradients are computed from output gradients that are pruned to 2:4, without
                   bias. False: from dense ones. None: as the layers were converted. "input" prunes the layer's input
                   instead; "auto" prunes, in each layer, the operand that adds less noise, measured in training, and
                   writes changes into `events`
    method         "fst" (default), "ste", "sr-ste", "step", "s-ste", "mvue" or "dense": see sparse24/recipe/methods.py
    preset         "paper", "equal-time" or "fine-tune": values of the settings left out; sparse24/recipe/presets.py
    decay_schedule "constant" (default), "linear" (rising from 0) or "cosine" (falling to 0), over the sparse steps
    dense_at       "end", "start", "none", or "auto" (default): where the method has its dense steps
    track_blocks   count flips of every 4x4 block too, for `plot_flips_against_gap`
    check_ranks_every  every so many steps all ranks compare their masks; 0: never (a debugging aid)
    decay_in       "step": the decay goes to final gradients, in `optimizer.step()`. "backward": each backward call adds
                   decay / micro_batches, inside the product that makes a weight gradient where that is a sparse one;
                   the step saves a pass over gradients and weights
    micro_batches  backward calls of an optimizer step, for decay_in="backward"; a step of fewer gets less decay
    count_casts    let 8-bit casts count what they clip and flush to zero, for `metrics`; costs a few per cent of them
    takeover       end the recipe that this model and optimizer have, even if it is in use: for trainers that start anew

    decay_in="backward" is for training where nothing clips or scales gradients. The order is un-scale -> clip -> decay,
    for the decay must keep its strength; what backward has added already would be clipped and un-scaled with the rest.
    The recipe refuses what it can see of that: a GradScaler with a fused optimizer, and the settings of trainers
    through `integrations`. It cannot see a call of `clip_grad_norm_`, nor a scaler that un-scales before the step. The
    gradient that hooks, reductions and `torch.autograd.grad` see holds the decay, and a layer that runs several times
    in a forward pass gets it as often.

    Frozen weights (`requires_grad_(False)`), such as those under LoRA adapters, keep the masks and the phase that they
    have. Where all are frozen there is no dense phase either: adapters run over what they were trained over. What is
    unfrozen later, and in the optimizer, is trained like the rest from its next step on.

    Making it searches the masks of the current weights. Raises Sparse24Error for a model without sparse
    layers, an optimizer without their weights, and settings out of range.
    """

    @checked_options(
        total_steps=TOTAL_STEPS,
        decay=Rule(f"be {DECAY}"),
        mask_interval=at_least(1),
        dense_fraction=DENSE_FRACTION,
        mvue=Rule('be True, False, None, "output", "input" or "auto"'),
        method=one_of(METHODS),
        preset=one_of(PRESETS),
        decay_schedule=one_of(SCHEDULES),
        dense_at=one_of(PLACES),
        check_ranks_every=at_least(0),
        decay_in=one_of(DECAY_IN),
        micro_batches=at_least(1),
    )
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer],
        total_steps: int,
        decay: float | None = None,
        mask_interval: int | None = None,
        dense_fraction: float | None = None,
        mvue: bool | str | None = None,
        method: str | None = None,
        *,
        preset: str = "paper",
        decay_schedule: str | None = None,
        dense_at: str | None = None,
        check_ranks_every: int = 0,
        track_blocks: bool = False,
        decay_in: str = "step",
        micro_batches: int = 1,
        takeover: bool = False,
        count_casts: bool = False,
    ):
        self.layers = trainable_layers(model)
        sharded = sharding.sharded_modules(model)
        sharding.reshard(sharded)
        trained = {name: layer for name, layer in self.layers.items() if layer.weight.requires_grad}
        chain = chain_of(optimizer, self.layers)
        self.optimizer = chain[-1]
        if decay is None and orthogonalizes(self.optimizer):
            decay = MUON_DECAY
        settings = filled(
            preset, decay=decay, mask_interval=mask_interval, dense_fraction=dense_fraction, mvue=mvue, method=method,
            decay_schedule=decay_schedule, dense_at=dense_at,
        )  # fmt: skip
        packed_gather.divide_rows(self.layers, sharded, reads_whole_weights(settings.method, decay_in))
        scales = CastScales(self.layers, count_casts)
        self._steps = assemble(
            trained, self.optimizer, total_steps, settings, scales, sharded, decay_in=decay_in,
            micro_batches=micro_batches, track_blocks=track_blocks, check_every=check_ranks_every,
        )  # fmt: skip
        self.method = self._steps.method
        self._search, self._decay = self._steps.search, self._steps.decay
        self._steps.check = ModelCheck(model, self.layers, self.optimizer)
        self._capture = Capture(self._steps, self._decay)
        self._has_warned = False
        take_over(self, takeover)
        share_lookout(self.layers.values())
        with torch.inference_mode(False):  # what is made here is written later, outside of a caller's inference mode
            begin(self._steps, settings, self.layers)
            self._decay.write(self.current_decay)
        self._hooks = StepHooks(chain, self._steps, self._capture, keep=self)
        if not trained:
            warn_of_frozen(self.layers)

    # -- what users set -------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value) -> None:
        if name in FIXED and "_hooks" in self.__dict__:
            raise Sparse24Error(
                f"{name} of a recipe is fixed when it is made, and setting it would change nothing; make a new Recipe "
                f"with another {name} and takeover=True, and give it the state of this one by "
                "load_state_dict(recipe.state_dict(), override=True)"
            )
        super().__setattr__(name, value)

    @property
    def decay(self) -> float:
        """The decay factor before its schedule; may be set during a run. 0 for methods without decay."""
        return self._decay.value if self.method.decay_on else 0.0

    @decay.setter
    def decay(self, value: float) -> None:
        self._decay.value = check_decay(value)
        if self._hooks:
            self._decay.write(self.current_decay)

    @property
    def check_ranks_every(self) -> int:
        return self._steps.check_every

    @check_ranks_every.setter
    @checked_options(check_ranks_every=at_least(0))
    def check_ranks_every(self, check_ranks_every: int) -> None:
        self._steps.check_every = check_ranks_every

    def freeze_masks(self) -> None:
        """Search no more; values are still re-packed after each step."""
        self._search.frozen = True

    def unfreeze_masks(self) -> None:
        self._search.frozen = False

    @checked_options(step=at_least(0))
    def start_at(self, step: int) -> None:
        """Continue at `step` optimizer steps, with masks searched now: for a run that had no recipe so far.

        Raises Sparse24Error for a step below 0.
        """
        with torch.inference_mode(False):
            self._steps.go_to(step, search=True)
            self._decay.write(self.current_decay)

    def detach(self) -> None:
        """Take the hooks off the optimizer. The layers stay as they are, in their current phase."""
        self._hooks.remove()
        for layer in self.layers.values():
            forget_owner(layer)
        self._decay.leave()
        self._steps.scales.leave()
        if self._steps.noise is not None:
            self._steps.noise.leave()

    # -- whole steps in a CUDA graph ------------------------------------------------------------------------------

    def capturing(self) -> AbstractContextManager[None]:
        """Within it `optimizer.step()` may be captured in a CUDA graph; run that graph by `replay` and not otherwise.

        The graph holds forward, backward, decay, the optimizer's step and the packing of the new weights; `replay` adds
        what a graph cannot do: it counts, searches masks when they are due, and knows when the phase ends. Raises
        Sparse24Error for a decay schedule and for methods that work on more than gradients ("sr-ste", "step").
        """
        return self._capture.allowed()

    def replay(self, graph) -> None:
        """Replay the CUDA graph of a whole training step that was captured under `capturing`, and count the step.

        Raises Sparse24Error, before anything runs, when the graph is no longer that of the next step: the phase has
        changed, or somebody has set another decay. Capture it anew then.
        """
        self._capture.replay(graph)

    def weights_moved(self, *unseen: nn.Module) -> None:
        """Called when weights are found written since they were packed: pack them, and say so once.

        unseen  layers whose weights do not show that they were written
        """
        self._steps.finish_interrupted()
        self._has_warned |= pack_moved(self.layers, self.step, self.optimizer, unseen, warn=not self._has_warned)

    def model_changed(self) -> None:
        """Called by layers of this recipe that were replaced or cast: the next step begins by looking at the model."""
        self._steps.check.due = True

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What must survive beside the model and the optimizer: plain numbers, strings and tensors.

        Step, settings, masks, flip history, and the states of torch's generators that MVUE draws from. With it a
        resumed run equals the uninterrupted one bit for bit; save it between two optimizer steps.
        """
        return state.save(self.layers, self._steps, self._search, self._decay)

    @checked_options()
    def load_state_dict(self, state_dict: dict, *, override: bool = False, rng: bool = True) -> None:
        """Take up a saved state; everything is checked before anything changes.

        override  accept a state whose settings (method, total steps, interval, ...) differ from this recipe's, which
                  rule; the phase is then the one that this recipe has for the state's step
        rng       also restore torch's generators; False leaves them to the caller

        Load the model's weights before or after: either order gives the same masks and packed forms. Raises
        Sparse24Error, changing nothing, for a state that is corrupt, of another model or of other settings.
        """
        with torch.inference_mode(False):
            if self._steps.unfrozen is not None:
                self._steps.unfrozen.take_in(self._steps)
            state.load(state_dict, self.layers, self._steps, self._search, self._decay, override=override, rng=rng)
        self._capture.forget()

    def __reduce_ex__(self, protocol):
        # What copy and pickle ask for. Copies of an optimizer have no hooks, so a copied recipe would never be called.
        if not self._hooks:  # detached, as trainers keep theirs after training: no hooks to lose
            return super().__reduce_ex__(protocol)
        raise Sparse24Error(
            "a Recipe cannot be copied or pickled, since it lives in the hooks of its optimizer: save "
            "recipe.state_dict(), or make a new Recipe for the copied model and its optimizer and load_state_dict() "
            "that state"
        )

    def __repr__(self) -> str:
        return (
            f"Recipe({self.method.name}, step {self.step} of {self.total_steps}, {self.phase}, decay "
            f"{self.decay:g}, mask_interval {self.mask_interval}, {len(self.layers)} layers)"
        )
