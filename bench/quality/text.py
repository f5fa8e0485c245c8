"""Text to tokens for the study: one BPE of 16384 pieces, rows of 513 tokens, in an order that all arms share.

    python -m bench.quality.text FOLDER --out TOKENS

FOLDER holds SOURCE_train.txt and SOURCE_valid.txt for each source, plain or .xz, documents separated by a line
<|endoftext|>. TOKENS gets train.bin (all sources, rows shuffled once) and SOURCE_valid.bin: uint16 [rows, 513]. The
last token of a row is the target of its last position.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import numpy as np

CONTEXT = 512
VOCABULARY = 16384
END = "<|endoftext|>"
SAMPLE_STRIDE = 8  # the tokenizer is trained on every eighth training document
CHUNK = 100_000  # characters; longer documents are encoded in parts, for the threads' sake


def documents(path: Path) -> list[str]:
    open_text = lzma.open if path.suffix == ".xz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        return file.read().split(f"\n\n{END}\n\n")


def chunks(document: str) -> list[str]:
    return [document[i : i + CHUNK] for i in range(0, len(document), CHUNK)]


def train_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rows(tokenizer, texts: list[str]) -> np.ndarray:
    """uint16 [rows, CONTEXT + 1]: the documents one after the other, cut into rows; what is left over is dropped."""
    pieces = [piece for text in texts for piece in (*chunks(text), END)]
    encoded = [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch_fast(pieces)]
    ids = np.concatenate(encoded)
    width = CONTEXT + 1
    return ids[: len(ids) // width * width].reshape(-1, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    training = {path.name.split("_train")[0]: documents(path) for path in sorted(args.folder.glob("*_train.txt*"))}
    if not training:
        raise SystemExit(f"error: {args.folder} has no SOURCE_train.txt or SOURCE_train.txt.xz")
    sample = [text for texts in training.values() for text in texts[::SAMPLE_STRIDE]]
    tokenizer = train_tokenizer([chunk for text in sample for chunk in chunks(text)])
    for source in training:
        (valid,) = args.folder.glob(f"{source}_valid.txt*")
        rows(tokenizer, documents(valid)).tofile(args.out / f"{source}_valid.bin")
    train = np.concatenate([rows(tokenizer, texts) for texts in training.values()])
    np.random.default_rng(0).shuffle(train, axis=0)
    train.tofile(args.out / "train.bin")
    print(f"{len(training)} sources, {train.size:,} training tokens in {args.out}")


if __name__ == "__main__":
    main()
