"""A small SASRec (Kang & McAuley 2018), by which EvoRec decides what to forget. The transformer is torch's own."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH = 50  # items of history it sees


class SASRec(nn.Module):
    """items (n, l), right-padded with -1 -> states (n, l, d): what each position expects next."""
    def __init__(self, n_items: int, d: int = 64, blocks: int = 2, dropout: float = 0.2):
        super().__init__()
        self.item, self.position = nn.Embedding(n_items, d), nn.Embedding(LENGTH, d)
        nn.init.normal_(self.item.weight, std=d**-0.5)
        layer = nn.TransformerEncoderLayer(d, 1, d, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(d), enable_nested_tensor=False)

    def forward(self, items: Tensor) -> Tensor:
        l = items.shape[1]
        x = self.item(items.clamp(min=0)) + self.position.weight[:l]  # (n, l, d)
        return self.blocks(x, mask=nn.Transformer.generate_square_subsequent_mask(l), is_causal=True)


def pad(carts: Sequence[Sequence[int]]) -> Tensor:
    """The last LENGTH items of each, (n, l), -1 behind the shorter ones."""
    return nn.utils.rnn.pad_sequence([torch.tensor(items[-LENGTH:], dtype=torch.long) for items in carts], True, -1)


def fit(model: SASRec, carts: Sequence[Sequence[int]], epochs: int, seed: int, lr: float = 1e-3, batch=128) -> None:
    """The next item against one uniform negative, binary cross-entropy, Adam; from the model as it is."""
    carts, draw = [items for items in carts if len(items) > 1], torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout's only source
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(carts), generator=draw).split(batch):
            items = pad([carts[i] for i in some.tolist()])  # (n, l)
            states, target = model(items[:, :-1]), items[:, 1:]
            real, negative = target >= 0, torch.randint(len(model.item.weight), target.shape, generator=draw)
            better, worse = ((states * model.item(t.clamp(min=0))).sum(-1)[real] for t in (target, negative))
            optimiser.zero_grad()
            (-(F.logsigmoid(better) + F.logsigmoid(-worse)).mean()).backward()
            optimiser.step()


@torch.no_grad()
def relevance(model: SASRec, carts: Sequence[Sequence[int]], batch: int = 512) -> list[Tensor]:
    """Per cart (len,), the cosine of each item with the state after the last one; those before the last LENGTH too."""
    model.eval()
    scores = []
    for start in range(0, len(carts), batch):
        some = carts[start:start + batch]
        for items, states in zip(some, model(pad(some))):  # (l, d)
            scores.append(F.cosine_similarity(model.item(torch.tensor(items)), states[min(len(items), LENGTH) - 1], -1))
    return scores
