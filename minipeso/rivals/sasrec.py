"""A small SASRec (Kang & McAuley 2018): the filter with which EvoRec decides what to forget. Not part of PESO.

The transformer is torch's own; nothing here is to be learnt from but the use.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH = 50  # items of history it sees


class SASRec(nn.Module):
    """items (n, l), right-padded with -1 -> states (n, l, d): what each position expects next."""

    def __init__(self, n_items: int, d: int = 64, blocks: int = 2, heads: int = 1, dropout: float = 0.2):
        super().__init__()
        self.item, self.place = nn.Embedding(n_items, d), nn.Embedding(LENGTH, d)
        nn.init.normal_(self.item.weight, std=d**-0.5)
        layer = nn.TransformerEncoderLayer(d, heads, d, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(d), enable_nested_tensor=False)

    def forward(self, items: Tensor) -> Tensor:
        l = items.shape[1]
        x = self.item(items.clamp(min=0)) + self.place.weight[:l]  # (n, l, d)
        return self.blocks(x, mask=nn.Transformer.generate_square_subsequent_mask(l), is_causal=True)


def pad(sequences: Sequence[Sequence[int]]) -> Tensor:
    """The last LENGTH items of each, (n, l), -1 behind the shorter ones."""
    return nn.utils.rnn.pad_sequence([torch.tensor(s[-LENGTH:], dtype=torch.long) for s in sequences], True, -1)


def fit(model: SASRec, sequences: Sequence[Sequence[int]], epochs: int, seed: int, lr: float = 1e-3,
        batch: int = 128) -> None:
    """The next item against one uniform negative, binary cross-entropy, Adam; from the model as it is."""
    sequences = [s for s in sequences if len(s) > 1]
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout's only source
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(sequences), generator=draw).split(batch):
            items = pad([sequences[i] for i in some.tolist()])
            states, target = model(items[:, :-1]), items[:, 1:]
            real = target >= 0
            negative = torch.randint(len(model.item.weight), target.shape, generator=draw)
            better, worse = ((states * model.item(t.clamp(min=0))).sum(-1)[real] for t in (target, negative))
            loss = -(F.logsigmoid(better) + F.logsigmoid(-worse)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@torch.no_grad()
def relevance(model: SASRec, sequences: Sequence[Sequence[int]], batch: int = 512) -> list[Tensor]:
    """For every sequence, the cosine of each of its items with the state after its last one: (len,) each, oldest
    first; items beyond the last LENGTH are scored too."""
    model.eval()
    found = []
    for start in range(0, len(sequences), batch):
        some = sequences[start:start + batch]
        states = model(pad(some))
        for k, sequence in enumerate(some):
            last = states[k, min(len(sequence), LENGTH) - 1]
            found.append(F.cosine_similarity(model.item(torch.tensor(sequence)), last, dim=-1))
    return found
