"""Text to vector: LSA against known SVDs and textbook tf-idf; mean hidden states against a loop."""
from __future__ import annotations

import gzip
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeso.embed import left_singular, llama_vectors, terms, tf_idf, title_vectors
from tests.conftest import draws

WORDS = "usb cable case cover phone hdmi mount lens strap charger 10ft black für イヤホン".split()


def titles(n: int = 80, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(n)]


def slow_tf_idf(documents: list[list[str]]) -> list[dict[str, float]]:
    """Term weights by counting, document by document."""
    rows = []
    for document in documents:
        row = {}
        for term in document:
            df = sum(term in other for other in documents)
            if df >= 2:
                idf = math.log((1 + len(documents)) / df)
                row[term] = (1 + math.log(document.count(term))) * idf
        norm = math.sqrt(sum(w * w for w in row.values()))
        rows.append({term: w / norm for term, w in row.items()})
    return rows


def test_terms():
    """Unicode words in lower case, then neighbouring pairs; punctuation separates."""
    assert terms("USB-C Kabel, für イヤホン!") == ["usb", "c", "kabel", "für", "イヤホン",
                                              "usb c", "c kabel", "kabel für", "für イヤホン"]
    assert terms(" -- ") == []


def test_tf_idf_is_the_textbook_formula():
    """Every entry equals the weight computed by counting; terms of one document are left out."""
    documents = [terms(text) for text in titles(25)] + [["only", "here"], []]
    matrix, slow = tf_idf(documents).to_dense().numpy(), slow_tf_idf(documents)
    vocabulary = sorted({term for row in slow for term in row})
    want = np.array([[row.get(term, 0) for term in vocabulary] for row in slow])
    assert matrix.shape == want.shape and np.abs(matrix - want).max() < 1e-6


def test_full_rank_keeps_the_cosines():
    """With `dim` at the rank of the matrix, the cosines of the vectors are those of tf-idf."""
    texts = sorted(set(titles(40)))
    slow = slow_tf_idf([terms(text) for text in texts])
    want = np.array([[sum(w * b.get(term, 0) for term, w in a.items()) for b in slow]
                     for a in slow])
    vectors = title_vectors(texts, dim=len(texts))
    assert np.abs(vectors @ vectors.T - want).max() < 1e-5


def test_subspace_iteration_finds_the_singular_vectors():
    """Rows of U S of a matrix with a known SVD come out, up to the signs of the columns."""
    U, V = (np.linalg.qr(np.random.default_rng(k).standard_normal((n, 60)))[0]
            for k, n in enumerate((200, 90)))
    S = 0.8 ** np.arange(60)
    want = U[:, :10] * S[:10]  # known by construction
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    matrix = torch.from_numpy(U * S @ V.T).float()
    for seed in (0, 1):
        got = left_singular(matrix, 10, seed)
        error = np.abs(np.abs(got) - np.abs(want)).max()
        assert got.shape == (200, 10) and error < 1e-3, (seed, error)


@given(st.lists(st.text(alphabet="abc é-", max_size=12), max_size=25), st.randoms())
@draws(60)
def test_order_and_repeats_do_not_matter(texts, draw):
    """Shuffled or repeated, a text keeps its vector bit for bit; rows are unit or zero."""
    vectors = dict(zip(texts, title_vectors(texts, dim=8)))
    again = texts + texts[:3]
    draw.shuffle(again)
    for text, vector in zip(again, title_vectors(again, dim=8)):
        assert vector.dtype == np.float32 and vector.shape == (8,)
        assert (vector == vectors[text]).all(), text
        norm = np.linalg.norm(vector)
        assert norm == 0 or abs(norm - 1) < 1e-5, (text, norm)


def test_nothing_in_common_is_zero():
    """No text, empty texts, texts that share no word: zeros of the right shape."""
    assert title_vectors([]).shape == (0, 128)
    assert not title_vectors(["", "", "lonely"]).any()
    vectors = title_vectors(["a b", "a c", "zzz"], dim=5)
    assert vectors[:2].any(1).all() and not vectors[2].any()


def test_like_titles_are_near():
    """Two cables are nearer to each other than a cable to a case."""
    cable, other, case, *_ = title_vectors(
        ["usb cable black", "usb charger cable", "phone case cover",
         "usb cable", "phone case", "case cover"], 3)
    assert cable @ other > cable @ case + 0.5, (cable @ other, cable @ case)


def test_neighbours_of_real_titles_share_a_category(shared_data):
    """Over 65 % of electronics have a nearest neighbour, by title alone, of their own category."""
    with gzip.open(shared_data / "electronics23" / "meta_Electronics.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines][:4000]
    category = np.array([row["categories"][0] for row in rows])
    vectors = title_vectors([row["title"] for row in rows])
    likeness = vectors[:1000] @ vectors.T
    likeness[np.arange(1000), np.arange(1000)] = -1
    share = (category[likeness.argmax(1)] == category[:1000]).mean()
    assert share > 0.65, share


# -- mean hidden states --------------------------------------------------------------------------

def encode(text: str) -> list[int]:
    return [1] + [ord(c) % 50 + 2 for c in text]


def hidden(ids: torch.Tensor) -> torch.Tensor:
    """A causal toy model: state = running mean of token features; padding is not seen."""
    features = torch.stack([ids.sin(), ids.cos(), ids * 0.01], -1)  # (n, l, 3)
    return features.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]


def slow_vector(fields: tuple[str, ...], longest: int = 2048) -> torch.Tensor:
    means = [hidden(torch.tensor([encode(field)[:longest]]))[0].mean(0) for field in fields]
    return sum(means) / len(means)


FIELDS = [("a cable", "long, black"), ("case", ""), ("", ""), ("x" * 40, "y"), ("one field",)]


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_llama_vectors_are_means_of_means(batch):
    """Mean over tokens, <bos> included and padding not, then over fields: whatever the batch."""
    vectors = llama_vectors(hidden, encode, FIELDS, batch=batch)
    want = torch.stack([slow_vector(fields) for fields in FIELDS]).numpy()
    assert vectors.dtype == np.float32 and np.abs(vectors - want).max() < 1e-6


def test_llama_vectors_follow_the_items_not_their_order():
    """Reversed items give reversed vectors, bit for bit; a plain string is one field."""
    there = llama_vectors(hidden, encode, FIELDS)
    assert (llama_vectors(hidden, encode, FIELDS[::-1]) == there[::-1]).all()
    one = llama_vectors(hidden, encode, ["a cable", "case"])
    assert (one == llama_vectors(hidden, encode, [("a cable",), ("case",)])).all()


def test_long_fields_are_cut():
    """A field is cut after `longest` tokens."""
    vectors = llama_vectors(hidden, encode, [("abcdefgh",)], longest=4)
    assert np.abs(vectors[0] - slow_vector(("abcdefgh",), 4).numpy()).max() < 1e-6
    assert np.abs(vectors[0] - slow_vector(("abcdefgh",)).numpy()).max() > 1e-3


@pytest.mark.parametrize("texts", [[("a",), ()], [("a",), ("b", "")]])
def test_an_item_without_tokens_is_named(texts):
    """No field, or a field whose encoding is empty (no <bos>): ValueError naming the item."""
    with pytest.raises(ValueError, match="item 1: "):
        llama_vectors(hidden, lambda text: encode(text)[1:], texts)
