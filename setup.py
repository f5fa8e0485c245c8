"""Builds libsparse24 by CMake, then the pybind11 binding, and puts both into the package.

Environment:

SPARSE24_CUDA      1, 0 or auto (default): see CMakeLists.txt
SPARSE24_CUDA_ARCHS   GPUs to compile for: all, or a list such as "80;90a"; default: those of this machine
SPARSE24_LIBRARY   path of a ready libsparse24.so: only the binding is built
CUTLASS_DIR        CUTLASS headers, for a CUDA build
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "libsparse24.so"


def find_tool(name: str) -> str:
    """cmake or ninja: of this Python's environment first (its bin folder may be off the PATH), else the system's."""
    try:
        module = __import__(name)
        folder = Path(getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR)
        if (folder / name).exists():
            return str(folder / name)
    except (ImportError, AttributeError):
        pass
    tool = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if tool is None:
        raise SystemExit(f"sparse24: building needs {name}; `pip install {name}`, or the system's package of that name")
    return tool


def build_library() -> Path:
    """The library, built or named by the user. The build folder stays, so that a second build is quick."""
    ready = os.environ.get("SPARSE24_LIBRARY")
    if ready:
        library = Path(ready).resolve()
        if not library.is_file():
            raise SystemExit(f"sparse24: SPARSE24_LIBRARY={ready} is not a file; it must name a ready {LIBRARY}")
        return library
    choice = os.environ.get("SPARSE24_CUDA") or "auto"
    folder = ROOT / "build" / {"0": "cpu", "1": "cuda"}.get(choice, "auto")
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DSPARSE24_CUDA={choice}", f"-DSPARSE24_PYTHON={sys.executable}"]
    configure += [f"-DSPARSE24_CUDA_ARCHS={os.environ.get('SPARSE24_CUDA_ARCHS', '')}"]  # a cached choice is not kept
    subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", str(folder), "--target", "sparse24"], check=True)
    return folder / LIBRARY


class BuildLibraryThenBinding(build_ext):
    def build_extensions(self) -> None:
        self.library = build_library()
        for extension in self.extensions:
            # By path, not by -L: folders searched earlier may hold another libsparse24.
            extension.extra_objects = [str(self.library)]
        super().build_extensions()
        self._put_library(Path(self.build_lib) / "sparse24")

    def copy_extensions_to_source(self) -> None:  # editable installs
        super().copy_extensions_to_source()
        self._put_library(ROOT / "sparse24")

    def _put_library(self, folder: Path) -> None:
        # To a new file, then renamed: a process that has the old library loaded keeps it intact.
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{LIBRARY}.{os.getpid()}"
        shutil.copyfile(self.library, scratch)
        os.replace(scratch, folder / LIBRARY)


class BuildPythonAndHeaders(build_py):
    """Installs the public C++ headers beside the library."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                ROOT / "csrc" / "include" / "sparse24",
                Path(self.build_lib) / "sparse24" / "include" / "sparse24",
                dirs_exist_ok=True,
            )


def relative_paths(folder: str, pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).rglob(pattern))]


binding = Extension(
    "sparse24._C",
    sources=["csrc/bindings/python_api.cpp"],  # which includes the others
    include_dirs=["csrc", "csrc/include", pybind11.get_include()],
    depends=relative_paths("csrc/include", "*.h") + relative_paths("csrc/bindings", "*"),
    language="c++",
    extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
    extra_link_args=["-Wl,-rpath,$ORIGIN"],
)

setup(
    ext_modules=[binding],
    cmdclass={"build_ext": BuildLibraryThenBinding, "build_py": BuildPythonAndHeaders},
)
