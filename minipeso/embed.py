"""Item text -> item vector: what the RQ-VAE quantises, the "item semantic features" of Section 2.

With the 1B base: the mean of Llama's own hidden states, as in the Release (`llama_vectors`). The
small bases know no language; for them latent semantic analysis (Deerwester et al. 1990), offline
and in seconds (`title_vectors`). Paper: "title/description", no model named.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

WORD = re.compile(r"\w+")


def title_vectors(texts: Sequence[str], dim: int = 128, seed: int = 0) -> np.ndarray:
    """Latent semantic analysis. -> (n, dim) float32, rows of unit length

    The rows of U S, where U S V^T is the rank-`dim` SVD of the tf-idf matrix. A text's vector
    depends on the *set* of texts and the seed, not on their order or repeats. A text that shares no
    word with any other one gets the zero vector; columns beyond the rank of the matrix are zero.
    """
    unique, owner = np.unique(np.array(texts, dtype=object), return_inverse=True)
    vectors = np.zeros((len(unique), dim), dtype=np.float32)
    matrix = tf_idf([terms(text) for text in unique])  # (u, vocabulary)
    rank = min(dim, *matrix.shape)
    if rank:
        vectors[:, :rank] = left_singular(matrix, rank, seed)
    return vectors[owner]  # (n, dim)


def terms(text: str) -> list[str]:
    """Lower-case words and pairs of neighbouring words."""
    words = WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def tf_idf(documents: Sequence[list[str]], min_documents: int = 2) -> Tensor:
    """(1 + ln tf) ln((1 + n) / df), then rows of unit length. -> sparse (n, vocabulary)

    Vocabulary: the terms of at least `min_documents` documents, sorted.
    """
    counts = [Counter(document) for document in documents]
    frequency = Counter(term for count in counts for term in count)
    kept = sorted(term for term, df in frequency.items() if df >= min_documents)
    column = {term: j for j, term in enumerate(kept)}
    entries = [(i, column[term], tf) for i, count in enumerate(counts)
               for term, tf in count.items() if term in column]
    row, col, tf = np.array(entries, dtype=np.int64).reshape(-1, 3).T  # each (nonzeros,)
    df = np.array([frequency[term] for term in kept])
    value = (1 + np.log(tf)) * np.log((1 + len(documents)) / df[col])
    norm = np.sqrt(np.bincount(row, value**2, minlength=len(documents)))  # (n,)
    value = torch.from_numpy(value / norm[row]).float()
    index, size = torch.from_numpy(np.stack([row, col])), (len(documents), len(kept))
    return torch.sparse_coo_tensor(index, value, size, check_invariants=True).coalesce()


def left_singular(matrix: Tensor, rank: int, seed: int, extra: int = 16,
                  rounds: int = 4) -> np.ndarray:
    """Unit rows of U S for the top `rank` singular values: randomised subspace iteration.

    Halko, Martinsson & Tropp 2011, Algorithms 4.4 and 5.1. `extra` random directions and `rounds`
    iterations buy accuracy.
    """
    width = min(rank + extra, *matrix.shape)
    start = torch.Generator().manual_seed(seed)
    Q = torch.randn(matrix.shape[1], width, generator=start)  # (vocabulary, width)
    Q = torch.linalg.qr(matrix @ Q).Q  # (n, width)
    for _ in range(rounds):
        Q = torch.linalg.qr(matrix.T @ Q).Q  # (vocabulary, width)
        Q = torch.linalg.qr(matrix @ Q).Q  # (n, width)
    U, S, _ = torch.linalg.svd((matrix.T @ Q).T, full_matrices=False)  # (width, width), (width,)
    return F.normalize((Q @ (U * S))[:, :rank], dim=1).numpy()  # (n, rank)


def llama_vectors(hidden: Callable[[Tensor], Tensor], encode: Callable[[str], list[int]],
                  texts: Sequence[str | Sequence[str]], batch: int = 32, longest: int = 2048,
                  device: str | torch.device = "cpu", progress: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """Mean last hidden state over a field's tokens, then over an item's fields. -> (n, d) float32

    `texts[i]`: the fields of item i, title and description; an empty field counts, as in the
    Release (its one token is <bos>). `encode` puts <bos> first; a field is cut after `longest`
    tokens. `hidden(ids (b, l)) -> (b, l, d)`. Fields go through it in order of length, so as
    to pad little. `progress(fields done)` since the last call.
    """
    rows = [(row,) if isinstance(row, str) else row for row in texts]
    fields = [(encode(text)[:longest], item) for item, row in enumerate(rows) for text in row]
    speechless = set(range(len(texts))).difference(item for _, item in fields)
    speechless.update(item for ids, item in fields if not ids)
    if speechless:
        item = min(speechless)
        raise ValueError("an item has a field without tokens, or no field\n"
                         f"item {item}: {texts[item]!r}\n"
                         "give every item a field, and let encode() put <bos> first")
    fields.sort(key=lambda field: (len(field[0]), field))
    tokens, owner = [ids for ids, _ in fields], torch.tensor([item for _, item in fields])  # (f,)
    means = []
    for start in range(0, len(fields), batch):
        means.append(mean_states(hidden, tokens[start:start + batch], device))
        progress(len(means[-1]))
    means = torch.cat(means)  # (f, d)
    totals = torch.zeros(len(texts), means.shape[1]).index_add_(0, owner, means)  # (n, d)
    return (totals / torch.bincount(owner)[:, None]).numpy()


@torch.no_grad()
def mean_states(hidden: Callable[[Tensor], Tensor], rows: Sequence[list[int]],
                device: str | torch.device) -> Tensor:
    """Mean hidden state of each token row, on the CPU. -> (b, d)

    Rows are padded on the right, where causal attention cannot see the padding; the mean skips it.
    """
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)  # (b, l)
    length = torch.tensor([len(row) for row in rows], device=device)[:, None]  # (b, 1)
    real = torch.arange(ids.shape[1], device=device) < length  # (b, l)
    return (hidden(ids).float() * real[..., None]).sum(1).div(length).cpu()
