"""Text in, tokens out, and the order in which they are read."""

import dataclasses

import numpy as np
import pytest
from conftest import make_text

from sparse24.errors import Sparse24Error
from sparse24.pretrain import text, tokens
from sparse24.pretrain.settings import resolve
from sparse24.pretrain.tokenizer import BpeTokenizer, ByteTokenizer

ODD = "def f(x):\n\treturn x  # ünïcode – 中文 🙂\r\n\n   <|endoftext|>next\x7f document"


@pytest.fixture(scope="module")
def bpe():
    return BpeTokenizer.train([make_text(20_000)], 320)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_decoding_gives_the_text_back(kind, bpe):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    (ids,) = tokenizer.encode([ODD])
    assert tokenizer.decode(ids.tolist()) == ODD


def test_bytes_of_the_tokens_add_up_to_the_text(bpe):
    plain = ODD.replace(text.END_OF_TEXT, "")
    for tokenizer in (bpe, ByteTokenizer()):
        (ids,) = tokenizer.encode([plain])
        assert tokenizer.token_bytes()[ids].sum() == len(plain.encode())
        assert tokenizer.token_bytes()[tokenizer.end_of_text] == 0


def test_bpe_keeps_to_the_wanted_size_and_learns_less_from_less_text(bpe):
    assert bpe.vocab_size == 320
    assert 257 <= BpeTokenizer.train(["ab" * 10], 320).vocab_size < 270


def test_training_a_bpe_twice_gives_the_same_tokens(bpe):
    again = BpeTokenizer.train([make_text(20_000)], 320)
    assert again.inner.to_str() == bpe.inner.to_str()


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_token_files_hold_the_whole_text(small, text_file, kind):
    data = tokens.prepare(resolve(small(tokenizer=kind)))
    parts = [data.tokenizer.decode(ids.tolist()) for ids in (data.train, data.valid)]
    assert all(part.endswith(text.END_OF_TEXT) for part in parts)
    assert "".join(part.removesuffix(text.END_OF_TEXT) for part in parts) == text_file.read_text(encoding="utf-8")
    assert data.train_text_bytes + data.valid_text_bytes == text_file.stat().st_size


def test_second_run_reads_the_tokens_from_the_cache(small, monkeypatch):
    first = tokens.prepare(resolve(small()))
    monkeypatch.setattr(tokens, "build", lambda *a: pytest.fail("built again"))
    second = tokens.prepare(resolve(small(steps=99)))
    assert np.array_equal(first.train, second.train) and first.digest == second.digest


def test_changed_text_or_tokenizer_makes_other_tokens(small, tmp_path):
    digests = {
        tokens.prepare(resolve(small(**change))).digest for change in ({}, {"vocab_size": 310}, {"tokenizer": "bytes"})
    }
    changed = tmp_path / "words.txt"
    changed.write_text(make_text(40_000, seed=1), encoding="utf-8")
    digests.add(tokens.prepare(resolve(small(data=(str(changed),)))).digest)
    assert len(digests) == 4


def test_damaged_cache_is_made_anew(small, tmp_path):
    settings = resolve(small(cache_dir=str(tmp_path / "cache")))
    said: list[str] = []
    before = np.array(tokens.prepare(settings, said.append).train)
    assert any(line.endswith(" kB into tokens") for line in said)
    assert not any("made anew" in line for line in said)
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "train.bin").write_bytes(b"cut short")
    assert np.array_equal(tokens.prepare(settings, said.append).train, before)
    assert any("not as they were written; they are made anew" in line for line in said)


def test_interrupted_preparation_leaves_nothing_behind(small, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "write_ids", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens.prepare(resolve(small(cache_dir=str(tmp_path / "cache"))))
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokenizer_is_trained_on_the_training_part_alone(small, tmp_path):
    train, valid = tmp_path / "train.txt", tmp_path / "valid.txt"
    train.write_text(make_text(8000))
    valid.write_text("Xylophone! " * 800)
    data = tokens.prepare(resolve(small(data=(str(train),), valid=(str(valid),), vocab_size=2000)))
    assert data.tokenizer.inner.token_to_id("Xylophone") is None
    assert data.tokenizer.decode(data.valid[:500].tolist()).startswith("Xylophone! Xylophone!")


def test_sizes_are_said_in_kilobytes_or_megabytes():
    assert [tokens.size(count) for count in (50, 99_999, 100_000, 1_234_567)] == [
        "0.1 kB",
        "100.0 kB",
        "0.1 MB",
        "1.2 MB",
    ]


def test_tokenizer_sample_is_capped_and_never_empty(text_file):
    span = text.Span(text_file, 0, text_file.stat().st_size)
    assert sum(len(piece.encode()) for piece in tokens.sample((span,), 10)) > 0
    big = (span,) * 20
    taken = sum(len(piece.encode()) for piece in tokens.sample(big, 200_000))
    assert 200_000 <= taken <= 280_000


def test_tokenizer_sample_is_spread_evenly_from_the_first_piece_on(tmp_path):
    path = tmp_path / "t"
    path.write_text("".join(f"piece {i}\n" for i in range(8)))
    spans = tuple(text.Span(path, 8 * i, 8 * (i + 1)) for i in range(8))
    for cap, taken in ((64, range(8)), (32, (0, 2, 4, 6)), (16, (0, 4))):
        assert list(tokens.sample(spans, cap)) == [f"piece {i}\n" for i in taken]


@pytest.mark.parametrize("size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_take_two_bytes_as_long_as_the_largest_fits(small, tmp_path, monkeypatch, size, dtype):
    class Large(ByteTokenizer):
        vocab_size, end_of_text = size, size - 1

    monkeypatch.setattr(tokens, "ByteTokenizer", Large)
    data = tokens.prepare(resolve(small(tokenizer="bytes", cache_dir=str(tmp_path / "cache"))))
    assert data.train.dtype == dtype and data.train[-1] == size - 1


# ---- reading and splitting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [make_text(5000), "é中🙂" * 500, "\n\n\n", "a"], ids=["lines", "no lines", "newlines", "one"]
)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 1 << 16])
def test_chunks_join_to_the_text(tmp_path, content, chunk_bytes):
    path = tmp_path / "t"
    path.write_bytes(content.encode())
    pieces = list(text.read_chunks(text.Span(path, 0, path.stat().st_size), chunk_bytes))
    assert "".join(pieces) == content and all(pieces)


