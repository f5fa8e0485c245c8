"""Builds libsparse24 once, and around it a wheel for each Python that is found: `make wheels`.

    python packaging/wheels.py [--out dist] [--python PATH ...]

The library is what takes long (SPARSE24_CUDA as for any build: 1 compiles the CUDA kernels, without a GPU too);
the binding of a Python takes seconds. auditwheel then names the oldest glibc that a wheel runs on, and refuses one that
needs what the system may lack.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = range(10, 15)  # of Python 3


def pythons() -> list[str]:
    """Every supported interpreter on the PATH that starts."""
    found = [shutil.which(f"python3.{minor}") for minor in VERSIONS]
    return [path for path in found if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]


def build_library(folder: Path) -> Path:
    """libsparse24.so by CMake, in a build folder that stays for the next time."""
    tools = Path(sys.executable).parent
    configure = [tools / "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
    configure += [f"-DSPARSE24_CUDA={os.environ.get('SPARSE24_CUDA', 'auto')}", f"-DSPARSE24_PYTHON={sys.executable}"]
    subprocess.run([*map(str, configure)], check=True)
    subprocess.run([str(tools / "cmake"), "--build", str(folder), "--target", "sparse24"], check=True)
    return folder / "libsparse24.so"


def build_wheel(python: str, library: Path, out: Path) -> Path:
    """The wheel of one Python, repaired: its name says the oldest glibc that it runs on."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"SPARSE24_LIBRARY": str(library)}
        command = [python, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", scratch, str(ROOT)]
        subprocess.run(command, check=True, env=environment)
        (raw,) = Path(scratch).glob("*.whl")
        repaired = Path(scratch) / "repaired"
        subprocess.run([sys.executable, "-m", "auditwheel", "repair", "-w", str(repaired), str(raw)], check=True)
        (wheel,) = repaired.glob("*.whl")
        return Path(shutil.move(wheel, out / wheel.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", nargs="+", default=pythons(), help="default: python3.10 to python3.14, as found")
    args = parser.parse_args()
    if not args.python:
        raise SystemExit("error: no python3.10 to python3.14 on the PATH; name interpreters with --python")
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    library = build_library(ROOT / "build" / "wheels")
    print(f"libsparse24.so: {library.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s")
    for python in args.python:
        start = time.monotonic()
        wheel = build_wheel(python, library, args.out)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
