"""The trie of real items: which code may follow a prefix of codes.

Release: "constrained" decoding allows any code of the level, even if no item has it. Here: only what is in the trie."""
import copy

import torch
from torch import Tensor


class Trie:
    """A prefix tree in flat arrays, built from codes (n_items, L) int; items with the same codes are one leaf.

    The nodes of a level are numbered in the order of their prefixes: node s has the children first[s] ..
    first[s + 1] - 1. State 0 is the root; a state at level L is the rank of the item's codes. A step is one gather."""
    def __init__(self, codes: Tensor, n_codes: int = 256):
        codes = torch.as_tensor(codes).long()
        if codes.ndim != 2 or not codes.numel():
            raise ValueError(f"a trie needs codes of shape (n_items >= 1, L >= 1), got {tuple(codes.shape)}")
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= n_codes:
            raise ValueError(f"codes must lie in 0..{n_codes - 1}, found {lowest}..{highest}")
        self.n_codes, self.levels = n_codes, codes.shape[1]
        self.first, self.code, self.width = [], [], []  # (parents + 1,), (children,) and the most children, per level
        node, nodes = codes.new_zeros(len(codes)), 1  # (n_items,): where each item stands
        for column in codes.unbind(1):
            keys, node = (node * n_codes + column).unique(return_inverse=True)  # (children,), (n_items,)
            parents = torch.arange(nodes + 1, device=codes.device)
            self.first.append(torch.searchsorted(keys, parents * n_codes))  # (parents + 1,)
            self.code.append(keys % n_codes)  # (children,)
            self.width.append(int(self.first[-1].diff().max()))
            nodes = len(keys)
        self.leaf, self.leaves = node, nodes  # of each item (n_items,); how many different IDs
        self.below = [torch.arange(nodes + 1, device=codes.device)]  # node s has leaves below[s] .. below[s + 1] - 1
        for first in self.first[:0:-1]:
            self.below.insert(0, self.below[0][first])  # (children + 1,) per level
        self.taken = self.upto = None

    def step(self, state: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """The children of `state` (...,) at `level`: their codes and states, (..., width) each.
        A state with fewer than `width` children is filled with code -1, whose state means nothing."""
        first = self.first[level]
        child = first[state][..., None] + torch.arange(self.width[level], device=state.device)  # (..., width)
        exists = child < first[state + 1][..., None]
        child = child.clamp(max=len(self.code[level]) - 1)
        if self.taken is not None:
            start, end = (self.below[level][edge].flatten(1) for edge in (child, child + 1))  # (n, beams * width)
            gone = torch.searchsorted(self.taken, end) - torch.searchsorted(self.taken, start)
            exists = exists & (gone < end - start).view_as(child)
        return torch.where(exists, self.code[level][child], -1), child

    def without(self, taken: Tensor) -> "Trie":
        """The same for n users, row u of a state (n, beams) being user u's, less leaves of their own: taken (n, m),
        sorted, filled up with `leaves`. A node without a leaf left is struck out: no beam is spent on a dead end."""
        trie = copy.copy(self)
        trie.taken = taken.to(self.code[0].device)
        return trie

    def recalling(self, p: Tensor, w: float) -> "Trie":
        """The same for n users with a memory of weight w that expects the leaves with p (n, leaves): beam.mixture."""
        trie, upto = copy.copy(self), torch.nn.functional.pad(p.double().cumsum(1), (1, 0))  # (n, leaves + 1)
        trie.upto, trie.w = upto.to(self.code[0].device), torch.tensor(w)
        return trie

    def to(self, device) -> "Trie":
        for name in ("first", "code", "below"):
            setattr(self, name, [t.to(device) for t in getattr(self, name)])
        return self
