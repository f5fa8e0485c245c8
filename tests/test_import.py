"""What `import sparse24` costs a program that has imported torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import sparse24

LARGE = ("transformers", "tokenizers", "lightning", "typer", "matplotlib", "tensorboard", "safetensors")
TIMED = f"""
import time, torch
start = time.process_time()
import sparse24, sys
print(time.process_time() - start, sparse24.__file__)
print([name for name in {(*LARGE, "sparse24.pretrain")} if name in sys.modules])
"""


def test_importing_is_quick_and_brings_no_large_library(tmp_path):
    """Promised: 0.25 s of a quiet core once its bytecode is written, by the first. Twice that here, for a busy one."""
    package = tmp_path / "sparse24"
    shutil.copytree(Path(sparse24.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ.copy()
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "COVERAGE_PROCESS_START"):
        environment.pop(name, None)
    runs = []
    for _ in range(3):
        command = [sys.executable, "-c", TIMED]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        told, large = done.stdout.splitlines()
        seconds, imported = told.split()
        assert Path(imported).parent == package and large == "[]"
        runs.append(float(seconds))
    assert (package / "__pycache__").exists() and min(runs[1:]) < 0.5, runs
