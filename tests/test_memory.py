"""--memory: transition counts mixed into the search, against scoring every item, a grid of weights and plain loops."""
import json
from dataclasses import replace

import numpy as np
import pytest

from minipeso.evaluate import Ranker
from minipeso.rivals import counts
from tests.micro import fingerprint, micro, run
from tests.reference import answer_log_p
from tests.test_counts import run_of, scores_by_hand
from tests.test_evaluate import IDS, ITEMS, KNOWN, LEVELS, MODEL, TEMPLATE, questions

STAGES = run_of(0).stages  # of the twelve known items, some of which share an ID


def made(n: int, seed: int, template=TEMPLATE, beams: int = ITEMS):
    """(ranker, memory, histories, own, questions): what their users own is not asked for."""
    draw, ranker, asked = np.random.default_rng(seed), Ranker(IDS, KNOWN, template, beams), questions(n, seed)
    own = [{*draw.permutation(12)[:draw.integers(6)].tolist()} - {e.target} for e in asked]
    return ranker, counts.memory(STAGES, KNOWN, ITEMS, ranker.trie), [e.history for e in asked], own, asked


def by_hand(ranker: Ranker, history, own) -> list[float]:
    """Every leaf's share: its items' transitions, and how often each was taken, plus one, for smoothing."""
    both, popular = (scores_by_hand(name, STAGES, history) for name in ("transitions", "popularity"))
    taken, leaves = {i: round(popular[i] * 1e6) + 1 for i in range(ITEMS)}, [0.0] * ranker.trie.leaves
    for i in {*KNOWN} - {*own}:
        leaves[ranker.leaf[i]] += both[i] - popular[i] + counts.SMOOTH * taken[i] / sum(taken.values())
    return [score / sum(leaves) for score in leaves]


def test_the_memory_is_a_distribution_over_what_may_be_recommended():
    """It sums to 1, has nothing for an ID all of whose items are the user's, and is what a loop over pairs gives."""
    ranker, memory, histories, own, _ = made(30, 0)
    for taken in (own, []):  # --seen exclude, include
        p = memory(histories, taken, range(30))  # (30, leaves)
        assert (p.sum(1) - 1).abs().max() < 1e-6
        for row, history, some in zip(p.tolist(), histories, taken or [()] * 30):
            assert row == pytest.approx(by_hand(ranker, history, some), abs=1e-6)


@pytest.mark.parametrize("w, beams", [(1e-3, ITEMS), (0.3, 2), (0.9, 3), (1.0, ITEMS)])
def test_the_search_is_exact_for_the_mixture(w, beams):
    """On every level the best prefixes by (1 - w) p + w p_memory, each by itself; with beams for all, these are
    all items that are left, and w = 1 ranks as the memory alone. With w = 0 nothing changes, to the bit."""
    ranker, memory, histories, own, _ = made(30, 1, beams=beams)
    plain, ranker.memory = [*ranker.search(MODEL, histories, own)], memory
    assert [*ranker.search(MODEL, histories, own)] == plain
    ranker.w = w
    for i, codes, scores in ranker.search(MODEL, histories, own):
        share, left, wanted = by_hand(ranker, histories[i], own[i]), {*KNOWN} - own[i], {(): 1.0}
        for level in range(1, LEVELS + 1):
            p = {}
            for j in (j for j in left if ranker.code[j][:level - 1] in wanted):
                below = {ranker.leaf[k] for k in left if ranker.code[k][:level] == ranker.code[j][:level]}
                lm = answer_log_p(MODEL, TEMPLATE.prompt(histories[i]).tolist(), TEMPLATE.answer(j)[:level])
                p[ranker.code[j][:level]] = (1 - w) * np.exp(lm) + w * sum(share[leaf] for leaf in below)
            wanted = dict(sorted(p.items(), key=lambda pair: -pair[1])[:beams])
        found = {code: np.exp(score) for code, score in zip(codes, scores) if code[0] >= 0}
        assert found == pytest.approx(wanted, rel=1e-4) and scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("n", [3, 12, 70])
def test_the_weight_makes_the_targets_likeliest(n):
    """No weight of a fine grid is better, by probabilities computed item by item; it is 0 if nobody is asked. What is
    learnt behind the item is no part of it."""
    ranker, memory, histories, own, asked = made(n, n, replace(TEMPLATE, tail=(0,), end=(0,)) if n % 2 else TEMPLATE)
    prompts = [ranker.template.prompt(history).tolist() for history in histories]
    lm = [np.exp(answer_log_p(MODEL, prompt, TEMPLATE.answer(e.target))) for prompt, e in zip(prompts, asked)]
    counted = [by_hand(ranker, e.history, some)[ranker.leaf[e.target]] for e, some in zip(asked, own)]
    for scale in (1.0, 0.3, 1e-3):  # of the memory: its weight falls to 0
        grid = np.linspace(0, 1, 2001)[:-1, None]
        likely = np.log((1 - grid) * lm + grid * scale * np.array(counted)).mean(1)  # (weights,)
        w = ranker.weigh(MODEL, lambda *of: scale * memory(*of), asked, own)  # noqa: B023
        assert w == ranker.w == pytest.approx(grid[likely.argmax(), 0], abs=2e-3), scale
    assert ranker.weigh(MODEL, memory, []) == 0.0


def test_a_run_with_a_memory(tmp_path):
    """Every method's weights are logged, stage by stage; the same seed gives the same bytes; training is untouched."""
    a, b, plain = (tmp_path / name for name in ("a", "b", "plain"))
    for out in (a, b, plain):
        run(micro(out, memory=out != plain, compare="evorec"))
    files, without = fingerprint(a), fingerprint(plain)
    assert files == fingerprint(b) and files["ranks.json"] != without["ranks.json"]
    assert all(files[name] == without[name] for name in files if name.endswith("safetensors"))
    lines = map(json.loads, files["metrics.jsonl"].splitlines())
    w = {(line["name"], line["stage"]): line["memory"] for line in lines if "memory" in line}
    assert [*w] == [("LoRA", 1), ("evorec", 2), ("evorec", 3), ("peso", 2), ("peso", 3)] and 0 < min(w.values()) <= 1
    training = json.loads((a / "results.json").read_text())["training"]
    assert {t: row["memory"] for t, row in training.items()} == {"2": w["peso", 2], "3": w["peso", 3]}
