"""Continual two-tower regularisers of Table 5: Contrastive, Contrastive + PIW, PISA. Baselines, as lightgcn.py.

Each is added to BPR at stage t >= 2 and pulls the vectors H of a batch's old nodes towards constant references: H_prev
of the model of t - 1 (on the new graph, as in PISA's code), for PISA also H_next of a freely fine-tuned model of t."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.rivals.lightgcn import Free, Links, Settings
from minipeso.rqvae import kmeans


def info_nce(x: Tensor, z: Tensor, own: Tensor, weight: Tensor, tau: float) -> Tensor:
    """-mean_b w_b log( exp(cos(x_b, z_own(b)) / tau) / sum_j exp(cos(x_b, z_j) / tau) ) -> ().
    x (n, d) references, z (m, d) current vectors, own (n,) which z is x_b's, weight (n,). 0 if n = 0."""
    if not len(x):
        return z.sum() * 0.0
    logits = F.normalize(x, dim=-1) @ F.normalize(z, dim=-1).T / tau  # (n, m)
    return (weight * F.cross_entropy(logits, own, reduction="none")).mean()


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each pair of distributions (n, K) -> (n,), between 0 and log 2."""
    log = lambda a: a.clamp(min=1e-12).log()  # noqa: E731  a saturated softmax has exact zeros: 0 log 0 = 0
    return sum((a * (log(a) - log((p + q) / 2))).sum(-1) for a in (p, q)) / 2


class Contrastive(Free):
    """beta [ I(u_prev, u) + I(i_prev, i) + I(items of u, u) + I(users of i, i) ] (Wang et al. 2021).

    Neighbours are those of the stages before, their references H_prev; at most `tower_neighbours` per node, drawn
    anew for every batch. PISA's code: all of them, quadratic in popular items. Here: a sample with the same mean."""
    def __init__(self, prev: Tensor, links: Links, old: Tensor, s: Settings, draw: torch.Generator):
        self.prev, self.links, self.old, self.s, self.draw = prev, links, old, s, draw  # old (U + I,) bool

    def weights(self, H: Tensor, users: Tensor) -> Tensor:
        """w_u (n,), how strongly each user is held."""
        return torch.ones(len(users))

    def __call__(self, H: Tensor, user: Tensor, item: Tensor) -> Tensor:
        users, items = (nodes[self.old[nodes]] for nodes in (user.unique(), self.links.n_users + item.unique()))
        both = (users, self.weights(H, users)), (items, torch.ones(len(items)))
        held = [self.hold(self.prev, H, nodes, w, links) for links in (None, self.links) for nodes, w in both]
        return self.s.contrast * sum(held)

    def hold(self, reference: Tensor, H: Tensor, nodes: Tensor, weight: Tensor, links: Links | None = None) -> Tensor:
        """I of every node with its own reference; with links, with its neighbours', where weights carry no gradient."""
        place, known = torch.arange(len(nodes)), nodes
        if links:
            place, known = links.sample(nodes, self.s.tower_neighbours, self.draw)
            weight = weight.detach()[place]
        return info_nce(reference[known], H[nodes], place, weight, self.s.tower_tau)


class PIW(Contrastive):
    """Contrastive with learnt imitation weights (Wang et al. 2023): w_u = softplus(MLP(delta_u)),
    delta_u = (g_prev(u) - g(u))^2 (K,), g_k(u) = softmax_k(c_k^T W_k h_u) over K item clusters.

    PISA's code, and here: the same W and the current centroids c for both times. w multiplies the user term with its
    gradient, so it may shrink. MLP K -> 50 -> 1."""
    def __init__(self, *held):
        super().__init__(*held)
        d, K = self.prev.shape[1], self.s.tower_clusters
        self.W = nn.Parameter(torch.randn(K, d, d, generator=self.draw))
        new = [torch.rand(a, b, generator=self.draw) for a, b in ((50, K), (1, 50))]
        self.mlp = [nn.Parameter((w * 2 - 1) / w.shape[1]**0.5) for w in new]
        self.bias = [nn.Parameter(torch.zeros(a)) for a in (50, 1)]

    def parameters(self) -> list[nn.Parameter]:
        return [self.W, *self.mlp, *self.bias]

    def begin_epoch(self, H: Tensor) -> None:
        self.centres = kmeans(H[(n := self.links.n_users):][self.old[n:]], len(self.W), self.draw)  # (K, d)

    def weights(self, H: Tensor, users: Tensor) -> Tensor:
        g_prev, g = (torch.einsum("kd,kde,ne->nk", self.centres, self.W, h[users]).softmax(-1) for h in (self.prev, H))
        hidden = F.linear((g_prev - g).square(), self.mlp[0], self.bias[0]).relu()  # (n, 50)
        return F.softplus(F.linear(hidden, self.mlp[1], self.bias[1]))[:, 0]


class PISA(Contrastive):
    """alpha [ I(u_next, u; w+) + I(items_next of u now, u; w+) + I(u_prev, u; w-) + I(items_prev of u, u; w-) ]
    (Yoo et al. 2025): who has changed follows the new data, who has not stays.

    s_u = JSD(G_prev(u), G(u)), G(u) = softmax_k(c_k . h_u) over K clusters of the current items; w_u = sigmoid(s_u -
    mean s). w+ = w_u for the largest `tower_share` of the batch, else 0; w- = 1 - w_u likewise. Weights carry a
    gradient in the self terms only. A user without a past has no self term and w+ = 0.5 for the neighbours."""
    def __init__(self, *held, next_model: Tensor, next_links: Links):
        super().__init__(*held)
        self.next, self.next_links = next_model, next_links  # (U + I, d), of D_t alone

    def begin_epoch(self, H: Tensor) -> None:
        self.centres = kmeans(H[self.links.n_users:], self.s.tower_clusters, self.draw)  # (K, d)

    def split(self, H: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        """(w+, w-) of users (n,), each (n,)."""
        shift = js_divergence(*((h[users] @ self.centres.T).softmax(-1) for h in (self.prev, H)))  # of (n, K) each
        w = torch.sigmoid(shift - shift.mean())
        return largest(w, self.s.tower_share), largest(1 - w, self.s.tower_share)

    def __call__(self, H: Tensor, user: Tensor, item: Tensor) -> Tensor:
        everyone = user.unique()
        old = self.old[everyone]
        plus, minus = self.split(H, users := everyone[old])
        follow = torch.full((len(everyone),), 0.5).masked_scatter(old, plus)
        total = self.hold(self.next, H, users, plus) + self.hold(self.prev, H, users, minus)
        total = total + self.hold(self.prev, H, users, minus, self.links)
        return self.s.pisa_alpha * (total + self.hold(self.next, H, everyone, follow, self.next_links))


def largest(w: Tensor, share: float) -> Tensor:
    """w (n,) where it is among the ceil(share n) largest, else 0 (PISA's code: by a quantile, which ties defeat)."""
    top = w.detach().topk(math.ceil(share * len(w))).indices
    return w * torch.zeros_like(w).index_fill(0, top, 1.0)
