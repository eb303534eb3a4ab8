"""The trie of real items: which code may follow a prefix of codes.

Release: "constrained" decoding allows any code of the level, so beams are spent on tuples that name
no item. Here: a trie over the catalogue, so that every finished beam is a real item.
"""
from __future__ import annotations

import torch
from torch import Tensor


class Trie:
    """A prefix tree in flat arrays, built from codes (n_items, L) int; doubles are merged.

    The nodes of a level are numbered in the order of their prefixes, so the children of node s are
    first[s] .. first[s + 1] - 1, and the j-th child's own number *is* first[s] + j: there is no
    table of next states. State 0 is the root; a state at level L is the rank of the item's codes.
    A step costs one gather, whatever the catalogue's size.
    """

    def __init__(self, codes: Tensor, n_codes: int = 256):
        codes = torch.as_tensor(codes).long()
        if codes.ndim != 2 or not codes.numel():
            raise ValueError(f"a trie needs codes of shape (n_items >= 1, L >= 1), got {tuple(codes.shape)}")
        if codes.min() < 0 or codes.max() >= n_codes:
            raise ValueError(f"codes must lie in 0..{n_codes - 1}, found {codes.min()}..{codes.max()}")
        self.n_codes, self.levels = n_codes, codes.shape[1]
        self.first, self.code, self.width = [], [], []  # a level each
        parent_of = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        nodes = 1
        for level in range(self.levels):
            # parent numbers stay below n_items, so these keys cannot overflow, however many the levels
            keys, child_of = torch.unique(parent_of * n_codes + codes[:, level], return_inverse=True)
            fan_out = torch.bincount(keys // n_codes, minlength=nodes)  # (nodes,)
            self.first.append(torch.cat([fan_out.new_zeros(1), fan_out.cumsum(0)]))  # (nodes + 1,)
            self.code.append(keys % n_codes)  # (children,)
            self.width.append(int(fan_out.max()))
            parent_of, nodes = child_of, len(keys)
        self.leaves = nodes  # distinct IDs

    def step(self, state: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """The children of `state` (...,) at `level`: their codes and states, (..., width) each.
        Where a state has fewer than `width` children, the code is -1 (and the state means nothing)."""
        first = self.first[level]
        child = first[state][..., None] + torch.arange(self.width[level], device=state.device)
        exists = child < first[state + 1][..., None]
        child = child.clamp(max=len(self.code[level]) - 1)
        return torch.where(exists, self.code[level][child], -1), child

    def to(self, device) -> Trie:
        self.first = [t.to(device) for t in self.first]
        self.code = [t.to(device) for t in self.code]
        return self
