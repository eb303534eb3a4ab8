"""Keys and values of what a Llama has seen, so that it is not computed again: for decoding, and for training."""
from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all positions so far, (n, g, capacity, e) a layer; it alone knows the position."""

    def __init__(self, config, n: int, capacity: int, like: Tensor):
        shape = (n, config.num_key_value_heads, capacity, config.head_dim)
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.num_hidden_layers)]
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        return keys[:, :, :end], values[:, :, :end]  # (n, g, end, e)

    def advance(self, l: int) -> None:
        """All layers were extended by l positions."""
        self.length += l

    def begin(self, start: Beginning) -> None:
        """An empty cache begins with `start`, the same for all n."""
        for mine, its in zip(self.layers, start.layers):
            for to, whence in zip(mine, its):
                to[:, :, :start.length] = whence
        self.length = start.length


class Beginning:
    """Keys and values (1, g, length, e) of the one sequence seen in the first pass; the rows of every later pass
    begin with it. Nothing is written over, so gradients go through."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.layers):
            self.layers.append((k, v))
            return k, v
        k0, v0 = (t.expand(len(k), -1, -1, -1) for t in self.layers[layer])
        return torch.cat([k0, k], 2), torch.cat([v0, v], 2)  # (n, g, length + l, e)

    def advance(self, l: int) -> None:
        self.length = self.length or l
