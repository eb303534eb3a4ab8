"""References that learn nothing but counts: what is popular, and what is taken soon after what.

They see the training items of D_1 .. D_t alone, as the models do. Where they win, a model has not learnt to count."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minipeso.rivals.lightgcn import pairs, recommended
from minipeso.stages import Stage
from minipeso.trie import Trie

NAMES = ("popularity", "popularity-decayed", "transitions", "transitions-first", "transitions-last")
STEPS = 5  # how far apart two items of a user may be: k steps weigh 1 / k, backwards half of it
AGE = 0.8  # the weight of an item of the history, to the power of how many came after it
SMOOTH = 10.0  # how many transitions popularity counts for in all, in what --memory mixes in
DECAY = 0.3  # what a stage's counts weigh after each later one, for popularity-decayed


def learn(run, name: str) -> dict[str, Tensor]:
    """-> {stage: found} by counts of D_1 .. D_t; -first: of D_1 alone; -last: of D_t alone. Popularity breaks ties."""
    found, n = {}, run.n_items
    for t in range(1, len(run.known) + 1):
        stages = run.stages[:t]
        some = {"transitions-first": stages[:1], "transitions-last": stages[-1:]}.get(name, stages)
        decay = DECAY if name == "popularity-decayed" else 1.0
        popular = sum(decay ** (t - s.number) * torch.bincount(lists([s])[1], minlength=n) for s in some)  # (I,)
        C = transitions(*lists(some if "transitions" in name else []), n)
        scores = lambda asked: (C @ recent([e.history for e in asked], n)).T + popular / 1e6  # noqa: B023, E731
        found[str(t)] = recommended(run, t, scores)
    return found


def oracle(run, name: str) -> dict[str, Tensor]:
    """The ceiling on the demo's world: found by the true probability of every item."""
    return {str(t): recommended(run, t, lambda asked: torch.stack([run.truth[e] for e in asked]))
            for t in range(1, len(run.known) + 1)}


def lists(stages: Sequence[Stage]) -> Tensor:
    """The training items of some stages, one user of one stage after the other: whose list (m,), item (m,)."""
    return pairs(enumerate(s.training(u) for s in stages for u in s.current))


def memory(stages: Sequence[Stage], known: list[int], n: int, trie: Trie) -> Callable[..., Tensor]:
    """p(histories, own, some) -> (b, leaves): the leaves' share of (C @ recent) + SMOOTH popular, own items at 0."""
    whose, item = lists(stages)
    C, popular = transitions(whose, item, n), torch.bincount(item, minlength=n) + 1.0  # (I, I), (I,)
    def p(histories: Sequence[Sequence[int]], own: Sequence[set[int]], some: Sequence[int]) -> Tensor:
        score = (C @ recent([histories[i] for i in some], n)).T + SMOOTH * popular / popular.sum()  # (b, I)
        score[tuple(pairs(enumerate([own[i] for i in some] if own else ())))] = 0.0
        leaf = score.new_zeros(len(some), trie.leaves).index_add_(1, trie.leaf, score[:, known])  # items on one ID
        return leaf / leaf.sum(1, keepdim=True).clamp(min=1e-30)
    return p


def transitions(whose: Tensor, item: Tensor, n: int) -> Tensor:
    """C (I, I), sparse: C[b, a] sums 1 / k over the pairs where b came k <= STEPS items after a, 1 / 2k if before."""
    places, weight = [], []
    for k in range(1, STEPS + 1):
        a, b = (part[whose[k:] == whose[:-k]] for part in (item[:-k], item[k:]))
        places += [torch.stack([b, a]), torch.stack([a, b])]
        weight += [torch.full((len(a),), 1 / k), torch.full((len(a),), 1 / (2 * k))]
    return torch.sparse_coo_tensor(torch.cat(places, 1), torch.cat(weight), (n, n), check_invariants=True).coalesce()


def recent(histories: Sequence[Sequence[int]], n: int) -> Tensor:
    """(I, b): AGE^(how many came after it) for every item of each history."""
    entries = [(item, j, AGE**age) for j, items in enumerate(histories) for age, item in enumerate(reversed(items))]
    item, j, weight = torch.tensor(entries, dtype=torch.double).reshape(-1, 3).T
    return torch.zeros(n, len(histories)).index_put_((item.long(), j.long()), weight.float(), accumulate=True)
