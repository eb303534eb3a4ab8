"""From examples to token sequences: the prompt, one token per code, labels on the answer only.

Release: one sequence per pair (history, target). Here: pairs of one user whose histories are prefixes of each other
share one sequence: the longest history once, the trunk, and behind it a branch of question and answer per pair. A mask
keeps the branches apart, and positions count as if each pair stood alone: the same loss and gradient, fewer tokens."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # the label of a position that has none
POOL = 32  # batches among which sequences are sorted by length
FRAME = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
         "\n\n### Instruction:\n{}\n\n### Response:")
QUESTIONS = {  # "paper" is Appendix D; "release" is the sentence in the authors' code
    "paper": FRAME.format("Based on the items that the user has interacted with: {items}, can you determine what item "
                          "would be recommended to the user next?"),
    "release": FRAME.format("The user has interacted with items {items} in chronological order. Can you predict the "
                            "next possible item that the user may expect?")}


@dataclass(frozen=True)
class Template:
    """preamble, item, separator, item, ..., tail -> answer, end: token ids around the items' codes.

    Code c of level l is the one token first_token + l * n_codes + c. Release: in the order of the sorted strings."""
    preamble: tuple[int, ...]
    separator: tuple[int, ...]
    tail: tuple[int, ...]
    end: tuple[int, ...]  # learnt behind the answer. Release: <|end_of_text|>. Paper, Eq. 2: the item alone
    items: np.ndarray  # (n_items, L): every item's tokens
    first_token: int
    n_codes: int

    @classmethod
    def short(cls, codes, n_codes: int) -> "Template":
        """<bos> item item ... -> item, for models without words: token 0 is <bos>."""
        return cls((0,), (), (), (), code_tokens(codes, n_codes, 1), 1, n_codes)

    @classmethod
    def text(cls, tokenizer, style: str, learn_end: bool, codes, n_codes: int) -> "Template":
        """The sentence QUESTIONS[style] in the tokens of a `tokenizers.Tokenizer`, behind whose vocabulary the codes'
        tokens stand. Its pieces are encoded apart, so no token spans a word and a code."""
        if style not in QUESTIONS:
            raise ValueError(f"no such prompt\n{style!r}; there are {', '.join(QUESTIONS)}\nchoose one of them")
        marks = [tokenizer.token_to_id(f"<|{edge}_of_text|>") for edge in ("begin", "end")]
        if None in marks:
            raise ValueError("the tokenizer has no <|begin_of_text|> or no <|end_of_text|>\nits vocabulary has "
                             f"{tokenizer.get_vocab_size()} tokens\nuse the tokenizer.json of the Llama 3 checkpoint")
        before, after = QUESTIONS[style].split("{items}")
        pieces = (before, ", ", after)
        before, separator, after = (tuple(tokenizer.encode(s, add_special_tokens=False).ids) for s in pieces)
        first, end = tokenizer.get_vocab_size(), (marks[1],) if learn_end else ()
        return cls((marks[0], *before), separator, after, end, code_tokens(codes, n_codes, first), first, n_codes)

    def trunk(self, history: Iterable[int]) -> list[int]:
        """The preamble and the history."""
        tokens = [token for item in history for token in (*self.separator, *self.items[item].tolist())]
        return [*self.preamble, *tokens[len(self.separator):]]

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
    """A trunk with the answers of one or more pairs; every array is (l,). A token of a branch sees the first `seen`
    tokens and those from `start`, where the branch begins, up to itself. In the trunk both are 0."""
    ids: np.ndarray
    labels: np.ndarray  # the token that should follow, or IGNORE
    seen: np.ndarray
    start: np.ndarray
    pairs: int
    preamble: int = 0  # how many first tokens all sequences of the template share


class Batch(NamedTuple):
    """Sequences of any lengths, padded on the right: what is padded has no label, and no token sees it."""
    ids: Tensor  # (n, l)
    labels: Tensor  # (n, l)
    positions: Tensor | None  # (n, l); None: 0, 1, 2, ...
    mask: Tensor | None  # (n, 1, l, l): which tokens each token sees; None: all before it
    real: Tensor  # (n, l): False where padded
    pairs: int
    preamble: int = 0  # how many first tokens all sequences share, to be computed once
    weight: float = 1.0  # of its mean in what is minimised: its pairs / the mean of all batches


def sequences(examples: Iterable, template: Template, share: bool = True) -> list[TokenSequence]:
    """The token sequences of examples (stages.Example). share=False: one per pair, as the release; slower, the same."""
    build = _branched if template.separator or template.tail or template.end else _continued
    return [build(chain, template) for chain in _chains(examples, share)]


def _chains(examples: Iterable, share: bool) -> list[list]:
    """Runs of pairs in which each history is the one before and its target. A window that slides ends the run."""
    chains: list[list] = []
    for example in examples:
        last = chains[-1][-1] if chains else None
        if share and last and (example.user, tuple(example.history)) == (last.user, (*last.history, last.target)):
            chains[-1].append(example)
        else:
            chains.append([example])
    return chains


def _continued(chain: list, template: Template) -> TokenSequence:
    """Nothing between the items: the trunk, one item longer, is every pair's prompt and answer."""
    ids = np.array(template.trunk((*chain[-1].history, chain[-1].target)))  # (l + 1,)
    labels = ids[1:].copy()
    labels[:len(template.trunk(chain[0].history)) - 1] = IGNORE
    zeros = np.zeros_like(labels)
    return TokenSequence(ids[:-1], labels, zeros, zeros, len(chain))


