"""Continual two-tower regularisers of Table 5: Contrastive, Contrastive + PIW, PISA. Baselines, as lightgcn.py.

Each is added to BPR at stage t >= 2 and pulls the current embeddings H towards constant references: H_prev, the
model of t - 1 (old weights on the new graph, as in PISA's code), and for PISA also H_next, a freely fine-tuned
model of t. Only nodes of the batch that existed before take part.
"""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.rivals.lightgcn import Neighbours
from minipeso.rqvae import kmeans


def info_nce(x: Tensor, z: Tensor, own: Tensor, weight: Tensor, tau: float) -> Tensor:
    """-mean_b w_b log( exp(cos(x_b, z_own(b)) / tau) / sum_j exp(cos(x_b, z_j) / tau) ) -> ().

    x (n, d) references, z (m, d) the batch's current embeddings, own (n,) which row of z belongs to x_b,
    weight (n,). 0 if there is no reference.
    """
    if not len(x):
        return z.sum() * 0.0
    logits = F.normalize(x, dim=-1) @ F.normalize(z, dim=-1).T / tau  # (n, m)
    return (weight * F.cross_entropy(logits, own, reduction="none")).mean()


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows (n, K) -> (n,), between 0 and log 2."""
    log = lambda a: a.clamp(min=1e-12).log()  # noqa: E731  a saturated softmax has exact zeros: 0 log 0 = 0
    return sum((a * (log(a) - log((p + q) / 2))).sum(-1) for a in (p, q)) / 2


class Contrastive:
    """beta [ I(u_prev, u) + I(i_prev, i) + I(items of u, u) + I(users of i, i) ] (Wang et al. 2021).

    Neighbours are those of the stages before, their references H_prev; at most `neighbours` a node, drawn anew
    for every batch. PISA's code: all of them, quadratic in popular items. Here: a sample with the same mean.
    """

    def __init__(self, prev: Tensor, links: tuple[Neighbours, Neighbours], old: Tensor, n_users: int, strength: float,
                 tau: float, neighbours: int, generator: torch.Generator):
        self.prev, self.links, self.old, self.n_users = prev, links, old, n_users  # old (U + I,) bool
        self.strength, self.tau, self.neighbours, self.generator = strength, tau, neighbours, generator

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def begin_epoch(self, H: Tensor) -> None:
        """Nothing to prepare."""

    def weights(self, H: Tensor, users: Tensor) -> Tensor:
        """w_u (n,), how strongly each user is held."""
        return torch.ones(len(users))

    def __call__(self, H: Tensor, user: Tensor, item: Tensor) -> Tensor:
        users, items = (nodes[self.old[nodes]] for nodes in (user.unique(), self.n_users + item.unique()))
        w, ones = self.weights(H, users), torch.ones(len(items))
        total = self.hold(self.prev, H, users, w) + self.hold(self.prev, H, items, ones)
        total = total + self.hold_to_neighbours(self.prev, H, users, self.links[0], w.detach())
        return self.strength * (total + self.hold_to_neighbours(self.prev, H, items, self.links[1], ones))

    def hold(self, reference: Tensor, H: Tensor, nodes: Tensor, weight: Tensor) -> Tensor:
        return info_nce(reference[nodes], H[nodes], torch.arange(len(nodes)), weight, self.tau)

    def hold_to_neighbours(self, reference: Tensor, H: Tensor, nodes: Tensor, links: Neighbours, weight: Tensor) -> Tensor:
        place, neighbour = links.sample(nodes, self.neighbours, self.generator)
        return info_nce(reference[neighbour], H[nodes], place, weight[place], self.tau)


class PIW(Contrastive):
    """Contrastive with learnt imitation weights (Wang et al. 2023): w_u = softplus(MLP(delta_u)),
    delta_u = (g_prev(u) - g(u))^2 (K,), g_k(u) = softmax_k(c_k^T W_k h_u) over K item clusters.

    PISA's code, and here: the same W and the current centroids c for both times. w multiplies the user term with
    its gradient, so it may shrink. MLP K -> 50 -> 1.
    """

    def __init__(self, *rest, clusters: int):
        super().__init__(*rest)
        d, draw = self.prev.shape[1], self.generator
        self.W = nn.Parameter(torch.randn(clusters, d, d, generator=draw))
        sizes = ((50, clusters), (1, 50))
        self.mlp = [nn.Parameter((torch.rand(a, b, generator=draw) * 2 - 1) / b**0.5) for a, b in sizes]
        self.bias = [nn.Parameter(torch.zeros(a)) for a, _ in sizes]

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self.W, *self.mlp, *self.bias]

    def begin_epoch(self, H: Tensor) -> None:
        self.centres = kmeans(H[self.n_users:][self.old[self.n_users:]], len(self.W), self.generator)

    def weights(self, H: Tensor, users: Tensor) -> Tensor:
        g_prev, g = (torch.einsum("kd,kde,ne->nk", self.centres, self.W, h[users]).softmax(-1) for h in (self.prev, H))
        hidden = F.relu(F.linear((g_prev - g).square(), self.mlp[0], self.bias[0]))
        return F.softplus(F.linear(hidden, self.mlp[1], self.bias[1]))[:, 0]


class PISA(Contrastive):
    """strength [ I(u_next, u; w+) + I(items_next of u now, u; w+) + I(u_prev, u; w-) + I(items_prev of u, u; w-) ]
    (Yoo et al. 2025): who has changed follows the new data, who has not stays.

    s_u = JSD(G_prev(u), G(u)), G(u) = softmax_k(c_k . h_u) over K clusters of the current items; w_u = sigmoid(s_u -
    mean s). w+ = w_u for the largest `share` of the batch, else 0; w- = 1 - w_u likewise. Weights carry a
    gradient in the self terms only. A user without a past has no self term and w+ = 0.5 for the neighbours.
    """

    def __init__(self, *rest, next_model: Tensor, next_links: Neighbours, clusters: int, share: float):
        super().__init__(*rest)
        self.next, self.next_links, self.clusters, self.share = next_model, next_links, clusters, share

    def begin_epoch(self, H: Tensor) -> None:
        self.centres = kmeans(H[self.n_users:], self.clusters, self.generator)

    def split(self, H: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        """(w+, w-) of users (n,), each (n,)."""
        before, now = ((h[users] @ self.centres.T).softmax(-1) for h in (self.prev, H))
        s = js_divergence(before, now)
        w = torch.sigmoid(s - s.mean())
        return largest(w, self.share), largest(1 - w, self.share)

    def __call__(self, H: Tensor, user: Tensor, item: Tensor) -> Tensor:
        everyone = user.unique()
        users = everyone[self.old[everyone]]
        total = H.sum() * 0.0
        if len(users):
            plus, minus = self.split(H, users)
            total = total + self.hold(self.next, H, users, plus) + self.hold(self.prev, H, users, minus)
            total = total + self.hold_to_neighbours(self.prev, H, users, self.links[0], minus.detach())
        follow = torch.full((len(everyone),), 0.5)
        if len(users):
            follow[self.old[everyone]] = plus.detach()
        return self.strength * (total + self.hold_to_neighbours(self.next, H, everyone, self.next_links, follow))


def largest(w: Tensor, share: float) -> Tensor:
    """w for the ceil(share n) users with the largest, else 0 (PISA's code: by a quantile, which ties defeat)."""
    kept = torch.zeros_like(w)
    at = w.detach().topk(math.ceil(share * len(w))).indices
    return kept.index_put((at,), w[at])
