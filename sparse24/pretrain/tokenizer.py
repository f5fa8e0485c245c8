"""Tokenizers: a byte-level BPE trained on the input, and plain bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .text import END_OF_TEXT


class ByteTokenizer:
    """A token a byte; id 256 ends a text."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become the replacement character."""
        pieces = "".join(chr(i) if i < 256 else "\0" for i in ids).encode("latin-1").split(b"\0")
        return END_OF_TEXT.join(piece.decode("utf-8", "replace") for piece in pieces)

    def token_bytes(self) -> np.ndarray:
        """Bytes of text each id stands for, int64 [vocab_size]; the end of text has none."""
        return np.array([1] * 256 + [0])

    def save(self, folder: Path) -> None:
        """Nothing to keep."""


class BpeTokenizer:
    """A byte-level BPE as GPT-2's: any text has a code, and decoding gives it back."""

    def __init__(self, inner):
        self.inner = inner
        self.vocab_size = inner.get_vocab_size()
        self.end_of_text = inner.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn at most `vocab_size` tokens; a short text gives fewer."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, folder: Path) -> BpeTokenizer:
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text; the texts are shared among the cores."""
        # the fast form leaves out character offsets, which cost more than the ids
        encode = getattr(self.inner, "encode_batch_fast", self.inner.encode_batch)
        return [np.array(e.ids, dtype=np.uint32) for e in encode(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Bytes of text each id stands for, int64 [vocab_size]; the end of text has none."""
        # in the byte-level alphabet a character is a byte
        size = [len(self.inner.id_to_token(i)) for i in range(self.vocab_size)]
        size[self.end_of_text] = 0
        return np.array(size)

    def save(self, folder: Path) -> None:
        self.inner.save(str(folder / "tokenizer.json"))
