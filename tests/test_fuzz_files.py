"""Compressed files, states and checkpoints with random damage: what was written, or a named error and nothing changed.

Damage is of two kinds. Of the bytes: cut, flipped, zeroed, swapped with those of another file; digests must see it.
Of the content, with digests made anew, as a careless or hostile writer would leave it: rules on content must see it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import JUNK, everything, fuzz_files, places
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import make, rewrite, run
from tiny_models import MLP

import sparse24
from sparse24 import Sparse24Error
from sparse24.save import load_checkpoint, load_compressed, save_checkpoint
from sparse24.save.exporting import DIGEST, HEADER, _digest
from sparse24.save.folders import STATE, WEIGHTS

#: options of an optimizer that torch refuses in words of its own where they do not go together
OF_TORCH = {"capturable", "differentiable", "foreach", "fused"}
VALUES = (None, -1, 0, 3, 2**31, 2**63, 10**30, 0.5, True, "x", "", [], {}, [1], {"rows": 4}, "fc1.weight")


# ---- bytes ----------------------------------------------------------------------------------------------------------


def damage_bytes(draw, content: bytes, other: bytes) -> bytes:
    """`content` with damage of one kind and any size; `other` is a file of the same kind."""
    start, size = draw.randrange(len(content)), 1 << draw.randrange(14)
    kind = draw.pick(["flip", "cut", "zeros", "swap", "insert", "remove", "other's", "empty"])
    piece = content[start : start + size]
    if kind == "flip":
        return content[:start] + bytes([content[start] ^ (1 << draw.randrange(8))]) + content[start + 1 :]
    if kind == "cut":
        return content[:start]
    if kind == "zeros":
        return content[:start] + bytes(len(piece)) + content[start + len(piece) :]
    if kind == "swap":
        to = draw.randrange(len(content))
        return content[:to] + piece + content[to + len(piece) :]
    if kind == "insert":
        return content[:start] + piece + content[start:]
    if kind == "remove":
        return content[:start] + content[start + size :]
    return other[: len(content)] if kind == "other's" else b""


@functools.cache
def compressed_files(folder: Path) -> tuple[Path, Path]:
    paths = folder / "one", folder / "other"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        model = MLP()
        sparse24.sparsify(model)
        sparse24.export(model, path, format="compressed")
    return paths


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_of_the_two(found: dict, folder: Path) -> bool:
    return any(equal(found, load_compressed(path)) for path in compressed_files(folder))


@fuzz_files(100)
def test_damaged_bytes_of_a_compressed_file(folder, draw):
    folder.mkdir()
    one, other = compressed_files(folder.parent)
    path = folder / "damaged"
    path.write_bytes(damage_bytes(draw, one.read_bytes(), other.read_bytes()))
    try:
        found = load_compressed(path)
    except Sparse24Error as error:
        assert len(str(error)) > 20
    else:  # white space of the header, or all of another file
        assert one_of_the_two(found, folder.parent)


# ---- content, sealed anew -------------------------------------------------------------------------------------------


def change_header(draw, header: dict) -> None:
    """Anything in any place of the header, a field gone, or one more."""
    place = draw.pick(list(places(header)) or [("version",)])
    holder = functools.reduce(lambda part, key: part[key], place[:-1], header)
    kind = draw.pick(["value", "value", "value", "gone", "more" if isinstance(holder, dict) else "gone"])
    if kind == "value":
        holder[place[-1]] = copy.deepcopy(draw.pick(VALUES))
    elif kind == "gone":
        with contextlib.suppress(KeyError):  # the header that an earlier change has emptied
            del holder[place[-1]]
    else:
        holder["more"] = {"rows": 8, "cols": 8, "transposed": False}


def change_tensors(draw, tensors: dict) -> None:
    """A tensor of another dtype or shape, with other bytes, gone, or swapped with another."""
    name, other = draw.pick(list(tensors)), draw.pick(list(tensors))
    kind, t = draw.pick(["dtype", "cut", "flat", "bytes", "gone", "swap"]), tensors[name]
    if kind == "dtype":
        tensors[name] = t.to(draw.pick([torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64]))
    elif kind == "cut":
        tensors[name] = t[:-1].contiguous()
    elif kind == "flat":
        tensors[name] = t.reshape(-1)
    elif kind == "bytes":
        t.view(torch.uint8).view(-1)[draw.randrange(t.nbytes)] ^= 1 << draw.randrange(8)
    elif kind == "gone":
        del tensors[name]
    else:
        tensors[name], tensors[other] = tensors[other], tensors[name]


@fuzz_files(100)
def test_any_content_of_a_compressed_file(folder, draw):
    """What is taken holds 2:4 weights of the shapes that the header names."""
    folder.mkdir()
    path = compressed_files(folder.parent)[0]
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}
    header = json.loads(metadata[HEADER])
    for _ in range(draw.randint(1, 2)):
        change_header(draw, header) if draw.random() < 0.5 else change_tensors(draw, tensors)
    metadata[HEADER] = json.dumps(header)
    metadata[DIGEST] = _digest(tensors, metadata[HEADER])
    save_file(tensors, folder / "changed", metadata=metadata)
    try:
        found = load_compressed(folder / "changed")
    except Sparse24Error as error:
        assert len(str(error)) > 20
        return
    for key, shape in header.get("layers", {}).items():
        weight = found[key].t() if shape["transposed"] else found[key]
        assert tuple(weight.shape) == (shape["rows"], shape["cols"])
        assert ((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@functools.cache
def checkpoints_of(folder: Path) -> list[Path]:
    saved = []
    for seed in (0, 7):
        model, optimizer, recipe = make(seed, model=MLP())
        run(model, optimizer, 0, 5)
        saved.append(save_checkpoint(folder / f"of {seed}", model, optimizer, recipe))
    return saved


@functools.cache
def objects_to_load_into(folder: Path):
    """Objects of a test's folder, made once and again after a load; and what they are before one."""
    objects = make(seed=1, model=MLP())
    run(*objects[:2], 0, 3)
    return objects, before_load(objects)


