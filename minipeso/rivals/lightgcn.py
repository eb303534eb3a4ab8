"""LightGCN (He et al. 2020), the two-tower backbone of Tables 3 and 5. A baseline: skip it if you read for PESO.

    E^(k+1) = D^-1/2 A D^-1/2 E^(k)     H = mean_k E^(k), k = 0 .. layers     score(u, i) = H_u . H_i

E (U + I, d): users first, then items. A is the bipartite graph of the training interactions. Every node of the
universe has a vector from the start; one that nobody has met yet keeps its random one."""
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.config import LARGEST
from minipeso.metrics import hit_at, ranks_of
from minipeso.rivals.settings import Flags
from minipeso.stages import Example
from minipeso.state import Progress


@dataclass(frozen=True)
class Settings(Flags):
    """Of all two-tower methods; "PISA" is its authors' code."""
    tower_width: int = 64  # PISA: dimensions of a user or item vector
    tower_init: float = 0.1  # standard deviation of new vectors. PISA: 0.01, with which D1's best epoch is an early one
    tower_layers: int = 2  # PISA: propagation steps. LightGCN's own example: 3
    tower_negatives: int = 4  # PISA: per positive
    tower_lr: float = 1e-2  # Adam. PISA: 1e-3; validation NDCG@10 of the demo's D1 is 0.17 with it, 0.28 with ours
    tower_weight_decay: float = 1e-5  # PISA, there inside Adam; here on the batch's vectors (lightgcn.fit)
    tower_batch: int = 1024  # PISA: pairs per step
    tower_epochs: int = 500  # PISA: at most, per stage
    tower_patience: int = 20  # PISA: validations (one every 2 epochs) in a row without a new best
    contrast: float = 0.1  # PISA: the weight of contrastive and PIW
    pisa_alpha: float = 0.5  # PISA: the weight of its own regulariser
    tower_tau: float = 0.5  # PISA: temperature of InfoNCE
    tower_neighbours: int = 10  # ours: neighbours per node and batch; PISA: all
    tower_clusters: int = 20  # PISA: of items, for PIW's and PISA's preference shift
    tower_share: float = 0.2  # PISA: the share of users with the largest weights, L
    bounds: ClassVar = {f"tower_{name}": (1, LARGEST) for name in "width negatives batch epochs neighbours".split()} | {
        "tower_tau": (1e-6, 1e6), "tower_init": (1e-6, 1e6), "tower_share": (0, 1), "tower_clusters": (1, 65536)}


class Questions(NamedTuple):
    """Whom to ask for what."""
    user: Tensor  # (n,)
    target: Tensor  # (n,) items
    seen: Tensor  # (2, k): which question, an item that its user has had


def pairs(taken: Iterable[tuple[int, Sequence[int]]]) -> Tensor:
    """(k, its items), ... -> every (k, item), as columns (2, m)."""
    every = [(k, item) for k, items in taken for item in items]
    return torch.tensor(every, dtype=torch.long).reshape(-1, 2).T.contiguous()


