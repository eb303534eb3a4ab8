"""Text to vector: LSA against known SVDs and textbook tf-idf; mean hidden states against a loop."""
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st

from minipeso import embed
from minipeso.embed import left_singular, llama_vectors, terms, tf_idf, title_vectors
from tests.conftest import draws

WORDS = "usb cable case cover phone hdmi mount lens strap charger 10ft black für イヤホン".split()
WORDLESS = ["", "a", "b-c", "c-a-b"]  # a text without a term, and a matrix of rank 2 with three columns


def titles(n: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(n)]


def slow_tf_idf(documents: list[list[str]]) -> list[dict[str, float]]:
    """Term weights by counting, document by document."""
    rows = []
    for document in documents:
        row = {}
        for term in document:
            df = sum(term in other for other in documents)
            if df >= 2:
                row[term] = (1 + math.log(document.count(term))) * math.log((1 + len(documents)) / df)
        norm = math.sqrt(sum(w * w for w in row.values()))
        rows.append({term: w / norm for term, w in row.items()})
    return rows


def test_tf_idf_is_the_textbook_formula():
    """Every entry equals the weight computed by counting; terms of one document are left out. A term is a Unicode word
    in lower case, or a pair of neighbours; punctuation separates."""
    assert terms("USB-C für イヤホン!") == ["usb", "c", "für", "イヤホン", "usb c", "c für", "für イヤホン"]
    assert terms(" -- ") == []
    documents = [terms(text) for text in titles(25)] + [["only", "here"], []]
    matrix, slow = tf_idf(documents, range(27)).to_dense().numpy(), slow_tf_idf(documents)
    vocabulary = sorted({term for row in slow for term in row})
    want = np.array([[row.get(term, 0) for term in vocabulary] for row in slow])
    assert matrix.shape == want.shape and np.abs(matrix - want).max() < 1e-6


def test_subspace_iteration_finds_the_singular_vectors():
    """Rows of U S of a matrix with a known SVD come out, up to the signs of the columns."""
    U, V = (np.linalg.qr(np.random.default_rng(n).standard_normal((n, 60)))[0] for n in (200, 90))
    S = 0.8 ** np.arange(60)
    want = U[:, :10] * S[:10]  # known by construction
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    matrix = torch.from_numpy(U * S @ V.T).float()
    for seed in (0, 1):
        got = left_singular(matrix, 10, seed, np.arange(200))
        assert got.shape == (200, 10) and np.abs(np.abs(got) - np.abs(want)).max() < 1e-3


def test_fitted_on_the_first_texts_alone():
    """The vectors of the first are those they have alone, whatever comes later; a later one's cosines are those of its
    tf-idf row by the first's weights; one that shares no word with them is zero."""
    texts = sorted(set(titles(40)))
    alone = title_vectors(texts[:25], dim=25)
    both = title_vectors([*texts[::-1], "unheard of"], dim=25, first=range(len(texts) - 25, len(texts)))[::-1]
    np.testing.assert_allclose(both[1:26] @ both[1:26].T, alone @ alone.T, atol=1e-5)
    assert not both[0].any() and np.allclose(np.linalg.norm(both[1:], axis=1), 1)
    documents = [terms(text) for text in texts]
    matrix = tf_idf(documents, range(25)).to_dense().numpy().astype(float)
    basis = np.linalg.svd(matrix[:25])[2][:np.linalg.matrix_rank(matrix[:25])]  # the first's row space
    rows = matrix @ basis.T
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(both[1:] @ both[1:].T, rows @ rows.T, atol=1e-4)


@given(st.lists(st.text(alphabet="abc é-", max_size=12), max_size=25), st.randoms())
@example(WORDLESS, random.Random(0))
@draws(60)
def test_order_and_repeats_do_not_matter(texts, draw):
    """Shuffled or repeated, a text keeps its vector bit for bit; rows are unit or zero."""
    vectors, again = dict(zip(texts, title_vectors(texts, dim=8))), texts + texts[:3]
    draw.shuffle(again)
    for text, vector in zip(again, title_vectors(again, dim=8)):
        assert vector.dtype == np.float32 and vector.shape == (8,) and (vector == vectors[text]).all(), text
        assert not vector.any() or abs(np.linalg.norm(vector) - 1) < 1e-5, (text, vector)


def test_nothing_in_common_is_zero():
    """No text, empty texts, texts that share no word: exactly zero, of the right shape."""
    assert title_vectors([]).shape == (0, 128) and not title_vectors(["", "", "lonely"]).any()
    vectors = title_vectors(["a b", "a c", "zzz"], dim=5)
    assert vectors[:2].any(1).all() and not vectors[2].any()
    for seed in range(20):
        assert title_vectors(WORDLESS, 8, seed).any(1).tolist() == [False, True, True, True], seed


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_row_of_rounding_gets_no_direction(scale):
    """Rows outside the top singular space are zero, empty or not; a row with one percent inside is not."""
    rows = np.random.default_rng(0).standard_normal((40, 6))
    matrix = torch.zeros(43, 9)
    matrix[:40, :6] = torch.from_numpy(rows)
    matrix[41, 6], matrix[42, 7], matrix[42, 0] = 1.0, 1.0, 1e-2
    vectors = left_singular(scale * matrix, 6, 0, np.arange(43))
    assert not vectors[40:42].any() and np.abs(np.linalg.norm(vectors[42]) - 1) < 1e-6
    cosines = rows @ rows.T / np.outer(*2 * [np.linalg.norm(rows, axis=1)])
    assert np.abs(vectors[:40] @ vectors[:40].T - cosines).max() < 1e-4


def encode(text: str) -> list[int]:
    return [1] + [ord(c) % 50 + 2 for c in text]


def hidden(ids: torch.Tensor) -> torch.Tensor:
    """A causal toy model: state = running mean of token features; padding is not seen."""
    features = torch.stack([ids.sin(), ids.cos(), ids * 0.01], -1)  # (n, l, 3)
    return features.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]


def slow_vector(text: str, longest: int = 2048) -> torch.Tensor:
    return hidden(torch.tensor([encode(text)[:longest]]))[0].mean(0)


TEXTS = ["a cable", "case", "", "x" * 40, "a cable, long"]


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_llama_vectors_are_means(batch, monkeypatch):
    """Mean over tokens, <bos> included and padding not, whatever the batch; the items' order does not matter. A text is
    cut after LONGEST tokens; one without any (no <bos>) is named."""
    done = []
    vectors = llama_vectors(hidden, encode, TEXTS, batch, progress=done.append)
    want = torch.stack([slow_vector(text) for text in TEXTS]).numpy()
    assert vectors.dtype == np.float32 and np.abs(vectors - want).max() < 1e-6 and sum(done) == len(TEXTS)
    assert (llama_vectors(hidden, encode, TEXTS[::-1], batch) == vectors[::-1]).all()
    with pytest.raises(ValueError, match="item 1: ''"):
        llama_vectors(hidden, lambda text: encode(text)[1:], ["a", ""], batch)
    monkeypatch.setattr(embed, "LONGEST", 4)
    vector = llama_vectors(hidden, encode, ["abcdefgh"], batch)[0]
    assert np.abs(vector - slow_vector("abcdefgh", 4).numpy()).max() < 1e-6
    assert np.abs(vector - slow_vector("abcdefgh").numpy()).max() > 1e-3
