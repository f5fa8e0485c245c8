"""A user's typed program passes `mypy --strict`, and a wrong one does not."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparse24

pytest.importorskip("mypy")
ROOT = Path(__file__).parent.parent
USER = ROOT / "tests" / "typing" / "user.py"
# torch's own annotations take mypy a minute and are not what is checked
SETTINGS = "[mypy]\nstrict = True\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n"


def mypy(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-incremental", str(program)]
    # nn.Module is Any here, and strict mode would have nobody subclass it
    command += ["--allow-subclassing-any"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )  # fmt: skip


def test_a_users_program_passes_mypy_strict(tmp_path):
    result = mypy(USER, tmp_path)
    assert result.returncode == 0, result.stdout


def test_the_program_uses_every_public_name():
    tree = ast.parse(USER.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    modules = {"errors", "functional", "integrations", "modules", "ops", "reference", "structure"}
    assert set(sparse24.__all__) - modules <= used
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert modules <= used | imported


def test_wrong_arguments_are_seen(tmp_path):
    """Were the package untyped, anything would pass."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import sparse24\n\nsparse24.verify(1, 2, 3, 4, 5)\nprint(sparse24.is_available().speed)\n")
    result = mypy(wrong, tmp_path)
    assert result.returncode == 1
    assert "Too many arguments" in result.stdout and "no attribute" in result.stdout, result.stdout
