"""Semantic IDs: unique, independent of order, invertible; the index file and its faults."""
from __future__ import annotations

import gzip
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeso import semantic_ids
from minipeso.embed import title_vectors
from minipeso.semantic_ids import (SemanticIDs, canonical_order, move_to_free, reassign_groups,
                                   standardise)
from tests.reference import release_repair
from tests.conftest import draws

TINY = dict(levels=3, codes=8, d_latent=4, hidden=(8,), epochs=3)


def vectors(n: int = 100, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def fit(x: np.ndarray, **changes) -> SemanticIDs:
    return SemanticIDs.fit(x, **TINY | changes)


def distinct(codes: torch.Tensor) -> int:
    return len(set(map(tuple, codes.tolist())))


# -- fit -----------------------------------------------------------------------------------------

@given(st.integers(1, 120), st.integers(1, 40), st.integers(0, 99))
@draws(25)
def test_ids_are_unique(n, different, seed):
    """Every item has its own ID, whatever the number of items and of equal vectors."""
    x = vectors(different, seed=seed)[np.random.default_rng(seed).integers(0, different, n)]
    ids = fit(x, epochs=1)
    assert ids.codes.shape == (n, 3) and ids.codes.dtype == torch.int64
    assert ids.codes.min() >= 0 and ids.codes.max() < 8 and distinct(ids.codes) == n
    assert ids.n_codes == 8 and ids.report()["collisions"] == 0


def test_the_releases_repair_alone_leaves_equal_items_together():
    """unique=False: items with one vector share their ID, and the report counts them."""
    x = vectors(40)
    x[:5] = x[0]
    ids = fit(x, unique=False, codes=16)
    assert distinct(ids.codes[:5]) == 1
    report = ids.report()
    assert report["collisions"] == 40 - distinct(ids.codes) >= 4 and report["largest_group"] >= 5
    assert fit(x, codes=16).report()["collisions"] == 0


def test_what_fit_hands_to_the_repairs(monkeypatch):
    """The Release's repair gets what the last level quantises; collisions are counted before it."""
    seen = []
    monkeypatch.setattr(semantic_ids, "reassign_groups",
                        lambda *state: seen.append(state) or state[0])
    x = vectors(300)
    before = fit(x, unique=False).collisions_before
    codes, residual, codebook = seen[0]
    assert torch.equal(torch.cdist(residual, codebook).argmin(1), codes[:, -1])
    assert before == 300 - distinct(codes) > 0
    assert fit(x).collisions_before == before


def test_ids_do_not_depend_on_the_order_of_the_items():
    """Shuffled items get the same IDs; so do items with equal vectors, as a set."""
    x, order = vectors(150), np.random.default_rng(1).permutation(150)
    assert torch.equal(fit(x[order]).codes, fit(x).codes[order])
    x[3] = x[140]
    there, here = fit(x[order]).codes, fit(x).codes[order]
    equal = np.isin(order, [3, 140])
    assert torch.equal(there[~equal], here[~equal])
    assert sorted(there[equal].tolist()) == sorted(here[equal].tolist())


def test_canonical_order_is_an_order_of_the_values():
    """Any permutation of the rows sorts to the same sequence; equal rows stay in item order."""
    x = vectors(200)
    x[50:60] = x[7]
    x[0, 0], x[1], x[1, 0] = 0.0, x[0], -0.0
    order = np.random.default_rng(2).permutation(200)
    assert (x[order][canonical_order(x[order])] == x[canonical_order(x)]).all()
    place = canonical_order(x).tolist()
    ties = [place.index(item) for item in (7, *range(50, 60))]
    assert ties == list(range(ties[0], ties[0] + 11))
    assert place.index(1) == place.index(0) + 1, "-0.0 equals 0.0"


def test_seed():
    """The same seed gives the same IDs, another seed others; the global generator is left alone."""
    state, x = torch.get_rng_state(), vectors()
    assert torch.equal(fit(x).codes, fit(x).codes)
    assert not torch.equal(fit(x).codes, fit(x, seed=1).codes)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change", [{"d_latent": 3}, {"hidden": (9,)}, {"epochs": 40}, {"lr": 0.1},
                                    {"batch": 10}, {"beta": 50.0, "epochs": 40}])
def test_every_setting_is_alive(change):
    """Changing any setting changes some ID."""
    assert not torch.equal(fit(vectors()).codes, fit(vectors(), **change).codes), change


def test_arrays_and_tensors_are_the_same():
    """numpy or torch, float32 or float64."""
    x = vectors()
    for same in (torch.from_numpy(x), x.astype(np.float64)):
        assert torch.equal(fit(same).codes, fit(x).codes)


