"""The text of a run: finding files, checking that they are UTF-8, splitting them into training and validation spans.

Nothing is held in memory: a span is a file and a byte range, read block by block.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import Sparse24Error

BLOCK_BYTES = 1 << 20
END_OF_TEXT = "<|endoftext|>"  # between documents, also inside a file


@dataclass(frozen=True)
class Source:
    """A text file; `name` is its path relative to what the user named, so that moving a folder changes nothing."""

    path: Path
    name: str
    size_bytes: int


@dataclass(frozen=True)
class Span:
    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Corpus:
    """Training and validation spans, and a digest of names and contents."""

    train: tuple[Span, ...]
    valid: tuple[Span, ...]
    digest: str
    skipped: tuple[str, ...]  # files of a folder that are not text

    @property
    def train_bytes(self) -> int:
        return sum(s.end - s.start for s in self.train)

    @property
    def valid_bytes(self) -> int:
        return sum(s.end - s.start for s in self.valid)


def load_corpus(data: tuple[str, ...], valid: tuple[str, ...], valid_fraction: float, max_bytes: int | None) -> Corpus:
    """Find, check and split the text. No `data`: the sources of the Python standard library.

    Raises Sparse24Error for a missing, empty or binary input.
    """
    digest, skipped = hashlib.blake2b(digest_size=16), []
    named = find_sources(data, "--data") if data else standard_library()
    sources = checked(capped(named, max_bytes), "--data" if data else "", digest, skipped)
    train = [Span(s.path, 0, capped_end(s, max_bytes)) for s in sources]
    if valid:
        held_out = checked(find_sources(valid, "--valid"), "--valid", digest, skipped)
        held_out = [Span(s.path, 0, s.size_bytes) for s in held_out]
    else:
        train, held_out = split(train, {s.path: s.name for s in sources}, valid_fraction)
    for span in [*train, *held_out]:
        digest.update(f"{span.start}-{span.end};".encode())
    return Corpus(tuple(train), tuple(held_out), digest.hexdigest(), tuple(skipped))


def standard_library() -> list[tuple[Source, bool]]:
    """Python's own sources without installed packages, tests (some have other encodings on purpose) and code tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"encodings", "test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts[:-1])]
    if not files:
        raise Sparse24Error(f"--data was not given and {root} holds no Python sources; name text files with --data")
    return [(Source(p, p.relative_to(root).as_posix(), p.stat().st_size), False) for p in sorted(files)]


def find_sources(named: tuple[str, ...], option: str) -> list[tuple[Source, bool]]:
    """Files with whether the user named them (then a binary one is an error) or a folder held them (then skipped)."""
    found: list[tuple[Source, bool]] = []
    for text in named:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and not is_hidden(p.relative_to(path))]
            if not inside:
                raise Sparse24Error(f"{option} {text} is a folder without files; name one that holds text")
            found += [(Source(p, p.relative_to(path).as_posix(), p.stat().st_size), False) for p in sorted(inside)]
        elif path.is_file():
            found.append((Source(path, path.name, path.stat().st_size), True))
        else:
            raise Sparse24Error(f"{option} {text} does not exist; name UTF-8 text files or folders of them")
    return found


def is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def capped(sources: list[tuple[Source, bool]], max_bytes: int | None) -> list[tuple[Source, bool]]:
    """The first files, in a shuffled order that depends on names only, that together hold `max_bytes`.

    Shuffled, or a capped run over a folder would read the first letters of the alphabet.
    """
    if max_bytes is None:
        return sources
    taken, total = [], 0
    for source, is_named in sorted(sources, key=lambda s: name_key(s[0].name)):
        if total >= max_bytes:
            break
        taken.append((source, is_named))
        total += source.size_bytes
    return taken


def capped_end(source: Source, max_bytes: int | None) -> int:
    """Where to stop reading a file: its end, or the last character that starts within `max_bytes`."""
    if max_bytes is None or source.size_bytes <= max_bytes:
        return source.size_bytes
    with source.path.open("rb") as f:
        f.seek(max(0, max_bytes - 3))
        near = f.read(4)
    first = max(0, max_bytes - 3)
    return max((first + i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), default=max_bytes)


