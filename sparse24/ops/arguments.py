"""Rules on arguments that all ops share: their Python types, the memory that is written, tensors that have values."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import Sparse24DtypeError, Sparse24Error
from ..options import fits, words

_Named = tuple[str, Tensor]
_WRONG_TYPE = (AttributeError, TypeError, ValueError, RuntimeError, OverflowError)


def names_wrong_types(function: Callable) -> Callable:
    """Let `function` name an argument of a wrong Python type, in place of torch's words about schemas.

    Arguments are held against their annotations only after something has failed, so right calls pay nothing for it.
    """

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():  # `try` would keep it from splitting a graph inside
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Sparse24Error:
            raise
        except _WRONG_TYPE as error:
            if not torch.compiler.is_compiling():
                _name_wrong_type(function, args, kwargs, error)
            raise

    return checked


def _name_wrong_type(function: Callable, args: tuple, kwargs: dict, error: Exception) -> None:
    try:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # a wrong number of arguments: Python says it well
        return
    hints = typing.get_type_hints(function)
    for name, value in arguments.items():
        _check_type(name, value, hints.get(name, object), error)


def _check_type(name: str, value: object, hint: object, error: Exception) -> None:
    if not fits(value, hint):
        raise Sparse24DtypeError(f"{name} must be {words(hint)}, got {_shown(value)}") from error
    if hint is int and not -(1 << 63) <= value < 1 << 63:
        raise Sparse24DtypeError(f"{name} must be an integer of 64 bits, got {_shown(value)}") from error
    if isinstance(value, Tensor):
        _check_plain(name, value, error)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            if isinstance(item, Tensor):
                _check_plain(f"{name}[{i}]", item, error)


def _check_plain(name: str, t: Tensor, error: Exception) -> None:
    if t.layout != torch.strided or t.is_quantized:
        kind = "quantized" if t.is_quantized else t.layout
        raise Sparse24Error(f"{name} must be a plain strided tensor, got a {kind} one; make it dense first") from error
    if t.device.type not in ("cpu", "cuda", "meta"):
        raise Sparse24Error(f"{name} is on {t.device}; ops run on CPU and CUDA tensors: move it") from error


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {sorted({type(item).__name__ for item in value})}"
    return f"{type(value).__name__} {value!r:.60}"


def check_has_values(t: Tensor, name: str, op: str) -> None:
    """For ops that read a number back from the device."""
    if t.is_meta or isinstance(t, torch._subclasses.FakeTensor):
        raise Sparse24Error(f"{op} reads the values of {name}, and a meta or fake tensor has none; pass a real one")


# ---- memory that is written -----------------------------------------------------------------------------------------


def check_writable(*written: _Named) -> None:
    """Refuse what an op cannot write to in place, before the dispatcher and autograd would in words of their own."""
    if torch.compiler.is_compiling():
        return
    for name, t in written:
        if t.is_neg():
            raise Sparse24Error(
                f"{name} is a lazily negated view, which cannot be written in place; write to {name}.resolve_neg()"
            )
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise Sparse24Error(
                f"{name} was made in inference mode and is written outside of it; clone it, or stay inside"
            )


def check_no_self_overlap(t: Tensor, name: str) -> None:
    """Refuse to write a 2-D view in which an address occurs twice, such as an expanded one."""
    if t.is_contiguous():
        return
    (inner, inner_extent), (outer, extent) = sorted(zip(t.stride(), t.shape, strict=True))
    if t.numel() and (
        (inner_extent > 1 and inner == 0) or (extent > 1 and inner_extent > 1 and outer <= (inner_extent - 1) * inner)
    ):
        raise Sparse24Error(
            f"{name} has places in memory that belong to several elements (shape {tuple(t.shape)}, strides "
            f"{t.stride()}), so it cannot be written in place; clone it"
        )


def check_no_shared_memory(written: Iterable[_Named], read: Iterable[_Named] = ()) -> None:
    """Refuse outputs that share memory with one another or with an input; a tensor given twice, too."""
    spans = [(*_span(t), True, name, t) for name, t in written if t.numel()]
    others = [(*_span(t), False, name, t) for name, t in read if t.numel()]
    if len(spans) == 1:  # what lies before or behind it needs no closer look
        start, end, *_ = spans[0]
        others = [span for span in others if span[0] < end and start < span[1]]
        if not others:
            return
    spans = sorted(spans + others, key=lambda span: span[:2])
    open_spans: list[tuple] = []  # those that reach past the start of the next one
    for span in spans:
        start, _, is_written, name, t = span
        open_spans = [other for other in open_spans if other[1] > start]
        for _, _, other_is_written, other_name, other in open_spans:
            if (is_written or other_is_written) and not _lie_side_by_side(other, t):
                raise Sparse24Error(
                    f"{name} and {other_name} share memory, and one of them is written; give every output memory of "
                    "its own"
                )
        open_spans.append(span)


def _span(t: Tensor) -> tuple[int, int]:
    """The address of the first byte, and of the one behind the last."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.numel() * t.element_size()
    last = sum((extent - 1) * stride for extent, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()


def _lie_side_by_side(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices are slices of the columns of one (or of the rows of a column-major one) without a share."""
    if first.dim() != 2 or second.dim() != 2:
        return False
    (pitch, width), (other_pitch, other_width) = _pitch_and_width(first), _pitch_and_width(second)
    offset = (second.data_ptr() - first.data_ptr()) % pitch if pitch else 0
    return pitch == other_pitch and width <= offset and offset + other_width <= pitch


def _pitch_and_width(t: Tensor) -> tuple[int, int]:
    """Bytes from one row (or column) to the next, and those that one takes."""
    (inner, extent), (outer, _) = sorted(zip(t.stride(), t.shape, strict=True))
    return outer * t.element_size(), ((extent - 1) * inner + 1) * t.element_size()
