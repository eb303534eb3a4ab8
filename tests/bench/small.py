"""Two small models. The RQ-VAE beside the procedure released with the paper (and with LC-Rec), on the same weights.
As we read it: a DataLoader, distances inside autograd's graph, Sinkhorn by dividing the matrix, the loss read at every
step, IDs as texts. LightGCN beside the least that its epoch must do, at the size of Video Games' D_1."""
from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from minipeso.rivals.lightgcn import Lesson, Links, Questions, Settings, fit, full_search, inner
from minipeso.rqvae import RELEASE_HIDDEN, RQVAE, collisions, train
from tests.bench import race
from tests.reference import full_matrix_sinkhorn

ITEMS, WIDTH, BATCH, STEPS = 50_000, 768, 1024, 10  # the catalogue, its vectors; batches in the epoch that is timed
GRAPH, ASKED = (17_000, 26_000, 103_000), 2_000  # users, items, interactions; users to rank
TOWER = Settings(tower_epochs=1)


def released_quantise(model: RQVAE, x: Tensor, spread: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q (n, d), its loss, codes (n, L)); `spread`: the last level by Sinkhorn."""
    residual = model.encoder(x)  # (n, d)
    z_q, losses, codes = 0, [], []
    for level, book in enumerate(model.codebooks, 1):
        distances = (residual ** 2).sum(1, keepdim=True) + (book ** 2).sum(1) - 2 * residual @ book.T  # (n, K)
        last = spread and level == len(model.codebooks)
        codes.append((-full_matrix_sinkhorn(distances.detach(), 0.003, 50) if last else distances).argmin(1))  # (n,)
        codeword = F.embedding(codes[-1], book)  # (n, d)
        losses.append(F.mse_loss(codeword, residual.detach()) + 0.25 * F.mse_loss(codeword.detach(), residual))
        value = residual + (codeword - residual).detach()
        residual, z_q = residual - value, z_q + value
    return z_q, torch.stack(losses).mean(), torch.stack(codes, 1)


def released_loss(model: RQVAE, x: Tensor) -> Tensor:
    z_q, loss, _ = released_quantise(model, x, spread=True)
    return F.mse_loss(model.decoder(z_q), x) + loss


def released_epoch(model: RQVAE, x: Tensor) -> int:
    """As `rqvae.train` for one epoch: steps of AdamW, then the number of collisions."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for some, in DataLoader(TensorDataset(x), BATCH, shuffle=True):
        optimiser.zero_grad()
        loss = released_loss(model, some)
        loss.backward()
        optimiser.step()
        loss.item()  # the released code sums it
    return released_collisions(model, x, BATCH)


@torch.no_grad()
def released_collisions(model: RQVAE, x: Tensor, batch: int) -> int:
    """Items minus distinct IDs, which are texts."""
    ids = ["-".join(map(str, codes)) for some, in DataLoader(TensorDataset(x), batch)
           for codes in released_quantise(model, some, spread=False)[2].tolist()]
    return len(ids) - len(set(ids))


def make(items: int, width: int, hidden: tuple[int, ...]) -> tuple[RQVAE, RQVAE, Tensor]:
    """Both sides, and vectors (items, width) in clusters, as texts are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(items // 50 + 1, width, generator=generator)
    own = torch.randint(len(centres), (items,), generator=generator)
    x = centres[own] + 0.3 * torch.randn(items, width, generator=generator)  # (n, d_in)
    ours = RQVAE(width, hidden=hidden, generator=generator)
    ours.init_codebooks(x[:10 * BATCH], generator)
    return ours, copy.deepcopy(ours), x


@torch.no_grad()
def same_ids(ours: RQVAE, peer: RQVAE, x: Tensor) -> str:
    """FloatingPointError unless the IDs are the same; a tie to rounding may fall either way."""
    same = (ours.quantise(x) == released_quantise(peer, x, spread=False)[2]).all(1).double().mean().item()
    if not same > 0.999:
        race.refuse("quantise", f"{same:.2%} of the IDs agree")
    return f"{same:.2%} of the IDs"


def rqvae(args: Namespace) -> None:
    ours, peer, x = make(ITEMS, WIDTH, RELEASE_HIDDEN)
    apart = race.same_training([(ours, lambda x: sum(ours.loss(x))), (peer, partial(released_loss, peer))], [x[:BATCH]])
    print("{}\nequal: loss to {:.0e}, gradients to {:.0e}, {}".format(race.machine(), *apart, same_ids(ours, peer, x)))
    epochs = {"ours": lambda: train(ours, x[:STEPS * BATCH], 1, torch.Generator().manual_seed(0)),
              "released": lambda: released_epoch(peer, x[:STEPS * BATCH])}
    ids = {"ours": lambda: collisions(ours.quantise(x)),
           **{f"released, {n:,} per batch": partial(released_collisions, peer, x, n) for n in (64, BATCH)}}
    print(f"an epoch of {STEPS} batches of {BATCH:,} x {WIDTH}, and a count of collisions\n"
          f"{race.table(race.compare(epochs, args.rounds), STEPS, 'steps')}\nIDs of {ITEMS:,} items, and the count\n"
          f"{race.table(race.compare(ids, args.rounds), ITEMS, 'items')}")


def graph_work(users: int, items: int, edges: int) -> tuple[dict[str, Callable], Callable]:
    """(an epoch and its bound by name, a ranking of ASKED users) on a random graph with few popular items. The bound,
    per batch: two sparse products forward, two backward, and Adam's pass over all vectors."""
    rng = np.random.default_rng(0)
    user = torch.from_numpy(rng.integers(0, users, edges))  # (m,)
    item = torch.from_numpy(rng.zipf(1.3, edges) * 40503 % items)  # (m,)
    links, E = Links(user, item, users, items), 0.1 * torch.randn(users + items, TOWER.tower_width)
    had, first, known = torch.unique(user * items + item), torch.zeros(1, dtype=torch.long), torch.arange(items)
    check = Questions(first, first, torch.zeros(2, 0, dtype=torch.long))  # validation on all would be timed too
    asked = torch.arange(min(ASKED, users))
    questions = Questions(asked, torch.randint(items, asked.shape), torch.stack([user, item])[:, user < len(asked)])

    def epoch() -> None:
        fit(E, Lesson(user, item, links, known, had, check), TOWER, torch.Generator().manual_seed(0))

    def bound() -> None:
        p = torch.nn.Parameter(E.clone())
        optimiser, p.grad = torch.optim.Adam([p], fused=True), torch.zeros_like(E)
        for _ in range(-(-edges // TOWER.tower_batch)):
            for _ in range(2 * TOWER.tower_layers):
                links.A @ E
            optimiser.step()
    ranking = partial(full_search, inner(E, users), known, questions, items)
    return {"ours": epoch, "sparse products and Adam": bound}, ranking


def towers(args: Namespace) -> None:
    runs, ranking = graph_work(*GRAPH)
    print("{}\nan epoch of LightGCN, {:,} users, {:,} items, {:,} interactions".format(race.machine(), *GRAPH))
    print(race.table(race.compare(runs, args.rounds), GRAPH[2], "pairs"))
    print(race.table(race.compare({"full ranking": ranking}, args.rounds), min(ASKED, GRAPH[0]), "users"))