def _branched(chain: list, template: Template) -> TokenSequence:
    """The trunk once, then a branch per pair: the tail and the answer."""
    ids = template.trunk(chain[-1].history)
    labels, seen, start = [IGNORE] * len(ids), [0] * len(ids), [0] * len(ids)
    for example in chain:
        answer = template.answer(example.target)
        branch = [*template.tail, *answer[:-1]]
        labels += [IGNORE] * (len(template.tail) - 1) + answer
        seen += [len(template.trunk(example.history))] * len(branch)
        start += [len(ids)] * len(branch)
        ids += branch
    return TokenSequence(*map(np.array, (ids, labels, seen, start)), len(chain), len(template.preamble))


def collate(some: list[TokenSequence], device="cpu") -> Batch:
    """The batch of some sequences of one template. Positions count as if each pair stood alone."""
    ids, labels, seen, start = (
        torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one[i]) for one in some], True, padding).to(device)
        for i, padding in enumerate((0, IGNORE, 0, 0)))  # (n, l) each
    slot, pairs = torch.arange(ids.shape[1], device=device), sum(one.pairs for one in some)
    real = slot < torch.tensor([len(one.ids) for one in some], device=device)[:, None]  # (n, l)
    if not any(one.start[-1] for one in some):  # asked on the host: no wait for the device
        return Batch(ids, labels, None, None, real, pairs)
    mask = (slot < seen[..., None]) | (slot >= start[..., None])  # (n, l, l)
    mask &= slot <= slot[:, None]
    return Batch(ids, labels, slot - start + seen, mask[:, None], real, pairs, some[0].preamble)


def batches(sequences: list[TokenSequence], pairs: int, generator: torch.Generator) -> list[list[TokenSequence]]:
    """One epoch's batches of about `pairs` pairs each, in random order. Sequences are shuffled, cut into pools of POOL
    batches, sorted by length inside a pool (so that little is padded) and cut into batches, which are shuffled too."""
    if not sequences:
        return []
    order = torch.randperm(len(sequences), generator=generator).numpy()
    count, length = np.array([(sequences[i].pairs, len(sequences[i].ids)) for i in order]).T
    pool = (count.cumsum() - 1) // (pairs * POOL)
    by_length = np.lexsort((length, pool))
    batch = (count[by_length].cumsum() - 1) // pairs  # the number of each sequence's batch
    groups = np.split(order[by_length], np.flatnonzero(np.diff(batch)) + 1)
    return [[sequences[i] for i in groups[j]] for j in torch.randperm(len(groups), generator=generator)]
