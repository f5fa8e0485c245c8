"""The build: what the library needs and exports, what an sdist holds, what the build says when something is missing."""

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import sparse24

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(sparse24.__file__).parent
LIBRARY = PACKAGE / "libsparse24.so"

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the package has no compiled library")


def find_cmake() -> str | None:
    beside = Path(sys.executable).parent / "cmake"
    return str(beside) if beside.exists() else shutil.which("cmake")


needs_cmake = pytest.mark.skipif(find_cmake() is None, reason="cmake was not found")


def run(*command, **environment):
    """Run a command; environment entries that are None are removed."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, env=env)


def run_cmake_function(tmp_path: Path, module: str, call: str, **environment):
    """Call one function of cmake/*.cmake in a script; its last argument `result` is printed."""
    script = tmp_path / "call.cmake"
    script.write_text(
        f"cmake_minimum_required(VERSION 3.20)\ninclude({ROOT}/cmake/{module})\n"
        f'{call}\nmessage(STATUS "got ${{result}}")\n'
    )
    done = run(find_cmake(), "-P", script, **environment)
    done.text = " ".join((done.stdout + done.stderr).split())
    return done


# ---- the library ----------------------------------------------------------------------------------------------------


@needs_library
def test_library_needs_no_driver_and_exports_its_own_names_only():
    if not shutil.which("readelf"):
        pytest.skip("readelf was not found")
    done = run("sh", ROOT / "cmake" / "check_library.sh", LIBRARY)
    assert done.returncode == 0, done.stderr


@needs_library
def test_library_loads_and_has_the_package_version():
    ctypes.CDLL(str(LIBRARY))
    from sparse24 import _C

    assert _C.version() == sparse24.__version__


@needs_library
def test_errors_of_the_library_are_errors_of_the_package():
    from sparse24 import _C

    with pytest.raises(sparse24.errors.Sparse24Error, match="k must not be negative, got -4"):
        _C.count_bad_metadata(0, 64, -4, 0, 0, 0, 0)
    with pytest.raises(sparse24.errors.Sparse24Error, match="dtype code must be between 0 and 4, got 9"):
        _C.mask_gap((0, 9, 4, 4, 4, 1), 0, 0, 0, 0)
    with pytest.raises(sparse24.errors.Sparse24Error, match="tuple of 4 fields"):
        _C.mask_flips([(0, 0, 0)], 0, 0, 0)


@needs_library
def test_no_function_of_the_binding_takes_more_than_12_arguments():
    """What belongs together travels as a tuple. Signatures are those that pybind11 writes into docstrings."""
    from sparse24 import _C

    counts = {
        name: max(line.count(": ") for line in function.__doc__.splitlines() if line.startswith(f"{name}("))
        for name, function in vars(_C).items()
        if callable(function)
    }
    assert len(counts) > 20 and {name: count for name, count in counts.items() if count > 12} == {}


# ---- packaging ------------------------------------------------------------------------------------------------------


def test_sdist_holds_every_source(tmp_path):
    pytest.importorskip("pybind11")
    tracked = run("git", "-C", ROOT, "ls-files")
    if tracked.returncode != 0 or not tracked.stdout:
        pytest.skip("not a git checkout")
    done = run(
        sys.executable, ROOT / "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {name for name in tracked.stdout.split("\n") if name and (ROOT / name).exists()}
    missing = {name for name in wanted - packed if not name.startswith(".git")}
    assert not missing, "MANIFEST.in forgets them"
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def test_a_wheel_is_built_for_each_python_that_starts(tmp_path, monkeypatch):
    """A shim of pyenv lies on the PATH and does not start; below pyenv there is one that does."""
    monkeypatch.syspath_prepend(ROOT / "packaging")
    import wheels

    def script(path, code):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nexit {code}\n")
        path.chmod(0o755)
        return str(path)

    script(tmp_path / "bin" / "python3.10", 127)
    script(tmp_path / "bin" / "python3.11", 127)
    on_path = script(tmp_path / "bin" / "python3.12", 0)
    below = script(tmp_path / "pyenv" / "versions" / "3.11.7" / "bin" / "python3.11", 0)
    script(tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python3.12", 0)  # a second of its version
    script(tmp_path / "pyenv" / "versions" / "3.9.1" / "bin" / "python3.9", 0)  # too old
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert [path for path in wheels.pythons() if str(tmp_path) in path] == [below, on_path]


def build_binding(tmp_path, library, **environment):
    """`setup.py build_ext` around a ready library."""
    pytest.importorskip("pybind11")
    build = ("build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    return run(sys.executable, ROOT / "setup.py", "-q", *build, SPARSE24_LIBRARY=str(library), **environment)


def test_a_ready_library_is_taken_as_it_is(tmp_path):
    """The compiler stands in for one: what it is asked to do is written down. packaging/wheels.py has a real one."""
    ready, asked = tmp_path / "ready" / "libsparse24.so", tmp_path / "asked"
    ready.parent.mkdir()
    ready.write_bytes(b"a library")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nwhile [ "$1" != -o ]; do shift; done\necho made > "$2"\n')
    compiler.chmod(0o755)
    done = build_binding(tmp_path, ready, CC=str(compiler), CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "sparse24"
    (binding,) = built.glob("_C*.so")
    assert (built / "libsparse24.so").read_bytes() == b"a library" and binding.read_text() == "made\n"
    compiled, linked = (line.split() for line in asked.read_text().splitlines())
    assert "csrc/bindings/python_api.cpp" in " ".join(compiled) and str(ready) in linked
    assert "-Wl,-rpath,$ORIGIN" in linked, "it finds the library beside it"


def test_a_ready_library_that_is_not_there_is_named(tmp_path):
    done = build_binding(tmp_path, "/no/such/lib.so")
    assert done.returncode != 0
    assert "SPARSE24_LIBRARY=/no/such/lib.so is not a file" in done.stderr


# ---- CMake's decisions ----------------------------------------------------------------------------------------------


@needs_cmake
@pytest.mark.parametrize("choice, text", [("0", "got FALSE"), ("maybe", "must be 1, 0 or auto, got 'maybe'")])
def test_cuda_choice_by_environment(tmp_path, choice, text):
    done = run_cmake_function(tmp_path, "CudaChoice.cmake", "sparse24_choose_cuda(result)", SPARSE24_CUDA=choice)
    assert text in done.text


@needs_cmake
def test_cuda_without_nvcc_says_so(tmp_path):
    without = {"PATH": "/nowhere", "CUDACXX": None, "CUDA_HOME": None, "CUDA_PATH": None}
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is in its default place")
    done = run_cmake_function(
        tmp_path, "CudaChoice.cmake", "sparse24_choose_cuda(result)", SPARSE24_CUDA="1", **without
    )
    assert done.returncode != 0 and "SPARSE24_CUDA=1 needs nvcc" in done.text and "SPARSE24_CUDA=0" in done.text


@needs_cmake
@pytest.mark.parametrize(
    "asked, archs",
    [
        ("all", "80;86;89;90a;89-virtual"),
        ("80;90a", "80;90a"),
        (" 86, 80-virtual ", "86;80-virtual"),
        ("80 80", "80"),
    ],
)
def test_gpus_to_compile_for_by_environment(tmp_path, asked, archs):
    done = run_cmake_function(tmp_path, "CudaArchs.cmake", "sparse24_cuda_archs(result)", SPARSE24_CUDA_ARCHS=asked)
    assert done.returncode == 0 and done.text.endswith(f"got {archs}")


@needs_cmake
@pytest.mark.fault(99)
@pytest.mark.parametrize("asked", ["75", "80;sm_90", "all;80", "90"])
def test_gpus_that_nothing_can_be_compiled_for_are_named(tmp_path, asked):
    done = run_cmake_function(tmp_path, "CudaArchs.cmake", "sparse24_cuda_archs(result)", SPARSE24_CUDA_ARCHS=asked)
    assert done.returncode != 0
    assert f"must be all, or a list of 80;86;89;90a;80-virtual;86-virtual;89-virtual, got '{asked}'" in done.text


@needs_cmake
@pytest.mark.parametrize(
    "capabilities, archs",
    [("8.6", "86"), ("9.0 9.0", "90a"), ("8.0 9.0", "80;90a"), ("8.7", "86"), ("12.0", "89-virtual"), ("7.5", "90a")],
)
def test_the_default_is_what_the_gpus_of_this_machine_need(tmp_path, capabilities, archs):
    found = tmp_path / "bin" / "nvidia-smi"
    found.parent.mkdir()
    found.write_text(f"#!/bin/sh\nprintf '%s\\n' {capabilities}\n")
    found.chmod(0o755)
    without = {"SPARSE24_CUDA_ARCHS": None, "PATH": f"{found.parent}:{os.environ['PATH']}"}
    done = run_cmake_function(tmp_path, "CudaArchs.cmake", "sparse24_cuda_archs(result)", **without)
    assert done.text.endswith(f"got {archs}")
    found.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    done = run_cmake_function(tmp_path, "CudaArchs.cmake", "sparse24_cuda_archs(result)", **without)
    assert done.text.endswith("got 90a"), "without a GPU, Hopper"


@needs_cmake
@pytest.mark.parametrize(
    "asked, version, fails",
    [(None, "13.0.88", True), (None, "12.8.93", False), ("0", "13.0.88", False), ("1", "12.8.93", True),
     ("auto", "13.0.88", True), ("OFF", "13.0.88", False)],
)  # fmt: skip
def test_spills_fail_the_build_with_the_compiler_of_the_list_or_as_asked(tmp_path, asked, version, fails):
    call = f"sparse24_fail_on_spills(result {version})"
    done = run_cmake_function(tmp_path, "CudaChoice.cmake", call, SPARSE24_FAIL_ON_SPILLS=asked)
    assert done.text.endswith(f"got {str(fails).upper()}")


@needs_cmake
def test_choices_of_the_environment_are_not_kept_by_a_build_folder(tmp_path):
    """What the build says to somebody whose compiler spills is to set a variable, and to build again."""
    configure = (find_cmake(), "-S", ROOT, "-B", tmp_path, "-DSPARSE24_CUDA=0")
    for asked in (None, "0"):
        done = run(*configure, SPARSE24_FAIL_ON_SPILLS=asked, SPARSE24_CUDA_ARCHS=None)
        assert done.returncode == 0, done.stderr
        assert "SPARSE24_FAIL_ON_SPILLS:STRING=\n" in (tmp_path / "CMakeCache.txt").read_text()


@needs_cmake
def test_flags_of_nvcc_for_real_code_and_for_ptx(tmp_path):
    done = run_cmake_function(tmp_path, "CudaArchs.cmake", "sparse24_gencode(result 80 90a 89-virtual)")
    assert done.text.endswith(
        "got -gencode=arch=compute_80,code=sm_80;-gencode=arch=compute_90a,code=sm_90a;"
        "-gencode=arch=compute_89,code=compute_89"
    )


@needs_cmake
@pytest.mark.parametrize("below", [".", "include", "cutlass_library/source/include"])
def test_cutlass_dir_may_be_a_checkout_or_the_wheel(tmp_path, below):
    header = tmp_path / "cutlass dir" / below / "cutlass"
    header.mkdir(parents=True)
    (header / "cutlass.h").touch()
    (header / "version.h").write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    done = run_cmake_function(
        tmp_path, "Cutlass.cmake", "sparse24_find_cutlass(result)", CUTLASS_DIR=str(tmp_path / "cutlass dir")
    )
    assert done.returncode == 0, done.text
    assert f"got {header.parent}" in done.text

    (header / "version.h").write_text("#define CUTLASS_MAJOR 3\n#define CUTLASS_MINOR 9\n")
    done = run_cmake_function(
        tmp_path, "Cutlass.cmake", "sparse24_find_cutlass(result)", CUTLASS_DIR=str(tmp_path / "cutlass dir")
    )
    assert done.returncode != 0 and "4.2 or later is needed" in done.text


@needs_cmake
def test_cutlass_dir_without_headers_is_named(tmp_path):
    done = run_cmake_function(
        tmp_path, "Cutlass.cmake", "sparse24_find_cutlass(result)", CUTLASS_DIR=str(tmp_path / "empty")
    )
    assert done.returncode != 0 and "has no cutlass/cutlass.h" in done.text


def fake_python(tmp_path: Path, body: str) -> Path:
    """Stands in for the interpreter that downloads by pip."""
    program = tmp_path / "bin" / "python3"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return program


@needs_cmake
@pytest.mark.parametrize(
    "body, text",
    [
        ("echo no route to the index >&2; exit 1", "no route to the index"),
        # A file of the right name with other bytes; --dest is followed by the folder.
        (
            'while [ "$1" != --dest ]; do shift; done; echo tampered > "$2/nvidia_cutlass-4.2.0.0-py3-none-any.whl"',
            "not the file we know",
        ),
    ],
    ids=["offline", "tampered"],
)
def test_failed_cutlass_download_names_both_remedies(tmp_path, body, text):
    call = f"set(SPARSE24_PYTHON {fake_python(tmp_path, body)})\nsparse24_find_cutlass(result)"
    cache = tmp_path / "cache"
    done = run_cmake_function(tmp_path, "Cutlass.cmake", call, CUTLASS_DIR=None, XDG_CACHE_HOME=str(cache))
    assert done.returncode != 0
    assert text in done.text and "package index" in done.text and "set CUTLASS_DIR" in done.text
    assert list(cache.rglob("*.whl")) == [], "nothing half-done stays in the cache"


@needs_cmake
def test_gemm_jobs_follow_cores_and_memory(tmp_path):
    done = run_cmake_function(tmp_path, "GemmJobs.cmake", "sparse24_gemm_jobs(result)")
    jobs = int(done.text.rpartition("got ")[2])
    assert 1 <= jobs <= (os.cpu_count() or 1)
    done = run_cmake_function(tmp_path, "GemmJobs.cmake", "set(SPARSE24_GEMM_JOBS 7)\nsparse24_gemm_jobs(result)")
    assert done.text.endswith("got 7")