def test_like_items_share_codes():
    """Items of one of eight clusters share their first code, items of different clusters do not."""
    centre = vectors(8, 12, seed=3) * 4
    cluster = np.repeat(np.arange(8), 30)
    ids = fit(centre[cluster] + 0.2 * vectors(240, 12), epochs=20)
    first = ids.codes[:, 0].numpy()
    assert all(len(set(first[cluster == k])) == 1 for k in range(8)) and len(set(first)) == 8


def test_real_items_that_share_a_code_share_a_category(shared_data):
    """600 electronics, 32 codes: sharing the first code makes one category 10 x likelier."""
    with gzip.open(shared_data / "electronics23" / "meta_Electronics.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines][::16][:600]
    category = np.unique([row["categories"][0] for row in rows], return_inverse=True)[1]
    ids = SemanticIDs.fit(title_vectors([row["title"] for row in rows]), codes=32)
    code, other = ids.codes[:, 0].numpy(), ~np.eye(600, dtype=bool)
    same_category, same_code = (a[:, None] == a[None] for a in (category, code))
    lift = same_category[same_code & other].mean() / same_category[other].mean()
    assert lift > 10, lift
    report = ids.report()
    assert report["collisions"] == 0 and min(report["codes_used"]) >= 30, report
    assert min(report["perplexity"]) > 20, report


@pytest.mark.parametrize("n, codes", [(1, 8), (2, 8), (5, 64)])
def test_fewer_items_than_codes(n, codes):
    """A handful of items still get an ID each."""
    assert distinct(fit(vectors(n), codes=codes).codes) == n


def test_vectors_that_are_not_finite():
    """NaN in a vector: ValueError."""
    x = vectors()
    x[4, 1] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        fit(x)


def test_standardise():
    """The scale and the origin of the vectors do not matter; one vector repeated stays finite."""
    x = torch.from_numpy(vectors())
    y = standardise(x)
    assert abs(y.pow(2).mean().sqrt() - 0.05) < 1e-6 and y.mean(0).abs().max() < 1e-7
    assert (standardise(x * 300 + 5) - y).abs().max() < 1e-5
    ratio = torch.pdist(y) / torch.pdist(x)
    assert ratio.max() / ratio.min() < 1.001, "one factor for all distances"
    assert not standardise(torch.ones(5, 3)).any()


# -- repair --------------------------------------------------------------------------------------

def random_state(n: int, levels: int, K: int, seed: int, groups: int):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=draw)
    codebooks = torch.randn(levels, K, 3, generator=draw)
    codes = torch.randint(K, (groups, levels), generator=draw)
    return codes[torch.randint(groups, (n,), generator=draw)], z, codebooks


@given(st.integers(2, 40), st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))
@draws(25)
def test_reassign_groups_equals_the_release_loop(n, K, groups, seed):
    """Batches of equal group size give the codes of the Release's loop over single groups."""
    codes, z, codebooks = random_state(n, 3, K, seed, groups)
    z, codebooks = z.double(), codebooks.double()
    for rounds in (1, 3):
        got = reassign_groups(codes, z, codebooks[-1], rounds)
        assert torch.equal(got, release_repair(codes, z, codebooks[-1], rounds)), (rounds, codes)


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 99))
@draws(40)
def test_the_last_code_gives_way_to_the_nearest_free_one(n, groups, seed):
    """While a prefix has room, each item but the first takes the nearest last code then free."""
    _, z, codebooks = random_state(n, 3, 64, seed, groups)
    z = z[torch.arange(n) % groups]  # groups of equals
    greedy = torch.zeros(n, 3, dtype=torch.int64)
    residual = z.clone()
    for level in range(3):
        greedy[:, level] = torch.cdist(residual, codebooks[level]).argmin(1)
        residual -= codebooks[level][greedy[:, level]]
    ids = move_to_free(greedy, z, codebooks)
    assert torch.equal(ids[:, :2], greedy[:, :2]) and distinct(ids) == n
    last = residual + codebooks[2][greedy[:, 2]]  # what the last level quantises
    kept, taken = set(), {}
    for item, code in enumerate(greedy.tolist()):
        if tuple(code) not in kept:
            kept.add(tuple(code))
            assert ids[item].tolist() == code, "the first of a group stays"
            taken.setdefault(tuple(code[:2]), set()).add(code[2])
    for item, code in enumerate(ids.tolist()):
        if code != greedy[item].tolist():
            used = taken[tuple(code[:2])]
            free = [k for k in range(64) if k not in used]
            want = min(free, key=lambda k: (last[item] - codebooks[2, k]).pow(2).sum().item())
            assert code[2] == want, (item, code, want)
            used.add(want)


