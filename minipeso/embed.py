"""Item text -> item vector: what the RQ-VAE quantises, the "item semantic features" of Section 2.

Paper: "title/description", no model named. Release, and here with a pretrained base: Llama's own mean hidden states of
each, averaged (`llama_vectors`). A small base knows no language: latent semantic analysis (Deerwester et al. 1990)."""
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LONGEST = 2048  # tokens of a text that `llama_vectors` reads


def title_vectors(texts: Sequence[str], dim=128, seed: int = 0, first: Sequence[int] | None = None) -> np.ndarray:
    """Latent semantic analysis: the unit rows of M V = U S, with U S V^T the rank-`dim` SVD of the tf-idf matrix M.

    -> (n, dim) float32. A text's vector depends on the *set* of texts and the seed, not on their order or repeats.
    first: the texts, by number, that vocabulary, weights and V are taken from (default: all). A text that shares no
    word with them gets the zero vector. Columns beyond the rank hold zeros."""
    unique, owner = np.unique(np.array(texts, dtype=object), return_inverse=True)
    fitted = np.unique(owner if first is None else owner[np.asarray(first)])  # numbers of unique texts
    vectors = np.zeros((len(unique), dim), dtype=np.float32)
    matrix = tf_idf([terms(text) for text in unique], fitted)  # (u, vocabulary)
    rank = min(dim, len(fitted), matrix.shape[1])
    if rank:
        vectors[:, :rank] = left_singular(matrix, rank, seed, fitted)
    return vectors[owner]  # (n, dim)


def terms(text: str) -> list[str]:
    """Lower-case words and pairs of neighbouring words."""
    words = re.findall(r"\w+", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def tf_idf(documents: Sequence[list[str]], fitted: Sequence[int]) -> Tensor:
    """(1 + ln tf) ln((1 + m) / df), then rows of unit length. -> sparse (n, vocabulary)
    Vocabulary: the terms of at least two of the m documents `fitted`, sorted. A document without any: an empty row."""
    counts = [Counter(document) for document in documents]
    frequency = Counter(term for i in fitted for term in counts[i])
    vocabulary = sorted(term for term, df in frequency.items() if df >= 2)
    column = {term: j for j, term in enumerate(vocabulary)}
    entries = [(i, column[term], tf) for i, count in enumerate(counts) for term, tf in count.items() if term in column]
    row, col, tf = np.array(entries, dtype=np.int64).reshape(-1, 3).T  # each (nonzeros,)
    df = np.array([frequency[term] for term in vocabulary])
    value = (1 + np.log(tf)) * np.log((1 + len(fitted)) / df[col])
    norm = np.sqrt(np.bincount(row, value**2, minlength=len(documents)))  # (n,)
    value, size = torch.from_numpy(value / norm[row]).float(), (len(documents), len(vocabulary))
    return torch.sparse_coo_tensor(np.stack([row, col]), value, size, check_invariants=True).coalesce()


def left_singular(matrix: Tensor, rank: int, seed: int, fitted: np.ndarray, extra=16, rounds=4) -> np.ndarray:
    """Unit rows of M V for the top `rank` singular values, V from the rows `fitted`, by randomised subspace iteration.
    M (n, m) -> (n, rank). Halko, Martinsson & Tropp 2011, Algorithms 4.4 and 5.1; `extra` and `rounds` buy accuracy.
    Rounding moves a row by about eps S_1: one not 100 times as long has no two true digits and becomes zero."""
    every, matrix = matrix, matrix.index_select(0, torch.from_numpy(fitted))
    width = min(rank + extra, *matrix.shape)
    Q = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed))  # (m, width)
    Q = torch.linalg.qr(matrix @ Q).Q  # (n, width)
    for _ in range(rounds):
        Q = torch.linalg.qr(matrix.T @ Q).Q  # (m, width)
        Q = torch.linalg.qr(matrix @ Q).Q  # (n, width)
    V, S, _ = torch.linalg.svd(matrix.T @ Q, full_matrices=False)  # (m, width), (width,)
    rows = every @ V[:, :rank]  # (n, rank)
    noise = 100 * torch.finfo(rows.dtype).eps * S[0]
    return F.normalize(rows, dim=1).where(rows.norm(dim=1, keepdim=True) > noise, 0).numpy()


@torch.no_grad()
def llama_vectors(hidden: Callable[[Tensor], Tensor], encode: Callable[[str], list[int]], texts: Sequence[str],
                  batch: int = 32, device="cpu", progress: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """Mean last hidden state over a text's tokens. -> (n, d) float32
    hidden(ids (b, l)) -> (b, l, d). `encode` puts <bos> first: an empty text has a state too. Texts go by length."""
    tokens = [encode(text)[:LONGEST] for text in texts]
    if not all(tokens):
        item = tokens.index([])
        raise ValueError(f"an item's text has no tokens\nitem {item}: {texts[item]!r}\nlet encode() put <bos> first")
    order = sorted(range(len(texts)), key=lambda item: (len(tokens[item]), tokens[item]))
    means = []
    for start in range(0, len(order), batch):
        some = [torch.tensor(tokens[item]) for item in order[start:start + batch]]
        ids, real = (pad_sequence(rows, batch_first=True).to(device)  # (b, l), padded where causal attention cannot see
                     for rows in (some, [*map(torch.ones_like, some)]))
        means.append((hidden(ids).float() * real[..., None]).sum(1).div(real.sum(1, True)).cpu())  # (b, d)
        progress(len(some))
    return torch.cat(means)[torch.tensor(order).argsort()].numpy()  # (n, d), from order back to items
