"""The references that count: against plain loops over dictionaries."""
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minipeso.metrics import ranks_of
from minipeso.rivals import counts
from minipeso.runs import report
from minipeso.stages import Stage, had, questions

N = 12


def run_of(seed: int, seen: str = "exclude") -> SimpleNamespace:
    """Three stages of eight users each, five of them known from before; items 9 .. 11 appear at the second stage."""
    draw, stages, past = np.random.default_rng(seed), [], {}
    for t, users in enumerate((range(8), range(3, 11), range(6, 14)), 1):
        current = {u: draw.permutation([i for i in range(9 if t == 1 else N) if i not in past.get(u, [])])[:4].tolist()
                   for u in users}
        stages.append(Stage(t, {u: past.get(u, []) for u in current}, current))
        past |= {u: past.get(u, []) + items for u, items in current.items()}
    def asked(t):
        some = questions(stages[:t], 3)
        return some, [had(stages[:t])[e.user] for e in some] if seen == "exclude" else []
    known = [list(range(n)) for n in (9, N, N)]
    return SimpleNamespace(stages=stages, n_items=N, questions=asked, known=known)


def scores_by_hand(name: str, stages: list[Stage], history: tuple[int, ...]) -> Counter:
    """Every item's score for one user, pair by pair."""
    score, t = Counter(), len(stages)
    some = {"transitions-first": stages[:1], "transitions-last": stages[-1:]}.get(name, stages)
    for stage in some:
        weight = 0.3 ** (t - stage.number) if name == "popularity-decayed" else 1
        for taken in (items[:-2] for items in stage.current.values()):
            for i, a in enumerate(taken):
                score[a] += weight * 1e-6
                for j, b in enumerate(taken[i + 1:], 1) if "transitions" in name else ():
                    for seen, other, w in ((a, b, 1 / j), (b, a, 0.5 / j)):
                        w *= sum(0.8**age for age, h in enumerate(reversed(history)) if h == seen)
                        score[other] += w * (j <= 5)
    return score


@pytest.mark.parametrize("name", counts.NAMES)
@pytest.mark.parametrize("seen", ["exclude", "include"])
def test_what_is_found_is_that_of_counting_by_hand(name, seen):
    """Training items alone, a history weighed by age, what a user has left out (or not), ties to the smaller number;
    of the stage's own users and, behind them, of those who are absent."""
    for seed in range(4):
        run = run_of(seed, seen)
        for t, found in counts.learn(run, name).items():
            asked, own = run.questions(int(t))
            for i, e in enumerate(asked):
                score = scores_by_hand(name, run.stages[:int(t)], e.history)
                order = sorted((j for j in run.known[int(t) - 1] if not own or j not in own[i]),
                               key=lambda j: (-round(score[j], 9), j))
                assert found[i].tolist() == (order + [-1] * 10)[:10], (seed, t, i)


def test_premiums_and_references_by_hand():
    """Means over D_2 .. D_T of what is hit more often; no such stage has test users: nothing, and said so."""
    run = run_of(0)
    target = {t: torch.tensor([e.target for e in run.questions(int(t))[0]]) for t in "123"}
    ranks = {x: {t: ranks_of(f[:, :4], target[t]) for t, f in counts.learn(run, x).items()} for x in counts.NAMES}
    found = report.premiums(ranks, {"1": 8, "2": 8, "3": 8})
    for what, other in (("adapting", "transitions-first"), ("remembering", "transitions-last")):
        gain = [sum((ranks["transitions"][t][i] > 0).item() - (ranks[other][t][i] > 0).item() for i in range(8)) / 8
                for t in "23"]
        mean, low, high = found[what]
        assert mean == pytest.approx(sum(gain) / 2) and low <= mean <= high
    assert report.premiums(ranks, {"1": 8, "2": 0, "3": 0}) == {} and "nobody" in report.premium_lines({})
    counted = {i for s in run.stages[:2] for items in s.current.values() for i in items[:-2]}
    cold = sum(items[-1] not in counted for items in run.stages[1].current.values()) / 8
    assert report.references(run.stages, run.known)["2"] == {"random": 10 / N, "cold": cold}
    run.stages.append(Stage(4, {}, {}))
    run.known.append(run.known[-1])  # a stage without users of its own asks for the absent ones
    assert report.references(run.stages, run.known)["4"] == {"random": 10 / N, "cold": None}
    found = {name: counts.learn(run, name) for name in counts.NAMES}
    assert {len(f["4"]) for f in found.values()} == {len(questions(run.stages))} and len(found["popularity"]) == 4
    assert report.premiums(ranks, {"2": 8, "3": 8, "4": 0}) == report.premiums(ranks, {"2": 8, "3": 8})
