"""Hit@k and NDCG@k by hand, and the bootstrap against a loop."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from minipeso.metrics import average, bootstrap_interval, gains, hit_at, hits, ndcg_at, ranks_of, summary
from tests.conftest import draws

RANKS = torch.tensor([1, 0, 3, 5, 6, 10, 11, 0])
some_ranks = st.lists(st.integers(0, 12), min_size=1, max_size=30).map(torch.tensor)


def test_a_hand_worked_table():
    """Ranks 1 - 3 5 6 10 11 -: three hits at 5, five at 10; gains 1, 1/2, 1/log2(6), 1/log2(7), 1/log2(11)."""
    five = [1.0, 0, 0.5, 0.386852807234542, 0, 0, 0, 0]
    ten = [1.0, 0, 0.5, 0.386852807234542, 0.356207187108022, 0.289064826317888, 0, 0]
    assert hits(RANKS, 5).tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    assert hits(RANKS, 10).tolist() == [1, 0, 1, 1, 1, 1, 0, 0]
    assert gains(RANKS, 5).tolist() == pytest.approx(five, abs=1e-14)
    assert gains(RANKS, 10).tolist() == pytest.approx(ten, abs=1e-14)
    assert [hit_at(RANKS, k).item() for k in (5, 10)] == [3 / 8, 5 / 8]
    assert [ndcg_at(RANKS, k).item() for k in (5, 10)] == pytest.approx([sum(five) / 8, sum(ten) / 8], abs=1e-14)
    assert all(metric(torch.ones(7), 1) == 1 and metric(torch.zeros(7), 10) == 0 for metric in (hit_at, ndcg_at))


@draws(100)
@given(ranks=some_ranks)
def test_summary_is_the_means_and_the_standard_error(ranks):
    """Every metric is the mean of its users' values; se is numpy's sd (n - 1) / sqrt(n); inputs are unchanged."""
    before = ranks.clone()
    row = summary(ranks)
    assert torch.equal(ranks, before)
    hit = [[1.0 if 1 <= r <= k else 0.0 for r in ranks.tolist()] for k in (5, 10, 1)]
    gain = [[1 / math.log2(r + 1) if 1 <= r <= k else 0.0 for r in ranks.tolist()] for k in (5, 10)]
    want = {"users": len(ranks), "hit@1": np.mean(hit[2]), "hit@5": np.mean(hit[0]), "hit@10": np.mean(hit[1]),
            "ndcg@5": np.mean(gain[0]), "ndcg@10": np.mean(gain[1])}
    if len(ranks) > 1:  # one user says nothing about the others
        want["se_hit@10"] = np.std(hit[1], ddof=1) / len(ranks)**0.5
    assert {k: v for k, v in row.items() if v is not None} == pytest.approx(want, abs=1e-14)


@draws(50)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 6), k=st.integers(1, 10))
def test_ranks_of_is_a_loop(seed, n, k):
    """The first place of each user's target, 0 if it is not there; -1, where less was found, is nobody's target."""
    draw = np.random.default_rng(seed)
    found, target = torch.from_numpy(draw.integers(-1, 8, (n, k))), torch.from_numpy(draw.integers(0, 8, n))
    ranks = ranks_of(found, target)
    want = [row.index(t) + 1 if t in row else 0 for row, t in zip(found.tolist(), target.tolist())]
    assert ranks.tolist() == want and ranks.dtype == torch.int64


@pytest.mark.parametrize("metric", [hits, gains])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_expected_metrics_are_the_mean_of_sampled_ones(metric, k):
    """With p (n, 10) for ranks: to five standard errors the mean over targets drawn from p, place 0 if it is none of
    the ten; where one place is sure, its metric exactly."""
    draw, n = np.random.default_rng(k), 20_000
    p = draw.dirichlet(np.full(11, 2.0), 6)  # (6, 11): the last is what is not among the ten
    for expected, row in zip(metric(torch.from_numpy(p[:, :10]), k).tolist(), p):
        sampled = metric((torch.from_numpy(draw.choice(11, n, p=row)) + 1) % 11, k).numpy()
        assert abs(sampled.mean() - expected) <= 5 * sampled.std() / n**0.5
    sure = torch.cat([torch.eye(10), torch.zeros(1, 10)]).double()
    assert torch.equal(metric(sure, k), metric(torch.tensor([*range(1, 11), 0]), k))


def test_average_weighs_stages_alike_and_leaves_out_empty_ones():
    """The mean of stages' means, whatever their users; standard errors add in squares."""
    many, few, empty = (summary(r) for r in (RANKS.repeat(50), RANKS[:3], RANKS[:0]))
    rows = [many, empty, few]
    before = [dict(row) for row in rows]
    mean = average(rows)
    assert rows == before and mean.keys() == many.keys() - {"users"}
    for name in ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10"):
        assert mean[name] == pytest.approx((many[name] + few[name]) / 2, abs=1e-14)
    assert mean["se_hit@10"] == pytest.approx(math.hypot(many["se_hit@10"], few["se_hit@10"]) / 2, abs=1e-14)
    one_user = summary(RANKS[:1])  # no standard error of its own
    assert average([one_user, few])["se_hit@10"] == pytest.approx(few["se_hit@10"] / 2)


