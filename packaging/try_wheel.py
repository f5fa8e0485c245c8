"""Installs a wheel into an empty environment and trains there: `python packaging/try_wheel.py dist/*.whl`.

The environment holds the wheel, and as links into the running Python what the wheel requires and what that requires; so
it takes seconds and no network. Nothing else is there: no source tree, no compiler, no cmake on the PATH.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

TRIES = Path(__file__).with_name("wheel_trains.py")


def names(requirements: list[str] | None) -> list[str]:
    """Of requirements outside of extras."""
    return [re.match(r"[\w.-]+", line)[0] for line in requirements or [] if "extra ==" not in line]


def all_needed(required: list[str]) -> set[str]:
    """Installed distributions that these and all their requirements are; raises where one of these is not installed."""
    for name in required:
        try:
            distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"error: the wheel requires {name}: install it for {sys.executable} first") from None
    todo, found = [*required], set()
    while todo:
        name = todo.pop()
        try:
            of_this = distribution(name).requires
        except PackageNotFoundError:  # of another system
            continue
        if name not in found:
            found.add(name)
            todo += names(of_this)
    return found


def link_packages(needed: set[str], site: Path) -> None:
    """Every top-level file and folder of these distributions, as a link."""
    for name in needed:
        of_this = distribution(name)
        tops = {Path(str(file)).parts[0] for file in of_this.files or []} - {"..", "__pycache__"}
        for top in tops:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(of_this.locate_file(top))).resolve())


def try_wheel(wheel: Path) -> str:
    """Raises where the wheel does not install or train; returns what was seen, in a line."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "empty"
        venv.create(folder, symlinks=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "lib" / version / "site-packages"
        install = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--quiet",
            "install",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*install, "--target", str(site), str(wheel.resolve())], check=True)
        installed = time.monotonic()
        (of_wheel,) = distributions(name="sparse24", path=[str(site)])
        link_packages(all_needed(names(of_wheel.requires)), site)
        environment = {"PATH": str(folder / "bin"), "HOME": scratch, "OMP_NUM_THREADS": "1"}
        command = [str(folder / "bin" / "python"), "-I", str(TRIES), str(site)]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {wheel.name} does not train in an empty environment:\n{done.stdout}{done.stderr}")
    seconds = f"installed in {installed - start:.0f} s, {time.monotonic() - installed:.0f} s with torch's import"
    return f"{wheel.name}: {done.stdout.strip()}; {seconds}"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(try_wheel(Path(argument)))
