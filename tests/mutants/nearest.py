"""The tests that should see a fault in a module, nearest first; of some modules, the functions that are in question."""

_RECIPE = ["test_recipe", "test_recipe_checkpoints"]
_CHECKPOINTS = ["test_damage", "test_checkpoints", "test_checkpoint_refusals", "test_checkpoint_resuming"]
_CHOICE = ["test_choice", "test_convert"]
_PRETRAIN = ["pretrain/test_pretrain_data", "pretrain/test_pretrain_damage", "pretrain/test_pretrain_resume"]

NEAREST = {
    "recipe/phases.py": _RECIPE,
    "recipe/decay.py": [*_RECIPE, "test_decay_in_backward", "test_recipe_optimizers", "test_recipe_methods"],
    "recipe/steps.py": [*_RECIPE, "test_recipe_methods", "test_recipe_optimizers", "test_recipe_mvue", "test_surgery"],
    "recipe/search.py": [*_RECIPE, "test_monitor", "test_recipe_methods"],
    "recipe/state.py": [*_RECIPE, "test_fuzz_states", "test_recipe_methods"],
    "recipe/methods.py": ["test_recipe_methods", "test_recipe_checkpoints"],
    "recipe/monitor.py": ["test_monitor", "test_recipe_checkpoints"],
    "functional/accumulation.py": ["test_accumulation"],
    "save/folders.py": _CHECKPOINTS,
    "save/checkpoints.py": _CHECKPOINTS,
    "save/fitting.py": _CHECKPOINTS,
    "save/exporting.py": ["test_export", *_CHECKPOINTS, "test_fuzz_files"],
    "files/writing.py": ["test_files", "test_damage"],
    "files/digests.py": ["test_files", "test_damage"],
    "convert/choice.py": _CHOICE,
    "convert/to_sparse.py": ["test_convert", "test_skipped_layers", "test_choice"],
    "convert/candidates.py": ["test_skipped_layers", "test_convert"],
    "convert/structure.py": ["test_families", "test_convert"],
    "convert/cost_model.py": ["test_cost_model", *_CHOICE],
    "pretrain/tokens.py": _PRETRAIN[:2],
    "pretrain/text.py": _PRETRAIN[:1],
    "pretrain/train.py": [*_PRETRAIN[1:], "pretrain/test_pretrain_job"],
}
#: the schedule and the step: the rest of the file talks to the user
FUNCTIONS = {"pretrain/train.py": ("learning_rate", "train_step", "restore", "evaluate")}
