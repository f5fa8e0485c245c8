"""Recipe: everything that 2:4 training does around the optimizer's step.

    backward over all micro-batches -> unscale -> clip -> [masked decay -> optimizer step -> masks, packing, phase]

The bracket is one call of `optimizer.step()`; the recipe hooks in before and after it, so the training loop stays as it
was. Nothing counts in forward: accumulation, evaluation and skipped steps change nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor, nn

from .. import ops
from ..convert import sparse_layers
from ..errors import Sparse24Error
from ..layers import copies, packing, sharding
from ..layers.modules import DENSE, SPARSE, SparseLayer, check_switch, distributed_rank
from ..layers.owners import forget_owner, owner_of, set_owner
from . import methods, monitor
from .block_flips import BlockFlips
from .optimizers import holding_optimizer
from .phases import PLACES, SCHEDULES, Phases, check_decay, scheduled_decay
from .ranks import check_ranks
from .state import check_state, restore_rng, rng_state

#: where the decay is added to a gradient
DECAY_IN = ("step", "backward")


class Recipe:
    """Trains the sparse layers of `model` with `optimizer`, from here to `total_steps` optimizer steps.

    model          a model that `sparsify` has converted, wrapped (DDP, FSDP2, torch.compile) or not; make the recipe
                   after wrapping, since wrapping may overwrite weights
    optimizer      any torch optimizer over its parameters; only `.grad` is touched, so fused, foreach, capturable and
                   8-bit ones work. Of a list, the one that holds the sparse weights is taken
    total_steps    optimizer steps of the whole run
    decay          masked decay, added to gradients as decay * (1 - mask) * weight; see `tune_decay`
    mask_interval  optimizer steps between two searches of the masks
    dense_fraction part of the steps that is dense (the last ones, for the paper's method); 0 leaves a 2:4 model
    mvue           weight gradients from output gradients pruned to 2:4 without bias
    method         "fst", "ste", "sr-ste", "step", "s-ste", or "dense": see sparse24/recipe/methods.py
    decay_schedule "constant", "linear" (rising from 0) or "cosine" (falling to 0), over the sparse steps
    dense_at       "end", "start", "none", or "auto": where the method has its dense steps
    track_blocks   count flips of every 4x4 block too, for `plot_flips_against_gap`
    check_ranks_every  every so many steps all ranks compare their masks; 0: never (a debugging aid)
    decay_in       "step": the decay goes to final gradients, in `optimizer.step()`. "backward": each backward call adds
                   decay / micro_batches, inside the product that makes a weight gradient where that is a sparse one;
                   the step saves a pass over gradients and weights
    micro_batches  backward calls of an optimizer step, for decay_in="backward"; a step of fewer gets less decay

    decay_in="backward" is for training where nothing clips or scales gradients. The order is un-scale -> clip -> decay,
    for the decay must keep its strength; what backward has added already would be clipped and un-scaled with the rest.
    The recipe refuses what it can see of that: a GradScaler with a fused optimizer, and the settings of trainers
    through `integrations`. It cannot see a call of `clip_grad_norm_`, nor a scaler that un-scales before the step. The
    gradient that hooks, reductions and `torch.autograd.grad` see holds the decay, and a layer that runs several times
    in a forward pass gets it as often.

    Frozen weights (`requires_grad_(False)`), such as those under LoRA adapters, keep the masks that they have. Where
    all are frozen there is no dense phase either: what the adapters are trained over is what they will run over.

    Making it searches the masks of the current weights. Raises Sparse24Error for a model without sparse layers, an
    optimizer without their weights, and settings out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer],
        total_steps: int,
        decay: float = 6e-5,
        mask_interval: int = 40,
        dense_fraction: float = 1 / 6,
        mvue: bool = True,
        method: str = "fst",
        *,
        decay_schedule: str = "constant",
        dense_at: str = "auto",
        check_ranks_every: int = 0,
        track_blocks: bool = False,
        decay_in: str = "step",
        micro_batches: int = 1,
    ):
        if not isinstance(model, nn.Module):
            raise Sparse24Error(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._sharded = sharding.sharded_modules(model)
        sharding.reshard(self._sharded)
        self.layers = sparse_layers(model)
        if not self.layers:
            raise Sparse24Error(f"{type(model).__name__} has no sparse layers; call sparse24.sparsify(model) first")
        self.method = methods.get_method(method)
        check_switch("mvue", mvue)
        self.mask_interval = _positive("mask_interval", mask_interval)
        self.check_ranks_every = _positive("check_ranks_every", check_ranks_every, least=0)
        if decay_schedule not in SCHEDULES:
            raise Sparse24Error(f"decay_schedule must be one of {', '.join(SCHEDULES)}, got {decay_schedule!r}")
        if dense_at not in PLACES:
            raise Sparse24Error(f"dense_at must be one of {', '.join(PLACES)}, got {dense_at!r}")
        self.decay_schedule = decay_schedule
        self.micro_batches = _positive("micro_batches", micro_batches)
        self._check_decay_in(decay_in)
        self.decay_in = decay_in
        self.phases = Phases.plan(total_steps, dense_fraction, self.method.dense_at if dense_at == "auto" else dense_at)
        if not self._moving_layers():
            self.phases = Phases.plan(total_steps, 0.0, "none")
        self._decay = check_decay(decay)
        self.optimizer = holding_optimizer(optimizer, self.layers)
        if self.method.freezes_second_moment:
            methods.FrozenSecondMoment.check(self.optimizer, [])

        self.step = 0  # optimizer steps taken
        self.masks_frozen = False
        self.last_refresh = 0
        self.monitor = monitor.FlipMonitor(
            self.layers, (math.prod(layer.kernel_weight().shape) for layer in self.layers.values())
        )
        self.block_flips = BlockFlips() if track_blocks else None
        self._unfinished: int | None = None  # the step that an interrupt has left half done
        self._entered = ""  # the phase that all layers are in
        self._frozen_moment: methods.FrozenSecondMoment | None = None
        self._gaps: tuple[int, dict[str, float]] | None = None
        self._capture_allowed = False
        self._captured: tuple[str, str] | None = None  # phase and decay of the step in the user's CUDA graph
        self._factor: float | None = None  # what the layers' `decay_factor` holds
        self._take_over()
        rank = distributed_rank()
        for layer in self.layers.values():
            layer.train_as(mvue=mvue, rank=rank, soft=self.method.soft)
        self._before = [layer.mask.clone() for layer in self.layers.values()]
        self._before_of = 0  # the refresh that `_before` belongs to, by its step
        self._start_phase(self.phase, search=True)
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._pre_hook),
            self.optimizer.register_step_post_hook(self._post_hook),
        ]
        self._write_factor()

    # -- what users read and set ----------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """ "sparse" or "dense": the phase of the next step."""
        return DENSE if self.method.probes else self.phases.at(self.step)

    @property
    def decay(self) -> float:
        """The decay factor before its schedule; may be set during a run. 0 for methods without decay."""
        return self._decay if self.method.decay_on else 0.0

    @decay.setter
    def decay(self, value: float) -> None:
        self._decay = check_decay(value)
        self._write_factor()

    @property
    def current_decay(self) -> float:
        """The factor that the next step uses."""
        if self.phase == DENSE:
            return 0.0
        progress = (self.step - self.phases.sparse_from) / max(1, self.phases.sparse_steps)
        return scheduled_decay(self.decay, self.decay_schedule, progress)

    @property
    def events(self) -> list[dict]:
        """What the flip-rate monitor has noticed: exploding and frozen masks, with the names of the layers."""
        return self.monitor.events

    def on_event(self, listener: Callable[[dict], None]) -> None:
        """Call `listener(event)` on each; it may set `recipe.decay`, which nothing else ever changes."""
        self.monitor.listeners.append(listener)

    def metrics(self) -> dict[str, float]:
        """Floats for a log. Reading the flip rate and the gaps waits for the device, so call it when you log.

        flip_rate, flip_rate_per_step  part of the weights whose mask changed at the last refresh; that by its steps
        decay      the factor that the next step uses       phase     0 sparse, 1 dense
        mask_age   steps since the masks were searched      step      optimizer steps taken
        gap_q10, gap_q50, gap_q90  quantiles over 4x4 blocks of the magnitude between the best and the next pattern
        """
        self._check_layers()
        return {
            "flip_rate": self.monitor.rate(),
            "flip_rate_per_step": self.monitor.rate_per_step(),
            "decay": float(self.current_decay),
            "phase": float(self.phase == DENSE),
            "mask_age": float(self.step - self.last_refresh),
            "step": float(self.step),
            **self._gap_quantiles(),
        }

    def fingerprint(self) -> str:
        """Phase and masks as a short text, to store with weights and to compare when they are loaded."""
        self._check_layers()
        scales = [layer.soft_scale for layer in self.layers.values() if layer.soft_scale is not None]
        return copies.fingerprint(self._entered, [layer.mask for layer in self.layers.values()], scales)

    def write_tensorboard(self, writer, prefix: str = "sparse24") -> None:
        """All of `metrics()` to a `torch.utils.tensorboard.SummaryWriter`, at the current step; the flip rate of each
        layer, and histograms of these and of the gaps of 4x4 blocks.
        """
        for name, value in self.metrics().items():
            if name != "step":
                writer.add_scalar(f"{prefix}/{name}", value, self.step)
        self.monitor.write_tensorboard(writer, prefix)
        writer.add_histogram(f"{prefix}/gap", self._gap_of(monitor.gap_sample).cpu(), self.step)

    def plot_flips_against_gap(self, path) -> None:
        """A picture of which blocks flip; needs track_blocks=True. Raises Sparse24Error before the first refresh."""
        (self.block_flips or BlockFlips()).plot(self._block_gaps(), path)

    def freeze_masks(self) -> None:
        """Search no more; values are still re-packed after each step."""
        self.masks_frozen = True

    def unfreeze_masks(self) -> None:
        self.masks_frozen = False

    def start_at(self, step: int) -> None:
        """Count from `step` optimizer steps on, with masks searched now: for going on with a run that had no recipe.

        Raises Sparse24Error for a step below 0.
        """
        self.step, self._unfinished = _positive("step", step, least=0), None
        self.last_refresh = self._before_of = self.step
        self._start_phase(self.phase, search=True)
        self._write_factor()

    def detach(self) -> None:
        """Take the hooks off the optimizer. The layers stay as they are, in their current phase."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self.layers.values():
            forget_owner(layer)
            if isinstance(layer, SparseLayer):
                layer.set_decay(None)

    # -- around the optimizer's step ------------------------------------------------------------------------------

    def _pre_hook(self, optimizer, args, kwargs):
        if is_capturing():
            self._check_capture()
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._before_step()
            return None

        evaluated = False

        def closure_then_decay():  # the gradients exist only once the closure has run
            nonlocal evaluated
            if evaluated and self.phase == SPARSE:  # LBFGS: the weights have moved since the last evaluation
                packing.pack(self.layers.values(), search=False)
            evaluated = True
            loss = closure()
            self._before_step()
            return loss

        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": closure_then_decay}
        return (args[0], closure_then_decay, *args[2:]), kwargs

    def _post_hook(self, optimizer, args, kwargs) -> None:
        if is_capturing():
            self._capture_step()
            return
        if self._frozen_moment is not None:
            self._frozen_moment.after_step()
        # Fused optimizers skip a step by themselves when GradScaler has found Inf or NaN: one read, after the step.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            for layer in self.layers.values():  # written to, perhaps, but not changed
                layer.note_packed()
            return
        self._finish_step(self.step + 1)

    @torch.no_grad()
    def _before_step(self) -> None:
        """Masked decay, on gradients that are final: accumulated, un-scaled (or fused), clipped."""
        self._finish_interrupted()
        if self._frozen_moment is not None:
            self._frozen_moment.before_step()
        if self.decay_in == "backward":
            self._check_not_scaled()
            return
        decay = self.current_decay
        if decay == 0:
            return
        if self.method.decay_on == "gradient":
            # A fused optimizer un-scales inside its kernel: what is added before must be scaled too.
            self._add_decay(self._trained_layers(), decay, getattr(self.optimizer, "grad_scale", None))
        else:
            self._decay_weights(decay)

    # -- decay in backward ----------------------------------------------------------------------------------------

    def _check_decay_in(self, decay_in: str) -> None:
        if decay_in not in DECAY_IN:
            raise Sparse24Error(f"decay_in must be one of {', '.join(DECAY_IN)}, got {decay_in!r}")
        if decay_in == "step":
            return
        if self.method.decay_on != "gradient":
            raise Sparse24Error(
                f"decay_in='backward' adds the decay to gradients, where method={self.method.name!r} has none; leave "
                "decay_in='step'"
            )
        if len(self._unique_layers()) < len(self.layers):
            raise Sparse24Error(
                "decay_in='backward' would decay a weight that several layers share once for each of them; use "
                "decay_in='step'"
            )

    def _check_not_scaled(self) -> None:
        if any(getattr(self.optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            raise Sparse24Error(
                "the gradients are scaled by a GradScaler, and decay_in='backward' has added a decay that is not: the "
                "optimizer would un-scale it too; use bfloat16 without a scaler, or decay_in='step'"
            )

    def _write_factor(self) -> None:
        """Tell backward the decay of the next step. It is read from memory, so that compiled code and CUDA graphs stay
        as they are while it changes; there is nothing to read as long as the decay is 0.
        """
        if self.decay_in == "step" or not self._hooks:
            return
        factor = self.current_decay / self.micro_batches
        made = {}
        for layer in self.layers.values():
            if layer.decay_factor is None and self.decay > 0:
                device = layer.mask.device
                if device not in made:
                    made[device] = torch.full((1,), factor, dtype=torch.float32, device=device)
                layer.set_decay(made[device])
        if factor == self._factor:
            return
        for tensor in {id(layer.decay_factor): layer.decay_factor for layer in self.layers.values()}.values():
            if tensor is not None:
                tensor.data.fill_(factor)  # .data: a forward that has saved it wants the present value
        self._factor = factor

    def _trained_layers(self) -> list[SparseLayer]:
        # Two layers may share a weight (allow_tied): its gradient gets the decay once.
        unique = {id(layer.weight): layer for layer in self.layers.values()}
        return [layer for layer in unique.values() if layer.weight.grad is not None]

    def _add_decay(self, layers: list[SparseLayer], factor: float, scale: Tensor | None, into=None) -> None:
        """into[i] (default: the gradient) += factor * (1 - mask) * weight, times `scale` where given."""
        into = [layer.weight.grad for layer in layers] if into is None else into
        plain = []
        for layer, target in zip(layers, into, strict=True):
            if packing.is_dtensor(layer.weight):
                sharding.decay_shard(layer, target, factor, scale)
            else:
                plain.append((layer, layer.as_kernel_sees(target)))
        if plain:
            ops.foreach_masked_decay_(
                [target for _, target in plain],
                [layer.kernel_weight() for layer, _ in plain],
                [packing.mask_bits(layer.mask) for layer, _ in plain],
                factor,
                scale,
            )

    def _decay_weights(self, decay: float) -> None:
        """weight -= lr * decay * (1 - mask) * weight: the baseline that decays weights (SR-STE)."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        keep = None if found_inf is None else 1.0 - (found_inf > 0).float()  # a skipped step must not decay either
        layers = {id(layer.weight): layer for layer in self._trained_layers()}
        for group in self.optimizer.param_groups:
            chosen = [layers[id(p)] for p in group["params"] if id(p) in layers]
            if chosen:
                terms = [torch.zeros_like(layer.weight) for layer in chosen]
                self._add_decay(chosen, float(group["lr"]) * decay, keep, terms)
                torch._foreach_sub_([sharding.local(layer.weight) for layer in chosen], [*map(sharding.local, terms)])

    # -- whole steps in a CUDA graph ------------------------------------------------------------------------------

    @contextmanager
    def capturing(self):
        """Within it `optimizer.step()` may be captured in a CUDA graph; run that graph by `replay` and not otherwise.

        The graph holds forward, backward, decay, the optimizer's step and the packing of the new weights; `replay` adds
        what a graph cannot do: it counts, searches masks when they are due, and knows when the phase ends. Raises
        Sparse24Error for a decay schedule and for methods that work on more than gradients ("sr-ste", "step").
        """
        if self.method.decay_on == "weight" or self.method.freezes_second_moment:
            raise Sparse24Error(
                f"a step of method={self.method.name!r} cannot be captured in a CUDA graph; capture forward and "
                "backward only"
            )
        if self.decay and self.decay_schedule != "constant" and self.decay_in == "step":
            raise Sparse24Error(
                f"decay_schedule={self.decay_schedule!r} changes the decay at each step, and a captured step keeps the "
                "one that it was captured with; use decay_schedule='constant' or decay_in='backward', or capture "
                "forward and backward only"
            )
        self._finish_interrupted()
        self._capture_allowed, self._captured = True, None
        try:
            yield
        finally:
            self._capture_allowed = False

    def replay(self, graph) -> None:
        """Replay the CUDA graph of a whole training step that was captured under `capturing`, and count the step.

        Raises Sparse24Error, before anything runs, when the graph is no longer that of the next step: the phase has
        changed, or somebody has set another decay. Capture it anew then.
        """
        if self._captured is None:
            raise Sparse24Error("no step has been captured; capture one under `with recipe.capturing():`")
        self._finish_interrupted()
        now = self._next_step()
        if self._captured != now:
            (phase, decay), (phase_now, decay_now) = self._captured, now
            raise Sparse24Error(
                f"the graph holds a step of the {phase} phase with {decay}, the next step is {phase_now} with "
                f"{decay_now}; capture it anew"
            )
        graph.replay()
        self._finish_step(self.step + 1, packed=True)

    def _check_capture(self) -> None:
        """Before a captured step changes anything: is it meant to be captured, and can it be?"""
        if not self._capture_allowed:
            raise Sparse24Error(
                "optimizer.step() is being captured in a CUDA graph, whose replays the recipe could not count; capture "
                "under `with recipe.capturing():` and call recipe.replay(graph), or leave optimizer.step() outside"
            )
        if getattr(self.optimizer, "found_inf", None) is not None:
            raise Sparse24Error("a step under GradScaler cannot be captured in a CUDA graph; use bfloat16")

    def _capture_step(self) -> None:
        """The post-hook inside a capture: what each replay is to do after the optimizer's step."""
        if self.phase == SPARSE:
            packing.pack(self.layers.values(), search=False)
        self._captured = self._next_step()

    def _next_step(self) -> tuple[str, str]:
        """Phase and decay as a graph holds them. A decay in backward is read from memory, and may be any."""
        if self.decay_in == "step":
            return self.phase, f"decay {self.current_decay:g}"
        reads = any(layer.decay_factor is not None for layer in self.layers.values())
        return self.phase, "a decay in backward" if reads else "no decay in backward"

    # -- after the optimizer's step -------------------------------------------------------------------------------

    def _finish_step(self, step: int, *, packed: bool = False) -> None:
        """All that belongs to optimizer step number `step`; the count moves last. `packed`: values are packed already.

        An interrupt in here leaves `_unfinished`, and whoever saves next finishes the step first. Doing it twice is
        harmless: masks and packed forms depend on the weights alone.
        """
        sharding.reshard(self._sharded)
        self._unfinished = step
        phase = DENSE if self.method.probes else self.phases.at(step)
        if phase != self._entered:
            self.step = step
            self._start_phase(phase, search=True)
        elif phase == SPARSE or self.method.probes:
            if step % self.mask_interval == 0 and not self.masks_frozen:
                self._refresh(step)
            elif phase == SPARSE and not packed:
                packing.pack(self.layers.values(), search=False)
            for layer in self.layers.values():
                layer.keep_mask()
        if self.check_ranks_every and step % self.check_ranks_every == 0:
            check_ranks(self.layers)
        self.step = step
        self._write_factor()
        self._unfinished = None

    def _finish_interrupted(self) -> None:
        if self._unfinished is not None:
            self._finish_step(self._unfinished)

    def _refresh(self, step: int) -> None:
        """Search the masks, pack, and count the flips since the masks before."""
        layers = self.layers.values()
        if self._before_of != step:  # else an interrupt has come, and the masks are partly new already
            torch._foreach_copy_(self._before, [layer.mask for layer in layers])
            self._before_of = step
        if self.method.probes:
            for layer, mask in zip(layers, packing.search_masks(layers), strict=True):
                layer.take_mask(mask)
        else:
            self._search_and_pack()
        if step != self.last_refresh:
            self._count_flips(step)
        self.last_refresh, self._gaps = step, None

    def _count_flips(self, step: int) -> None:
        masks = [layer.mask for layer in self.layers.values()]
        flips = ops.foreach_mask_flips([*map(packing.mask_bits, self._before)], [*map(packing.mask_bits, masks)])
        progress = (step - self.phases.sparse_from) / max(1, self.phases.sparse_steps)
        self.monitor.push(flips, step, step - self.last_refresh, None if self.method.probes else progress)
        if self.block_flips is not None:
            self.block_flips.add(self._before, masks)

    def _start_phase(self, phase: str, *, search: bool) -> None:
        """Set the phase of every layer; entering the sparse one packs, and searches the masks unless told otherwise."""
        if phase == SPARSE:
            self._search_and_pack() if search else packing.pack(self.layers.values(), search=False)
            self.last_refresh = self.step if search else self.last_refresh
            if self.method.freezes_second_moment:
                weights = [layer.weight for layer in self._unique_layers()]
                self._frozen_moment = methods.FrozenSecondMoment(self.optimizer, weights)
        elif self.method.probes and search:
            for layer, mask in zip(self.layers.values(), packing.search_masks(self.layers.values()), strict=True):
                layer.take_mask(mask)
        for layer in self.layers.values():
            layer.enter(phase)
        self._entered = phase

    def _moving_layers(self) -> list[SparseLayer]:
        return [layer for layer in self.layers.values() if layer.weight.requires_grad]

    def _search_and_pack(self) -> None:
        """Frozen weights are packed only: their masks belong to the training that they are from."""
        moving = self._moving_layers()
        packing.pack(moving, search=True)
        if len(moving) < len(self.layers):
            packing.pack([layer for layer in self.layers.values() if not layer.weight.requires_grad], search=False)

    def _unique_layers(self) -> list[SparseLayer]:
        return list({id(layer.weight): layer for layer in self.layers.values()}.values())

    def _gap_quantiles(self) -> dict[str, float]:
        if self._gaps is None or self._gaps[0] != self.last_refresh:
            self._gaps = (self.last_refresh, self._gap_of(monitor.gap_quantiles))
        return self._gaps[1]

    def _block_gaps(self) -> list[Tensor]:
        return [ops.mask_gap(weight) for weight in self._kernel_weights()]

    def _gap_of(self, statistic: Callable):
        elements = sum(layer.weight.numel() for layer in self.layers.values())
        return statistic(self._kernel_weights(), elements=elements)

    def _kernel_weights(self) -> Iterator[Tensor]:
        """One at a time: FSDP2 gathers each, and all of them would be the memory that sharding saves."""
        sharding.reshard(self._sharded)
        return (packing.full_weight(layer) for layer in self.layers.values())

    def _take_over(self) -> None:
        """One recipe a layer, or the decay would be added twice."""
        for layer in self.layers.values():
            other = owner_of(layer)
            if other is not None and other._hooks:
                if other.optimizer is self.optimizer:
                    raise Sparse24Error(
                        "this model and optimizer have a recipe already; use that one, or call its detach() first"
                    )
                other.detach()  # a new optimizer: the old pair is out of use
            set_owner(layer, self)

    def _check_layers(self) -> None:
        """`densify` ends a recipe: its masks are gone."""
        dense = [name for name, layer in self.layers.items() if not isinstance(layer, SparseLayer)]
        if dense:
            raise Sparse24Error(
                f"layers of this recipe are dense again ({', '.join(dense[:4])}); sparsify the model, make a new "
                "recipe and load a state that was saved before"
            )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What must survive beside the model and the optimizer: plain numbers, strings and tensors.

        Step, settings, masks, flip history, and the states of torch's generators that MVUE draws from. With it a
        resumed run equals the uninterrupted one bit for bit; save it between two optimizer steps.
        """
        self._check_layers()
        self._finish_interrupted()
        return {
            "version": 1,
            "step": self.step,
            "phase": self.phase,
            "settings": self._settings(),
            "decay": self._decay,
            "last_refresh": self.last_refresh,
            "masks_frozen": self.masks_frozen,
            "masks": {name: layer.mask.clone() for name, layer in self.layers.items()},
            "monitor": self.monitor.state_dict(),
            "scales": [layer.soft_scale.clone() for layer in self.layers.values()] if self.method.soft else [],
            "frozen_moment": [t.clone() for t in self._frozen_moment.frozen] if self._frozen_moment else [],
            "rng": rng_state(next(iter(self.layers.values())).weight.device),
            **({"blocks": self.block_flips.state_dict()} if self.block_flips else {}),
        }

    def load_state_dict(self, state: dict, *, override: bool = False, rng: bool = True) -> None:
        """Take up a saved state; everything is checked before anything changes.

        override  accept a state whose settings (method, total steps, interval, ...) differ from this recipe's, which
                  rule; the phase is then the one that this recipe has for the state's step
        rng       also restore torch's generators; False leaves them to the caller

        Load the model's weights before or after: either order gives the same masks and packed forms. Raises
        Sparse24Error, changing nothing, for a state that is corrupt, of another model or of other settings.
        """
        self._check_layers()
        shapes = [layer.weight.shape for layer in self._unique_layers()]
        masks = {name: layer.mask for name, layer in self.layers.items()}
        masks = check_state(state, self._settings(), masks, override, shapes)
        planned = DENSE if self.method.probes else self.phases.at(state["step"])
        if state["phase"] != planned and not override:
            raise Sparse24Error(
                f"the state was saved in the {state['phase']} phase, but step {state['step']} of this recipe is "
                f"{planned}; make the recipe with the same settings, or pass override=True to follow this recipe"
            )
        self.monitor.check_state(state["monitor"])
        if self.block_flips is not None and "blocks" in state:
            self.block_flips.load_state_dict(state["blocks"], list(masks.values()))
        self.step, self._unfinished = state["step"], None
        self._decay = check_decay(state["decay"])
        self.last_refresh, self.masks_frozen = state["last_refresh"], state["masks_frozen"]
        self._before_of, self._captured = self.last_refresh, None
        self._gaps = self._frozen_moment = None
        for name, layer in self.layers.items():
            layer.take_mask(masks[name])
            layer.keep_mask()
        self.monitor.load_state_dict(state["monitor"])
        device = next(iter(self.layers.values())).weight.device
        if self.method.soft and state["scales"]:
            for layer, scale in zip(self.layers.values(), state["scales"], strict=True):
                layer.set_soft_scale(scale)
        # Going back from a dense state to a sparse phase finds new masks: the old ones are of weights long gone.
        self._start_phase(planned, search=planned != state["phase"])
        if self._frozen_moment is not None and state["frozen_moment"]:
            weights = [layer.weight for layer in self._unique_layers()]
            self._frozen_moment = methods.FrozenSecondMoment(self.optimizer, weights, state["frozen_moment"])
        self._write_factor()
        if rng:
            restore_rng(state["rng"], device)

    def _settings(self) -> dict:
        return {
            "method": self.method.name,
            "total_steps": self.phases.total_steps,
            "sparse_from": self.phases.sparse_from,
            "sparse_until": self.phases.sparse_until,
            "mask_interval": self.mask_interval,
            "decay_schedule": self.decay_schedule,
            "decay_in": self.decay_in,
        }

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
            f"Recipe({self.method.name}, step {self.step} of {self.phases.total_steps}, {self.phase}, decay "
            f"{self.decay:g}, mask_interval {self.mask_interval}, {len(self.layers)} layers)"
        )


def is_capturing() -> bool:
    """Whether work on the current CUDA stream is being captured in a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _positive(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise Sparse24Error(f"{name} must be an integer, {least} or more, got {value!r}")
    return int(value)
