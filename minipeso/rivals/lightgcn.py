"""LightGCN (He et al. 2020), the two-tower backbone of Tables 3 and 5. A baseline: skip it if you read for PESO.

    E^(k+1) = D^-1/2 A D^-1/2 E^(k)     H = mean_k E^(k), k = 0 .. layers     score(u, i) = H_u . H_i

E (U + I, d): users first, then items. A is the bipartite graph of the training interactions. Every node of the
universe has a row from the start; one that nobody has met yet keeps its random vector.
"""
from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Tower(NamedTuple):
    """How it is trained. Source of the defaults in config.py: the PISA authors' code."""

    layers: int
    negatives: int
    lr: float
    weight_decay: float
    batch: int
    epochs: int
    patience: int


class Questions(NamedTuple):
    """Whom to ask for what: user (n,), target (n,), and the items each has had, as (row, item) pairs (2, k)."""

    user: Tensor
    target: Tensor
    seen: Tensor


def adjacency(user: Tensor, item: Tensor, n_users: int, n_items: int) -> Tensor:
    """D^-1/2 A D^-1/2 as sparse CSR (U + I, U + I) of the edges user (m,) - item (m,); doubles count once."""
    n = n_users + n_items
    edge = torch.unique(user * n + n_users + item)
    a, b = edge // n, edge % n
    degree = torch.bincount(torch.cat([a, b]), minlength=n).clamp(min=1).float()
    weight = (degree[a] * degree[b]).rsqrt()
    place = torch.stack([torch.cat([a, b]), torch.cat([b, a])])
    coo = torch.sparse_coo_tensor(place, weight.repeat(2), (n, n), check_invariants=False).coalesce()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return coo.to_sparse_csr()


class _Propagate(torch.autograd.Function):
    """P E, P = (I + A + A^2 + ...) / (layers + 1), by Horner's rule. P is symmetric as A is, so the gradient of
    E is P g: the same function, and no transpose is ever built."""

    @staticmethod
    def forward(ctx, E: Tensor, A: Tensor, layers: int) -> Tensor:
        ctx.A, ctx.layers = A, layers
        return _horner(E, A, layers)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _horner(grad.contiguous(), ctx.A, ctx.layers), None, None


def _horner(E: Tensor, A: Tensor, layers: int) -> Tensor:
    H = E
    for _ in range(layers):
        H = torch.addmm(E, A, H)  # E + A H
    return H / (layers + 1)


def propagate(E: Tensor, A: Tensor, layers: int) -> Tensor:
    """The mean of E, A E, A^2 E, ... (U + I, d)."""
    return _Propagate.apply(E, A, layers)