def test_full_prefixes_overflow_to_the_next_nearest():
    """27 equal items on 3 x 3 x 3 codes fill every ID, first codes in order of distance."""
    _, _, codebooks = random_state(1, 3, 3, 0, 1)
    z = torch.zeros(27, 3)
    ids = move_to_free(torch.zeros(27, 3, dtype=torch.int64), z, codebooks)
    assert distinct(ids) == 27
    first = codebooks[0].pow(2).sum(1).argsort().tolist()
    order = list(dict.fromkeys(ids[1:, 0].tolist()))
    assert order == first, (order, first)
    assert Counter(ids[:, 0].tolist()) == {k: 9 for k in range(3)}


def test_a_full_prefix_moves_the_code_above():
    """4 items on a prefix with 3 last codes: the fourth takes the 2nd nearest code one level up."""
    codebooks = torch.tensor([[[0.0], [9.0], [30.0]], [[0.0], [1.0], [5.0]], [[0.0], [0.1], [0.2]]])
    ids = move_to_free(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 1), codebooks)
    assert ids.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]]


def test_more_items_than_ids():
    """28 items cannot have 27 IDs: ValueError with both numbers."""
    _, _, codebooks = random_state(1, 3, 3, 0, 1)
    with pytest.raises(ValueError, match="28 items; 3 codes on 3 levels make 27 IDs"):
        move_to_free(torch.zeros(28, 3, dtype=torch.int64), torch.zeros(28, 3), codebooks)


# -- tables and files ----------------------------------------------------------------------------

CODES = torch.tensor([[1, 0, 3], [0, 2, 2], [1, 0, 3], [3, 3, 3]])


def test_item_of_is_the_inverse():
    """item_of returns exactly the items with that row; [] for any other code."""
    ids = fit(vectors(60), unique=False)
    for item, code in enumerate(ids.codes):
        assert item in ids.item_of(code) and item in ids.item_of(tuple(code.tolist()))
    found = [item for code in ids.codes.unique(dim=0) for item in ids.item_of(code)]
    assert sorted(found) == list(range(60))
    ids = SemanticIDs(CODES, 4)
    assert ids.item_of((1, 0, 3)) == [0, 2]
    assert ids.item_of([-1, -1, -1]) == ids.item_of((0, 0, 0)) == ids.item_of((1, 0)) == []


def test_report_by_hand():
    """Counts and perplexities of four rows worked out by hand."""
    report = SemanticIDs(CODES, 4, collisions_before=2).report()
    perplexity = report.pop("perplexity")
    assert report == {"items": 4, "distinct": 3, "collisions_before_repair": 2, "collisions": 1,
                      "largest_group": 2, "codes_used": [3, 3, 2]}
    # shares (2, 1, 1)/4 twice: entropy 1.5 bits; (3, 1)/4: 2 - 3/4 log2 3 bits
    assert perplexity == pytest.approx([2**1.5, 2**1.5, 4 / 3**0.75], rel=1e-6)


def test_table_names_a_collapsed_level():
    """A level on which under half of the possible codes are used is marked."""
    lines = SemanticIDs(torch.tensor([[k, 0] for k in range(8)]), 16, 7).table().splitlines()
    assert lines[0] == "8 items, 8 semantic IDs, 0 collisions (7 before repair), largest group 1"
    assert "COLLAPSED" not in lines[1] and "COLLAPSED" in lines[2], lines
    assert "before" not in SemanticIDs(CODES, 4).table()


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 300), st.integers(0, 99))
@draws(30)
def test_save_and_load(tmp_path_factory, n, levels, K, seed):
    """What is saved is loaded, in the Release's format."""
    path = tmp_path_factory.mktemp("ids") / "semantic_ids.json"
    codes = torch.randint(K, (n, levels), generator=torch.Generator().manual_seed(seed))
    SemanticIDs(codes, K).save(path)
    loaded = SemanticIDs.load(path, K)
    assert torch.equal(loaded.codes, codes) and loaded.codes.dtype == torch.int64
    assert loaded.n_codes == K
    want = [f"<{letter}_{code}>" for letter, code in zip("abcdef", codes[-1].tolist())]
    assert json.loads(path.read_text())[str(n - 1)] == want
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left behind"


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    """If writing fails half-way, the file that was there is still whole."""
    path = tmp_path / "ids.json"
    SemanticIDs(CODES, 4).save(path)
    old = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        SemanticIDs(CODES[:2], 4).save(path)
    assert path.read_bytes() == old


