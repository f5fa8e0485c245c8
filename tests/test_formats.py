"""The table of element formats: its twin in C++, and what is derived from it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from sparse24 import _library, formats, ops
from sparse24.formats import FORMATS


@pytest.mark.skipif(not hasattr(_library.binding(), "packed_formats"), reason="nothing is compiled")
def test_the_table_is_that_of_the_library():
    """Each format of csrc/common/format.h, field by field; fp32 and fp64 are packed on the CPU alone."""
    ours = {
        (f.code, str(f.dtype).removeprefix("torch."), f.bytes, f.per_vector, f.meta_tile_k, f.token_step, f.mn_major,
         f.scaled, FORMATS[f.wide_dtype].code)
        for f in FORMATS.values() if f.code >= 0 and f.bytes < 4
    }  # fmt: skip
    assert ours == set(_library.binding().packed_formats())


def test_dtypes_of_each_rule_are_those_of_the_table():
    assert formats.HALF_DTYPES == (torch.bfloat16, torch.float16)
    assert formats.WEIGHT_DTYPES == (torch.float32, torch.bfloat16, torch.float16)
    assert formats.FLOAT8_DTYPES == (torch.float8_e4m3fn, torch.float8_e5m2)
    assert formats.DTYPE_CODE[torch.float8_e5m2] == 4 and torch.float64 not in formats.DTYPE_CODE
    assert all(f.dtype == dtype and f.bytes == dtype.itemsize for dtype, f in FORMATS.items())

    assert [dtype for dtype in formats.WEIGHT_DTYPES if FORMATS[dtype].wants_loss_scaling] == [torch.float16]
    assert formats.names(formats.WEIGHT_DTYPES) == "float32, bfloat16 or float16"
    assert formats.packed_dtype(torch.float32, True) == torch.bfloat16 == formats.DEFAULT_DTYPE
    assert formats.packed_dtype(torch.float16, True) == formats.packed_dtype(torch.float16, False) == torch.float16
    assert formats.packed_dtype(torch.float64, False) == torch.float64


#: who names formats beside the table: what is timed, and what trainers call theirs
NAMES_DTYPES = ("benchmark", "integrations")
FORMAT_NAMES = {str(dtype).removeprefix("torch.") for dtype in FORMATS if dtype.itemsize < 4}


def named_formats(source: str) -> list[int]:
    """Lines that name a 16- or 8-bit dtype of torch: as an attribute, a string that is one, or `x.half()`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in FORMAT_NAMES | {"half"})
        or (isinstance(node, ast.Constant) and node.value in FORMAT_NAMES)
    ]


def test_only_the_table_names_formats():
    """A rule that asks `dtype == torch.bfloat16` elsewhere would forget the next format."""
    package = Path(formats.__file__).parent
    found = [
        f"{path.relative_to(package)}:{line}"
        for path in sorted(package.rglob("*.py"))
        if path != Path(formats.__file__) and path.relative_to(package).parts[0] not in NAMES_DTYPES
        for line in named_formats(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source", ["x.dtype == torch.float16", "getattr(torch, 'bfloat16')", "x.half()", "E4M3 = torch.float8_e4m3fn"]
)
def test_the_search_for_names_finds_them(source):
    assert named_formats(source) == [1]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("m, k", [(0, 0), (1, 4), (64, 64), (65, 132), (200, 256), (128, 320)])
def test_every_byte_of_E_has_one_place(dtype, m, k):
    order = formats.metadata_order(m, k, dtype)
    size = ops.metadata_bytes(m, k, dtype)
    assert order.numel() == size
    assert torch.equal(order.flatten().sort().values, torch.arange(size))


def test_the_order_of_8_bit_values_is_written_out():
    """byte(m, k) = ((k/128) * ceil(m/64) + m/64) * 1024 + (m%64) * 16 + (k%128)/8, element by element."""
    m, k = 130, 300
    order = formats.metadata_order(m, k, torch.float8_e4m3fn)
    assert order.shape == (192, 384 // 8)
    for row, col in [(0, 0), (1, 8), (63, 120), (64, 0), (129, 296), (191, 376)]:
        expected = ((col // 128) * 3 + row // 64) * 1024 + (row % 64) * 16 + (col % 128) // 8
        assert order[row, col // 8] == expected
    assert formats.padded_tokens(33, torch.float8_e4m3fn) == 64 and formats.padded_tokens(33) == 40
