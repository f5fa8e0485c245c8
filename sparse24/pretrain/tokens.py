"""Token files, made once per input and settings, and the order in which a run reads them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import Sparse24Error
from ..files import check_seal, read_json, seal
from . import text
from .settings import Settings
from .tokenizer import BpeTokenizer, ByteTokenizer

CACHE_VERSION = 2
CHUNKS_AT_ONCE = 512  # of 64 KiB: enough work for many cores, some 32 MB of text in memory


@dataclass(frozen=True)
class TokenData:
    """Memory-mapped ids, uint16 or uint32, and what is needed to read them."""

    train: np.ndarray
    valid: np.ndarray
    tokenizer: ByteTokenizer | BpeTokenizer
    token_bytes: np.ndarray  # int64 [vocab_size]
    digest: str  # of the text, its split and the tokenizer's settings
    train_text_bytes: int
    valid_text_bytes: int


def prepare(settings: Settings, say: Callable[[str], None] = lambda line: None) -> TokenData:
    """The tokens of the input, from the cache or made now.

    Raises Sparse24Error for bad input, an unwritable cache, or too little text for the context length.
    """
    corpus = text.load_corpus(settings.data, settings.valid, settings.valid_fraction, settings.max_bytes)
    if corpus.skipped and settings.data:
        say(f"skipped {len(corpus.skipped)} files that hold no UTF-8 text, such as {corpus.skipped[0]}")
    kind = {"version": CACHE_VERSION, "tokenizer": settings.tokenizer}
    if settings.tokenizer == "bpe":
        kind |= {"vocab_size": settings.vocab_size, "tokenizer_bytes": settings.tokenizer_bytes}
    digest = hashlib.blake2b((json.dumps(kind) + corpus.digest).encode(), digest_size=16).hexdigest()
    folder = cache_root(settings.cache_dir) / f"tokens-{digest}"
    if not is_complete(folder):
        if folder.exists():
            say(f"the tokens in {folder} are not as they were written; they are made anew")
        build(folder, corpus, settings, say)
    data = open_tokens(folder, corpus, settings, digest)
    for name, ids, option in (("training", data.train, "--data"), ("validation", data.valid, "--valid")):
        if len(ids) < settings.ctx + 1:
            raise Sparse24Error(
                f"--ctx {settings.ctx} needs at least {settings.ctx + 1} {name} tokens, but the text has {len(ids)}; "
                f"give more text with {option} or a smaller --ctx"
            )
    source = f"{size(corpus.train_bytes)} and {size(corpus.valid_bytes)} of text"
    counts = f"{len(data.train):,} training and {len(data.valid):,} validation tokens"
    say(f"{source}: {counts}, vocabulary {data.tokenizer.vocab_size:,}")
    return data


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def cache_root(cache_dir: str | None) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(cache_dir or Path(base) / "sparse24").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as e:
        raise Sparse24Error(f"--cache-dir {root} cannot be written ({e.strerror or e}); name another folder") from e
    return root


def is_complete(folder: Path) -> bool:
    """Whether the cached files are those that were written, byte for byte; else they are made again."""
    try:
        check_seal(folder)
        return np.dtype(read_json(folder / "meta.json").get("dtype")) in (np.uint16, np.uint32)
    except (OSError, Sparse24Error, TypeError):
        return False


def build(folder: Path, corpus: text.Corpus, settings: Settings, say: Callable[[str], None]) -> None:
    """Train the tokenizer and write the ids: into a temporary folder that is renamed when all is there."""
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        if settings.tokenizer == "bytes":
            tokenizer = ByteTokenizer()
        else:
            sample_bytes = min(corpus.train_bytes, settings.tokenizer_bytes)
            say(f"training a byte-level BPE of {settings.vocab_size:,} tokens on {size(sample_bytes)}")
            tokenizer = BpeTokenizer.train(sample(corpus.train, settings.tokenizer_bytes), settings.vocab_size)
        tokenizer.save(temporary)
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        say(f"turning {size(corpus.train_bytes + corpus.valid_bytes)} into tokens")
        write_ids(temporary / "train.bin", corpus.train, tokenizer, dtype)
        write_ids(temporary / "valid.bin", corpus.valid, tokenizer, dtype)
        (temporary / "meta.json").write_text(json.dumps({"dtype": np.dtype(dtype).name}))
        seal(temporary)
        if folder.exists() and not is_complete(folder):
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            if not is_complete(folder):  # else another process was faster, with the same content
                raise
    except OSError as e:
        raise Sparse24Error(
            f"--cache-dir {folder.parent}: tokens could not be written ({e.strerror or e}); make room or name another"
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sample(spans: tuple[text.Span, ...], max_bytes: int) -> Iterator[str]:
    """Pieces spread evenly over the spans, together about `max_bytes`."""
    share = min(1.0, max_bytes / max(1, sum(s.end - s.start for s in spans)))
    due = 1.0 - share  # so that the first piece is always taken
    for span in spans:
        for chunk in text.read_chunks(span):
            due += share
            if due >= 1.0:
                due -= 1.0
                yield chunk


def write_ids(path: Path, spans: tuple[text.Span, ...], tokenizer, dtype) -> None:
    """The ids of all spans, an end of text behind each."""
    end = np.array([tokenizer.end_of_text], dtype=dtype)
    with path.open("wb") as f:
        batch: list[str | None] = []  # None: the end of a span

        def flush() -> None:
            ids = iter(tokenizer.encode([t for t in batch if t is not None]))
            for item in batch:
                (end if item is None else next(ids).astype(dtype)).tofile(f)
            batch.clear()

        for span in spans:
            for chunk in text.read_chunks(span):
                batch.append(chunk)
                if len(batch) >= CHUNKS_AT_ONCE:
                    flush()
            batch.append(None)
        flush()


def open_tokens(folder: Path, corpus: text.Corpus, settings: Settings, digest: str) -> TokenData:
    tokenizer = ByteTokenizer() if settings.tokenizer == "bytes" else BpeTokenizer.load(folder)
    dtype = np.dtype(read_json(folder / "meta.json")["dtype"])
    train, valid = (np.memmap(folder / name, dtype=dtype, mode="r") for name in ("train.bin", "valid.bin"))
    return TokenData(train, valid, tokenizer, tokenizer.token_bytes(), digest, corpus.train_bytes, corpus.valid_bytes)


class Batches:
    """Batches as a pure function of (seed, step): both arms and a resumed run see the same text in the same order.

    An epoch cuts the tokens into windows of `ctx` at a random offset and visits each once, in a random order; both
    come from (seed, epoch).
    """

    def __init__(self, ids: np.ndarray, ctx: int, batch: int, seed: int):
        self.ids, self.ctx, self.batch, self.seed = ids, ctx, batch, seed
        self.windows = (len(ids) - 1) // ctx
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of an optimizer step, int64 [batch, ctx] each."""
        index = np.arange(step * self.batch, (step + 1) * self.batch)
        rows = [self._start(*divmod(int(i), self.windows)) for i in index]
        return gather(self.ids, np.array(rows), self.ctx)

    def _start(self, epoch: int, position: int) -> int:
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            offset = rng.integers((len(self.ids) - 1) % self.ctx + 1)  # all windows still fit behind it
            self._epoch, self._starts = epoch, offset + self.ctx * rng.permutation(self.windows)
        return int(self._starts[position])


def gather(ids: np.ndarray, starts: np.ndarray, ctx: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.stack([ids[s : s + ctx + 1] for s in starts]).astype(np.int64)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def validation_batches(ids: np.ndarray, ctx: int, batch: int, max_tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A fixed slice: windows spread evenly over the validation tokens, at most `max_tokens`, at least one window."""
    windows = (len(ids) - 1) // ctx
    count = max(1, min(windows, max_tokens // ctx))
    count -= count % batch if count > batch else 0  # batches of one shape: compiled code is made for it
    starts = (np.arange(count) * windows // count) * ctx
    return [gather(ids, starts[i : i + batch], ctx) for i in range(0, count, batch)]
