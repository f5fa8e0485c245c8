"""The table of GEMM kernels and the files that instantiate them say the same."""

from __future__ import annotations

import re
from pathlib import Path

GEMM = Path(__file__).resolve().parents[1] / "csrc" / "gemm"
ROW = re.compile(r"^SP24_GEMM_KERNEL\((.*)\)$", re.MULTILINE)
SHORT = {
    "Forward": "forward",
    "GradInput": "grad_input",
    "GradWeight": "grad_weight",
    "ActivatedForward": "activated_forward",
    "GatedForward": "gated_forward",
    "BFloat16": "bf16",
    "Float16": "fp16",
    "Float32": "fp32",
}


def rows() -> list[list[str]]:
    return [[cell.strip() for cell in row.split(",")] for row in ROW.findall((GEMM / "kernels.def").read_text())]


def file_name(row: list[str]) -> str:
    names, (tile_m, tile_n, tile_k, cluster_m, cluster_n) = [SHORT[cell] for cell in row[:3]], row[3:]
    return f"{'_'.join(names)}_{tile_m}x{tile_n}x{tile_k}_c{cluster_m}x{cluster_n}.cu"


def test_every_row_has_its_file_and_every_file_its_row():
    assert sorted(file_name(row) for row in rows()) == sorted(p.name for p in (GEMM / "instantiations").glob("*.cu"))


def test_every_file_defines_the_kernel_it_is_named_after():
    for row in rows():
        text = (GEMM / "instantiations" / file_name(row)).read_text()
        (arguments,) = re.findall(r"SP24_DEFINE_GEMM_KERNEL\(([^)]*)\)", text)
        assert [cell.strip() for cell in arguments.split(",")] == row


def test_the_table_stays_small_enough_to_compile():
    assert 0 < len(rows()) <= 24


def test_each_pass_and_dtype_writes_both_output_dtypes():
    wanted = {
        (pass_, dtype, out)
        for pass_ in ("Forward", "GradInput", "GradWeight")
        for dtype in ("BFloat16", "Float16")
        for out in (dtype, "Float32")
    }
    assert wanted <= {tuple(row[:3]) for row in rows()}