class Links:
    """The graph of the edges user (m,) - item (m,), doubles counted once, both ways, as CSR lists over U + I nodes."""
    def __init__(self, user: Tensor, item: Tensor, n_users: int, n_items: int):
        self.n_users, n, item = n_users, n_users + n_items, n_users + item
        key = torch.unique(torch.cat([user * n + item, item * n + user]))  # (k,), sorted
        self.node, self.neighbour = key // n, key % n  # (k,)
        self.first = torch.searchsorted(self.node, torch.arange(n + 1))  # (n + 1,)

    @cached_property
    def A(self) -> Tensor:
        """D^-1/2 A D^-1/2 as sparse CSR (U + I, U + I)."""
        degree = self.first.diff().float()
        weight = (degree[self.node] * degree[self.neighbour]).rsqrt()  # (k,)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(self.first, self.neighbour, weight, 2 * degree.shape, check_invariants=False)

    def sample(self, nodes: Tensor, k: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """(place in nodes (m,), neighbour (m,)): a node's at most k neighbours, or k of them with replacement."""
        count, column = self.first[nodes + 1] - self.first[nodes], torch.arange(k)  # (n,), (k,)
        drawn = (torch.rand(len(nodes), k, generator=draw) * count[:, None]).long()
        chosen = torch.where((count <= k)[:, None], column, drawn)  # (n, k)
        place, j = (column < count[:, None]).nonzero().T
        return place, self.neighbour[self.first[nodes[place]] + chosen[place, j]]


class Lesson(NamedTuple):
    """What there is to learn at a stage, and how it is validated."""
    user: Tensor  # (m,) of the training pairs
    item: Tensor  # (m,)
    links: Links  # the graph of these pairs alone
    known: Tensor  # (k,) items that exist by now
    had: Tensor  # sorted keys user * I + item of all that anybody has had by now
    check: Questions


class Propagate(torch.autograd.Function):
    """propagate(E, A, layers) = P E (U + I, d), P = (I + A + A^2 + ...) / (layers + 1), by Horner's rule. P is
    symmetric as A is, so the gradient of E is P g: the same function, and no transpose is ever built."""
    @staticmethod
    def forward(ctx, E: Tensor, A: Tensor, layers: int) -> Tensor:
        ctx.A, ctx.layers, H = A, layers, E
        for _ in range(layers):
            H = torch.addmm(E, A, H)  # E + A H
        return H / (layers + 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return propagate(grad.contiguous(), ctx.A, ctx.layers), None, None


propagate = Propagate.apply


def bpr_loss(u: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-mean log sigmoid(u . positive - u . negative): (n, d), (n, d), (n, k, d) -> ()."""
    better, worse = (u * positive).sum(-1, keepdim=True), torch.einsum("nd,nkd->nk", u, negative)  # (n, 1), (n, k)
    return -F.logsigmoid(better - worse).mean()


def sample_negatives(user: Tensor, k: int, known: Tensor, had: Tensor, n_items: int, draw: torch.Generator) -> Tensor:
    """(n, k) items of `known`, uniform over those that the user has not had yet. PISA's code spares the test item."""
    chosen = known[torch.randint(len(known), (len(user), k), generator=draw)]
    for _ in range(100):  # a user who has had everything keeps a positive; nobody real does
        key = user[:, None] * n_items + chosen
        bad = had[torch.searchsorted(had, key).clamp(max=len(had) - 1)] == key  # (n, k)
        if not bad.any():
            break
        chosen[bad] = known[torch.randint(len(known), (int(bad.sum()),), generator=draw)]
    return chosen


def inner(H: Tensor, n_users: int) -> Callable[[Tensor], Tensor]:
    """score(u, i) = H_u . H_i, of users (b,) and all items -> (b, I)."""
    return lambda users: H[users] @ H[n_users:].T


@torch.no_grad()
def full_search(scores: Callable[[Tensor], Tensor], known: Tensor, asked: Questions, n_items: int, batch=32) -> Tensor:
    """(n, 10) int64: the best of all `known` items but those the user has had, -1 behind them. Ties go to the smaller
    item number. scores: users (b,) -> (b, I)."""
    hidden, later = torch.full((n_items,), -torch.inf), torch.arange(n_items) / n_items * 2**-30
    hidden[known] = 0.0
    question, item = asked.seen[:, torch.argsort(asked.seen[0])]
    found = torch.full((len(asked.user), 10), -1)
    for start in range(0, len(found), batch):  # one product per batch, no loop over users
        some = slice(start, start + batch)
        score = scores(asked.user[some]).double()  # (b, I)
        score.sub_(score.abs().add_(1e-30).mul_(later)).add_(hidden)  # less than any difference of two float32
        low, high = torch.searchsorted(question, torch.tensor([start, start + batch]))
        score[question[low:high] - start, item[low:high]] = -torch.inf
        best, place = score.topk(min(10, n_items))
        found[some, :best.shape[1]] = place.masked_fill(best == -torch.inf, -1)
    return found


def recommended(run, t: int, scores: Callable[[list[Example]], Tensor]) -> Tensor:
    """(n, 10) items for the questions of stage t, each of a user of its own, by scores: some of them (b,) -> (b, I)."""
    asked, own = run.questions(t)
    target = torch.tensor([e.target for e in asked], dtype=torch.long)
    who = Questions(torch.arange(len(asked)), target, pairs(enumerate(own)))
    known = torch.tensor(run.known[t - 1])
    return full_search(lambda rows: scores([asked[i] for i in rows]), known, who, run.n_items)


class Free:
    """No regulariser; those of pisa.py have the same three methods."""
    def parameters(self) -> list[nn.Parameter]:
        return []

    def begin_epoch(self, H: Tensor) -> None:
        """Nothing to prepare."""

    def __call__(self, H: Tensor, user: Tensor, item: Tensor) -> Tensor | float:
        """What is added to the loss of the pairs user (b,), item (b,)."""
        return 0.0


def batch_loss(E: Tensor, H: Tensor, nodes: Tensor, weight_decay: float) -> Tensor:
    """BPR over nodes (b, 2 + k), the user, the item taken and k others, + weight_decay / 2 |E|^2 of them per pair."""
    u, positive, negative = H[nodes].split([1, 1, nodes.shape[1] - 2], 1)  # one gather: its gradient is a whole table
    return bpr_loss(u[:, 0], positive[:, 0], negative) + weight_decay / 2 * E[nodes].square().sum() / len(nodes)


def fit(E: Tensor, lesson: Lesson, s: Settings, draw: torch.Generator, regulariser: Free = Free()) -> Tensor:
    """Adam on BPR and the regulariser from E -> the E of the best epoch by Hit@10 on lesson.check, every second epoch;
    `tower_patience` validations in a row without a new best end it (Release: counted after epoch 20). Weight decay is a
    penalty on the batch's own vectors, as LightGCN's: PISA's code gives it to Adam, which rescales it to steps of lr
    and so shrinks everybody who is absent from D_t towards 0."""
    user, item, links, known, had, check = lesson
    E, A, n_users = nn.Parameter(E.clone()), links.A, links.n_users
    optimiser = torch.optim.Adam([E, *regulariser.parameters()], lr=s.tower_lr, fused=True)
    progress = Progress({"E": E}, optimiser, patience=s.tower_patience)
    for epoch in progress.left(range(1, s.tower_epochs + 1)):
        regulariser.begin_epoch(propagate(E.detach(), A, s.tower_layers))
        for some in torch.randperm(len(user), generator=draw).split(s.tower_batch):
            H = propagate(E, A, s.tower_layers)
            negative = sample_negatives(user[some], s.tower_negatives, known, had, len(E) - n_users, draw)
            nodes = torch.cat([user[some, None], n_users + item[some, None], n_users + negative], 1)  # (b, 2 + k)
            loss = batch_loss(E, H, nodes, s.tower_weight_decay) + regulariser(H, user[some], item[some])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"two-tower loss: not finite\n{loss.item()} in epoch {epoch}\nlower --tower-lr")
        if epoch % 2 == 0 or epoch == s.tower_epochs:
            H = propagate(E.detach(), A, s.tower_layers)
            found = full_search(inner(H, n_users), known, check, len(E) - n_users)
            progress.keep_best(-hit_at(ranks_of(found, check.target), 10))
    progress.take_best()
    return E.detach()
