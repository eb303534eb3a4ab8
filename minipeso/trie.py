"""The trie of real items: which code may follow a prefix of codes.

Release: "constrained" decoding allows any code of the level, so beams are spent on tuples that name
no item. Here: a trie over the catalogue, so that every finished beam is a real item.
"""
import torch
from torch import Tensor


class Trie:
    """A prefix tree in flat arrays, built from codes (n_items, L) int; items with the same codes are one leaf.

    The nodes of a level are numbered in the order of their prefixes, so the children of node s are
    first[s] .. first[s + 1] - 1, and the number of the j-th child *is* first[s] + j: no table of next
    states. State 0 is the root; a state at level L is the rank of the item's codes.
    A step costs one gather, whatever the catalogue's size.
    """

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
        self.leaves = nodes  # different IDs

    def step(self, state: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """The children of `state` (...,) at `level`: their codes and states, (..., width) each.
        A state with fewer than `width` children is filled with code -1, whose state means nothing."""
        first = self.first[level]
        child = first[state][..., None] + torch.arange(self.width[level], device=state.device)  # (..., width)
        exists = child < first[state + 1][..., None]
        child = child.clamp(max=len(self.code[level]) - 1)
        return torch.where(exists, self.code[level][child], -1), child

    def to(self, device) -> "Trie":
        self.first = [t.to(device) for t in self.first]
        self.code = [t.to(device) for t in self.code]
        return self