def test_chunks_end_behind_a_line_and_a_line_without_end_is_cut(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"a line\n" * 100 + "é".encode() * 500)
    *chunks, last = text.read_chunks(text.Span(path, 0, path.stat().st_size), 50)
    lines = [chunk for chunk in chunks if "a" in chunk]
    assert "".join(lines) == "a line\n" * 100 and all(len(chunk) < 57 and chunk[-1] == "\n" for chunk in lines)
    assert all(200 - 4 < len(chunk.encode()) <= 250 for chunk in chunks[len(lines) :]) and len(last.encode()) <= 250


def test_hidden_files_are_no_text_of_a_folder(tmp_path):
    for name in ("a.txt", ".git/config", ".hidden", "__pycache__/a.pyc", "below/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words " * 50)
    names = {source.name for source, _ in text.find_sources((str(tmp_path),), "--data")}
    assert names == {"a.txt", "below/b.txt"}


def test_one_file_is_split_at_its_tail_between_paragraphs(tmp_path):
    path = tmp_path / "t"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(1000)))
    corpus = text.load_corpus((str(path),), (), 0.1, None)
    (train,), (valid,) = corpus.train, corpus.valid
    assert train.end == valid.start and valid.end == path.stat().st_size
    assert path.read_text()[valid.start :].startswith("paragraph ")
    assert 0.08 <= corpus.valid_bytes / path.stat().st_size <= 0.12


