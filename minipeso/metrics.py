"""Hit@k and NDCG@k from ranks (Appendix C.1), and how sure one can be of them.

A rank is 1-based; 0 means that the target was not among the beams. Every user counts."""
import numpy as np
import torch
from torch import Tensor

METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10")  # hit@1 is the Release's; ndcg@1 would be the same


def hits(ranks: Tensor, k: int) -> Tensor:
    """Per user: 1 if 1 <= rank <= k, else 0. (n,) -> (n,) float64"""
    return ((ranks >= 1) & (ranks <= k)).double()


def gains(ranks: Tensor, k: int) -> Tensor:
    """Per user: 1 / log2(rank + 1) if the target is among the first k, else 0. (n,) -> (n,) float64"""
    return hits(ranks, k) / torch.log2(ranks.double().clamp(min=1) + 1)


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
        return {name: None for name in summary(torch.zeros(0)) if name != "users"}
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name.startswith(("hit@", "ndcg@"))}
    return mean | {"se_hit@10": sum((row["se_hit@10"] or 0.0)**2 for row in rows)**0.5 / len(rows)}


def bootstrap_interval(strata: list[Tensor], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the mean over strata (stages) of the mean over seeds and users. strata: (seeds, users) each.
    Users are drawn with replacement, the same for all seeds. K seeds are too few to be drawn so: with K = 3 that holds
    the truth 86 times in 100. Their mean is drawn from Student's t with K - 1 degrees and their own spread: 95 times
    (`test_interval_covers_the_truth_in_95_of_100`). Of one seed it is over its users alone."""
    random, means = np.random.default_rng(seed), sum(values.double().mean(1) for values in strata)  # (seeds,)
    error = means.std().item() / len(means)**0.5 if len(means) > 1 else 0.0
    total = error * random.standard_t(max(len(means) - 1, 1), draws)  # (draws,)
    for values in strata:
        # a mean over a resample depends only on how often each distinct value was drawn
        distinct, counts = np.unique(values.double().mean(0).cpu().numpy(), return_counts=True)
        drawn = random.multinomial(values.shape[1], counts / values.shape[1], draws)  # (draws, distinct)
        total += drawn @ distinct / values.shape[1]
    return tuple(np.quantile(total / len(strata), [0.025, 0.975]).tolist())
