"""Ranks against scoring every item by hand, and the two recommenders that know no user."""
import pytest
import torch
from hypothesis import given, strategies as st

from minipeso.evaluate import Ranker, reference_hits
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Example, Stage
from minipeso.tokens import Template
from tests.conftest import draws
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


def rank_by_hand(example: Example, hit: str) -> int:
    """Every known item's teacher-forced log-probability, sorted; items on one ID by their number."""
    prompt = TEMPLATE.prompt(example.history).tolist()
    score = {item: round(answer_log_p(MODEL, prompt, TEMPLATE.answer(item)), 9) for item in KNOWN}
    if hit == "item":
        return sorted(KNOWN, key=lambda item: (-score[item], item)).index(example.target) + 1
    return sorted(set(score.values()), reverse=True).index(score[example.target]) + 1


@pytest.mark.parametrize("hit", ["item", "id"])
def test_ranks_are_those_of_scoring_every_item(hit):
    """With beams for all, the rank is the place among all known items by teacher-forced log-probability;
    hit "item" gives items that share an ID successive places, hit "id" one place."""
    examples = questions(40, seed=0)
    ranks = Ranker(IDS, KNOWN, TEMPLATE, beams=ITEMS, hit=hit).ranks(MODEL, examples)
    assert ranks.dtype == torch.int64 and ranks.tolist() == [rank_by_hand(e, hit) for e in examples]
    assert {e.target for e in examples} >= {3, 8, 11, 5, 6}, "the shared IDs were not asked for"


@draws(12)
@given(st.permutations(range(15)), st.sampled_from([1, 4, 64]))
def test_batch_size_and_order_do_not_matter(order, batch):
    """Every user's rank is the user's own, whoever is searched beside them."""
    examples = questions(15, seed=1)
    ranker = Ranker(IDS, KNOWN, TEMPLATE, beams=4)
    single = [ranker.ranks(MODEL, [e]).item() for e in examples]
    assert ranker.ranks(MODEL, [examples[i] for i in order], batch).tolist() == [single[i] for i in order]


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


def test_progress_counts_every_user_once():
    """What the bar is told adds up to the number of users; nobody to rank is an empty tensor, not an error."""
    assert Ranker(IDS, KNOWN, TEMPLATE).ranks(MODEL, []).tolist() == []
    told = []
    Ranker(IDS, KNOWN, TEMPLATE, beams=2).ranks(MODEL, questions(11, seed=5), batch=4, progress=told.append)
    assert sum(told) == 11 and max(told) <= 4, told


def test_dropout_is_off_while_ranking():
    """The model is put into evaluation mode first."""
    MODEL.train()
    Ranker(IDS, KNOWN, TEMPLATE).ranks(MODEL, questions(1, seed=0))
    assert not any(m.training for m in MODEL.modules())


def test_reference_hits_by_hand():
    """Random: top / known items. Popularity: the most taken of D_1 .. D_t without any stage's last two items
    of a user, ties to the lower number; the target is the last item, cold if not counted. An empty stage has none."""
    first = Stage(1, {1: [], 2: [], 3: []}, {1: [0, 0, 1, 4, 1], 2: [1, 0, 5, 0], 3: [4, 4, 4, 6, 3]})
    # D_1 without the last two of each: 0 three times, 4 three times, 1 twice
    second = Stage(2, {4: [], 5: []}, {4: [1, 1, 7, 9, 1], 5: [7, 8, 9]})  # adds 1 twice, 7 twice: 1 leads with four
    stages, known = [first, second, Stage(3, {}, {})], [list(range(7)), list(range(10)), list(range(10))]
    assert reference_hits(stages, known, top=1) == {
        "1": {"random": 1 / 7, "popularity": 1 / 3, "cold": 1 / 3},  # 3
        "2": {"random": 1 / 10, "popularity": 1 / 2, "cold": 1 / 2},  # 9
        "3": {"random": 1 / 10, "popularity": None, "cold": None}}
    assert reference_hits(stages, known, top=2)["1"] == {"random": 2 / 7, "popularity": 1 / 3, "cold": 1 / 3}
    assert reference_hits(stages, known, top=3)["1"]["popularity"] == 2 / 3, "0, 4 and 1"
    assert reference_hits(stages, known, top=10)["1"]["random"] == 1.0, "ten draws cannot miss one of seven"