def name_key(name: str) -> bytes:
    return hashlib.blake2b(os.fsencode(name), digest_size=8).digest()


def checked(sources: list[tuple[Source, bool]], option: str, digest, skipped: list[str]) -> list[Source]:
    """The sources that are text and not empty; names and contents go into the digest."""
    good = []
    for source, is_named in sources:
        content = hashlib.blake2b(digest_size=16)
        problem = read_through(source.path, content)
        if problem is None and source.size_bytes:
            good.append(source)
            digest.update(os.fsencode(f"{source.name}:{source.size_bytes}:{content.hexdigest()};"))
        elif problem is not None and is_named:
            raise Sparse24Error(
                f"{option} {source.path} is not UTF-8 text ({problem}); give a text file, or convert it to UTF-8"
            )
        else:
            skipped.append(f"{source.path}: {problem or 'empty'}")
    if not good:
        what = ", ".join(str(s.path) for s, _ in sources[:3])
        raise Sparse24Error(f"{option} holds no text: {what} empty or not UTF-8; give files with text in them")
    return good


def read_through(path: Path, content) -> str | None:
    """Feed the file into the digest; what is wrong with it as text, or None."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as f:
            while block := f.read(BLOCK_BYTES):
                content.update(block)
                if (zero := block.find(0)) >= 0:
                    return f"a zero byte at offset {offset + zero}"
                decoder.decode(block)
                offset += len(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        return f"byte 0x{e.object[e.start]:02x} near offset {offset + e.start}"
    except OSError as e:
        return e.strerror or str(e)
    return None


def split(train: list[Span], names: dict[Path, str], fraction: float) -> tuple[list[Span], list[Span]]:
    """Set `fraction` of the bytes aside: whole files where there are many, else the tail of the largest."""
    want = max(1, int(fraction * sum(s.end for s in train)))
    held_out, total = [], 0
    for span in sorted(train, key=lambda s: name_key("valid/" + names[s.path])):
        if total < want and total + span.end <= 1.5 * want:
            held_out.append(span)
            total += span.end
    if total >= want / 2:
        return [s for s in train if s not in held_out], held_out
    largest = max(train, key=lambda s: s.end)
    cut = tail_start(largest, want)
    kept = [Span(s.path, 0, cut) if s is largest else s for s in train]
    return [s for s in kept if s.end], [Span(largest.path, cut, largest.end)]


def tail_start(span: Span, tail_bytes: int) -> int:
    """Where the tail begins: at the end of a document, a paragraph or a line near by, else between two characters."""
    start = max(0, span.end - tail_bytes)
    with span.path.open("rb") as f:
        f.seek(start)
        near = f.read(max(tail_bytes // 5, 4))
    for mark in (END_OF_TEXT.encode(), b"\n\n", b"\n"):
        if (at := near.find(mark)) >= 0:
            return start + at + len(mark)
    return start + next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)


def read_chunks(span: Span, chunk_bytes: int = 1 << 16) -> Iterator[str]:
    """The text of a span in pieces of about `chunk_bytes`, cut behind a newline where there is one.

    A newline stays with the piece before it, so that joining the pieces gives the text back.
    """
    with span.path.open("rb") as f:
        f.seek(span.start)
        left, rest = span.end - span.start, b""
        while left > 0:
            block = f.read(min(chunk_bytes, left))
            if not block:
                raise Sparse24Error(f"{span.path} became shorter while it was read; start again")
            left -= len(block)
            rest += block
            cut = len(rest) if left == 0 else rest.rfind(b"\n") + 1
            if cut == 0 and len(rest) >= 4 * chunk_bytes:  # a line without end: cut between two characters
                cut = max(i for i in range(len(rest) - 4, len(rest)) if rest[i] & 0xC0 != 0x80)
            if cut:
                yield rest[:cut].decode()
                rest = rest[cut:]
