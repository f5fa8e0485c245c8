"""Hugging Face Trainer: one callback converts the model, makes the recipe, logs, saves, resumes and evaluates.

    trainer = Trainer(model, args, ..., callbacks=[Sparse24Callback(decay=6e-5)])

Order of a step in Trainer: accumulate, un-scale, clip, optimizer.step(); the recipe's hooks run inside the last one.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from ..convert import sparse_layers, unwrap
from ..errors import Sparse24Error, Sparse24Warning
from ..files import write_atomically
from ..layers import DENSE
from ..options import checked_options, one_of
from ..recipe import Recipe, fingerprint_of, fingerprint_of_state, load_masks, same_function
from .references import take_references
from .settings import check_decay_in, split_settings
from .states import MASKS, end, read_state, sparsify_once

STATE_FILE = "sparse24.pt"
#: key in trainer_state.json and config.json: the masks and the phase that the weights beside it were saved under
STATE_KEY = "sparse24"


def packed_dtype(args) -> torch.dtype | None:
    """What products will take under the Trainer's autocast on a GPU; None: what the weights' own dtype asks for."""
    if args.device.type != "cuda":
        return None
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None


class Sparse24Callback(TrainerCallback):
    """Trains the FFNs of a Trainer's model 2:4 sparse.

    include, exclude, backend   as in `sparse24.sparsify`; a model that is sparse already is left as it is
    total_steps     optimizer steps; default: the Trainer's max_steps
    override        resume although the checkpoint's recipe had other settings, such as fewer steps; these ones rule
    masks           "load": resume with the masks of the checkpoint. "search": find them in its weights, as after a
                    dense run, and count on from the Trainer's step
    references      "follow": a dense `ref_model` of the Trainer with the weights of its model, as TRL's DPOTrainer has
                    one, gets the masks that the model begins with. "keep": it stays dense
    settings        all others of `sparsify` (tokens, lean, ...) and of `Recipe` (decay, mask_interval, ...). The
                    Trainer gives dtype (what its fp16 or bf16 multiplies in) and micro_batches if they are left out

    The model is converted when the Trainer is made, before its optimizer. Checkpoints get a file sparse24.pt beside the
    Trainer's own, and config.json an entry that says which phase and masks the weights belong to. Resuming reads the
    file; so do `evaluate` and `predict` of a model that `from_pretrained` has loaded from a checkpoint, and the end of
    a training with load_best_model_at_end. To resume from a folder outside of the Trainer's own `output_dir`, name it
    in `args.resume_from_checkpoint` as well as in `train(resume_from_checkpoint=...)`, which callbacks do not see.
    `report` and `recipe` are there to look at. The metrics go into the Trainer's log history; `log_through` shows them
    to its other loggers too.
    """

    @checked_options(masks=one_of(MASKS), references=one_of(("follow", "keep")))
    def __init__(
        self,
        include="auto",
        exclude=(),
        backend: str = "auto",
        *,
        total_steps: int | None = None,
        override: bool = False,
        masks: str = "load",
        references: str = "follow",
        **settings,
    ):
        self.references, self._has_reference = references, False
        self.include, self.exclude, self.backend, self.total_steps = include, exclude, backend, total_steps
        self.override, self.masks = override, masks
        self.sparsify_settings, self.recipe_settings = split_settings(settings)
        self.report = None
        self.recipe: Recipe | None = None

    # -- conversion -----------------------------------------------------------------------------------------------

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._convert(model, args)

    def _convert(self, model, args) -> None:
        clips = "max_grad_norm=0" if (args.max_grad_norm or 0) > 0 else None
        check_decay_in(self.recipe_settings, clips, "bf16=True in place of fp16" if args.fp16 else None)
        given = {"dtype": packed_dtype(args), "micro_batches": args.gradient_accumulation_steps}
        found_sparse = bool(sparse_layers(model))
        self.report = sparsify_once(model, self.include, self.exclude, self.backend, **(given | self.sparsify_settings))
        if sparse_layers(model) and not found_sparse:
            _take_saved_masks(model)

    def log_through(self, trainer) -> None:
        """Move this callback before the Trainer's own, so that TensorBoard, whatever else `report_to` names, and the
        progress bar get the metrics with the Trainer's logs.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    # -- training -------------------------------------------------------------------------------------------------

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
        end(self.recipe)  # the Trainer begins again: auto_find_batch_size, a second train(), another trial
        settings = {"micro_batches": args.gradient_accumulation_steps} | self.recipe_settings
        self.recipe = Recipe(model, optimizer, self.total_steps or state.max_steps, **settings)
        if state.global_step > 0:
            self._resume(args, state)
        if self.references == "follow":
            resumed = bool((state.stateful_callbacks or {}).get(STATE_KEY, {}).get("reference"))
            self._has_reference = take_references(model, resumed=resumed)

    def _resume(self, args, state) -> None:
        if self.masks == "search":
            self.recipe.start_at(state.global_step)
            return
        # The Trainer does not tell callbacks which folder it resumes from, but it has read trainer_state.json there.
        expected = (state.stateful_callbacks or {}).get(STATE_KEY, {}).get("masks")
        if expected is not None and "-" not in expected:  # of a version whose fingerprints had no phase
            expected = None
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        problem = f"there is no {STATE_FILE} in {folders[0]}: without it the masks are lost"
        for folder in folders:
            if not (folder / STATE_FILE).is_file():
                continue
            saved = read_state(folder / STATE_FILE)
            if expected is None or expected == fingerprint_of_state(saved):
                # The Trainer restores the generators itself, per rank.
                self.recipe.load_state_dict(saved, override=self.override, rng=False)
                return
            problem = f"{folder / STATE_FILE} has the masks of another run"
        raise Sparse24Error(
            f"resuming at step {state.global_step}, but {problem}. Set args.resume_from_checkpoint to the checkpoint's "
            'folder too, or find masks in its weights, as after a dense run, by Sparse24Callback(masks="search")'
        )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.recipe is None:
            return
        self.recipe.detach()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None:  # the Trainer has put its weights into the model
            _take_masks_of_best(model, Path(best))
        _mark(model)

    # -- checkpoints and logs -------------------------------------------------------------------------------------

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.recipe is not None and control.should_save:  # trainer_state.json is written before on_save
            masks = {"masks": self.recipe.fingerprint(), "reference": self._has_reference}
            state.stateful_callbacks = (state.stateful_callbacks or {}) | {STATE_KEY: masks}
            _mark(model)

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self.recipe is None:
            return
        recipe_state = self.recipe.state_dict()  # gathers masks where ranks divide a layer: all take part
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                write_atomically(folder / STATE_FILE, lambda path: torch.save(recipe_state, path))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.recipe is None or logs is None:
            return
        metrics = {f"sparse24/{name}": value for name, value in self.recipe.metrics().items()}
        logs.update(metrics)
        if state.log_history:  # the Trainer has copied the logs into its history already
            state.log_history[-1].update(metrics)


