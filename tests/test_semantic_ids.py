"""Semantic IDs: unique, independent of order, invertible; the index file and its faults."""
import gzip
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from minipeso import semantic_ids
from minipeso.rqvae import quantise_residuals
from minipeso.semantic_ids import LETTERS, SemanticIDs, canonical_order, move_to_free, reassign_groups, standardise
from tests.conftest import draws
from tests.reference import release_repair

TINY = dict(levels=3, codes=8, d_latent=4, hidden=(8,), epochs=3)


def vectors(n: int = 100, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def fit(x: np.ndarray, **changes) -> SemanticIDs:
    return SemanticIDs.fit(x, **TINY | changes)


def distinct(codes: torch.Tensor) -> int:
    return len(set(map(tuple, codes.tolist())))


@given(st.integers(1, 120), st.integers(1, 40), st.integers(0, 99))
@draws(25)
def test_ids_are_unique(n, different, seed):
    """Every item has its own ID, whatever the number of items and of equal vectors."""
    x = vectors(different, seed=seed)[np.random.default_rng(seed).integers(0, different, n)]
    ids = fit(x, epochs=1)
    assert ids.codes.shape == (n, 3) and ids.codes.dtype == torch.int64 and distinct(ids.codes) == n
    assert ids.codes.min() >= 0 and ids.codes.max() < 8 == ids.n_codes and ids.report()["collisions"] == 0


def test_what_fit_hands_to_the_repairs(monkeypatch):
    """The Release's repair gets what the last level quantises; collisions are counted before it, and what it leaves."""
    seen = []
    monkeypatch.setattr(semantic_ids, "reassign_groups", lambda *state: seen.append(state) or state[0])
    x = vectors(300)
    x[:5] = x[0]
    ids = fit(x, unique=False)
    (codes, residual, codebook), before = seen[0], ids.collisions_before
    assert torch.equal(torch.cdist(residual, codebook).argmin(1), codes[:, -1])
    assert before == 300 - distinct(codes) > 0 and distinct(ids.codes[:5]) == 1 and ids.report()["largest_group"] >= 5
    assert fit(x).collisions_before == before


def test_ids_do_not_depend_on_the_order_of_the_items():
    """Shuffled items get the same IDs; so do items with equal vectors, as a set."""
    x, order, still = vectors(150), np.random.default_rng(1).permutation(150), np.ones(60)
    x[3] = x[140]
    there, here = fit(x[order]).codes, fit(x).codes[order]
    equal = np.isin(order, [3, 140])
    assert torch.equal(there[~equal], here[~equal])
    assert sorted(there[equal].tolist()) == sorted(here[equal].tolist())
    # any permutation of the vectors sorts to the same sequence; equal ones stay in item order, -0.0 equals 0.0
    x = vectors(60)
    x[50:] = x[7]
    x[0, 0], x[1], x[1, 0] = 0.0, x[0], -0.0
    order = np.random.default_rng(2).permutation(60)
    assert (x[order][canonical_order(x[order], still)] == x[canonical_order(x, still)]).all()
    place = np.argsort(canonical_order(x, still))
    assert (np.diff(place[[7, *range(50, 60)]]) == 1).all() and place[1] == place[0] + 1


@pytest.mark.parametrize("unique", [True, False])
def test_later_items_are_encoded_by_what_the_first_fitted(unique):
    """No ID depends on an item that comes later: those of D_1, and of D_1 and D_2, are what they are alone, collisions
    of the later ones and all; the tokenizer of all stages gives others."""
    born = [1] * 90 + [2] * 30 + [3] * 30
    x = np.concatenate([vectors(90), vectors(30, seed=4), vectors(90)[:30] + 1e-9])
    codes = lambda some, born: fit(x[some], unique=unique, born=born, codes=4, levels=4).codes  # noqa: E731
    both, order = codes(range(150), born), np.random.default_rng(0).permutation(150)
    for n in (90, 120):
        assert torch.equal(codes(range(n), born[:n]), both[:n]), n
    assert torch.equal(codes(order, [born[i] for i in order]), both[order])
    assert distinct(both) == 150 or not unique and distinct(both) < 120
    assert not torch.equal(codes(range(150), None), both)


@pytest.mark.parametrize("change", [{"d_latent": 3}, {"hidden": (9,)}, {"epochs": 40}, {"codes": 9},
                                    {"seed": 1}])
def test_the_settings_alone_decide(change):
    """Changing any setting changes some ID; numpy or torch does not, and torch's own generator is left alone."""
    state, usual = torch.get_rng_state(), fit(vectors()).codes
    assert torch.equal(fit(torch.from_numpy(vectors())).codes, usual)
    assert torch.equal(fit(vectors(), epochs_left=lambda progress, epochs: []).codes, fit(vectors(), epochs=0).codes)
    assert not torch.equal(fit(vectors(), **change).codes, usual), change
    assert torch.equal(state, torch.get_rng_state())


def test_like_items_share_codes():
    """Items of one of eight clusters share their first code, items of different clusters do not."""
    cluster = np.repeat(np.arange(8), 30)
    x = 4 * vectors(8, 12, seed=3)[cluster] + 0.2 * vectors(240, 12)
    first = fit(x, epochs=20).codes[:, 0].numpy()
    assert len(set(first)) == 8 == len(set(zip(cluster, first)))


def test_standardise():
    """The scale and the origin of the vectors do not matter; one vector repeated is zero; NaN is an error."""
    x = torch.from_numpy(vectors())
    y = standardise(x)
    assert abs(y.pow(2).mean().sqrt() - 0.05) < 1e-6 and y.mean(0).abs().max() < 1e-7
    assert (standardise(x * 300 + 5) - y).abs().max() < 1e-5
    ratio = torch.pdist(y) / torch.pdist(x)
    assert ratio.max() / ratio.min() < 1.001, "one factor for all distances"
    with pytest.raises(ValueError, match="must be finite"):
        fit(np.where(vectors() == vectors()[4, 1], np.nan, vectors()))
    # a mean in float32 is not exactly the vector: of one vector repeated rounding is left, not a direction
    for n, value in itertools.product((*range(1, 40), 25_935), (0.0, 1.0, 0.1, 1e-3 / 7, 1e6 / 7, 1e-20)):
        assert not standardise(torch.full((n, 3), value) * torch.tensor([1.0, -0.3, 7.7])).any(), (n, value)


def random_state(n: int, levels: int, K: int, seed: int, groups: int):
    draw = torch.Generator().manual_seed(seed)
    z, codebooks = (torch.randn(*shape, 3, generator=draw, dtype=torch.float64) for shape in ((n,), (levels, K)))
    codes = torch.randint(K, (groups, levels), generator=draw)
    return codes[torch.randint(groups, (n,), generator=draw)], z, codebooks


@given(st.integers(2, 40), st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))
@draws(25)
def test_reassign_groups_equals_the_release_loop(n, K, groups, seed):
    """Batches of equal group size give the codes of the Release's loop over single groups."""
    codes, z, codebooks = random_state(n, 3, K, seed, groups)
    for rounds in (1, 3):
        want = release_repair(codes, z, codebooks[-1], rounds)
        assert torch.equal(reassign_groups(codes, z, codebooks[-1], rounds), want), (rounds, codes)


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 99))
@draws(40)
def test_the_last_code_gives_way_to_the_nearest_free_one(n, groups, seed):
    """While a prefix has room, each item but the first takes the nearest last code then free."""
    _, z, codebooks = random_state(n, 3, 64, seed, groups)
    z = z[torch.arange(n) % groups]  # groups of equals
    greedy, residuals = quantise_residuals(z, codebooks)
    ids, last = move_to_free(greedy, z, codebooks, np.ones(len(z))), residuals[2]
    assert torch.equal(ids[:, :2], greedy[:, :2]) and distinct(ids) == n
    first = {tuple(code): item for item, code in reversed([*enumerate(greedy.tolist())])}
    assert all(ids[item].tolist() == list(code) for code, item in first.items()), "the first of a group stays"
    taken = set(first)
    for item in sorted(set(range(n)) - set(first.values())):
        free = [k for k in range(64) if (*ids[item, :2].tolist(), k) not in taken]
        want = min(free, key=lambda k: (last[item] - codebooks[2, k]).pow(2).sum().item())
        assert ids[item, 2] == want, (item, ids[item], want)
        taken.add((*ids[item, :2].tolist(), want))