def before_load(objects):
    model, optimizer, recipe = objects
    return everything(model, recipe), copy.deepcopy(optimizer.state_dict())


def assert_unchanged(objects, before):
    now, moments = before_load(objects)
    assert now == before[0], "model or recipe changed"
    assert moments["param_groups"] == before[1]["param_groups"]
    for key, values in moments["state"].items():
        assert all(torch.equal(value, before[1]["state"][key][name]) for name, value in values.items())


@fuzz_files(60)
def test_damaged_bytes_of_a_checkpoint(folder, draw):
    (one, other), (objects, before) = checkpoints_of(folder.parent), objects_to_load_into(folder.parent)
    copied = Path(shutil.copytree(one, folder))
    name = draw.pick([WEIGHTS, STATE, "SHA256SUMS"])
    whole = (one / name).read_bytes()
    content = damage_bytes(draw, whole, (other / name).read_bytes())
    (copied / name).write_bytes(content)
    if content == whole:
        return
    with pytest.raises(Sparse24Error):
        load_checkpoint(copied, *objects)
    assert_unchanged(objects, before)


@fuzz_files(60)
def test_any_content_of_a_checkpoint(folder, draw):
    """Junk in one place of a state that is sealed anew: refused with nothing changed, or training goes on from it."""
    (one, _), (objects, before) = checkpoints_of(folder.parent), objects_to_load_into(folder.parent)
    copied = Path(shutil.copytree(one, folder))
    state = torch.load(copied / STATE, weights_only=True)
    place = draw.pick([place for place in places(state) if place[0] != "extra" and place[-1] not in OF_TORCH])
    junk = draw.pick(JUNK)
    junk = junk if junk is ... else copy.deepcopy(junk)

    def changed(part):
        part = copy.deepcopy(part)
        holder = functools.reduce(lambda inner, key: inner[key], place[1:-1], part)
        if junk is ...:
            del holder[place[-1]]
        else:
            holder[place[-1]] = junk
        return part

    rewrite(copied, **{place[0]: junk if len(place) == 1 else changed})
    try:
        load_checkpoint(copied, *objects)
    except Sparse24Error as error:
        assert len(str(error)) > 20
        assert_unchanged(objects, before)
        return
    objects_to_load_into.cache_clear()
    run(*objects[:2], 5, 6)
    assert objects[2].step == 6
