"""cmake/strict_nvcc.sh: which messages of ptxas fail the build, and which spills are known and borne."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.mark.parametrize(
    "message, status, expected",
    [
        ("all is well", 0, 0),
        ("ptxas info : (C7510) Potential Performance Loss", 0, 1),
        ("16 bytes stack frame, 8 bytes spill stores, 0 bytes spill loads", 0, 1),
        ("0 bytes stack frame, 0 bytes spill stores, 12 bytes spill loads", 0, 1),
        ("error", 3, 3),
    ],
)
def test_serialised_wgmma_and_spills_fail_the_build(tmp_path, message, status, expected):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "{message}"\ntouch "$2"\nexit {status}\n')
    compiler.chmod(0o755)
    target = tmp_path / "kernel.o"
    done = run("sh", ROOT / "cmake" / "strict_nvcc.sh", compiler, "-o", target)
    assert done.returncode == expected
    assert message in done.stderr
    assert target.exists() == (expected != 1), "an object that is refused must not survive for the next build"


def spilling(tmp_path, *kernels):
    """A compiler whose ptxas tells of (symbol of a kernel, GPU, bytes that it spills)."""
    shutil.copy(ROOT / "cmake" / "strict_nvcc.sh", tmp_path)
    told = [
        line
        for symbol, arch, bytes_ in kernels
        for line in (
            f"ptxas info : Compiling entry function '_ZN7cutlass13device_kernelIN8sparse24{symbol}EEEv' for '{arch}'",
            f"    32 bytes stack frame, {bytes_ and 4} bytes spill stores, {bytes_} bytes spill loads",
        )
    ]
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(told) + "\nEND\n")
    compiler.chmod(0o755)
    return "sh", tmp_path / "strict_nvcc.sh", compiler, "-o"


@pytest.mark.parametrize("file", ["Known", "group_0"])
@pytest.mark.parametrize(
    "kernel, bytes_, expected", [("5Known", 24, 0), ("5Known", 28, 1), ("8NewKnown", 4, 1), ("3New", 4, 1)]
)
def test_spills_are_allowed_by_kernel_and_bytes(tmp_path, file, kernel, bytes_, expected):
    (tmp_path / "allowed_spills.txt").write_text("# kernel bytes\nsm90/Known 24\nsm80/New 24\n")
    others = ("5Other", "sm_90a", 0), ("5Known", "sm_90a", 20)
    for kernels in ((*others, (kernel, "sm_90a", bytes_)), ((kernel, "sm_90a", bytes_), *others)):
        done = run(*spilling(tmp_path, *kernels), f"build/gemm/sm90/{file}.cu.o")
        assert done.returncode == expected
        told = "24 bytes allowed for sm90/Known" if kernel == "5Known" else "0 bytes allowed for this kernel"
        assert (told in done.stderr) == (expected == 1)


@pytest.mark.parametrize("spilled_on, expected", [("sm_90", 0), ("sm_89", 1)])
def test_spills_may_be_allowed_on_one_architecture_alone(tmp_path, spilled_on, expected):
    (tmp_path / "allowed_spills.txt").write_text("sm89/Known 24 sm_90\n")
    kernels = [("5Known", arch, 24 * (arch == spilled_on)) for arch in ("sm_89", "sm_90")]
    done = run(*spilling(tmp_path, *kernels), "build/gemm/sm89/Known.cu.o")
    assert done.returncode == expected


def test_every_kernel_that_may_spill_is_in_the_table_of_kernels():
    allowed = [line.split() for line in (ROOT / "cmake/allowed_spills.txt").read_text().splitlines() if line[0] != "#"]
    for name, most, *_ in allowed:
        arch, kernel = name.split("/")
        row = f"SP24_GEMM_KERNEL({', '.join(kernel.split('_'))})"
        assert row in (ROOT / f"csrc/gemm/{arch}/kernels.def").read_text() and int(most) > 0


def test_what_ptxas_tells_of_a_good_kernel_is_not_shown(tmp_path):
    told = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "ptxas info    : Used 168 registers"\necho "    {told}"\necho note\n')
    compiler.chmod(0o755)
    done = run("sh", ROOT / "cmake" / "strict_nvcc.sh", compiler)
    assert (done.returncode, done.stderr.strip()) == (0, "note")
