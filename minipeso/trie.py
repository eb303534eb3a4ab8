"""The trie of real items: which code may follow a prefix of codes.

Release: "constrained" decoding allows any code of the level, so beams are spent on tuples that name
no item. Here: a trie over the catalogue, so that every finished beam is a real item.
"""
from __future__ import annotations

import torch
from torch import Tensor

NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Trie:
    """A prefix tree in flat arrays, built from codes (n_items, L) int; doubles are merged.

    The nodes of a level are numbered in the order of their prefixes, so the children of node s are
    first[s] .. first[s + 1] - 1, and the j-th child's own number *is* first[s] + j: there is no
    table of next states. State 0 is the root; a state at level L is the rank of the item's codes.
    A step costs one gather, whatever the catalogue's size.
    """

    def __init__(self, codes: Tensor, n_codes: int = 256):
        codes = torch.as_tensor(codes)
        if codes.ndim != 2 or not codes.numel():
            raise ValueError(f"a trie needs codes of shape (n_items >= 1, L >= 1), got {tuple(codes.shape)}")
        if codes.dtype not in NARROW:  # floats, and unsigned types that torch cannot compare
            codes = codes.long()
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= n_codes:
            raise ValueError(f"codes must lie in 0..{n_codes - 1}, found {lowest}..{highest}")
        self.n_codes, self.levels = n_codes, codes.shape[1]
        self.first, self.code, self.width = [], [], []  # a level each
        bits = max(highest.bit_length(), 1)
        key, nodes = torch.zeros(len(codes), dtype=torch.long, device=codes.device), 1
        while len(self.code) < self.levels:
            begin = len(self.code)  # an item's key: its node so far and all the codes that 63 bits have room for
            end = min(begin + max((63 - nodes.bit_length()) // bits, 1), self.levels)
            for column in codes[:, begin:end].unbind(1):
                key.bitwise_left_shift_(bits).bitwise_or_(column)
            ordered, item = key.sort(stable=True)
            begins = _begins(ordered)  # (nodes + 1,)
            if end < self.levels:
                key[item] = torch.repeat_interleave(begins.diff())
            nodes = len(begins) - 1
            self._split(ordered[begins[:-1]], end - begin, bits)
        self.leaves = nodes  # distinct IDs

    def _split(self, key: Tensor, count: int, bits: int) -> None:
        """Adds `count` levels, the lowest first, whose nodes have the keys (nodes,): a key without its last code is the
        parent's, and where that changes, the next parent's children begin."""
        at, last = len(self.code), (1 << bits) - 1
        for _ in range(count):
            self.code.insert(at, key.to(_narrow(last)) & last)  # (children,)
            key >>= bits
            begins = _begins(key)  # (parents + 1,)
            key = key[begins[:-1]]
            self.first.insert(at, begins.to(_narrow(len(self.code[at]))))
            self.width.insert(at, int(self.first[at].diff().max()))

    def step(self, state: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """The children of `state` (...,) at `level`: their codes and states, (..., width) each.
        Where a state has fewer than `width` children, the code is -1 (and the state means nothing)."""
        first = self.first[level]
        child = first[state][..., None] + torch.arange(self.width[level], device=state.device)
        exists = child < first[state + 1][..., None]
        child = child.clamp(max=len(self.code[level]) - 1)
        return torch.where(exists, self.code[level][child].long(), -1), child

    def to(self, device) -> Trie:
        self.first = [t.to(device) for t in self.first]
        self.code = [t.to(device) for t in self.code]
        return self


def _begins(ordered: Tensor) -> Tensor:
    """Where each run of equal values begins, and where the last one ends."""
    begins = torch.ones(len(ordered) + 1, dtype=torch.bool, device=ordered.device)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:-1])
    return begins.nonzero()[:, 0]


def _narrow(limit: int) -> torch.dtype:
    """The smallest type that holds 0..limit."""
    return next(dtype for dtype in NARROW if limit <= torch.iinfo(dtype).max)
