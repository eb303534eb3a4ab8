"""Hit@k and NDCG@k from ranks (Appendix C.1), and how sure one can be of them.

A rank is 1-based; 0 means that the target was not among the beams. Every user counts.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CUTOFFS = (5, 10)


def hits(ranks: Tensor, k: int) -> Tensor:
    """Per user: 1 if 1 <= rank <= k, else 0. (n,) -> (n,) float64."""
    return ((ranks >= 1) & (ranks <= k)).double()


def gains(ranks: Tensor, k: int) -> Tensor:
    """Per user: 1 / log2(rank + 1) if the target is among the first k, else 0. (n,) float64."""
    return hits(ranks, k) / torch.log2(ranks.double().clamp(min=1) + 1)


def hit_at(ranks: Tensor, k: int) -> Tensor:
    """Hit@k: the share of users whose target is among the first k; nan if there is no user."""
    return hits(ranks, k).mean()


def ndcg_at(ranks: Tensor, k: int) -> Tensor:
    """NDCG@k with one relevant item: the mean of 1 / log2(rank + 1) over users."""
    return gains(ranks, k).mean()


def summary(ranks: Tensor) -> dict[str, float | int | None]:
    """{"users", "hit@5", "hit@10", "ndcg@5", "ndcg@10", "se_hit@10"}: means, and Hit@10's standard
    error over users, sd / sqrt(n). Without users every metric is None."""
    row: dict[str, float | int | None] = {"users": len(ranks)}
    for name, metric in (("hit", hit_at), ("ndcg", ndcg_at)):
        row |= {f"{name}@{k}": metric(ranks, k).item() if len(ranks) else None for k in CUTOFFS}
    spread = hits(ranks, CUTOFFS[-1]).std().item() if len(ranks) > 1 else None
    row["se_hit@10"] = None if spread is None else spread / len(ranks) ** 0.5
    return row


def average(rows: list[dict]) -> dict[str, float | None]:
    """The mean over stages, every stage weighing the same; stages without users are left out.
    The standard error treats the stages' users as independent."""
    rows = [row for row in rows if row["users"]]
    if not rows:
        return {name: None for name in summary(torch.zeros(0)) if name != "users"}
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if "@" in name and name[:2] != "se"}
    errors = [row["se_hit@10"] or 0.0 for row in rows]
    return mean | {"se_hit@10": sum(e * e for e in errors) ** 0.5 / len(rows)}


def paired_interval(a: Tensor, b: Tensor, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of mean(a - b) by the paired bootstrap over users: a and b (n,) are the same
    users' values under two methods; n users are drawn with replacement, `draws` times."""
    return bootstrap_interval([a - b], draws, seed)


def bootstrap_interval(strata: list[Tensor], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the mean over strata (stages) of the mean within each: users are drawn with
    replacement inside their stratum, as many as there are, `draws` times."""
    random, total = np.random.default_rng(seed), 0.0
    for values in strata:
        # a mean over a resample depends only on how often each distinct value was drawn
        distinct, counts = np.unique(values.double().cpu().numpy(), return_counts=True)
        n = len(values)
        drawn = random.multinomial(n, counts / n, draws)  # (draws, distinct)
        total = total + drawn @ distinct / n
    low, high = np.quantile(total / len(strata), [0.025, 0.975]).tolist()
    return low, high
