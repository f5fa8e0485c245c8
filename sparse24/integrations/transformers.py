"""Hugging Face Trainer: one callback converts the model, makes the recipe, logs, saves and resumes.

    trainer = Trainer(model, args, ..., callbacks=[Sparse24Callback(decay=6e-5)])

Order of a step in Trainer: accumulate, un-scale, clip, optimizer.step(); the recipe's hooks run inside the last one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainerCallback

from ..convert import sparse_layers, sparsify, unwrap
from ..errors import Sparse24Error
from ..files import write_atomically
from ..recipe import Recipe, fingerprint_of_state
from .settings import check_decay_in, split_settings

STATE_FILE = "sparse24.pt"
STATE_KEY = "sparse24"  # in trainer_state.json: which masks the file beside it has


def packed_dtype(args) -> torch.dtype | None:
    """What products will take under the Trainer's autocast on a GPU; None: what the weights' own dtype asks for."""
    if args.device.type != "cuda":
        return None
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None


class Sparse24Callback(TrainerCallback):
    """Trains the FFNs of a Trainer's model 2:4 sparse.

    include, exclude, backend   as in `sparse24.sparsify`
    total_steps     optimizer steps; default: the Trainer's max_steps
    settings        all others of `sparsify` (tokens, lean, ...) and of `Recipe` (decay, mask_interval, ...). The
                    Trainer gives dtype (what its fp16 or bf16 multiplies in) and micro_batches if they are left out

    The model is converted when the Trainer is made, before its optimizer. Checkpoints get a file sparse24.pt beside the
    Trainer's own; resuming reads it. From a folder outside of the Trainer's own `output_dir`, name it in
    `args.resume_from_checkpoint` as well as in `train(resume_from_checkpoint=...)`, which callbacks do not see.
    `report` and `recipe` are there to look at. The metrics go into the Trainer's log history; `log_through` shows them
    to its other loggers too.
    """

    def __init__(
        self,
        include="auto",
        exclude=(),
        backend: str = "auto",
        *,
        total_steps: int | None = None,
        **settings,
    ):
        self.include, self.exclude, self.backend, self.total_steps = include, exclude, backend, total_steps
        self.sparsify_settings, self.recipe_settings = split_settings(settings)
        self.report = None
        self.recipe: Recipe | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._convert(model, args)

    def _convert(self, model, args) -> None:
        clips = "max_grad_norm=0" if (args.max_grad_norm or 0) > 0 else None
        check_decay_in(self.recipe_settings, clips, "bf16=True in place of fp16" if args.fp16 else None)
        given = {"dtype": packed_dtype(args), "micro_batches": args.gradient_accumulation_steps}
        self.report = sparsify(model, self.include, self.exclude, self.backend, **(given | self.sparsify_settings))

    def log_through(self, trainer) -> None:
        """Come before the Trainer's own callbacks, so that TensorBoard and whatever else `report_to` names, and the
        progress bar, get the metrics with its logs.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.report is None:
            raise Sparse24Error(
                "Sparse24Callback was added after the Trainer was made; pass it as Trainer(..., callbacks=[...]), so "
                "that the model is converted before its optimizer is made"
            )
        if not sparse_layers(model):  # made anew by Trainer(model_init=...)
            self._convert(unwrap(model), args)
        if not sparse_layers(model):
            return  # backend="auto" has left the model dense, and has said so
        settings = {"micro_batches": args.gradient_accumulation_steps} | self.recipe_settings
        self.recipe = Recipe(model, optimizer, self.total_steps or state.max_steps, **settings)
        if state.global_step > 0:
            self._resume(args, state)

    def _resume(self, args, state) -> None:
        # The Trainer does not tell callbacks which folder it resumes from, but it has read trainer_state.json there.
        expected = (state.stateful_callbacks or {}).get(STATE_KEY, {}).get("masks")
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        problem = f"there is no {STATE_FILE} in {folders[0]}: without it the masks are lost"
        for folder in folders:
            if not (folder / STATE_FILE).is_file():
                continue
            saved = torch.load(folder / STATE_FILE, weights_only=True)
            if expected is None or expected == fingerprint_of_state(saved):
                # The Trainer restores the generators itself, per rank.
                self.recipe.load_state_dict(saved, rng=False)
                return
            problem = f"{folder / STATE_FILE} has the masks of another run"
        raise Sparse24Error(
            f"resuming at step {state.global_step}, but {problem}. Set args.resume_from_checkpoint to the checkpoint's "
            "folder too, or train from the start"
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.recipe is not None and control.should_save:  # trainer_state.json is written before on_save
            masks = {"masks": self.recipe.fingerprint()}
            state.stateful_callbacks = (state.stateful_callbacks or {}) | {STATE_KEY: masks}

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self.recipe is not None and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                write_atomically(folder / STATE_FILE, lambda path: torch.save(self.recipe.state_dict(), path))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.recipe is None or logs is None:
            return
        metrics = {f"sparse24/{name}": value for name, value in self.recipe.metrics().items()}
        logs.update(metrics)
        if state.log_history:  # the Trainer has copied the logs into its history already
            state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        if self.recipe is not None:
            self.recipe.detach()
