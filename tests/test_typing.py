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


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> str:
    """What mypy says of the user's program and of a wrong one, in one run: it reads the package each time."""
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "mypy.ini").write_text(SETTINGS)
    (folder / "wrong.py").write_text(
        "import sparse24\n\nsparse24.verify(1, 2, 3, 4, 5)\nprint(sparse24.is_available().speed)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-incremental", str(USER), "wrong.py"]
    # nn.Module is Any here, and strict mode would have nobody subclass it
    command += ["--allow-subclassing-any"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def test_a_users_program_passes_mypy_strict(told):
    wrong = [line for line in told.splitlines() if "error:" in line and not line.startswith("wrong.py:")]
    assert wrong == [] and "2 source files" in told


def test_the_program_uses_every_public_name():
    tree = ast.parse(USER.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    modules = {"errors", "functional", "integrations", "modules", "ops", "reference", "structure"}
    assert set(sparse24.__all__) - modules <= used
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert modules <= used | imported


def test_wrong_arguments_are_seen(told):
    """Were the package untyped, anything would pass."""
    assert "wrong.py:3: error: Too many arguments" in told and 'wrong.py:4: error: "' in told, told
    assert "no attribute" in told, told