def bpr_loss(u: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-mean log sigmoid(u . positive - u . negative): (n, d), (n, d), (n, k, d) -> ()."""
    better = (u * positive).sum(-1, keepdim=True)  # (n, 1)
    worse = torch.einsum("nd,nkd->nk", u, negative)
    return -F.logsigmoid(better - worse).mean()


def sample_negatives(user: Tensor, k: int, known: Tensor, had: Tensor, n_items: int,
                     generator: torch.Generator) -> Tensor:
    """(n, k) items of `known`, uniform over those that the user has not had by now.

    `had`: sorted keys user * n_items + item. Release of PISA: over items the user never takes in the whole
    corpus, the test item included, which tells the model what not to rank low. Here: nothing of the future.
    """
    chosen = known[torch.randint(len(known), (len(user), k), generator=generator)]
    for _ in range(100):  # a user who has had everything keeps a positive; nobody real does
        key = user[:, None] * n_items + chosen
        place = torch.searchsorted(had, key).clamp(max=len(had) - 1)
        bad = had[place] == key
        if not bad.any():
            break
        chosen[bad] = known[torch.randint(len(known), (int(bad.sum()),), generator=generator)]
    return chosen


@torch.no_grad()
def full_ranks(H: Tensor, n_users: int, known: Tensor, asked: Questions, top: int = 10, batch: int = 128) -> Tensor:
    """(n,) int64: the 1-based rank of every target among all `known` items but those the user has had; 0 beyond
    `top`, and where the target is not known. Ties go to the smaller item number.

    One product a batch, no loop over users (`python -m tests.bench.__main__ towers` times it).
    """
    items, n_items = H[n_users:], len(H) - n_users
    hidden = torch.full((n_items,), -torch.inf)
    hidden[known] = 0.0
    order = torch.argsort(asked.seen[0])
    row, item = asked.seen[:, order]
    ranks = torch.zeros(len(asked.user), dtype=torch.long)
    for start in range(0, len(ranks), batch):
        some = slice(start, start + batch)
        score = H[asked.user[some]] @ items.T + hidden  # (b, I)
        low, high = torch.searchsorted(row, torch.tensor([start, start + len(score)]))
        score[row[low:high] - start, item[low:high]] = -torch.inf
        target = asked.target[some, None]
        own = score.gather(1, target)
        ahead = (score > own).sum(1) + ((score == own) & (torch.arange(n_items) < target)).sum(1)
        ranks[some] = torch.where((ahead < top) & (own[:, 0] > -torch.inf), ahead + 1, 0)
    return ranks


def fit(E: Tensor, edges: tuple[Tensor, Tensor], A: Tensor, n_users: int, known: Tensor, had: Tensor,
        check: Questions, how: tuple[Tower, torch.Generator, object | None]) -> Tensor:
    """Adam on BPR (and a regulariser) from E -> the E of the best epoch by Hit@10 on `check`.

    Weight decay is a penalty on the batch's own vectors, weight_decay / 2 (|u|^2 + |i+|^2 + |i-|^2) a pair, as
    LightGCN's. PISA's code gives it to Adam, which rescales it to steps of lr and so shrinks everybody who is
    absent from D_t towards 0.

    Validated every second epoch. One rule for all methods: stop after `patience` validations in a row without
    a new best (Release: counted after epoch 20). `regulariser`: pisa.py's, with .begin_epoch(H), .parameters()
    and a call (H, users, items) -> ().
    """
    tower, generator, regulariser = how
    (user, item), E = edges, E.clone().requires_grad_(True)
    extra = list(regulariser.parameters()) if regulariser else []
    optimiser = torch.optim.Adam([E, *extra], lr=tower.lr, fused=True)
    best, kept, waited = -math.inf, E.detach().clone(), 0
    for epoch in range(1, tower.epochs + 1):
        if regulariser:
            regulariser.begin_epoch(propagate(E.detach(), A, tower.layers))
        for some in torch.randperm(len(user), generator=generator).split(tower.batch):
            H = propagate(E, A, tower.layers)
            negative = sample_negatives(user[some], tower.negatives, known, had, len(E) - n_users, generator)
            rows = torch.cat([user[some, None], n_users + item[some, None], n_users + negative], 1)  # (b, 2 + k)
            u, positive, others = H[rows].split([1, 1, tower.negatives], 1)  # one gather: its gradient is a whole table
            loss = bpr_loss(u[:, 0], positive[:, 0], others) + tower.weight_decay / 2 * E[rows].square().sum() / len(some)
            if regulariser:
                loss = loss + regulariser(H, user[some], item[some])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the two-tower loss is no longer finite\nfound {loss.item()} in epoch {epoch}\n"
                                     "lower --tower-lr")
        if epoch % 2 == 0 or epoch == tower.epochs:
            hit = (full_ranks(propagate(E.detach(), A, tower.layers), n_users, known, check) > 0).float().mean().item()
            waited = 0 if hit > best else waited + 1
            if hit > best:
                best, kept = hit, E.detach().clone()
            if waited >= tower.patience:
                break
    return kept


class Neighbours:
    """Who is linked to whom, as CSR lists, for sampling: .sample(nodes, k) -> (place in nodes (m,), neighbour (m,))."""

    def __init__(self, a: np.ndarray, b: np.ndarray, n: int):
        order = np.lexsort((b, a))
        self.b, self.first = torch.from_numpy(b[order]), torch.from_numpy(np.searchsorted(a[order], np.arange(n + 1)))

    def sample(self, nodes: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All of a node's neighbours if it has at most k, else k of them with replacement."""
        count = self.first[nodes + 1] - self.first[nodes]  # (n,)
        column = torch.arange(k)
        drawn = (torch.rand(len(nodes), k, generator=generator) * count[:, None]).long()
        chosen = torch.where((count <= k)[:, None], column, drawn)  # (n, k)
        place, at = (column < count[:, None]).nonzero().T
        return place, self.b[self.first[nodes[place]] + chosen[place, at]]


