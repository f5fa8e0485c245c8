"""What an error tells somebody to do can be done: its names exist, and the front end that raised it takes them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from tiny_models import MLP, gpt2

import sparse24
from sparse24 import ops
from sparse24.errors import Sparse24Error

PACKAGE = Path(sparse24.__file__).parent
#: rooms whose errors reach a trainer's user through a callback, which then must take the keyword that they name
BEHIND_CALLBACKS = ("convert", "recipe")
CALL = re.compile(r"\b(sparse24|ops|recipe|model)\.(\w+)\(")
KEYWORD = re.compile(r"(?<![\w.\-])([a-z_]{3,})=(?=[\w'\"(\[]|\.\.\.)")
OPTION = re.compile(r"(?<!\w)--[a-z][a-z-]+")


class Message:
    def __init__(self, file: Path, node: ast.Raise):
        self.where = f"{file.relative_to(PACKAGE)}:{node.lineno}"
        self.room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        texts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        self.text = " ".join(texts)


def messages() -> list[Message]:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if ast.unparse(node.exc.func).startswith("Sparse24"):
                    found.append(Message(file, node))
    return found


MESSAGES = messages()


def keywords_of(*functions) -> set[str]:
    return {name for function in functions for name in inspect.signature(function).parameters}


def public_keywords() -> set[str]:
    """Of everything that users call: the package's names, the recipe's methods, the ops."""
    things = [getattr(sparse24, name) for name in sparse24.__all__]
    things += [getattr(sparse24.Recipe, name) for name in dir(sparse24.Recipe) if not name.startswith("_")]
    things += [getattr(ops, name) for name in ops.__all__]
    found = set()
    for thing in things:
        try:
            found |= keywords_of(thing)
        except (TypeError, ValueError):
            continue
    return found


def test_the_sweep_sees_the_package():
    assert len(MESSAGES) > 200 and any("override=True" in message.text for message in MESSAGES)


@pytest.mark.fault(88)
def test_functions_that_errors_name_exist():
    owners = {"sparse24": sparse24, "ops": ops, "recipe": sparse24.Recipe, "model": torch.nn.Module}
    missing = [
        f"{message.where}: {owner}.{name}"
        for message in MESSAGES
        for owner, name in CALL.findall(message.text)
        if not hasattr(owners[owner], name)
    ]
    assert missing == []


#: keywords of other libraries that errors name rightly, and words of a path or a format
FOREIGN = {"loss", "layout", "strict", "callbacks", "weights_only", "is_grads_batched", "vectorize", "retain_graph"}


@pytest.mark.fault(88)
def test_keywords_that_errors_name_are_taken_by_something_public():
    known = public_keywords() | keywords_of(*callbacks()) | FOREIGN
    unknown = [
        f"{message.where}: {name}="
        for message in MESSAGES
        for name in KEYWORD.findall(message.text)
        if name not in known and message.room not in ("benchmark", "pretrain", "cli")
    ]
    assert unknown == []


def callbacks():
    pytest.importorskip("transformers")
    pytest.importorskip("lightning")
    from sparse24.integrations import lightning, transformers

    return transformers.Sparse24Callback, lightning.Sparse24Callback


#: not reached from a callback: other functions' own arguments
ELSEWHERE = {
    "rng",
    "grid",
    "target",
    "batches",
    "loss",
    "probe_step",
    "copy",
    "like",
    "masked",
    "format",
    "search",
} | FOREIGN


@pytest.mark.fault(88)
def test_keywords_of_recipe_and_conversion_errors_are_taken_by_both_callbacks():
    """`override=True` was named by an error that no callback could act on."""
    for callback in callbacks():
        taken = keywords_of(callback, sparse24.sparsify, sparse24.Recipe) - {"settings", "self", "model"}
        for message in MESSAGES:
            if message.room in BEHIND_CALLBACKS and "tune.py" not in message.where:
                for name in set(KEYWORD.findall(message.text)) - ELSEWHERE:
                    assert name in taken, f"{message.where}: {callback.__module__} takes no {name}="
                    if name in keywords_of(sparse24.sparsify, sparse24.Recipe):
                        callback(**{name: 1 if name == "total_steps" else _harmless(callback, name)})


def _harmless(callback, name):
    for function in (callback, sparse24.sparsify, sparse24.Recipe):
        parameter = inspect.signature(function).parameters.get(name)
        if parameter is not None:
            return None if parameter.default is inspect.Parameter.empty else parameter.default
    return None


@pytest.mark.fault(88)
def test_command_line_options_that_errors_name_exist():
    typer = pytest.importorskip("typer")
    from sparse24.cli import app

    commands = typer.main.get_command(app).commands.values()
    options = {o for command in commands for p in command.params for o in (*p.opts, *p.secondary_opts)}
    wrong = [
        f"{message.where}: {option}"
        for message in MESSAGES
        for option in OPTION.findall(message.text)
        if option not in options | {"--help", "--nproc-per-node"}  # the latter is torchrun's
    ]
    assert wrong == []


# -- each remedy taken, through each front end ------------------------------------------------------------------------


def plain(**settings):
    """sparsify and Recipe by hand, with the callbacks' flat list of settings."""
    from sparse24.integrations.settings import split_settings

    include, exclude = settings.pop("include", "auto"), settings.pop("exclude", ())
    steps = settings.pop("total_steps", 2)
    of_sparsify, of_recipe = split_settings(settings)
    model = MLP()
    sparse24.sparsify(model, include, exclude, **of_sparsify)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recipe = sparse24.Recipe(model, optimizer, steps, **of_recipe)
    for _ in range(2):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    return recipe


