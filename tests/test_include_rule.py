"""Who may include whom in csrc (CONTRIBUTING.md has the map). Includes point one way:

bindings -> include/sparse24 <- api -> {cpu, fused} -> {mask, pack, activation}; api -> gemm -> activation;
all -> common

Siblings do not include one another: what two need goes down to common, what joins two goes up to fused.
"""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

#: folder -> folders whose headers it may include, besides its own
ALLOWED = {
    "include": set(),
    "common": {"include"},
    "mask": {"include", "common"},
    "pack": {"include", "common"},
    "activation": {"include", "common"},
    "gemm": {"include", "common", "activation"},
    "fused": {"include", "common", "mask", "pack", "activation"},
    "cpu": {"include", "common", "mask", "pack", "activation"},
    "api": {"include", "common", "mask", "pack", "activation", "gemm", "fused", "cpu"},
    "bindings": {"include"},
}

#: headers of others -> the folders that may include them
EXTERNAL = {
    r"(cutlass|cute)/": {"gemm"},
    r"pybind11/": {"bindings"},
    r"(torch|ATen|c10)/": set(),
    r"Python\.h": set(),
    r"cuda\w*\.h": {"common", "mask", "pack", "activation", "gemm", "fused", "api"},
}

INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.MULTILINE)

sources = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.is_file())


def folder_of(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def resolve(name: str, includer: Path) -> Path | None:
    """The file of ours that `#include "name"` means, if any."""
    for base in (includer.parent, CSRC, CSRC / "include"):
        if (base / name).is_file():
            return (base / name).resolve()
    return None


def violations(path: Path, text: str) -> list[str]:
    folder = folder_of(path)
    wrong = []
    for kind, name in INCLUDE.findall(text):
        own = resolve(name, path) if kind == '"' else None
        if own is not None:
            target = folder_of(own)
            if target != folder and target not in ALLOWED[folder]:
                wrong.append(f"{folder}/ may not include {name}")
            continue
        for pattern, folders in EXTERNAL.items():
            if re.match(pattern, name):
                if folder not in folders:
                    wrong.append(f"{folder}/ may not include {name}")
                break
        else:
            if kind == '"':
                wrong.append(f"there is no {name}")
    return wrong


@pytest.mark.parametrize("path", sources, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_one_way(path):
    assert folder_of(path) in ALLOWED, f"csrc/{folder_of(path)}/ has no place in the map: give it one here"
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    "folder, line",
    [
        ("mask", '#include "pack/pack_group.h"'),
        ("common", '#include "mask/block_search.h"'),
        ("gemm", '#include "mask/block_search.h"'),
        ("cpu", "#include <cuda_runtime_api.h>"),
        ("bindings", '#include "common/check.h"'),
        ("include", "#include <cuda_runtime_api.h>"),
        ("fused", "#include <cutlass/cutlass.h>"),
        ("fused", '#include "cute/tensor.hpp"'),
        ("bindings", "#include <torch/extension.h>"),
        ("mask", '#include "mask/no_such_file.h"'),
    ],
)
def test_the_rule_notices(folder, line):
    assert violations(CSRC / folder / "example.h", f"#pragma once\n{line}\n")
