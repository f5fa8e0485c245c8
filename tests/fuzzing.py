"""Random cases: how they are drawn, how many there are, and how one that failed is run again.

    SPARSE24_FUZZ_SEED=n     other cases than those that every run of the tests sees, ten times as many
    SPARSE24_FUZZ_CASES=n    how many, over all tests of test_fuzz*.py, in the shares that they have there
    SPARSE24_FUZZ_CASE=i     the case i of each test alone, as a failure names it

Cases are independent: each has a generator of its own, made from the seed, the test's name and its number.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import time

import pytest
import torch

from sparse24 import Sparse24Error, reference
from sparse24.testing import assert_same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64)
EXTENTS = (0, 1, 2, 3, 4, 5, 8, 12, 16, 20, 31, 64, 68)
BLOCKS = (4, 8, 12, 16, 20, 64, 68)
LAYOUTS = ("plain", "transposed", "every other", "offset", "padded rows", "expanded", "overlapping")
SEED = (11, 7)

FUZZ_SEED = os.environ.get("SPARSE24_FUZZ_SEED")
ONLY = os.environ.get("SPARSE24_FUZZ_CASE")
#: cases of all tests, as their decorators have them: what SPARSE24_FUZZ_CASES is divided by
ALL = 4600
TIMES = int(os.environ.get("SPARSE24_FUZZ_CASES", "0")) / ALL or (1 if FUZZ_SEED is None else 10)


def fuzz(cases: int):
    """A test (device, draw) that runs as many cases, each with a generator of its own."""

    def decorate(test):
        def run(device):
            run_cases(test, cases, device)

        run.__doc__ = test.__doc__
        return pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])(run)

    return decorate


def fuzz_files(cases: int):
    """The same of a test (folder, draw) of what files hold. Each gets an empty folder of its own."""

    def decorate(test):
        def run(tmp_path, kind):
            folders = (tmp_path / str(i) for i in itertools.count())
            run_cases(lambda _, draw: test(next(folders), draw), cases, kind, test.__name__)

        run.__doc__ = test.__doc__
        return pytest.mark.parametrize("kind", ["files"])(run)

    return decorate


def run_cases(test, cases: int, first_argument, name: str = "") -> None:
    name, seed, start = name or test.__name__, FUZZ_SEED or "0", time.monotonic()
    numbers = range(round(cases * TIMES)) if ONLY is None else [int(ONLY)]
    for number in numbers:
        try:
            test(first_argument, Draw(f"{seed} {name} {number}"))
        except Exception as error:
            again = f"SPARSE24_FUZZ_SEED={seed} SPARSE24_FUZZ_CASE={number} pytest tests -k {name}"
            raise AssertionError(f"case {number} of seed {seed}: {error!r}; again by {again}") from error
    print(f"{name}: {len(numbers)} cases of seed {seed} in {time.monotonic() - start:.0f} s")


class Draw(random.Random):
    """A generator of cases: numbers by `random.Random`, and tensors."""

    def pick(self, options):
        return options[int(self.random() * len(options))]

    def usually(self, usual, *others, share: float = 0.8):
        """`usual` in most cases, else one of `others`."""
        return usual if self.random() < share else self.pick(others)

    def shape(self) -> tuple[int, ...]:
        rank = self.pick((2, 2, 2, 2, 0, 1, 3))
        return tuple(self.pick(BLOCKS if self.random() < 0.5 else EXTENTS) for _ in range(rank))

    def tensor(self, shape=None, dtypes=DTYPES, layouts=LAYOUTS) -> torch.Tensor:
        """A tensor of `shape`, or of a few dimensions: small integers, or real numbers and a few special values."""
        shape, dtype = self.shape() if shape is None else tuple(shape), self.pick(dtypes)
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        values = torch.randint(-4, 5, shape, generator=generator).to(dtype)
        if dtype.is_floating_point and values.numel() and self.random() < 0.5:
            values = values + torch.rand(shape, generator=generator).to(dtype)
            special = self.pick([-0.0, float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).tiny / 2])
            values.view(-1)[self.randrange(values.numel())] = special
        return lay_out(values, self.pick(layouts))

    def mask(self, shape) -> torch.Tensor:
        """A mask that may fit a weight of `shape`, or not."""
        rows, cols = (n // 4 for n in shape)
        kind = self.usually("fits", "taller", "int32", "strided", "flat", share=0.6)
        rows += kind == "taller"
        generator = torch.Generator().manual_seed(self.randrange(100))
        mask = reference.transposable_mask(torch.randn(4 * rows, 4 * cols, generator=generator))
        if kind == "int32":
            return mask.to(torch.int32)
        if kind == "strided":
            return mask.to(torch.int32).repeat_interleave(2, 1).to(torch.uint16)[:, ::2]
        return mask.reshape(-1) if kind == "flat" else mask


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, or for the last two kinds others, in memory of another kind."""
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every other" and values.dim():
        wide = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1]))
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "offset":
        flat = values.new_zeros(values.numel() + 1)
        flat[1:] = values.reshape(-1)
        return flat[1:].view(values.shape)
    if layout == "padded rows" and values.dim():
        wide = values.new_zeros((*values.shape[:-1], values.shape[-1] + 3))
        wide[..., 1:-2] = values
        return wide[..., 1:-2]
    if layout == "expanded" and values.dim() and values.shape[0]:
        return values[:1].expand(values.shape)
    if layout == "overlapping" and values.dim() == 2 and values.numel():
        flat = values.reshape(-1)[: sum(values.shape) - 1]
        return flat.as_strided(values.shape, (1, 1))
    return values


