"""Hit@k and NDCG@k from ranks (Appendix C.1), and how sure one can be of them.

A rank is 1-based, 0 if the target was not recommended; every user counts. Where the truth is known, as in the demo, the
metrics take p (n, 10) for ranks (n,), the true probability of each recommended item, and are what sampled ones are in
the mean, without their noise: sum_k p_k for Hit, sum_k p_k / log2(k + 1) for NDCG."""
from functools import cache

import numpy as np
import torch
from torch import Tensor

METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10")  # hit@1 is the Release's; ndcg@1 would be the same


def ranks_of(found: Tensor, target: Tensor) -> Tensor:
    """The place of every target (n,) among the items found for its user (n, k), best first. -> (n,) int64"""
    here = found == target[:, None]
    return torch.where(here.any(1), here.int().argmax(1) + 1, 0)


def hits(ranks: Tensor, k: int) -> Tensor:
    """Per user: 1 if 1 <= rank <= k, else 0. (n,) or p (n, 10) -> (n,) float64"""
    return ranks[:, :k].double().sum(1) if known(ranks) else ((ranks >= 1) & (ranks <= k)).double()


def gains(ranks: Tensor, k: int) -> Tensor:
    """Per user: 1 / log2(rank + 1) if the target is among the first k, else 0. (n,) or p (n, 10) -> (n,) float64"""
    if known(ranks):
        return (ranks[:, :k] / torch.log2(torch.arange(k).double() + 2)).sum(1)
    return hits(ranks, k) / torch.log2(ranks.double().clamp(min=1) + 1)


def known(ranks: Tensor) -> bool:
    """Whether these are probabilities p (n, 10), not ranks."""
    return ranks.ndim == 2 and ranks.is_floating_point()


def hit_at(ranks: Tensor, k: int) -> Tensor:
    """Hit@k: the share of users whose target is among the first k; nan if there is no user. (n,) -> ()"""
    return hits(ranks, k).mean()


def ndcg_at(ranks: Tensor, k: int) -> Tensor:
    """NDCG@k with one relevant item: the mean of 1 / log2(rank + 1) over users. (n,) -> ()"""
    return gains(ranks, k).mean()


def summary(ranks: Tensor) -> dict[str, float | int | None]:
    """{"users", the METRICS, "se_hit@10"}: means; sd / sqrt(users); None if undefined."""
    n, of = len(ranks), {"hit": hit_at, "ndcg": ndcg_at}
    row = {m: of[m.split("@")[0]](ranks, int(m.split("@")[1])).item() if n else None for m in METRICS}
    return {"users": n, **row, "se_hit@10": hits(ranks, 10).std().item() / n**0.5 if n > 1 else None}


def average(rows: list[dict]) -> dict[str, float | None]:
    """The mean over the stages that have users, all weighing the same; their users are taken as independent."""
    rows = [row for row in rows if row["users"]]
    if not rows:
        return dict.fromkeys((*METRICS, "se_hit@10"))
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in METRICS}
    return mean | {"se_hit@10": sum((row["se_hit@10"] or 0.0)**2 for row in rows)**0.5 / len(rows)}


def bootstrap_interval(strata: list[Tensor], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the mean over strata (stages) of the mean over seeds and users. strata: (seeds, users) each.
    Users are drawn with replacement, the same for all seeds; of one seed that is all. K seeds are too few for it (of 3
    it holds the truth 86 times in 100): their mean is drawn from Student's t with K - 1 degrees."""
    random, means = np.random.default_rng(seed), sum(values.double().mean(1) for values in strata)  # (seeds,)
    error = means.std().item() / len(means)**0.5 if len(means) > 1 else 0.0
    total = error * random.standard_t(max(len(means) - 1, 1), draws)  # (draws,)
    for k, values in enumerate(strata):
        each, n = values.double().mean(0).cpu().numpy(), values.shape[1]  # (users,)
        distinct, counts = np.unique(each, return_counts=True)
        if len(distinct) > 50 and n <= 2000:  # expected metrics: a value per user
            total += resamples(n, draws, k) @ each / n
        else:  # a mean depends only on how often each distinct value was drawn: (draws, distinct)
            total += random.multinomial(n, counts / n, draws) @ distinct / n
    return tuple(np.quantile(total / len(strata), [0.025, 0.975]).tolist())


@cache
def resamples(n: int, draws: int, stream: int) -> np.ndarray:
    """How often each of n users comes in every resample, (draws, n): drawn once for all that is compared on them."""
    return np.random.default_rng([n, stream]).multinomial(n, np.full(n, 1 / n), draws).astype(np.float32)
