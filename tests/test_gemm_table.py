"""The tables of GEMM kernels: what they hold, and the source files that CMake makes of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^SP24_GEMM_KERNEL\((.*)\)$", re.MULTILINE)


ARCHS = ("sm80", "sm89", "sm90")


def rows(arch: str = "sm90") -> list[list[str]]:
    table = (ROOT / "csrc" / "gemm" / arch / "kernels.def").read_text()
    return [[cell.strip() for cell in row.split(",")] for row in ROW.findall(table)]


def find_cmake() -> str:
    try:
        import cmake
    except ImportError:
        found = shutil.which("cmake")
    else:
        found = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    if not found:
        pytest.skip("no cmake")
    return found


def generate(folder: Path, arch: str, *settings: str) -> list[Path]:
    script = ROOT / "cmake" / "GemmKernels.cmake"
    subprocess.run([find_cmake(), f"-DARCH={arch}", f"-DFOLDER={folder}", *settings, "-P", str(script)], check=True)
    return sorted(folder.glob("*.cu"))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_gets_a_file_that_defines_its_kernel(tmp_path, arch):
    written = {path.stem: path.read_text() for path in generate(tmp_path, arch)}
    assert sorted(written) == sorted("_".join(row) for row in rows(arch))
    for row in rows(arch):
        (arguments,) = re.findall(r"SP24_DEFINE_GEMM_KERNEL\(([^)]*)\)", written["_".join(row)])
        assert [cell.strip() for cell in arguments.split(",")] == row


@pytest.mark.parametrize("arch", ARCHS)
def test_grouped_files_define_every_kernel_once(tmp_path, arch):
    defined = []
    for path in generate(tmp_path, arch, "-DSPARSE24_GEMM_GROUP=4"):
        found = re.findall(r"SP24_DEFINE_GEMM_KERNEL\(([^)]*)\)", path.read_text())
        assert path.stem.startswith("group_") and 1 <= len(found) <= 4
        defined += ["_".join(row.split(", ")) for row in found]
    assert sorted(defined) == sorted("_".join(row) for row in rows(arch))
    assert len(list(tmp_path.iterdir())) == {"sm80": 2, "sm89": 1, "sm90": 10}[arch]


@pytest.mark.parametrize("arch", ARCHS)
def test_files_that_need_not_change_are_not_written_again(tmp_path, arch):
    before = {path: path.stat().st_mtime_ns for path in generate(tmp_path, arch)}
    spoiled = next(iter(before))
    spoiled.write_text("")
    after = {path: path.stat().st_mtime_ns for path in generate(tmp_path, arch)}
    assert [path for path in before if after[path] != before[path]] == [spoiled]
    assert spoiled.read_text() != ""


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_is_listed_twice(arch):
    assert len({tuple(row) for row in rows(arch)}) == len(rows(arch))


@pytest.mark.parametrize("archs, most", [(("sm80", "sm89"), 9), (("sm90",), 37)])
def test_the_tables_stay_small_enough_to_compile(archs, most):
    assert 0 < sum(len(rows(arch)) for arch in archs) <= most


def test_each_pass_and_dtype_writes_both_output_dtypes():
    wanted = {
        (pass_, "Plain", dtype, out)
        for pass_ in ("Forward", "GradInput", "GradWeight")
        for dtype in ("BFloat16", "Float16")
        for out in (dtype, "Float32")
    }
    assert wanted <= {tuple(row[:4]) for row in rows()}


def test_products_of_activations_write_the_dtype_of_their_operands():
    wanted = {(pass_, dtype) for pass_ in ("ForwardOfInput", "GradInputOfOutput") for dtype in ("BFloat16", "Float16")}
    found = [row for row in rows() if row[0] in {pass_ for pass_, _ in wanted}]
    assert {(row[0], row[2]) for row in found} == wanted
    assert all(row[2] == row[3] for row in found)


def test_8_bit_products_have_both_accumulations():
    sums = ("Fast", "Promoted")
    wanted = {(pass_, "Plain", "BFloat16", kind) for pass_ in ("Forward", "GradWeight") for kind in sums}
    assert wanted <= {(row[0], row[1], row[3], row[4]) for row in rows() if row[2] == "Float8E4M3"}
