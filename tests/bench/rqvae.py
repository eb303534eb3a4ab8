"""The RQ-VAE beside the procedure that is released with the paper (and with LC-Rec): an epoch of training, and the IDs of a catalogue.

The latter, as we read it: a DataLoader, distances inside autograd's graph, Sinkhorn by dividing the matrix, the loss read at every step, IDs as texts.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.bench import race
from minipeso.rqvae import RELEASE_HIDDEN, RQVAE, collisions, train

ITEMS, WIDTH, BATCH, STEPS = 50_000, 768, 1024, 10  # the catalogue, its vectors; batches in the epoch that is timed


class Released(nn.Module):
    """The same weights in the released shape of the code."""

    def __init__(self, ours: RQVAE):
        super().__init__()
        self.encoder, self.decoder = copy.deepcopy(ours.encoder), copy.deepcopy(ours.decoder)
        self.books = nn.ModuleList(nn.Embedding.from_pretrained(book.detach().clone(), freeze=False) for book in ours.codebooks)

    def quantised(self, x: Tensor, spread: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(z_q (n, d), its loss, codes (n, L)); `spread`: the last level by Sinkhorn."""
        residual = self.encoder(x)  # (n, d)
        z_q, losses, codes = 0, [], []
        for level, book in enumerate(self.books, 1):
            distances = (residual ** 2).sum(1, keepdim=True) + (book.weight ** 2).sum(1) - 2 * residual @ book.weight.T  # (n, K)
            codes.append(plan(distances.detach()).argmax(1) if spread and level == len(self.books) else distances.argmin(1))
            codeword = book(codes[-1])
            losses.append(F.mse_loss(codeword, residual.detach()) + 0.25 * F.mse_loss(codeword.detach(), residual))
            value = residual + (codeword - residual).detach()
            residual, z_q = residual - value, z_q + value
        return z_q, torch.stack(losses).mean(), torch.stack(codes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both losses."""
        z_q, loss, _ = self.quantised(x, spread=True)
        return F.mse_loss(self.decoder(z_q), x) + loss


def plan(distances: Tensor, eps: float = 0.003, iterations: int = 50) -> Tensor:
    """Sinkhorn by rescaling the matrix itself. (n, K) -> (n, K)"""
    D = distances.double()
    middle = (D.max() + D.min()) / 2
    Q = torch.exp(-(D - middle) / (D.max() - middle + 1e-5) / eps)
    Q /= Q.sum()
    for axis in (1, 0) * iterations:
        Q /= Q.sum(axis, keepdim=True)
        Q /= Q.shape[1 - axis]
    return Q * Q.shape[0]


def released_epoch(model: Released, x: Tensor) -> int:
    """As `rqvae.train` for one epoch: steps of AdamW, then the number of collisions."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for rows, in DataLoader(TensorDataset(x), BATCH, shuffle=True):
        optimiser.zero_grad()
        loss = model(rows)
        loss.backward()
        optimiser.step()
        loss.item()  # the released code sums it
    return released_collisions(model, x, BATCH)


@torch.no_grad()
def released_collisions(model: Released, x: Tensor, batch: int) -> int:
    """Items minus distinct IDs, which are texts."""
    ids = ["-".join(map(str, row)) for rows, in DataLoader(TensorDataset(x), batch)
           for row in model.quantised(rows, spread=False)[2].tolist()]
    return len(ids) - len(set(ids))


def make(items: int, width: int, hidden: tuple[int, ...]) -> tuple[RQVAE, Released, Tensor]:
    """Both sides and vectors (items, width) in clusters, as texts are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(items // 50 + 1, width, generator=generator)
    x = centres[torch.randint(len(centres), (items,), generator=generator)] + 0.3 * torch.randn(items, width, generator=generator)
    ours = RQVAE(width, hidden=hidden, generator=generator)
    ours.init_codebooks(x[:10 * BATCH], generator)
    return ours, Released(ours), x


def check(ours: RQVAE, peer: Released, x: Tensor) -> str:
    """FloatingPointError unless loss, gradients and IDs are the same."""
    loss, theirs = torch.stack(ours.loss(x[:BATCH])).sum(), peer(x[:BATCH])
    gradients = [torch.autograd.grad(value, list(side.encoder.parameters())) for value, side in ((loss, ours), (theirs, peer))]
    apart = max(((g - h).norm() / h.norm().clamp(min=1e-12)).item() for g, h in zip(*gradients))
    with torch.no_grad():
        off, same = (loss / theirs - 1).abs().item(), (ours.quantise(x) == peer.quantised(x, spread=False)[2]).all(1).double().mean().item()
    found = f"loss to {off:.0e}, gradients of the encoder to {apart:.0e}, {same:.2%} of the IDs"
    if not (off < 1e-5 and apart < 1e-4 and same > 0.999):  # a tie to rounding may fall either way
        race.refuse("quantise", found)
    return found


def contests(ours: RQVAE, peer: Released, x: Tensor) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """(an epoch on STEPS batches, the IDs of all and their collisions), each by name."""
    released = {f"released, {n:,} at a time": partial(released_collisions, peer, x, n) for n in (64, BATCH)}
    return ({"ours": lambda: train(ours, x[:STEPS * BATCH], 1, torch.Generator().manual_seed(0)),
             "released": lambda: released_epoch(peer, x[:STEPS * BATCH])},
            {"ours": lambda: collisions(ours.quantise(x)), **released})


def run(rounds: int) -> None:
    ours, peer, x = make(ITEMS, WIDTH, RELEASE_HIDDEN)
    print(f"{race.machine(torch)}; {torch.get_num_threads()} threads\nequal: {check(ours, peer, x)}")
    heads = ((f"an epoch of {STEPS} batches of {BATCH:,} x {WIDTH}, and a count of collisions", STEPS, "steps"),
             (f"IDs of {ITEMS:,} items, and a count of collisions", ITEMS, "items"))
    for (head, count, unit), runs in zip(heads, contests(ours, peer, x), strict=True):
        print(head, *race.lines(race.compare(runs, rounds), count, unit), sep="\n")