def hugging_face(**settings):
    pytest.importorskip("accelerate")
    from tiny_trainers import hf_trainer

    folder = settings.pop("folder")
    arguments = dict(save_strategy="no", logging_strategy="no", max_grad_norm=0.0, gradient_accumulation_steps=1)
    trainer, callback = hf_trainer(folder, lambda: gpt2(1), 2, arguments, **settings)
    trainer.train()
    return callback.recipe


def lightnings(**settings):
    pytest.importorskip("lightning")
    from tiny_lightning import Regression, callback_of, loader, trainer_of

    folder = settings.pop("folder")
    callback = callback_of(**(dict(total_steps=2) | settings))
    trainer_of(folder, callback, max_steps=2).fit(Regression(), loader())
    return callback.recipe


FRONT_ENDS = dict(plain=plain, hugging_face=hugging_face, lightning=lightnings)
#: what is wrong, what the error says, what it tells one to do
CASES = {
    "a method by another name": (dict(method="srste"), "method must be one of .*sr-ste", dict(method="sr-ste")),
    "decay in backward of a method that has none": (
        dict(method="sr-ste", decay_in="backward"),
        "leave decay_in='step'",
        dict(method="sr-ste", decay_in="step"),
    ),
    "a negative decay": (dict(decay=-1.0), "0 is plain straight-through", dict(decay=0)),
    "an interval of zero": (
        dict(mask_interval=0),
        "mask_interval must be an integer, 1 or more",
        dict(mask_interval=1),
    ),
    "a fraction above one": (dict(dense_fraction=2), r"a number from 0 to 1", dict(dense_fraction=1)),
    "a place that is none": (dict(dense_at="middle"), "dense_at must be one of .*end", dict(dense_at="end")),
    "a schedule that is none": (dict(decay_schedule="step"), "one of .*cosine", dict(decay_schedule="cosine")),
    "a pattern with a slip": (dict(include=("*fcc1",)), "the closest are", dict(include=("*fc*",))),
    "everything excluded": (dict(exclude=("*",)), "exclude=.*leaves none of the layers", dict(exclude=())),
    "a backend that is none": (dict(backend="dense"), "backend must be one of auto, sparse", dict(backend="sparse")),
    "no micro-batches": (dict(micro_batches=0), "micro_batches must be an integer, 1 or more", dict(micro_batches=1)),
    "a setting with a slip": (dict(mask_intervall=3), "did you mean mask_interval", dict(mask_interval=3)),
}


@pytest.mark.fault(88)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_the_remedy_of_an_error_can_be_taken(tmp_path, front_end, case):
    wrong, words, right = CASES[case]
    run, extra = FRONT_ENDS[front_end], {} if front_end == "plain" else dict(folder=tmp_path)
    if front_end == "hugging_face":  # GPT-2 names its layers otherwise
        wrong, right = ({k: _gpt2s(v) if k == "include" else v for k, v in d.items()} for d in (wrong, right))
    with pytest.raises(Sparse24Error, match=words):
        run(**wrong, **extra)
    recipe = run(**right, **extra)
    assert recipe.step == 2


def _gpt2s(patterns):
    return tuple({"*fcc1": "*c_fcc", "*fc*": "*mlp.c_*"}[pattern] for pattern in patterns)