def test_full_prefixes_overflow_to_the_next_nearest():
    """27 equal items on 3 x 3 x 3 codes fill every ID, first codes in order of distance; 28 are an error. The fourth of
    4 items on a prefix with 3 last codes takes the 2nd nearest code one level up."""
    _, _, codebooks = random_state(1, 3, 3, 0, 1)
    ids = move_to_free(torch.zeros(27, 3, dtype=torch.int64), torch.zeros(27, 3), codebooks, np.ones(27))
    assert distinct(ids) == 27
    assert list(dict.fromkeys(ids[1:, 0].tolist())) == codebooks[0].pow(2).sum(1).argsort().tolist()
    with pytest.raises(ValueError, match="28 items; 3 codes on 3 levels make 27 IDs"):
        move_to_free(torch.zeros(28, 3, dtype=torch.int64), torch.zeros(28, 3), codebooks, np.ones(28))
    codebooks = torch.tensor([[[0.0], [9.0], [30.0]], [[0.0], [1.0], [5.0]], [[0.0], [0.1], [0.2]]])
    ids = move_to_free(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 1), codebooks, np.ones(4))
    assert ids.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]]


CODES = torch.tensor([[1, 0, 3], [0, 2, 2], [1, 0, 3], [3, 3, 3]])


def test_item_of_report_and_table_by_hand():
    """item_of returns exactly the items with that row; [] for any other code. Counts and perplexities of four rows by
    hand; a level with under half of the possible codes in use is marked."""
    ids = fit(vectors(60), unique=False)
    assert all(item in ids.item_of(code) for item, code in enumerate(ids.codes))
    assert sorted(item for code in ids.codes.unique(dim=0) for item in ids.item_of(code)) == list(range(60))
    ids = SemanticIDs(CODES, 4)
    assert [ids.item_of(codes) for codes in ((1, 0, 3), [-1, -1, -1], (0, 0, 0), (1, 0))] == [[0, 2], [], [], []]
    report = SemanticIDs(CODES, 4, collisions_before=2).report()
    perplexity = report.pop("perplexity")
    assert report == {"items": 4, "distinct": 3, "collisions_before_repair": 2, "collisions": 1, "largest_group": 2,
                      "codes_used": [3, 3, 2]}
    # shares (2, 1, 1)/4 twice: entropy 1.5 bits; (3, 1)/4: 2 - 3/4 log2 3 bits
    assert perplexity == pytest.approx([2**1.5, 2**1.5, 4 / 3**0.75], rel=1e-6)
    lines = SemanticIDs(torch.tensor([[k, 0, k // 2] for k in range(8)]), 16, 7).table().splitlines()
    assert lines[0] == "8 items, 8 semantic IDs, 0 collisions (7 before repair), largest group 1"
    assert ["COLLAPSED" in line for line in lines[1:]] == [False, True, False], lines
    assert "before" not in SemanticIDs(CODES, 4).table()


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 300), st.integers(0, 99))
@draws(30)
def test_save_and_load(tmp_path_factory, n, levels, K, seed):
    """What is saved is loaded, in the Release's format."""
    path = tmp_path_factory.mktemp("ids") / "semantic_ids.json"
    codes = torch.randint(K, (n, levels), generator=torch.Generator().manual_seed(seed))
    SemanticIDs(codes, K).save(path)
    loaded = SemanticIDs.load(path, K)
    assert torch.equal(loaded.codes, codes) and loaded.codes.dtype == torch.int64 and loaded.n_codes == K
    want = [f"<{letter}_{code}>" for letter, code in zip("abcdef", codes[-1].tolist())]
    assert json.loads(path.read_text())[str(n - 1)] == want
    assert [loaded.tokens[level * K + code] for level, code in enumerate(codes[-1].tolist())] == want
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert torch.equal(SemanticIDs.load(path, K).codes, codes), "a byte-order mark is harmless"


GOOD = {"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", "<b_3>"], "2": ["<a_0>", "<b_2>"]}
FAULTS = [  # the file, or what replaces GOOD's rows; what the message must name
    ("", "Expecting value"), (json.dumps(GOOD)[:-9], "column"), ("[" * 100_000, "recursion"),
    ("{}", "no items"), ("[]", "no items"), (json.dumps(list(GOOD.items())), "no items"),
    (json.dumps({"0": GOOD["0"], "2": GOOD["2"]}), "no row for item 1, one too many for '2'"),
    (json.dumps({"1": GOOD["1"], "2": GOOD["2"]}), "no row for item 0"),
    (json.dumps({"0": GOOD["0"], "01": GOOD["1"]}), "one too many for '01'"),
    ('{"0": ["<a_1>"], "1": ["<a_2>"], "1": ["<a_3>"]}', "one too many for '1'"),
    ({"B00X": ["<a_1>", "<b_1>"]}, "no row for item 3, one too many for 'B00X'"),
    ({"1": ["<a_1>", "<b_256>"]}, "item 1 has '<b_256>' on level b\nexpected <b_0> .. <b_255>"),
    ({"1": ["<a_1>", f"<b_{'9' * 5000}>"]}, "item 1 has '<b_999"),
    ({"1": ["<a_-1>", "<b_2>"]}, "item 1 has '<a_-1>' on level a"),
    ({"1": ["<a_1>"]}, r"item 1 is \['<a_1>'\], item 0 is \['<a_1>', '<b_2>'\]"),
    ({"2": ["<a_1>", "<b_1>", "<c_1>"]}, "item 2 is "),
    (json.dumps({"0": [f"<{c}_1>" for c in LETTERS] + ["<a_1>"]}), "item 0 is "),  # more levels than letters
    ({"1": []}, r"item 1 is \[\]"), (json.dumps({"0": [], "1": []}), r"item 0 is \[\]"),
    ({"1": None}, "item 1 is None"), ({"0": None}, "item 0 is None"),
    ({"1": "<a_1><b_2>"}, "item 1 is '<a_1><b_2>'"), ({"1": {"<a_1>": 0, "<b_2>": 1}}, "item 1 is "),
    ({"1": ["<a_1>", 3]}, "item 1 has 3 on level b"),
    ({"1": ["<a_1>", ["<b_1>"]]}, r"item 1 has \['<b_1>'\] on level b"),
    ({"1": ["<a_1>", "b_3"]}, "item 1 has 'b_3' on level b"),
    ({"1": ["<b_1>", "<a_3>"]}, "item 1 has '<b_1>' on level a"),
    ({"1": ["<a_1>", "<b_٣>"]}, "item 1 has '<b_٣>'"), ({"1": ["<a_1>", "<b_03>"]}, "item 1 has '<b_03>'"),
    (gzip.compress(b"{}"), "codec can't decode")]


@pytest.mark.parametrize("content, named", FAULTS, ids=range(len(FAULTS)))
def test_a_malformed_file_is_refused(tmp_path, content, named):
    """Each corruption is a three-line ValueError naming the file, the item and the value; so is a missing path."""
    path = tmp_path / "ids.json"
    content = json.dumps(GOOD | content) if isinstance(content, dict) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=named) as error:
        SemanticIDs.load(path)
    message = str(error.value)
    assert len(message.splitlines()) == 3 and str(path) in message, message
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="no semantic-ID file"):
            SemanticIDs.load(missing)


@pytest.mark.parametrize("folder, items, different", [
    ("Instruments_cl_ori", 53509, 53360), ("Video_Games_cl_0.6_0_5_3_0", 25935, 25707)])
def test_released_index_files(shared_data, folder, items, different):
    """The authors' semantic IDs load, with the known numbers of items and of distinct IDs: they hold collisions."""
    path, = (shared_data / "peso_release" / folder).glob("*.index*.json")
    report = SemanticIDs.load(path).report()
    assert (report["items"], report["distinct"], report["collisions"]) == (items, different, items - different)
    assert len(report["codes_used"]) == 4 and report["collisions_before_repair"] is None, report