# -- masks of weights that were saved -------------------------------------------------------------------------------


def _mark(model: nn.Module) -> None:
    """Write phase and masks, as a fingerprint, into the model's config, which is saved with the weights everywhere."""
    config = getattr(unwrap(model), "config", None)
    if config is not None and not isinstance(config, dict):
        setattr(config, STATE_KEY, {"function": fingerprint_of(model)})


def _take_saved_masks(model: nn.Module) -> None:
    """Give a model that has just been made sparse the masks and the phase that its weights were saved under."""
    config = getattr(unwrap(model), "config", None)
    name = getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "")
    if not name:
        return  # weights from no file, under a config perhaps that another model had before
    folder = Path(name)
    if (folder / STATE_FILE).is_file():
        load_masks(model, read_state(folder / STATE_FILE))
        return
    entry = getattr(config, STATE_KEY, None)
    saved = entry.get("function") if isinstance(entry, dict) else None
    if not isinstance(saved, str):
        return  # weights that sparse24 has not trained
    if saved.startswith(f"{DENSE}-"):
        for layer in sparse_layers(model).values():
            layer.enter(DENSE)
    elif not same_function(saved, fingerprint_of(model)):
        warnings.warn(
            f"the weights in {folder} were saved under other masks than a search finds in them now, and there is no "
            f"{STATE_FILE} beside them: evaluate() computes another function than the run did, until you call "
            f'sparse24.load_masks(model, torch.load("checkpoint-.../{STATE_FILE}", weights_only=True)) with the '
            f"{STATE_FILE} of the checkpoint that they are from",
            Sparse24Warning,
            stacklevel=2,
        )


def _take_masks_of_best(model: nn.Module, folder: Path) -> None:
    if (folder / STATE_FILE).is_file():
        load_masks(model, read_state(folder / STATE_FILE))
        return
    warnings.warn(
        f"the Trainer has loaded the weights of {folder}, the best ones, and there is no {STATE_FILE} beside them: "
        "they run under the masks and the phase that the training ended with. Restore the file from a copy and call "
        "sparse24.load_masks(model, state), or search masks by sparse24.refresh(model, search=True)",
        Sparse24Warning,
        stacklevel=2,
    )