def on(device: str, t: torch.Tensor) -> torch.Tensor:
    """The tensor with its whole storage, so with its strides and its offset, on `device`."""
    if device == "cpu":
        return t
    storage = t.new_empty(0).set_(t.untyped_storage())
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def plain(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().clone(memory_format=torch.contiguous_format)


def is_computed(t) -> bool:
    """Dtypes that ops take: float64 by the reference, on the CPU only."""
    return t.dtype in FLOATS or (t.dtype == torch.float64 and t.device.type == "cpu")


def is_weight(t) -> bool:
    return t.dim() == 2 and t.shape[0] % 4 == t.shape[1] % 4 == 0 and is_computed(t)


def fits_mask(mask, shape) -> bool:
    """Whether `mask` is one of a weight of `shape`."""
    return mask.dtype == torch.uint16 and tuple(mask.shape) == tuple(n // 4 for n in shape) and mask.is_contiguous()


def packed_dtype(w) -> torch.dtype:
    return torch.bfloat16 if w.device.type == "cuda" and w.dtype == torch.float32 else w.dtype


def attempt(valid: bool, function, *args, **kwargs):
    """The result, or None for a named exception; valid arguments must give a result, others must not."""
    try:
        result = function(*args, **kwargs)
    except Sparse24Error as error:
        assert not valid, f"refused what it should take: {error}"
        assert len(str(error)) > 20, "says nothing"
        return None
    assert valid, "accepted what it should refuse"
    return True if result is None else result


def assert_product(out, a, b, *added, unit=2.0**-23):
    """`out` is a @ b and what is added to it, up to the rounding of sums and of `out`; each element by its own bound.

    A sum of k products, taken in any order, lies within k units in the last place of the sum of their magnitudes,
    |a| @ |b|: where terms cancel, that is far more than a unit of the result. PyTorch errs as much, but where its order
    happens to be the kinder one, twice its error is no bound. What is added may be added to a product that `out` has
    rounded already, so then each term brings a rounding of its own, of what may cancel later.

    unit  of the sums; of fp32 a whole one, since tensor cores cut off what others round
    """
    a, b, added = a.cpu().double(), b.cpu().double(), [t.cpu().double() for t in added]
    exact, reach = a @ b + sum(added), a.abs() @ b.abs() + sum(t.abs() for t in added)
    dtype, terms = torch.finfo(out.dtype), a.shape[-1] + len(added)
    unit = dtype.eps if out.dtype == torch.float64 else unit
    roundings = dtype.eps * (exact.abs() + len(added) * reach)
    error, bound = (out.cpu().double() - exact).abs(), terms * unit * reach + roundings + dtype.tiny
    assert out.shape == exact.shape and (error <= bound).all(), (
        f"{error.max():.2e} off, by a bound of {bound.max():.2e}"
    )


def same(ours, theirs, what):
    ours, theirs = ((ours,), (theirs,)) if isinstance(ours, torch.Tensor) else (ours, theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(a, b, f"{what}[{i}]")


# -- states ---------------------------------------------------------------------------------------------------------

JUNK = [None, -1, 10**6, 0.5, float("nan"), True, "x", [], {}, [1], {"x": 1}, torch.zeros(()), torch.zeros(3), ...]


def everything(model, recipe):
    """What a refused state must leave alone."""
    torch.save((model.state_dict(), list(model.buffers()), recipe.state_dict(), recipe.phase), buffer := io.BytesIO())
    return buffer.getvalue(), [layer.phase for layer in recipe.layers.values()]


def places(state, path=()):
    """Paths to everything in nested dicts and lists."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))
