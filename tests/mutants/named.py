"""Faults that once were seen by no test near to them: each is killed by a test of behaviour.

(module, text, text with the fault, tests). Those of the C++ headers are in named_cpp.py.
"""

NAMED = [
    (
        "layers/packing.py",  # the search in the packed dtype, which rounds magnitudes together
        "weights, masks = [full_weight(layer) for layer in group], [",
        "weights, masks = [full_weight(layer).to(layer._buffers[PACKED_BUFFERS[0]].dtype) for layer in group], [",
        ["test_verify", "test_modules", "test_module_changes"],
    ),
    (
        "save/verification.py",
        "for values, E, transposed in both[:1] if state.lean else both:",
        "for values, E, transposed in both[:1]:",
        ["test_verify"],
    ),
    (
        "save/verification.py",
        "zip((METADATA, METADATA_T), fresh[1::2], strict=True)",
        "zip((METADATA,), fresh[1:2], strict=True)",
        ["test_verify"],
    ),
    ("recipe/monitor.py", "EXPLOSION_RATE = 0.9, 0.1", "EXPLOSION_RATE = 0.9, 0.15", ["test_monitor"]),
    ("recipe/monitor.py", "FROZEN_RATE = 0.4, 1e-4", "FROZEN_RATE = 0.6, 1e-4", ["test_monitor"]),
    ("recipe/monitor.py", "EXPLOSION_PROGRESS = 0.5", "EXPLOSION_PROGRESS = 0.6", ["test_monitor"]),
    ("convert/cost_model.py", "ASSUMED_TOKENS = 8192", "ASSUMED_TOKENS = 2048", ["test_choice", "test_cost_model"]),
    (
        "functional/accumulation.py",  # it would write over foreign memory
        "    if not adjacent or target(",
        "    if target(",
        ["test_accumulation"],
    ),
    (
        "functional/accumulation.py",
        "lower.data_ptr() == upper.data_ptr() + upper.numel() * upper.element_size()",
        "lower.data_ptr() >= upper.data_ptr()",
        ["test_accumulation"],
    ),
    (
        "recipe/decay.py",
        '_add_to(terms, chosen, float(group["lr"]) * decay, keep)',
        '_add_to(terms, chosen, float(optimizer.param_groups[0]["lr"]) * decay, keep)',
        ["test_recipe_methods"],
    ),
    (
        "pretrain/train.py",
        "limit = s.clip if s.clip > 0 else math.inf",
        "limit = math.inf",
        ["pretrain/test_pretrain_damage"],
    ),
    (
        "pretrain/train.py",
        "lr, phase = learning_rate(self.step, s)",
        "lr, phase = learning_rate(self.step + 1, s)",
        ["pretrain/test_pretrain_damage"],
    ),
    ("recipe/state.py", '    decay.value = check_decay(state["decay"])\n', "", ["test_recipe_checkpoints"]),
    (
        "recipe/state.py",
        "    search.load_state_dict(state)\n",
        '    search.load_state_dict(state | {"monitor": search.monitor.state_dict()})\n',
        ["test_recipe_checkpoints", "test_monitor"],
    ),
    ("save/exporting.py", "    if kept > 2:\n", "    if kept > 3:\n", ["test_verify"]),
    (
        "recipe/steps.py",  # the schedule laid over all steps instead of the sparse ones
        "/ max(1, self.phases.sparse_steps)",
        "/ max(1, self.phases.total_steps)",
        ["test_recipe"],
    ),
    (
        "recipe/monitor.py",
        'self._peaks = state["flips"].amax(0).tolist() if self.flips else [0] * len(self.names)',
        "self._peaks = [0] * len(self.names)",
        ["test_monitor", "test_recipe_checkpoints"],
    ),
    (
        "recipe/monitor.py",
        'self.flips, self._reported = state["flips"].tolist(), set(state["reported"])',
        'self.flips, self._reported = state["flips"].tolist(), set()',
        ["test_monitor", "test_recipe_checkpoints"],
    ),
    ("save/folders.py", "        remove_folder(old)\n", "        __import__('shutil').rmtree(old)\n", ["test_damage"]),
]
