"""The documentation holds: its Python snippets run, its commands and options exist, its links lead to files.

Snippets of a page share one namespace and run in order, on the CPU, in an empty folder. A ```python block inside an
HTML comment is run too and not shown: it makes the tiny model and data that the visible ones work on. One after
`<!-- needs: library -->` is a test of its own, skipped where the library is not installed; it runs after the unmarked
ones above it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: what the snippets of a page import beside torch and sparse24
NEEDS = {
    "README.md": ("transformers", "safetensors"),
    "docs/checkpoints.md": ("safetensors",),
    "docs/export.md": ("transformers", "safetensors"),
    "docs/flip-rate.md": ("matplotlib", "tensorboard"),
    "docs/huggingface.md": ("transformers", "accelerate"),
    "docs/lightning.md": ("lightning",),
    "docs/other-libraries.md": ("transformers",),
    "docs/tuning-the-decay.md": ("matplotlib",),
}

SNIPPET = re.compile(r"^(?:<!-- needs: ([\w, ]+) -->\n)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python -m sparse24|make) [^`\n]*)`")
REFERENCE = re.compile(r"^::: sparse24\.([\w.]+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Snippet(NamedTuple):
    line: int  # of the first line of code
    code: str
    needs: tuple[str, ...]  # libraries that a marker above it names


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(text.count("\n", 0, found.start(2)), found[2], tuple(re.findall(r"\w+", found[1] or "")))
        for found in SNIPPET.finditer(text)
    ]


def run(page: Path, chosen: list[Snippet]) -> dict:
    namespace = {"__name__": "__main__"}
    for snippet in chosen:
        # Empty lines in front: a traceback then names the line of the page.
        exec(compile("\n" * snippet.line + snippet.code, str(page), "exec"), namespace)
    return namespace


def shell_lines(page: Path) -> list[str]:
    """The commands of the shell blocks and of inline code, without comments, continued lines joined."""
    text = page.read_text(encoding="utf-8")
    blocks = SHELL.findall(text) + INLINE.findall(text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Snippets write into the current folder, and may set environment variables and make a process group."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # models this small only wait for one another's threads
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name_of)
def test_snippets_of_a_page_run_in_order(page, elsewhere):
    for package in NEEDS.get(name_of(page), ()):
        pytest.importorskip(package)
    run(page, [snippet for snippet in snippets(page) if not snippet.needs])


MARKED = [(page, snippet) for page in PAGES for snippet in snippets(page) if snippet.needs]


@pytest.mark.parametrize("page, marked", MARKED, ids=[f"{name_of(page)}:{s.line} {s.needs[0]}" for page, s in MARKED])
def test_snippets_with_other_libraries_run(page, marked, elsewhere):
    for package in (*NEEDS.get(name_of(page), ()), *marked.needs):
        pytest.importorskip(package)
    run(page, [s for s in snippets(page) if not s.needs and s.line < marked.line] + [marked])


@pytest.mark.gpu
def test_quick_start_captures_a_step_where_there_is_a_gpu(elsewhere):
    """Without one its page leaves the CUDA graph out."""
    page = ROOT / "docs" / "quickstart.md"
    pytest.importorskip("transformers")
    namespace = run(page, snippets(page))
    assert namespace["ffn_recipe"].step == 103


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8"))]
    missing = [t for t in targets if t and "://" not in t and not t.startswith("mailto:")]
    assert [t for t in missing if not (page.parent / t).exists()] == []


def test_commands_and_their_options_exist():
    typer = pytest.importorskip("typer")
    from sparse24.cli import app

    commands = typer.main.get_command(app).commands
    options = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} for name, command in commands.items()
    }
    wrong, seen = [], set()
    for page in PAGES:
        for line in shell_lines(page):
            _, found, arguments = line.partition("python -m sparse24 ")
            if not found:
                continue
            command, *rest = arguments.split()
            seen.add(command)
            if command not in commands:
                wrong.append(f"{name_of(page)}: there is no command {command}")
                continue
            given = {word.partition("=")[0] for word in rest if word.startswith("--")}
            wrong += [f"{name_of(page)}: {command} has no option {o}" for o in given - options[command] - {"--help"}]
    assert wrong == []
    assert seen >= {"env", "pretrain", "tune"}


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for line in shell_lines(page):
            words = line.split()
            wanted = {word for word in words[words.index("make") + 1 :] if word.isalpha()} if "make" in words else set()
            assert wanted <= targets, f"{name_of(page)}: {line}"


def test_every_kernel_page_is_in_the_index():
    folder = ROOT / "docs" / "kernels"
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in folder.glob("*.md") if p.name != "README.md" and f"({p.name})" not in index] == []


def test_the_page_about_the_paper_names_files_and_tests_that_exist():
    text = (ROOT / "docs/paper.md").read_text()
    folders = (ROOT, ROOT / "sparse24", ROOT / "tests")
    files = {name for name in re.findall(r"`([\w/.]+)`", text) if "/" in name or name.endswith(".py")}
    missing = {name for name in files if not any((folder / name).exists() for folder in folders)}
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+?)_?(?:\.\.\.)?`", text)
    missing |= {name for name in named if f"def {name}" not in tests}
    assert len(files) > 10 and len(named) > 5 and not missing


def documented(name: str):
    """What a line `::: sparse24.NAME` of the reference is about: a module, a class or a function."""
    try:
        return importlib.import_module(f"sparse24.{name}")
    except ModuleNotFoundError:
        *parents, last = f"sparse24.{name}".split(".")
        return getattr(importlib.import_module(".".join(parents)), last)


def test_no_file_hides_a_function_of_its_name_from_the_reference():
    """The generator reads files: of `from .follow import follow` it documents the file follow.py, not the function."""
    entries = {
        name for page in (ROOT / "docs" / "reference").glob("*.md") for name in REFERENCE.findall(page.read_text())
    }
    hidden = []
    for entry in entries:
        found = documented(entry)
        if hasattr(found, "__path__"):  # a room: all that it lists
            files = {path.stem for path in Path(found.__path__[0]).glob("*.py")}
            hidden += [f"{entry}.{name}.{name}" for name in found.__all__ if name in files]
        elif inspect.isfunction(found) and found.__module__.rpartition(".")[2] == found.__name__:
            hidden.append(f"{found.__module__.removeprefix('sparse24.')}.{found.__name__}")
    assert set(hidden) <= entries and "follow" in entries
