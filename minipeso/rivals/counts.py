"""References that learn nothing but counts: what is popular, and what is taken soon after what.

They see the training items of D_1 .. D_t alone, as the models do. Where they win, a model has not learnt what can be
counted."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minipeso.rivals.lightgcn import Questions, full_ranks, pairs
from minipeso.stages import Example, Stage
from minipeso.synthetic import oracle as oracle_of

NAMES = ("popularity", "popularity-decayed", "transitions", "transitions-first", "transitions-last")
STEPS = 5  # how far apart two items of a user may be: k steps weigh 1 / k, backwards half of it
AGE = 0.8  # the weight of an item of the history, to the power of how many came after it
DECAY = 0.3  # what a stage's counts weigh after each later one, for popularity-decayed


def learn(run, name: str) -> dict[str, Tensor]:
    """-> {stage: ranks} by counts of D_1 .. D_t; -first: of D_1 alone; -last: of D_t alone. Popularity breaks ties."""
    ranks, n = {}, run.n_items
    for t in range(1, len(run.known) + 1):
        stages = run.stages[:t]
        some = {"transitions-first": stages[:1], "transitions-last": stages[-1:]}.get(name, stages)
        decay = DECAY if name == "popularity-decayed" else 1.0
        popular = sum(decay ** (t - s.number) * torch.bincount(lists([s])[1], minlength=n) for s in some)  # (I,)
        C = transitions(*lists(some if "transitions" in name else []), n)
        ranks[str(t)] = rank(run, t, lambda asked: (C @ recent(asked, n)).T + popular / 1e6)  # noqa: B023
    return ranks


def oracle(run, name: str) -> dict[str, Tensor]:
    """The ceiling on the demo's world: ranks by the true probability of every item (synthetic.oracle)."""
    cfg, data, stages = run.cfg, run.data, range(1, len(run.known) + 1)
    event = lambda e: (data.users[e.user], data.keys[e.target])  # noqa: E731
    columns = [int(key[1:]) for key in data.keys]  # item D00123 of the world is column 123
    p = {tuple(key): torch.from_numpy(true[columns]) for *key, true in oracle_of(  # (I,) each
        cfg.world_users, cfg.world_items, cfg.world_alpha, cfg.data_seed,
        {event(e) for t in stages for e in run.questions(t)[0]})}
    return {str(t): rank(run, t, lambda asked: torch.stack([p[event(e)] for e in asked])) for t in stages}


def rank(run, t: int, scores: Callable[[list[Example]], Tensor]) -> Tensor:
    """Ranks (n,) of the questions of stage t, each of a user of its own, by scores: some of them (b,) -> (b, I)."""
    asked, own = run.questions(t)
    target = torch.tensor([e.target for e in asked], dtype=torch.long)
    who = Questions(torch.arange(len(asked)), target, pairs(enumerate(own)))
    return full_ranks(lambda rows: scores([asked[i] for i in rows]), torch.tensor(run.known[t - 1]), who, run.n_items)


def lists(stages: Sequence[Stage]) -> Tensor:
    """The training items of some stages, one user of one stage after the other: whose list (m,), item (m,)."""
    return pairs(enumerate(s.training(u) for s in stages for u in s.current))


def transitions(whose: Tensor, item: Tensor, n: int) -> Tensor:
    """C (I, I), sparse: C[b, a] sums 1 / k over the pairs where b came k <= STEPS items after a, 1 / 2k if before."""
    places, weight = [], []
    for k in range(1, STEPS + 1):
        a, b = (part[whose[k:] == whose[:-k]] for part in (item[:-k], item[k:]))
        places += [torch.stack([b, a]), torch.stack([a, b])]
        weight += [torch.full((len(a),), 1 / k), torch.full((len(a),), 1 / (2 * k))]
    return torch.sparse_coo_tensor(torch.cat(places, 1), torch.cat(weight), (n, n), check_invariants=True).coalesce()


def recent(asked: Sequence[Example], n: int) -> Tensor:
    """(I, b): AGE^(how many came after it) for every item of each history."""
    entries = [(item, j, AGE**age) for j, e in enumerate(asked) for age, item in enumerate(reversed(e.history))]
    item, j, weight = torch.tensor(entries, dtype=torch.double).reshape(-1, 3).T
    return torch.zeros(n, len(asked)).index_put_((item.long(), j.long()), weight.float(), accumulate=True)
