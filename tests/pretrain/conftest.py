"""A small text and settings under which a whole run takes a second or two."""

import random

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from run_files import draw_nothing  # noqa: E402

from sparse24.pretrain import Settings  # noqa: E402

WORDS = (
    "the of and a to in is was it for with as his on be at by had not are but from or have an they which one".split()
)


def make_text(bytes_at_least: int, seed: int = 0) -> str:
    """Lines of common words, with a few characters of more than one byte."""
    draw, lines, size = random.Random(seed), [], 0
    while size < bytes_at_least:
        line = " ".join(draw.choices(WORDS, k=draw.randint(4, 12))).capitalize() + draw.choice(
            [".", "!", " – ça va?", " 🙂"]
        )
        lines.append(line)
        size += len(line.encode()) + 1
    return "\n".join(lines) + "\n"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small only wait for one another's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Figures are made but not rendered.

    A test that takes `rendered` has them whole, and so has what fixtures of a module have made.
    """
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", draw_nothing)


@pytest.fixture
def rendered():
    pass


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(40_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(text_file, cache_dir, tmp_path):
    """small(**changes): settings of a run of 12 steps of a one-layer model, into tmp_path/run."""

    def make(**changes) -> Settings:
        values = dict(
            data=(str(text_file),), cache_dir=str(cache_dir), out=str(tmp_path / "run"), device="cpu",
            layers=1, width=32, heads=2, ctx=32, vocab_size=300, batch=4, micro_batch=2, steps=12, warmup=2, lr=3e-3,
            mask_interval=3, eval_interval=4, eval_tokens=256, save_interval=5, samples=1, sample_tokens=4,
        )  # fmt: skip
        return Settings(**(values | changes))

    return make


@pytest.fixture
def quiet():
    return lambda line: None
