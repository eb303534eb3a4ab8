"""From examples to token rows: the prompt, one token a code, labels on the answer only.

Release: one row for every (history, target) pair. Here: pairs of one user whose histories are
prefixes of each other share one row, in which the history stands once (the trunk) and every pair
has its own branch of question and answer. A mask keeps the branches apart and positions count as
if each pair stood alone, so loss and gradient are the pairs' own, at a fraction of the tokens.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a position with no label
FRAME = ("Below is an instruction that describes a task. Write a response that appropriately completes "
         "the request.\n\n### Instruction:\n{}\n\n### Response:")
QUESTIONS = {  # "paper" is Appendix D; "release" is the sentence in the authors' code
    "paper": FRAME.format("Based on the items that the user has interacted with: {items}, can you "
                          "determine what item would be recommended to the user next?"),
    "release": FRAME.format("The user has interacted with items {items} in chronological order. Can you "
                            "predict the next possible item that the user may expect?"),
}


@dataclass(frozen=True)
class Template:
    """preamble, item, separator, item, ..., tail -> answer, end: token ids around the items' codes.

    Code c of level l is the one token first_token + l * n_codes + c; items (n_items, L) holds every
    item's tokens. Release: ids in the order of the sorted strings. Here: by arithmetic, so that no
    vocabulary file decides what a row of the checkpoint means.
    """

    preamble: tuple[int, ...]
    separator: tuple[int, ...]
    tail: tuple[int, ...]
    end: tuple[int, ...]  # learnt behind the answer. Release: <|end_of_text|>. Paper, Eq. 2: the item alone
    items: np.ndarray
    first_token: int
    n_codes: int

    @classmethod
    def short(cls, codes, n_codes: int) -> Template:
        """<bos> item item ... -> item, for models without a text vocabulary: token 0 is <bos>."""
        return cls((0,), (), (), (), code_tokens(codes, n_codes, 1), 1, n_codes)

    @classmethod
    def text(cls, tokenizer, style: str, learn_end: bool, codes, n_codes: int) -> Template:
        """The sentence QUESTIONS[style] through a `tokenizers.Tokenizer`; the codes' tokens lie
        behind its vocabulary. Its pieces are encoded apart: no token spans a word and a code."""
        if style not in QUESTIONS:
            raise ValueError(f"no prompt is called {style!r}; there are {', '.join(QUESTIONS)}")
        marks = [tokenizer.token_to_id(f"<|{edge}_of_text|>") for edge in ("begin", "end")]
        if None in marks:
            raise ValueError("the tokenizer has no <|begin_of_text|> or no <|end_of_text|>\n"
                             f"its vocabulary has {tokenizer.get_vocab_size()} tokens\n"
                             "use the tokenizer.json that belongs to the Llama 3 checkpoint")
        before, separator, after = (tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in
                                    (QUESTIONS[style].split("{items}")[0], ", ",
                                     QUESTIONS[style].split("{items}")[1]))
        first = tokenizer.get_vocab_size()
        end = (marks[1],) if learn_end else ()
        return cls((marks[0], *before), separator, after, end, code_tokens(codes, n_codes, first), first, n_codes)

    @property
    def continues(self) -> bool:
        """Whether nothing stands between the items: then the answer simply continues the history."""
        return not (self.separator or self.tail or self.end)

    def trunk(self, history: Iterable[int]) -> list[int]:
        ids = list(self.preamble)
        for i, item in enumerate(history):
            ids += [*(self.separator if i else ()), *self.items[item].tolist()]
        return ids

    def prompt(self, history: Iterable[int]) -> Tensor:
        """The token ids (l,) that stand before the answer."""
        return torch.tensor(self.trunk(history) + list(self.tail))

    def answer(self, item: int) -> list[int]:
        return [*self.items[item].tolist(), *self.end]


def code_tokens(codes, n_codes: int, first_token: int) -> np.ndarray:
    """codes (n_items, L) -> token ids (n_items, L)."""
    codes = np.asarray(codes, dtype=np.int64)
    return first_token + np.arange(codes.shape[1]) * n_codes + codes


class TokenSequence(NamedTuple):
    """One sequence with the answers of one or more pairs; every array is (l,)."""

    ids: np.ndarray
    labels: np.ndarray  # the token to predict *at* each position (already shifted), or IGNORE
    positions: np.ndarray
    branch: np.ndarray  # 0 in the trunk, k in the k-th pair's branch
    trunk_seen: np.ndarray  # how many of the trunk's first tokens a branch may see
    pairs: int


class Batch(NamedTuple):
    ids: Tensor  # (n, l)
    labels: Tensor  # (n, l)
    positions: Tensor | None  # (n, l)
    mask: Tensor | None  # (n, 1, l, l); None: causal
    real: Tensor  # (n, l); False where a row is padded
    pairs: int
    preamble: Tensor | None = None  # (1, p): what all rows begin with, if it is not in them
    at: Tensor | None = None  # (n, m): where the labels are; None: everywhere is asked for


def sequences(examples: Iterable, template: Template, share: bool = True) -> list[TokenSequence]:
    """The rows of a stage's examples (stages.Example). With share=False every pair is its own row:
    slower, the same loss; it is what the release trains on, and how a test proves the sharing."""
    build = _continued if template.continues else _branched
    return [build(chain, template) for chain in _chains(examples, share)]


def _chains(examples: Iterable, share: bool) -> Iterator[list]:
    """Runs of pairs in which each history is the one before plus its target. A window that has begun
    to slide breaks the run: its items move to other positions, so nothing can be shared exactly."""
    chain: list = []
    for example in examples:
        if chain and not (share and example.user == chain[-1].user
                          and tuple(example.history) == (*chain[-1].history, chain[-1].target)):
            yield chain
            chain = []
        chain.append(example)
    if chain:
        yield chain


def _continued(chain: list, template: Template) -> TokenSequence:
    """No question between the items: the trunk, one item longer, is every pair's prompt and answer."""
    ids = np.array(template.trunk((*chain[-1].history, chain[-1].target)))
    labels = np.full(len(ids), IGNORE)
    levels = template.items.shape[1]
    for example in chain:
        start = len(template.preamble) + len(example.history) * levels
        labels[start - 1:start - 1 + levels] = template.items[example.target]
    l = len(ids) - 1  # the last token is a label only
    zeros = np.zeros(l, dtype=np.int64)
    return TokenSequence(ids[:l], labels[:l], np.arange(l), zeros, zeros, len(chain))


