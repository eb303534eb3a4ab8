"""Ranks against scoring every item by hand; what a user has is struck out; what has been learnt is found."""
import itertools

import pytest
import torch
from hypothesis import given, strategies as st

from minipeso import continual
from minipeso.evaluate import Ranker
from minipeso.metrics import hit_at
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Example, examples
from minipeso.tokens import Template
from tests.conftest import draws
from tests.micro import micro, set_up
from tests.reference import answer_log_p, toy_llama

N_CODES, LEVELS, ITEMS = 5, 3, 14
# items 3, 8 and 11 share an ID, and so do 5 and 6; 12 and 13 are not known yet, 13 has the ID of 0
SAME = {8: 3, 11: 3, 6: 5, 13: 0}


def catalogue() -> SemanticIDs:
    draw = torch.randperm(N_CODES**LEVELS, generator=torch.Generator().manual_seed(2))[:ITEMS]
    codes = torch.stack([draw // N_CODES**2, draw // N_CODES % N_CODES, draw % N_CODES], 1)
    codes[1] = 0  # an ID like any other
    for item, other in SAME.items():
        codes[item] = codes[other]
    return SemanticIDs(codes, N_CODES)


IDS = catalogue()
KNOWN = list(range(12))
TEMPLATE = Template.short(IDS.codes, N_CODES)
MODEL = toy_llama(seed=4, vocab_size=1 + LEVELS * N_CODES)


def questions(n: int, seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    pick = lambda high: int(torch.randint(high, (1,), generator=draw))  # noqa: E731
    return [Example(user, tuple(pick(ITEMS) for _ in range(pick(7))), pick(12), 1) for user in range(n)]


def rank_by_hand(example: Example, hit: str, own: set[int] = frozenset()) -> int:
    """Every known item's teacher-forced log-probability, less the user's own, sorted; items on one ID by number."""
    prompt, left = TEMPLATE.prompt(example.history).tolist(), [item for item in KNOWN if item not in own]
    score = {item: round(answer_log_p(MODEL, prompt, TEMPLATE.answer(item)), 9) for item in left}
    if hit == "item":
        return sorted(left, key=lambda item: (-score[item], item)).index(example.target) + 1
    return sorted(set(score.values()), reverse=True).index(score[example.target]) + 1


@pytest.mark.parametrize("hit", ["item", "id"])
def test_ranks_are_those_of_scoring_every_item(hit):
    """With beams for all, the rank is the place among all known items by teacher-forced log-probability;
    hit "item" gives items that share an ID successive places, hit "id" one place."""
    examples = questions(40, seed=0)
    ranks = Ranker(IDS, KNOWN, TEMPLATE, beams=ITEMS, hit=hit).ranks(MODEL.train(), examples)
    assert not any(m.training for m in MODEL.modules()), "dropout is off while ranking"
    assert ranks.dtype == torch.int64 and ranks.tolist() == [rank_by_hand(e, hit) for e in examples]
    assert {e.target for e in examples} >= {3, 8, 11, 5, 6}, "the shared IDs were not asked for"


@draws(30)
@given(st.sets(st.sampled_from(KNOWN)), st.integers(0, 99), st.sampled_from([1, 3, ITEMS]))
def test_what_a_user_has_is_struck_out_inside_the_search(own, seed, beams):
    """With beams for all, ranks are those of scoring every other item; with few, as many others come back as there are
    beams and IDs left: an ID is struck out when all its items are the user's, and no beam ends there."""
    asked = [e for e in questions(9, seed) if e.target not in own]
    owns = [own if e.user % 2 else set() for e in asked]  # each user its own
    ranker = Ranker(IDS, KNOWN, TEMPLATE, beams)
    free = [{tuple(IDS.codes[i].tolist()) for i in KNOWN if i not in some} for some in owns]
    for i, codes, _ in ranker.search(MODEL, [e.history for e in asked], owns):
        found = [code for code in codes if code[0] >= 0]
        assert len(set(found)) == len(found) == min(beams, len(free[i])) and {*found} <= free[i]
    if beams == ITEMS:
        assert ranker.ranks(MODEL, asked, owns).tolist() == [rank_by_hand(e, "item", o) for e, o in zip(asked, owns)]


@draws(12)
@given(st.permutations(range(15)), st.sampled_from([1, 4, 64]))
def test_batch_size_and_order_do_not_matter(order, batch):
    """Every user's rank is the user's own, whoever is searched beside them; nobody to rank is no error. What the bar
    is told adds up to the number of users."""
    examples, told = questions(15, seed=1), []
    ranker = Ranker(IDS, KNOWN, TEMPLATE, beams=4)
    single = [ranker.ranks(MODEL, [e]).item() for e in examples]
    ranks = ranker.ranks(MODEL, [examples[i] for i in order], (), batch, told.append)
    assert ranks.tolist() == [single[i] for i in order] and sum(told) == 15 and ranker.ranks(MODEL, []).tolist() == []


def test_every_user_counts_and_what_the_beams_miss_is_0():
    """One rank per example, in the examples' order: 0 beyond the beams, 0 for an item the trie does not hold."""
    examples = questions(30, seed=3)
    wide = Ranker(IDS, KNOWN, TEMPLATE, beams=ITEMS, hit="id").ranks(MODEL, examples)
    narrow = Ranker(IDS, KNOWN, TEMPLATE, beams=3, hit="id").ranks(MODEL, examples)
    ranked = narrow > 0
    assert wide.all() and 0 < ranked.sum() < 30 and narrow.max() <= 3, (wide, narrow)
    assert (narrow[ranked] <= wide[ranked]).all(), "fewer rivals cannot worsen a rank"
    unknown = [e._replace(target=t) for e, t in zip(examples, [12, 13] * 15)]  # 13: on the ID of a known item
    for hit in ("item", "id"):
        assert not Ranker(IDS, KNOWN, TEMPLATE, ITEMS, hit).ranks(MODEL, unknown).any()


def test_100_users_are_memorised(tmp_path, monkeypatch):
    """By a tiny Llama trained from scratch to its last epoch: the last training item of each is among the ten."""
    falling = itertools.count(0, -1)
    monkeypatch.setattr(continual, "mean_loss", lambda *rest: next(falling))
    made = set_up(micro(tmp_path, world_users=106, world_items=120, codes=16, shape=(48, 2, 2, 2, 96), batch=64,
                        base_dropout=0.0, base_epochs=40, base_lr=1e-2))
    last = {e.user: e for e in examples(made.stages[0], "train")}.values()  # of each user
    ranks = Ranker(made.ids, made.known[0], made.template).ranks(made.model, [*last])
    assert len(ranks) >= 100 and hit_at(ranks, 10) > 0.95, hit_at(ranks, 10)
