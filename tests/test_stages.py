"""The protocol: the paper's and the release's counts, and nothing of the future in any example."""
import json
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeso.files.release import read_release
from minipeso.files.reviews import read_reviews
from minipeso.runs.report import statistics_table
from minipeso.stages import Interactions, Stage, cut, examples, had, questions, statistics, subset, user_disjoint
from tests.conftest import draws

T0 = 1_588_687_728_923


def interactions(events):
    """Interactions from (user, item, time) numbers, in the order given."""
    user, item, time = (np.array(column, dtype=np.int64) for column in zip(*events))
    return Interactions(user, item, time, *([f"{k}" for k in range(ids.max() + 1)] for ids in (user, item)))


def random_events(n, n_users, seed):
    """n events of distinct items, so that an item's number names its event; times may tie."""
    rng = np.random.default_rng(seed)
    users, times = rng.integers(0, n_users, n).tolist(), rng.integers(0, n // 2 + 2, n).tolist()
    return [(u, k, T0 + t) for k, (u, t) in enumerate(zip(users, times))]


worlds = st.builds(random_events, st.integers(20, 200), st.integers(1, 12), st.integers(0, 10**6))


def table(stages, *names):
    return [tuple(row[name] for name in names) for row in statistics(stages)[:-1]]


def test_the_known_figures(shared_data):
    """Real reviews cut and filtered, and the authors' Video Games blocks: exact counts; a history is all before it."""
    counts = ("users", "items", "interactions")
    assert table(cut(read_reviews(shared_data / "electronics23")), *counts) == [
        (7_201, 8_300, 58_467), (445, 2_095, 3_108), (409, 1_914, 2_797), (444, 2_074, 3_071), (560, 2445, 4121)]
    stages, _ = read_release(shared_data / "peso_release" / "Video_Games_cl_0.6_0_5_3_0")
    assert table(stages, *counts) == [(12_447, 18_450, 91_273), (1_035, 4_537, 7_491), (1_091, 4_269, 7_492),
                                      (1_949, 5_951, 14_646), (1_791, 5_641, 13_271)]
    past = {}
    for stage in stages:
        assert stage.history == {user: past.get(user, []) for user in stage.users}, stage.number
        past |= {user: stage.history[user] + stage.current[user] for user in stage.users}
    last = statistics(stages)[-1]
    assert (last["stage"], last["users"], last["items"], last["interactions"]) == ("D1:5", 17_300, 25_935, 134_173)


def test_instruments_reproduce_table_4(shared_data):
    """D2-D5 of Instruments equal the paper's Table 4 to every printed digit but New Items, which are not among D1's:
    without D1 there are more of them. Theirs and D1's items are together those of the ID file."""
    stages, _ = read_release(shared_data / "peso_release" / "Instruments_cl_ori")
    assert [s.number for s in stages] == [2, 3, 4, 5]
    names = ("users", "new_users", "items", "interactions", "avg_length", "sparsity")
    rounded = [(*row[:4], round(row[4], 2), round(row[5], 4)) for row in table(stages, *names)]
    assert rounded == [
        (1_772, 1_183, 8_346, 13_197, 7.45, 0.9991), (1_821, 1_265, 8_325, 13_334, 7.32, 0.9991),
        (2_289, 1_684, 9_617, 18_811, 8.22, 0.9991), (2_238, 1_699, 9_131, 17_573, 7.85, 0.9991)]
    new_items, printed = [n for n, in table(stages, "new_items")], [2_900, 2_909, 3_864, 3_365]
    assert all(a > b for a, b in zip(new_items, printed)) and 40_471 + sum(printed) == 53_509, new_items
    train = examples(stages[0], "train")
    assert len(train) == 9_653 and sum(not e.history for e in train) == 1_183
    assert sum(len(e.history) == 20 for e in examples(stages[0], "test")) == 267


def test_leave_one_out_by_hand():
    """Two earlier and five current items give three training questions, one valid, one test."""
    stage = Stage(2, {7: [1, 2]}, {7: [3, 4, 5, 6, 8]})
    assert stage.training(7) == [3, 4, 5]
    assert examples(stage, "train", window=3) == [(7, (1, 2), 3, 2), (7, (1, 2, 3), 4, 2), (7, (2, 3, 4), 5, 2)]
    assert examples(stage, "valid", window=3) == [(7, (3, 4, 5), 6, 2)]
    assert examples(stage, "test") == [(7, (1, 2, 3, 4, 5, 6), 8, 2)]
    assert examples(Stage(1, {0: []}, {0: [5, 6, 7]}), "train") == [(0, (), 5, 1)], "a new user's first item"


@draws(60)
@given(worlds, st.integers(1, 6), st.integers(1, 8))
def test_no_example_sees_its_future(events, min_events, window):
    """Every history is the user's latest surviving events before the target, and no later ones."""
    try:
        stages = cut(interactions(events), min_events=min_events)
    except ValueError:
        return  # an empty D1
    when = {item: (time, user, item) for user, item, time in events}
    owner = {item: user for user, item, _ in events}
    for stage in stages:
        train, valid, test = (examples(stage, p, window) for p in ("train", "valid", "test"))
        held_out, shown = {e.target for e in valid + test}, {i for e in train for i in (e.target, *e.history)}
        assert not held_out & shown, "a held-out item was shown"
        assert len(train) + len(valid) + len(test) == stage.interactions and len(test) == len(stage.users)
        assert [i for u in stage.users for i in stage.training(u)] == [e.target for e in train]
        for e in train + valid + test:
            before = [i for i in stage.history[e.user] + stage.current[e.user] if when[i] < when[e.target]]
            assert e.history == tuple(before[-window:]) and owner[e.target] == e.user


@draws(60)
@given(worlds, st.sampled_from([0.3, 0.57, 0.6, 0.8]), st.integers(1, 6), st.integers(1, 6))
def test_cut_equals_the_slow_reference(events, first, n_stages, min_events):
    """An event-by-event reference cuts, filters and remembers the same."""
    ordered = sorted(events, key=lambda e: (e[2], e[0], e[1]))
    start = (len(events) * round(100 * first)) // 100
    rest = len(events) - start
    ends = [start + rest * k // (n_stages - 1) for k in range(n_stages)] if n_stages > 1 else [len(events)]
    want, past = [], {}
    for number, (begin, end) in enumerate(zip([0, *ends], ends), start=1):
        groups = {}
        for user, item, _ in ordered[begin:end]:
            groups.setdefault(user, []).append(item)
        kept = {u: groups[u] for u in sorted(groups) if len(groups[u]) >= min_events}
        want.append(Stage(number, {u: past.get(u, []) for u in kept}, kept))
        past |= {u: past.get(u, []) + items for u, items in kept.items()}
    if not want[0].current:
        with pytest.raises(ValueError, match="no user has"):
            cut(interactions(events), first, n_stages, min_events)
        return
    assert repr(cut(interactions(events), first, n_stages, min_events)) == repr(want), "also the order inside a stage"


@pytest.mark.parametrize("events, share, message", [
    ([(0, k, T0 + k) for k in range(4)], (), "5 stages(.|\n)*4 interactions, 2020-05-05 to 2020-05-05"),
    ([(0, k, T0) for k in range(50)], (), "by time"),
    ([(k, k, T0 + k) for k in range(100)], (), "no user has 5 events in D1(.|\n)*100 interactions"),
    *((random_events(50, 2, 0), share, "cannot cut") for share in ((0.0, 5), (1.0, 5), (float("nan"), 5), (0.6, 0)))])
def test_data_that_cannot_be_cut(events, share, message):
    """Too few events, one single time, no user left, a senseless share: found values are named."""
    with pytest.raises(ValueError, match=message):
        cut(interactions(events), *share)


def test_an_empty_later_stage_is_allowed_and_the_first_share_is_the_floor():
    """A later stage may lose all its users: no examples, no ratios, no division by zero."""
    events = [(0, k, T0 + k) for k in range(12)] + [(k, k, T0 + k) for k in range(12, 20)]
    stages = cut(interactions(events), stages=3)
    assert [s.users for s in stages] == [[0], [], []] and examples(stages[1], "test") == []
    assert table(stages, "users", "avg_length", "sparsity")[1] == (0, None, None)
    assert "| D2 | 0 | 0 | 0 | 0 | 0 | NA | NA |" in re.sub(" +", " ", statistics_table(statistics(stages)))
    assert [s.users for s in user_disjoint(stages, seed=0)] == [[0], [], []]
    # 60 % of 13 events is 7, and 57 % of 100 is 57 although 0.57 * 100 is 56.99999 in floats
    for first, n, size in ((0.6, 13, 7), (0.57, 100, 57), (0.29, 100, 29), (0.6, 15, 9)):
        assert cut(interactions([(0, k, T0 + k) for k in range(n)]), first, 2, 1)[0].interactions == size, (first, n)


@draws(40)
@given(worlds, st.integers(0, 99))
def test_user_disjoint(events, seed):
    """Whole users, one stage each, order kept, no histories, sizes off by under one sequence."""
    try:
        natural = cut(interactions(events), min_events=2)
    except ValueError:
        return
    mixed = user_disjoint(natural, seed)
    whole = {}
    for stage in natural:
        whole |= {user: whole.get(user, []) + items for user, items in stage.current.items()}
    assert sorted(user for stage in mixed for user in stage.users) == sorted(whole), "a user is lost or in two stages"
    assert all(stage.current[u] == whole[u] for stage in mixed for u in stage.users)
    assert not any(h for stage in mixed for h in stage.history.values())
    wanted, filled = (np.cumsum([s.interactions for s in stages]) for stages in (natural, mixed))
    assert (np.abs(wanted - filled) < max(map(len, whole.values()))).all(), (wanted, filled)
    assert user_disjoint(natural, seed) == mixed and all(s.users == sorted(s.users) == list(s.history) for s in mixed)


def test_user_disjoint_fills_exactly_where_sequences_fit():
    """A stage that is exactly full takes no further user; D_1 has users of every natural stage, by the seed."""
    natural = [Stage(t, {u: [] for u in users}, {u: [10 * u, 10 * u + 1] for u in users})
               for t, users in ((1, range(6)), (2, range(6, 8)), (3, ()), (4, range(8, 10)))]
    splits = [user_disjoint(natural, seed) for seed in range(5)]
    assert all([s.interactions for s in split] == [12, 4, 0, 4] for split in splits)
    assert set().union(*(split[0].users for split in splits)) == set(range(10))


def test_subset_keeps_whole_users_in_proportion():
    """n drawn users, nested over n, with untouched items and histories, from every stage alike."""
    stages = cut(interactions(random_events(6000, 600, 3)), min_events=2)
    small, large = subset(stages, 100, seed=5), subset(stages, 300, seed=5)
    few, more, everyone = (set().union(*(s.users for s in part)) for part in (small, large, stages))
    assert (len(few), len(more)) == (100, 300) and few < more < everyone
    for before, after in zip(stages, large):
        assert after == Stage(before.number, *({u: side[u] for u in before.users if u in more}
                                               for side in (before.history, before.current)))
        share = len(after.users) / len(before.users)
        assert abs(share - 300 / len(everyone)) < 0.12, (before.number, share)
    assert subset(stages, 10**9, seed=0) == stages and subset(stages, 100, seed=6) != small
    with pytest.raises(ValueError, match="none of 0 drawn users"):
        subset(stages, 0, seed=0)
    natural = cut(interactions(random_events(8000, 800, 1)), min_events=2)
    for seed in range(5):  # who is drawn has nothing to do with whom the split puts into D_1, with one seed for both
        mixed = user_disjoint(natural, seed)
        whole, part = (np.array([len(stage.users) for stage in stages]) for stages in (mixed, subset(mixed, 200, seed)))
        expected = whole * 200 / whole.sum()
        assert part.sum() == 200 and (np.abs(part - expected) < 4 * np.sqrt(expected)).all(), (part, expected)


def test_statistics_and_absent_users_by_hand(monkeypatch):
    """New users have no history; an item seen in an earlier stage or in any history is not new."""
    stages = [Stage(2, {1: [10], 2: []}, {1: [11, 12], 2: [12, 13, 10]}),
              Stage(3, {1: [10, 11, 12], 3: [20]}, {1: [13], 3: [14, 15, 20]})]
    rows = statistics(stages)
    assert " ".join(rows[0]) == "stage users new_users items new_items interactions avg_length sparsity"
    assert [tuple(row.values()) for row in rows] == [
        ("D2", 2, 1, 4, 3, 5, 2.5, 3 / 8), ("D3", 2, 0, 4, 2, 4, 2.0, 0.5), ("D2:3", 3, None, 7, None, 9, None, None)]
    lines = re.sub(" +", " ", statistics_table(rows)).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "the table's lines have equal width"
    assert [lines[2], lines[4]] == ["| D2 | 2 | 1 | 4 | 3 | 5 | 2.50 | 0.3750 |",
                                    "| D2:3 | 3 | NA | 7 | NA | 9 | NA | NA |"]
    # U_I: who was in an earlier stage and is not in the last, sorted, with the latest test question known of them
    stages = [Stage(1, {1: [], 2: [], 5: []}, {1: [10, 11, 12], 2: [13], 5: [14, 15]}),
              Stage(2, {5: [14, 15], 3: []}, {5: [16, 17], 3: [18]}),
              Stage(3, {3: [18], 4: []}, {3: [19], 4: [20]})]
    here = [(3, (18,), 19, 3), (4, (), 20, 3)]
    assert questions(stages) == here + [(1, (10, 11), 12, 1), (2, (), 13, 1), (5, (14, 15, 16), 17, 2)]
    monkeypatch.setattr("minipeso.stages.ABSENT", 2)
    assert len(two := questions(stages)[2:]) == 2 and {*two} < {*map(tuple, [(1, (10, 11), 12, 1), (2, (), 13, 1),
                                                                            (5, (14, 15, 16), 17, 2)])}
    # what they have had before that question
    assert had(stages) == {1: {10, 11}, 2: set(), 5: {14, 15, 16}, 3: {18}, 4: set()}


def release_folder(tmp_path, block):
    (tmp_path / "X.index.epoch1.json").write_text("{}")
    (tmp_path / "X.all.block_1.json").write_text(block if isinstance(block, str) else json.dumps(block))
    return tmp_path


@pytest.mark.parametrize("block, where", [
    ("{", "not JSON"), ([], "holds a list"), ({"x": {}}, "user 'x'"), ({"3": []}, "user '3'"),
    ({"3": {"current_block": ["1"]}}, "previous_block"),
    *(({user: {"previous_block": before, "current_block": now}}, where) for user, before, now, where in [
        ("3", [], [], "empty current_block"), ("3", [], "12", "user '3'"), ("3", ["a"], [1], "user '3'"),
        ("3", [1.5], [1], "user '3'"), ("3", [], [-1], "negative item"), ("-3", [], [1], "negative user")])])
def test_damaged_blocks_name_file_and_user(tmp_path, block, where):
    """A block of another shape is an error that says which file, which user, and what is wrong."""
    with pytest.raises(ValueError, match=where) as caught:
        read_release(release_folder(tmp_path, block))
    assert "X.all.block_1.json" in str(caught.value)


def test_a_release_folder_is_one_data_set_of_sorted_numbers(tmp_path):
    """Ids become integers, users come in increasing order, block_1 is stage 2; no blocks, no semantic IDs or two data
    sets in one folder are refused."""
    folder = release_folder(tmp_path, {"10": {"previous_block": [], "current_block": ["7", "5"]},
                                       "9": {"previous_block": ["1"], "current_block": [3]}})
    ids, block = folder / "X.index.epoch1.json", folder / "X.all.block_1.json"
    (stage,), codes = read_release(folder)
    assert stage == Stage(2, {9: [1], 10: []}, {9: [3], 10: [7, 5]}) and codes == ids
    assert stage.users == list(stage.history) == [9, 10]
    for path, message in ((folder / "Y.all.block_1.json", "two files hold stage 2"), (ids, "semantic IDs")):
        path.unlink() if path == ids else path.write_bytes(block.read_bytes())
        with pytest.raises(ValueError, match=message):
            read_release(folder)
        path.write_text("{}") if path == ids else path.unlink()
    block.unlink()
    with pytest.raises(ValueError, match="no stage found"):
        read_release(folder)
