"""The protocol: the paper's and the release's counts, and nothing of the future in any example."""
from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeso.files.reviews import read_reviews
from minipeso.stages import Interactions
from minipeso.stages import Stage, cut, examples, statistics, statistics_table, subset, user_disjoint
from minipeso.files.release import read_release
from tests.conftest import draws

T0 = 1_588_687_728_923
RELEASE = "peso_release/"


def interactions(events):
    """Interactions from (user, item, time) numbers, in the order given."""
    user, item, time = (np.array(column, dtype=np.int64) for column in zip(*events))
    return Interactions(user, item, time, [f"u{k}" for k in range(user.max() + 1)],
                        [f"i{k}" for k in range(item.max() + 1)])


def random_events(n, n_users, seed):
    """n events of distinct items, so that an item's number names its event; times may tie."""
    rng = np.random.default_rng(seed)
    return [(int(u), k, T0 + int(t)) for k, (u, t) in
            enumerate(zip(rng.integers(0, n_users, n), rng.integers(0, n // 2 + 2, n)))]


worlds = st.builds(random_events, st.integers(20, 200), st.integers(1, 12), st.integers(0, 10**6))


def table(stages, *names):
    return [tuple(row[name] for name in names) for row in statistics(stages)[:-1]]


# The paper's Table 4 and design figures: users, items, interactions.
ELECTRONICS = [(7_201, 8_300, 58_467), (445, 2_095, 3_108), (409, 1_914, 2_797),
               (444, 2_074, 3_071), (560, 2_445, 4_121)]
VIDEO_GAMES = [(12_447, 18_450, 91_273), (1_035, 4_537, 7_491), (1_091, 4_269, 7_492),
               (1_949, 5_951, 14_646), (1_791, 5_641, 13_271)]


def test_electronics_figures(shared_data):
    """Cut, filter and duplicates of the real reviews give the known counts, exactly."""
    stages = cut(read_reviews(shared_data / "electronics23"))
    assert table(stages, "users", "items", "interactions") == ELECTRONICS
    seen = set()
    for stage in stages:
        assert {u for u, h in stage.history.items() if not h} == set(stage.users) - seen
        seen |= set(stage.users)


def test_video_games_figures(shared_data):
    """The authors' Video Games blocks: counts, and each history is all that went before."""
    stages, codes = read_release(shared_data / RELEASE / "Video_Games_cl_0.6_0_5_3_0")
    assert table(stages, "users", "items", "interactions") == VIDEO_GAMES
    assert codes.name.endswith(".json") and ".index." in codes.name
    past = {}
    for stage in stages:
        for user in stage.users:
            assert stage.history[user] == past.get(user, []), f"D{stage.number}, user {user}"
            past[user] = stage.history[user] + stage.current[user]
    last = statistics(stages)[-1]
    assert (last["stage"], last["users"], last["items"]) == ("D1:5", 17_300, 25_935)
    assert last["interactions"] == 134_173


def test_instruments_reproduce_table_4(shared_data):
    """D2-D5 of Instruments equal the paper's Table 4 to every printed digit, new users too."""
    stages, _ = read_release(shared_data / RELEASE / "Instruments_cl_ori")
    assert [s.number for s in stages] == [2, 3, 4, 5]
    names = ("users", "new_users", "items", "interactions", "avg_length", "sparsity")
    found = [(*row[:4], round(row[4], 2), round(row[5], 4)) for row in table(stages, *names)]
    assert found == [(1_772, 1_183, 8_346, 13_197, 7.45, 0.9991),
                     (1_821, 1_265, 8_325, 13_334, 7.32, 0.9991),
                     (2_289, 1_684, 9_617, 18_811, 8.22, 0.9991),
                     (2_238, 1_699, 9_131, 17_573, 7.85, 0.9991)]
    train = examples(stages[0], "train")
    assert len(train) == 9_653 and sum(not e.history for e in train) == 1_183
    full = [e for e in examples(stages[0], "test") if len(e.history) == 20]
    assert len(full) == 267, "test histories of D2 that reach 20 items"


def test_leave_one_out_by_hand():
    """Two earlier and five current items give three training questions, one valid, one test."""
    stage = Stage(2, {7: [1, 2]}, {7: [3, 4, 5, 6, 8]})
    assert examples(stage, "train", window=3) == [
        (7, (1, 2), 3, 2), (7, (1, 2, 3), 4, 2), (7, (2, 3, 4), 5, 2)]
    assert examples(stage, "valid", window=3) == [(7, (3, 4, 5), 6, 2)]
    assert examples(stage, "test") == [(7, (1, 2, 3, 4, 5, 6), 8, 2)]
    new = Stage(1, {0: []}, {0: [5, 6, 7]})
    assert examples(new, "train") == [(0, (), 5, 1)], "a new user's first item is a target"


@pytest.mark.parametrize("n, sizes", [(1, (0, 0, 1)), (2, (0, 1, 1)), (3, (1, 1, 1))])
def test_short_users(n, sizes):
    """One item is a test, two are valid and test; earlier items never become targets."""
    stage = Stage(3, {4: [90, 91]}, {4: list(range(n))})
    made = [examples(stage, part) for part in ("train", "valid", "test")]
    assert tuple(map(len, made)) == sizes
    assert all(e.target < 90 for part in made for e in part)


def test_unknown_part_names_the_known_ones():
    """A part that does not exist, or no window, is refused."""
    stage = Stage(1, {}, {})
    with pytest.raises(ValueError, match="'dev'(.|\n)*train, valid, test"):
        examples(stage, "dev")
    with pytest.raises(ValueError, match="window 0"):
        examples(stage, "test", window=0)


@draws(60)
@given(worlds, st.integers(1, 6), st.integers(1, 8))
def test_no_example_sees_its_future(events, min_events, window):
    """Every history is the user's latest surviving events before the target, and no later ones."""
    try:
        stages = cut(interactions(events), min_events=min_events)
    except ValueError:
        return                                        # an empty D1: its own test is below
    when = {item: (time, user, item) for user, item, time in events}
    owner = {item: user for user, item, _ in events}
    for stage in stages:
        train, valid, test = (examples(stage, p, window) for p in ("train", "valid", "test"))
        held_out = {e.target for e in valid + test}
        assert not held_out & {e.target for e in train}, "a held-out item is a training target"
        assert not held_out & {i for e in train for i in e.history}, "a held-out item was shown"
        assert len(train) + len(valid) + len(test) == stage.interactions
        assert len(test) == len(stage.users)
        for e in train + valid + test:
            before = [i for i in stage.history[e.user] + stage.current[e.user]
                      if when[i] < when[e.target]]
            assert e.history == tuple(before[-window:]) and owner[e.target] == e.user
        ends = {e.user: when[e.target] for e in valid}
        assert all(when[e.target] < ends[e.user] for e in train)


@draws(60)
@given(worlds, st.sampled_from([0.3, 0.57, 0.6, 0.8]), st.integers(1, 6), st.integers(1, 6))
def test_cut_equals_the_slow_reference(events, first, n_stages, min_events):
    """An event-by-event reference cuts, filters and remembers the same."""
    ordered = sorted(events, key=lambda e: (e[2], e[0], e[1]))
    start = (len(events) * round(100 * first)) // 100
    rest = len(events) - start
    ends = [start + rest * k // (n_stages - 1) for k in range(n_stages)] if n_stages > 1 \
        else [len(events)]
    want, past, position = [], {}, 0
    for number, end in enumerate(ends, start=1):
        groups = {}
        for user, item, _ in ordered[position:end]:
            groups.setdefault(user, []).append(item)
        kept = {u: groups[u] for u in sorted(groups) if len(groups[u]) >= min_events}
        want.append(Stage(number, {u: list(past.get(u, [])) for u in kept}, kept))
        for user, items in kept.items():
            past.setdefault(user, []).extend(items)
        position = end
    if not want[0].current:
        with pytest.raises(ValueError, match="no user has"):
            cut(interactions(events), first, n_stages, min_events)
        return
    stages = cut(interactions(events), first, n_stages, min_events)
    assert stages == want
    assert all(s.users == sorted(s.users) == list(s.history) for s in stages)


def test_users_with_one_to_five_events_in_a_stage():
    """Only users with >= 5 events stay, per stage: dropped in one, a user may be in others."""
    d1 = [(u, 10 * u + k) for u, n in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 15))
          for k in range(n)]
    d2 = [(u, 100 + 10 * u + k) for u, n in ((4, 5), (5, 4), (6, 11)) for k in range(n)]
    events = [(u, i, T0 + k) for k, (u, i) in enumerate(d1 + d2)]
    stages = cut(interactions(events), first=0.6, stages=2)
    assert [s.users for s in stages] == [[5, 6], [4, 6]]
    assert stages[1].history == {4: [], 6: list(range(60, 75))}, "dropped events are no history"
    assert stages[0].items == {*range(50, 55), *range(60, 75)} and stages[0].interactions == 20


def write(path, rows):
    path.write_text("".join(rows))
    return path


def test_order_and_format_of_the_file_do_not_matter(tmp_path):
    """Shuffled, packed, CSV or JSONL: identical stages and identical examples."""
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", T0 + t) for u, i, t in
            zip(rng.integers(0, 30, 900), rng.integers(0, 80, 900), rng.integers(0, 50, 900))]

    def as_json(rows):
        return [json.dumps({"user_id": u, "parent_asin": i, "timestamp": int(t)}) + "\n"
                for u, i, t in rows]

    first = write(tmp_path / "A.jsonl", as_json(rows))
    want = cut(read_reviews(first))
    assert sum(len(s.users) for s in want) > 40
    rng.shuffle(rows)
    second = write(tmp_path / "B.jsonl", as_json(rows))
    third = write(tmp_path / "C.csv", ["user_id,parent_asin,rating,timestamp\n"] +
                  [f"{u},{i},5.0,{t}\n" for u, i, t in rows])
    packed = tmp_path / "D.jsonl.gz"
    packed.write_bytes(gzip.compress(second.read_bytes()))
    for path in (second, third, packed):
        assert cut(read_reviews(path)) == want, path.name
        assert repr(cut(read_reviews(path))) == repr(want), "the order inside the stages differs"


def test_data_that_cannot_be_cut():
    """Too few events, one single time, no user left, a senseless share: found values are named."""
    few = interactions([(0, k, T0 + k) for k in range(4)])
    with pytest.raises(ValueError, match="5 stages(.|\n)*4 interactions, 2020-05-05 to 2020-05-05"):
        cut(few)
    with pytest.raises(ValueError, match="by time"):
        cut(interactions([(0, k, T0) for k in range(50)]))
    with pytest.raises(ValueError, match="no user has 5 events in D1(.|\n)*100 interactions"):
        cut(interactions([(k, k, T0 + k) for k in range(100)]))
    for first, n_stages in ((0.0, 5), (1.0, 5), (float("nan"), 5), (0.6, 0)):
        with pytest.raises(ValueError, match="cannot cut"):
            cut(interactions(random_events(50, 2, 0)), first=first, stages=n_stages)


def test_an_empty_later_stage_is_allowed():
    """A later stage may lose all its users: no examples, no ratios, no division by zero."""
    events = [(0, k, T0 + k) for k in range(12)] + [(k, k, T0 + k) for k in range(12, 20)]
    stages = cut(interactions(events), stages=3)
    assert [s.users for s in stages] == [[0], [], []]
    assert examples(stages[1], "test") == []
    row = statistics(stages)[1]
    assert (row["users"], row["avg_length"], row["sparsity"]) == (0, None, None)
    assert "| D2 | 0 | 0 | 0 | 0 | 0 | NA | NA |" in statistics_table(statistics(stages))
    assert [s.users for s in user_disjoint(stages, seed=0)] == [[0], [], []]


def test_the_first_share_is_the_floor():
    """60 % of 13 events is 7, and 57 % of 100 is 57 although 0.57 * 100 is 56.99999 in floats."""
    for first, n, size in ((0.6, 13, 7), (0.57, 100, 57), (0.29, 100, 29), (0.6, 15, 9)):
        events = [(0, k, T0 + k) for k in range(n)]
        assert cut(interactions(events), first, 2, 1)[0].interactions == size, (first, n)


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
        for user, items in stage.current.items():
            whole[user] = whole.get(user, []) + items
    placed = [user for stage in mixed for user in stage.users]
    assert sorted(placed) == sorted(whole), "a user is lost or in two stages"
    assert all(stage.current[u] == whole[u] for stage in mixed for u in stage.users)
    assert not any(h for stage in mixed for h in stage.history.values())
    longest = max(map(len, whole.values()))
    wanted, filled = (np.cumsum([s.interactions for s in stages]) for stages in (natural, mixed))
    assert (np.abs(wanted - filled) < longest).all(), (wanted, filled, longest)
    assert user_disjoint(natural, seed) == mixed
    assert all(s.users == sorted(s.users) == list(s.history) for s in mixed)


def test_user_disjoint_fills_exactly_where_sequences_fit():
    """A stage that is exactly full takes no further user."""
    natural = [Stage(t, {u: [] for u in users}, {u: [10 * u, 10 * u + 1] for u in users})
               for t, users in ((1, range(6)), (2, range(6, 8)), (3, ()), (4, range(8, 10)))]
    for seed in range(5):
        assert [s.interactions for s in user_disjoint(natural, seed)] == [12, 4, 0, 4]


@pytest.mark.parametrize("seed", range(5))
def test_a_subset_of_the_disjoint_split_is_of_all_its_stages(seed):
    """Who is drawn has nothing to do with whom the split puts into D_1, although both have one seed: every stage shrinks
    in proportion."""
    natural = cut(interactions(random_events(8000, 800, 1)), min_events=2)
    mixed = user_disjoint(natural, seed)
    whole, part = (np.array([len(stage.users) for stage in stages]) for stages in (mixed, subset(mixed, 200, seed)))
    expected = whole * 200 / whole.sum()
    assert part.sum() == 200 and (np.abs(part - expected) < 4 * np.sqrt(expected)).all(), (part, expected)


def test_user_disjoint_depends_on_the_seed_and_draws_across_stages():
    """Another seed places users elsewhere; a stage mixes users of every natural stage."""
    natural = cut(interactions(random_events(4000, 400, 1)), min_events=2)
    one, other = user_disjoint(natural, 1), user_disjoint(natural, 2)
    assert one[0].users != other[0].users
    sizes = np.array([[s.interactions for s in stages] for stages in (natural, one)])
    assert (np.abs(sizes[0] - sizes[1]) < 40).all(), sizes
    latecomers = set(natural[4].users) - set(natural[0].users)
    assert latecomers & set(one[0].users)


def test_subset_keeps_whole_users_in_proportion():
    """n drawn users, nested over n, with untouched items and histories, from every stage alike."""
    stages = cut(interactions(random_events(6000, 600, 3)), min_events=2)
    everyone = set().union(*(s.users for s in stages))
    small, large = subset(stages, 100, seed=5), subset(stages, 300, seed=5)
    users = [set().union(*(s.users for s in part)) for part in (small, large)]
    assert (len(users[0]), len(users[1])) == (100, 300) and users[0] < users[1] < everyone
    for before, after in zip(stages, large):
        assert after.number == before.number and set(after.users) == users[1] & set(before.users)
        assert all(after.current[u] == before.current[u] for u in after.users)
        assert all(after.history[u] == before.history[u] for u in after.users)
        share = len(after.users) / len(before.users)
        assert abs(share - 300 / len(everyone)) < 0.12, (before.number, share)
    assert subset(stages, 10**9, seed=0) == stages
    assert subset(stages, 100, seed=6) != small
    with pytest.raises(ValueError, match="none of 0 drawn users"):
        subset(stages, 0, seed=0)


def test_statistics_by_hand():
    """New users have no history; an item seen in an earlier stage or in any history is not new."""
    stages = [Stage(2, {1: [10], 2: []}, {1: [11, 12], 2: [12, 13, 10]}),
              Stage(3, {1: [10, 11, 12], 3: [20]}, {1: [13], 3: [14, 15, 20]})]
    rows = statistics(stages)
    assert rows[0] == {"stage": "D2", "users": 2, "new_users": 1, "items": 4, "new_items": 3,
                       "interactions": 5, "avg_length": 2.5, "sparsity": 1 - 5 / 8}
    assert rows[1] == {"stage": "D3", "users": 2, "new_users": 0, "items": 4, "new_items": 2,
                       "interactions": 4, "avg_length": 2.0, "sparsity": 0.5}
    assert rows[2] == {"stage": "D2:3", "users": 3, "new_users": None, "items": 7,
                       "new_items": None, "interactions": 9, "avg_length": None, "sparsity": None}
    lines = statistics_table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "the table's rows have equal width"
    assert lines[2] == "| D2 | 2 | 1 | 4 | 3 | 5 | 2.50 | 0.3750 |"
    assert lines[4] == "| D2:3 | 3 | NA | 7 | NA | 9 | NA | NA |"


def release_folder(tmp_path, block):
    (tmp_path / "X.index.epoch1.json").write_text("{}")
    (tmp_path / "X.all.block_1.json").write_text(block if isinstance(block, str)
                                                 else json.dumps(block))
    return tmp_path


def test_release_users_are_sorted_numbers(tmp_path):
    """Ids become integers, users come in increasing order, block_1 is stage 2."""
    folder = release_folder(tmp_path, {"10": {"previous_block": [], "current_block": ["7", "5"]},
                                       "9": {"previous_block": ["1"], "current_block": [3]}})
    (stage,), codes = read_release(folder)
    assert stage == Stage(2, {9: [1], 10: []}, {9: [3], 10: [7, 5]}) and stage.users == [9, 10]
    assert list(stage.history) == stage.users
    assert codes == folder / "X.index.epoch1.json"


@pytest.mark.parametrize("block, where", [
    ("{", "not JSON"), ([], "holds a list"), ({"x": {}}, "user 'x'"), ({"3": []}, "user '3'"),
    ({"3": {"current_block": ["1"]}}, "previous_block"),
    ({"3": {"previous_block": [], "current_block": []}}, "empty current_block"),
    ({"3": {"previous_block": [], "current_block": "12"}}, "user '3'"),
    ({"3": {"previous_block": ["a"], "current_block": [1]}}, "user '3'"),
    ({"3": {"previous_block": [1.5], "current_block": [1]}}, "user '3'"),
    ({"3": {"previous_block": [], "current_block": [-1]}}, "negative item"),
    ({"-3": {"previous_block": [], "current_block": [1]}}, "negative user"),
])
def test_damaged_blocks_name_file_and_user(tmp_path, block, where):
    """A block of another shape is an error that says which file, which user, and what is wrong."""
    with pytest.raises(ValueError, match=where) as caught:
        read_release(release_folder(tmp_path, block))
    assert "X.all.block_1.json" in str(caught.value)


def test_release_folder_must_be_one_data_set(tmp_path):
    """No blocks, no semantic IDs or two data sets in one folder are refused."""
    (tmp_path / "X.index.epoch1.json").write_text("{}")
    with pytest.raises(ValueError, match="no stage found"):
        read_release(tmp_path)
    good = {"3": {"previous_block": [], "current_block": [1]}}
    release_folder(tmp_path, good)
    (tmp_path / "Y.all.block_1.json").write_text("{}")
    with pytest.raises(ValueError, match="two files hold stage 2"):
        read_release(tmp_path)
    (tmp_path / "Y.all.block_1.json").unlink()
    (tmp_path / "X.index.epoch1.json").unlink()
    with pytest.raises(ValueError, match="semantic IDs"):
        read_release(tmp_path)