def _branched(chain: list, template: Template) -> TokenSequence:
    """The trunk once, then tail and answer of every pair, each branch seeing its part of the trunk."""
    trunk = template.trunk(chain[-1].history)
    parts = [(trunk, [IGNORE] * len(trunk), range(len(trunk)), 0, 0)]
    for k, example in enumerate(chain, start=1):
        answer = template.answer(example.target)
        seen = len(template.trunk(example.history))
        branch = [*template.tail, *answer[:-1]]
        labels = [IGNORE] * (len(template.tail) - 1) + answer
        parts.append((branch, labels, range(seen, seen + len(branch)), k, seen))
    ids, labels, positions = (np.concatenate([np.array(part[i]) for part in parts]) for i in range(3))
    branch, seen = (np.repeat([part[i] for part in parts], [len(part[0]) for part in parts]) for i in (3, 4))
    return TokenSequence(ids, labels, positions, branch, seen, len(chain))


def collate(rows: list[TokenSequence], device="cpu", preamble: Sequence[int] | None = None) -> Batch:
    """Rows of any lengths, padded on the right; what is padded has no label and is seen by no token. With the
    template's preamble, branched rows come without it, to be computed once, and with the places of their labels,
    where alone the last layer is needed: the same loss, but those who watch a layer see other inputs."""
    ids, labels, positions, branch, seen = (
        torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row[i]) for row in rows], True, padding).to(device)
        for i, padding in enumerate((0, IGNORE, 0, 0, 0)))  # (n, l) each
    pairs = sum(row.pairs for row in rows)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(row.ids) for row in rows])[:, None]
    real = real.to(device)  # (n, l)
    if not any(row.branch[-1] for row in rows):  # asked on the host: no wait for the device
        return Batch(ids, labels, None, None, real, pairs)
    slot = torch.arange(ids.shape[1], device=device)
    own = branch[:, :, None] == branch[:, None]  # (n, l, l)
    trunk = (branch[:, None] == 0) & (slot < seen[..., None])
    mask = (own | trunk) & (slot <= slot[:, None])
    if preamble is None or len(preamble) < 2:
        return Batch(ids, labels, positions, mask[:, None], real, pairs)
    p, most = len(preamble), max(int((row.labels != IGNORE).sum()) for row in rows)
    at = (labels[:, p:] != IGNORE).long().argsort(stable=True, dim=1, descending=True)[:, :most]  # (n, most)
    return Batch(ids[:, p:], labels[:, p:], positions[:, p:], mask[:, None, p:], real[:, p:], pairs, ids[:1, :p], at)


def batches(rows: list[TokenSequence], pairs: int, generator: torch.Generator, pool: int = 32) -> list[list[TokenSequence]]:
    """One epoch's batches of about `pairs` pairs each, in random order, of rows of like length.

    Rows are shuffled, cut into pools of `pool` batches, sorted by length inside a pool (so that
    little is padded), and cut into batches, which are shuffled again.
    """
    if not rows:
        return []
    order = torch.randperm(len(rows), generator=generator).numpy()
    count, length = (np.array([f(rows[i]) for i in order]) for f in (lambda r: r.pairs, lambda r: len(r.ids)))
    in_pool = (count.cumsum() - 1) // (pairs * pool)
    by_length = np.lexsort((length, in_pool))
    order, count = order[by_length], count[by_length]
    cut = np.flatnonzero(np.diff((count.cumsum() - 1) // pairs)) + 1
    groups = np.split(order, cut)
    return [[rows[i] for i in groups[j]] for j in torch.randperm(len(groups), generator=generator)]