GOOD = {"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", "<b_3>"], "2": ["<a_0>", "<b_2>"]}
FAULTS = [  # name, text of the file, what the message must name
    ("empty file", "", "Expecting value"),
    ("cut off", json.dumps(GOOD)[:-9], "column"),
    ("empty object", "{}", "no items"),
    ("a list", "[]", "no items"),
    ("an item is missing", json.dumps({"0": GOOD["0"], "2": GOOD["2"]}),
     "no row for item 1; 2 rows, one for '2'"),
    ("ids start at 1", json.dumps({"1": GOOD["1"], "2": GOOD["2"]}), "no row for item 0"),
    ("a key is no number", json.dumps(GOOD | {"B00X": ["<a_1>", "<b_1>"]}),
     "no row for item 3; 4 rows, one for 'B00X'"),
    ("a key with zeros", json.dumps({"0": GOOD["0"], "01": GOOD["1"]}), "one for '01'"),
    ("an item twice", '{"0": ["<a_1>"], "1": ["<a_2>"], "1": ["<a_3>"]}',
     "item '1' has several rows"),
    ("code out of range", json.dumps(GOOD | {"1": ["<a_1>", "<b_256>"]}),
     "item 1 has '<b_256>', with codes 0 .. 255"),
    ("huge code", json.dumps(GOOD | {"1": ["<a_1>", f"<b_{'9' * 5000}>"]}), "item 1 has '<b_999"),
    ("negative code", json.dumps(GOOD | {"1": ["<a_-1>", "<b_2>"]}),
     "item 1 has '<a_-1>' on level 1"),
    ("wrong length", json.dumps(GOOD | {"1": ["<a_1>"]}), "item 1 has 1 codes, item 0 has 2"),
    ("too long", json.dumps(GOOD | {"2": ["<a_1>", "<b_1>", "<c_1>"]}),
     "item 2 has 3 codes, item 0 has 2"),
    ("no code", json.dumps(GOOD | {"1": []}), r"item 1 is \[\]"),
    ("row is null", json.dumps(GOOD | {"1": None}), "item 1 is None"),
    ("row is text", json.dumps(GOOD | {"1": "<a_1><b_2>"}), "item 1 is '<a_1><b_2>'"),
    ("token is a number", json.dumps(GOOD | {"1": ["<a_1>", 3]}), "item 1 has 3 on level 2"),
    ("token is malformed", json.dumps(GOOD | {"1": ["<a_1>", "b_3"]}),
     "item 1 has 'b_3' on level 2"),
    ("levels exchanged", json.dumps(GOOD | {"1": ["<b_1>", "<a_3>"]}),
     "item 1 has '<b_1>' on level 1"),
    ("other digits", json.dumps(GOOD | {"1": ["<a_1>", "<b_٣>"]}), "item 1 has '<b_٣>'"),
    ("leading zero", json.dumps(GOOD | {"1": ["<a_1>", "<b_03>"]}), "item 1 has '<b_03>'"),
]


@pytest.mark.parametrize("text, named", [fault[1:] for fault in FAULTS],
                         ids=[fault[0] for fault in FAULTS])
def test_a_malformed_file_is_refused(tmp_path, text, named):
    """Each corruption is a three-line ValueError naming the file, the item and the value."""
    path = tmp_path / "ids.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=named) as error:
        SemanticIDs.load(path)
    message = str(error.value)
    assert len(message.splitlines()) == 3 and str(path) in message, message


def test_bytes_that_are_no_text(tmp_path):
    """A compressed file passed as JSON, and no file at all, are told so."""
    path = tmp_path / "ids.json"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    with pytest.raises(ValueError, match="cannot use the semantic-ID file"):
        SemanticIDs.load(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="no semantic-ID file"):
            SemanticIDs.load(missing)


def test_collisions_in_a_file(tmp_path):
    """Two items on one ID load by default and are an error on demand, naming both."""
    path = tmp_path / "ids.json"
    SemanticIDs(CODES, 4).save(path)
    assert SemanticIDs.load(path, 4).report()["collisions"] == 1
    with pytest.raises(ValueError, match="items 0 and 2 share .*<a_1>"):
        SemanticIDs.load(path, 4, allow_collisions=False)
    path.write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    marked = SemanticIDs.load(path, allow_collisions=False)
    assert len(marked.codes) == 3, "a byte-order mark is harmless"


@pytest.mark.parametrize("folder, items, different, largest", [
    ("Instruments_cl_ori", 53509, 53360, 18), ("Video_Games_cl_0.6_0_5_3_0", 25935, 25707, None)])
def test_released_index_files(shared_data, folder, items, different, largest):
    """The authors' semantic IDs load, with the known numbers of items and of distinct IDs."""
    path, = (shared_data / "peso_release" / folder).glob("*.index*.json")
    report = SemanticIDs.load(path).report()
    assert (report["items"], report["distinct"]) == (items, different)
    assert report["collisions"] == items - different
    assert largest is None or report["largest_group"] == largest, report
    assert len(report["codes_used"]) == 4 and report["collisions_before_repair"] is None, report