def test_many_files_are_split_by_whole_files_whatever_the_folder_is_called(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(60):
            (tmp_path / folder / f"{i}.txt").write_text(f"{i} " * 100)
    a, b = (text.load_corpus((str(tmp_path / folder),), (), 0.1, None) for folder in ("a", "b"))
    assert {s.path.name for s in a.valid} == {s.path.name for s in b.valid} and a.digest == b.digest
    assert len(a.train) + len(a.valid) == 60 and not {s.path for s in a.train} & {s.path for s in a.valid}
    assert 3 <= len(a.valid) <= 9


@pytest.mark.parametrize("small_bytes, whole", [(45, False), (55, True)])
def test_whole_files_are_set_aside_where_they_are_at_least_half_of_what_is_wanted(tmp_path, small_bytes, whole):
    (tmp_path / "large.txt").write_text("x" * (1000 - small_bytes))
    (tmp_path / "small.txt").write_text("x" * small_bytes)
    corpus = text.load_corpus((str(tmp_path),), (), 0.1, None)
    assert [(span.path.name, span.end - span.start) for span in corpus.valid] == (
        [("small.txt", small_bytes)] if whole else [("large.txt", 100)]
    )


@pytest.mark.parametrize("fraction", [0.1, 0.1003])
def test_a_tail_without_lines_begins_between_two_characters(tmp_path, fraction):
    path = tmp_path / "t"
    path.write_text("🙂" * 1000, encoding="utf-8")
    corpus = text.load_corpus((str(path),), (), fraction, None)
    for span in corpus.train + corpus.valid:
        assert set("".join(text.read_chunks(span))) == {"🙂"}
    assert corpus.valid_bytes == 400


def test_capped_text_ends_between_two_characters(tmp_path):
    path = tmp_path / "t"
    path.write_text("🙂" * 1000, encoding="utf-8")
    for cap in (999, 1000, 1001, 1002):
        corpus = text.load_corpus((str(path),), (str(path),), 0.1, cap)
        assert cap - 4 < corpus.train_bytes <= cap
        assert set("".join(text.read_chunks(corpus.train[0]))) == {"🙂"}


def test_default_input_is_the_standard_library(small):
    corpus = text.load_corpus((), (), 0.05, 300_000)
    assert 300_000 <= corpus.train_bytes + corpus.valid_bytes < 1_200_000
    assert all(s.path.suffix == ".py" for s in corpus.train + corpus.valid)
    folders = {part for source, _ in text.standard_library() for part in source.name.split("/")[:-1]}
    assert "json" in folders and not folders & {"encodings", "test", "tests", "site-packages"}


def test_a_folder_may_hold_binary_files_but_a_named_one_may_not(tmp_path):
    (tmp_path / "good.txt").write_text("hello " * 100)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00\x00")
    corpus = text.load_corpus((str(tmp_path),), (), 0.1, None)
    assert len(corpus.skipped) == 1 and "picture.png" in corpus.skipped[0]
    with pytest.raises(
        Sparse24Error, match="--data .*picture.png is not UTF-8 text .*a zero byte at offset 4.* convert"
    ):
        text.load_corpus((str(tmp_path / "picture.png"),), (), 0.1, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text: .*bad.txt empty"),
        (b"text with a \0 in it", "not UTF-8 text .a zero byte at offset 12"),
        (b"caf\xe9 in latin-1", "not UTF-8 text .byte 0xe9 near offset 3"),
        (b"cut in a character \xf0\x9f", "not UTF-8 text"),
    ],
)
def test_text_that_is_none_is_refused_by_name_and_reason(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    good = tmp_path / "good.txt"
    good.write_text("hello " * 100)
    with pytest.raises(Sparse24Error, match=message):
        text.load_corpus((str(path),), (), 0.1, None)
    with pytest.raises(Sparse24Error, match="--valid.*" + message):
        text.load_corpus((str(good),), (str(path),), 0.1, None)


def test_missing_file_and_empty_folder_are_named(tmp_path):
    with pytest.raises(Sparse24Error, match="--data .*nothing.txt does not exist; name"):
        text.load_corpus((str(tmp_path / "nothing.txt"),), (), 0.1, None)
    with pytest.raises(Sparse24Error, match="--data .* is a folder without files"):
        text.load_corpus((str(tmp_path),), (), 0.1, None)


def test_too_little_text_names_the_context_length_and_both_counts(small, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a few words " * 20)
    with pytest.raises(
        Sparse24Error, match="--ctx 32 needs at least 33 validation tokens, but the text has 1[0-9]; .*--valid"
    ):
        tokens.prepare(resolve(small(data=(str(path),), tokenizer="bytes", cache_dir=str(tmp_path / "c"))))
    with pytest.raises(Sparse24Error, match="--ctx 512 needs at least 513 training tokens"):
        tokens.prepare(resolve(small(data=(str(path),), tokenizer="bytes", ctx=512, cache_dir=str(tmp_path / "c"))))


def test_unwritable_cache_is_named(small, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(Sparse24Error, match="--cache-dir .*file/below cannot be written .*name another"):
        tokens.prepare(resolve(small(cache_dir=str(blocked / "below"))))


# ---- the order -----------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone():
    ids = np.arange(1000, dtype=np.uint16)
    forward, backward = tokens.Batches(ids, 8, 4, seed=1), tokens.Batches(ids, 8, 4, seed=1)
    first = {step: forward(step) for step in range(70)}
    for step in reversed(range(70)):
        assert np.array_equal(backward(step)[0], first[step][0])
    assert not np.array_equal(tokens.Batches(ids, 8, 4, seed=2)(0)[0], first[0][0])


def test_targets_are_the_next_tokens():
    inputs, targets = tokens.Batches(np.arange(1000, dtype=np.uint16), 8, 4, seed=0)(3)
    assert inputs.shape == targets.shape == (4, 8) and inputs.dtype == np.int64
    assert np.array_equal(inputs + 1, targets)


@pytest.mark.parametrize("count", [9, 65, 66, 72, 100])
def test_an_epoch_visits_each_window_once(count):
    ids = np.arange(count, dtype=np.uint32)
    batches = tokens.Batches(ids, 8, 1, seed=5)
    for epoch in range(3):
        starts = sorted(int(batches(epoch * batches.windows + i)[0][0, 0]) for i in range(batches.windows))
        assert len(starts) == (count - 1) // 8
        assert np.all(np.diff(starts) == 8) and starts[-1] + 8 < count


def test_validation_slice_is_fixed_spread_and_bounded():
    ids = np.arange(10_001, dtype=np.uint16)
    inputs = np.concatenate([x for x, _ in tokens.validation_batches(ids, 10, 3, 400)])
    assert inputs.shape == (39, 10) and inputs[-1, 0] > 9000  # 13 batches of one shape
    assert sum(len(x) for x, _ in tokens.validation_batches(ids, 10, 3, 1)) == 1


def test_settings_that_do_not_touch_the_text_share_its_tokens(small):
    first, second = (tokens.prepare(resolve(small(**c))) for c in ({}, {"ffn": ("half",), "lr": 1e-4, "seed": 7}))
    assert first.digest == second.digest
    assert dataclasses.asdict(resolve(small()))["data"] == resolve(small()).data
