"""Hit@k and NDCG@k by hand, and the bootstrap against a loop."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from minipeso.metrics import average, gains, hit_at, hits, ndcg_at, paired_interval, summary
from tests.conftest import draws

RANKS = torch.tensor([1, 0, 3, 5, 6, 10, 11, 0])
some_ranks = st.lists(st.integers(0, 12), min_size=1, max_size=30).map(torch.tensor)


def coins(n: int, p: float, seed: int) -> torch.Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < p).double()


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
    hit = [[1.0 if 1 <= r <= k else 0.0 for r in ranks.tolist()] for k in (5, 10)]
    gain = [[1 / math.log2(r + 1) if 1 <= r <= k else 0.0 for r in ranks.tolist()] for k in (5, 10)]
    want = {"users": len(ranks), "hit@5": np.mean(hit[0]), "hit@10": np.mean(hit[1]),
            "ndcg@5": np.mean(gain[0]), "ndcg@10": np.mean(gain[1])}
    if len(ranks) > 1:  # one user says nothing about the others
        want["se_hit@10"] = np.std(hit[1], ddof=1) / len(ranks)**0.5
    assert {k: v for k, v in row.items() if v is not None} == pytest.approx(want, abs=1e-14)


def test_a_stage_without_users_has_no_numbers():
    """None, not 0 and not nan: nothing was measured."""
    row = summary(torch.zeros(0, dtype=torch.long))
    assert row == {"users": 0, "hit@5": None, "hit@10": None, "ndcg@5": None, "ndcg@10": None, "se_hit@10": None}
    assert average([row, row]) == {k: None for k in row if k != "users"} == average([])


def test_average_weighs_stages_alike_and_leaves_out_empty_ones():
    """The mean of stages' means, whatever their users; standard errors add in squares."""
    many, few, empty = (summary(r) for r in (RANKS.repeat(50), RANKS[:3], RANKS[:0]))
    rows = [many, empty, few]
    before = [dict(row) for row in rows]
    mean = average(rows)
    assert rows == before and mean.keys() == many.keys() - {"users"}
    for name in ("hit@5", "hit@10", "ndcg@5", "ndcg@10"):
        assert mean[name] == pytest.approx((many[name] + few[name]) / 2, abs=1e-14)
    assert mean["se_hit@10"] == pytest.approx(math.hypot(many["se_hit@10"], few["se_hit@10"]) / 2, abs=1e-14)
    one_user = summary(RANKS[:1])  # no standard error of its own
    assert average([one_user, few])["se_hit@10"] == pytest.approx(few["se_hit@10"] / 2)


@pytest.mark.parametrize("kind", ["hits", "gains", "real"])
def test_interval_equals_a_bootstrap_loop(kind):
    """Resampling user by user with numpy gives the same ends, to the noise of 4,000 draws."""
    n, rng = 150, np.random.default_rng(5)
    r, s = torch.from_numpy(rng.integers(0, 12, (2, n)))
    a, b = {"hits": (hits(r, 10), hits(s, 5)), "gains": (gains(r, 10), gains(s, 10)),
            "real": torch.from_numpy(rng.normal(size=(2, n)))}[kind]
    difference, means = (a - b).numpy(), []
    for _ in range(4000):
        means.append(np.mean([difference[i] for i in rng.integers(0, n, n)]))
    want, noise = np.quantile(means, [0.025, 0.975]), np.std(means)
    got = paired_interval(a, b, draws=4000)
    assert np.abs(got - want).max() < 0.15 * noise, f"{got} against {want}, sd of the mean {noise}"
    assert got[0] < difference.mean() < got[1]


def test_interval_covers_the_truth_in_95_of_100():
    """Over 400 pairs of methods whose true difference is 0.1, the interval holds it as often as it says."""
    inside = 0
    for seed in range(400):
        low, high = paired_interval(coins(300, 0.4, 2 * seed), coins(300, 0.3, 2 * seed + 1), 500, seed)
        inside += low <= 0.1 <= high
    assert 0.915 <= inside / 400 <= 0.98, f"{inside} of 400"


def test_interval_is_antisymmetric_and_paired():
    """Swapping the methods mirrors it; pairing makes it narrower than the users' own spread would."""
    a = coins(400, 0.5, 1)
    b = torch.cat([1 - a[:8], a[8:]])
    (low, high), back = paired_interval(a, b), paired_interval(b, a)
    assert (-back[1], -back[0]) == pytest.approx((low, high), abs=0.003)
    assert paired_interval(a, a) == (0.0, 0.0) and low < (a - b).mean() < high
    assert high - low < 0.05 < 3.92 * (2 * 0.25 / 400)**0.5 / 2, "half of an unpaired one"


def test_interval_depends_on_its_seed_alone():
    """Equal calls are equal, torch's and numpy's global states neither matter nor move."""
    a, b = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = paired_interval(a, b, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert paired_interval(a, b, seed=3) == first != paired_interval(a, b, seed=4)