def loop(strata: list[np.ndarray], rng, both: bool = False, draws: int = 4000) -> tuple[np.ndarray, float]:
    """The ends and the spread of a resampling one by one: users, and seeds by Student's t or, both, drawn as well."""
    K, means = len(strata[0]), []
    sd = 0.0 if both or K == 1 else np.mean([s.mean(1) for s in strata], 0).std()  # with K, not K - 1
    for _ in range(draws):
        seeds = rng.integers(0, K, K) if both else np.arange(K)
        mean = np.mean([s[seeds][:, rng.integers(0, s.shape[1], s.shape[1])].mean() for s in strata])
        means.append(mean + sd * rng.standard_normal() / math.sqrt(rng.chisquare(max(K - 1, 1))))
    return np.quantile(means, [0.025, 0.975]), np.std(means)


@pytest.mark.parametrize("kind", ["hits", "gains", "real"])
@pytest.mark.parametrize("K, sizes", [(1, (150,)), (1, (40, 15)), (5, (60, 25)), (7, (30,))])
def test_interval_equals_a_loop(kind, K, sizes):
    """Against drawing user by user with another generator, Student's t from a normal and a chi-square: the same ends,
    to the noise of the draws; stages weigh the same."""
    rng, strata = np.random.default_rng(5), []
    for n in sizes:
        r, s = torch.from_numpy(rng.integers(0, 12, (2, K, n)))
        strata.append({"hits": hits(r, 10) - hits(s, 5), "gains": gains(r, 10) - gains(s, 10),
                       "real": torch.from_numpy(rng.normal(size=(K, n)))}[kind])
    want, noise = loop([s.numpy() for s in strata], rng)
    got = np.array(bootstrap_interval(strata, draws=20_000))
    assert np.abs(got - want).max() < 0.15 * noise, f"{got} against {want}, sd of the mean {noise}"
    assert got[0] < np.mean([s.mean() for s in strata]) < got[1]


def test_interval_covers_the_truth_in_95_of_100():
    """How often it holds a true difference of 0.1: of coin flips of one seed; of three seeds that differ, by little or
    by more than users do, where a bootstrap of seeds and users is too narrow and one of users alone means nothing."""
    rng, trials = np.random.default_rng(0), 200
    coins = [torch.from_numpy(rng.binomial(1, 0.4, (1, 300)) - rng.binomial(1, 0.3, (1, 300))) for _ in range(trials)]
    inside = {"one seed": [bootstrap_interval([x], 500, i) for i, x in enumerate(coins)]}
    for sd in (0.01, 0.2):
        users, noise = rng.normal(0.1, 0.3, (trials, 2, 1, 60)), rng.normal(0, 0.3, (trials, 2, 3, 60))
        worlds = users + noise + rng.normal(0, sd, (trials, 1, 3, 1))  # (trials, stages, seeds, users)
        inside[f"t, {sd}"] = [bootstrap_interval([*torch.from_numpy(x)], 300, i) for i, x in enumerate(worlds)]
        alone = (torch.from_numpy(x.mean(1, keepdims=True)) for x in worlds[:60])
        inside[f"users, {sd}"] = [bootstrap_interval([*x], 300) for x in alone]
        inside[f"both, {sd}"] = [loop(list(x), rng, True, 200)[0] for x in worlds[:60]]
    share = {name: np.mean([low <= 0.1 <= high for low, high in some]) for name, some in inside.items()}
    assert all(0.915 <= share[name] <= 0.98 for name in ("one seed", "t, 0.2")) and share["t, 0.01"] > 0.93, share
    assert share["both, 0.2"] < 0.9 and share["users, 0.2"] < 0.5, share
