"""The flat trie against nested dictionaries."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeso.trie import Trie
from tests.conftest import draws
from tests.reference import dict_trie, level_by_level_trie

quick = draws(150)


@st.composite
def code_sets(draw) -> tuple[torch.Tensor, int]:
    """(codes (n_items, L), n_codes): from one item to 40, doubles and long shared prefixes among them."""
    levels = draw(st.integers(1, 8))
    n_codes = draw(st.sampled_from([1, 2, 3, 7, 256, 2048, 40_000, 2**31]))
    used = draw(st.integers(1, min(n_codes, 4)))  # few codes: prefixes meet
    pool = draw(st.lists(st.integers(0, n_codes - 1), min_size=used, max_size=used))
    row = st.lists(st.sampled_from(pool), min_size=levels, max_size=levels)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=40))), n_codes


def children(trie: Trie, state: int, level: int) -> dict[int, int]:
    """{code: state} of one state, by the public step."""
    code, child = trie.step(torch.tensor([state]), level)
    assert code.shape == child.shape == (1, trie.width[level])
    pairs = [(c, s) for c, s in zip(code[0].tolist(), child[0].tolist()) if c >= 0]
    assert len(dict(pairs)) == len(pairs), f"a code stands twice among {code[0].tolist()}"
    return dict(pairs)


def walk(trie: Trie, node: dict, state: int = 0, level: int = 0):
    """Compares trie and dictionaries below a node; yields the leaves' states, left to right."""
    if level == trie.levels:
        yield state
        return
    found = children(trie, state, level)
    assert list(found) == sorted(node), f"level {level}, state {state}: {list(found)} against {sorted(node)}"
    for code, child in found.items():
        yield from walk(trie, node[code], child, level + 1)


@quick
@given(code_sets())
def test_step_is_the_dictionary_trie(sets):
    """From every state that can be reached: exactly the dictionary's codes, in order; every leaf is
    reached once, and its state is the rank of its codes among the distinct ones."""
    codes, n_codes = sets
    trie = Trie(codes, n_codes)
    distinct = sorted(set(map(tuple, codes.tolist())))
    assert trie.leaves == len(distinct) and trie.levels == codes.shape[1] and trie.n_codes == n_codes
    assert list(walk(trie, dict_trie(codes))) == list(range(len(distinct)))


@quick
@given(code_sets(), st.integers(0, 2**31 - 1))
def test_many_states_step_as_each_alone(sets, seed):
    """step broadcasts over any shape of states."""
    trie = Trie(*sets)
    for level in range(trie.levels):
        nodes = len(trie.first[level]) - 1
        states = torch.randint(nodes, (2, 3), generator=torch.Generator().manual_seed(seed))
        code, child = trie.step(states, level)
        assert code.shape == child.shape == (2, 3, trie.width[level])
        for i in range(2):
            for j in range(3):
                alone = trie.step(states[i, j], level)
                assert torch.equal(code[i, j], alone[0]) and torch.equal(child[i, j], alone[1])
        following = trie.first[level][-1]
        assert 0 <= child.min() and child.max() < following, "a state that cannot be stepped from"


@quick
@given(code_sets(), st.integers(0, 2**31 - 1))
def test_doubles_and_the_order_of_items_are_nothing(sets, seed):
    """Shuffled and repeated items build the same arrays."""
    codes, n_codes = sets
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    a, b = Trie(codes, n_codes), Trie(torch.cat([codes[order], codes[order[:3]]]), n_codes)
    assert a.leaves == b.leaves and a.width == b.width
    assert all(torch.equal(x, y) for x, y in zip(a.first + a.code, b.first + b.code, strict=True))


def same_arrays(trie: Trie, codes: torch.Tensor, n_codes: int) -> None:
    """Every number is the one that the construction level by level gives, in the smallest type that holds it."""
    first, code, width, leaves = level_by_level_trie(codes, n_codes)
    assert (trie.width, trie.leaves, trie.levels) == (width, leaves, codes.shape[1])
    for ours, slow in zip(trie.first + trie.code, first + code, strict=True):
        assert torch.equal(ours.long(), slow), f"{ours.tolist()[:20]} against {slow.tolist()[:20]}"
    assert sum(t.nbytes for t in trie.first + trie.code) <= sum(t.nbytes for t in first + code)


@quick
@given(code_sets())
def test_one_sort_of_packed_codes_is_the_sort_of_every_level(sets):
    """The same arrays, however many codes a key has room for: 1 x 2^31 up to 8 x 1 codes."""
    same_arrays(Trie(*sets), *sets)


@pytest.mark.parametrize("items, levels, n_codes, bound", [
    (20_000, 4, 256, 8), (20_000, 8, 2048, 40), (20_000, 3, 40_000, 26), (70_000, 2, 256, 3), (300, 12, 2**31, 90)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16, torch.float64])
def test_large_catalogues_are_the_sort_of_every_level(items, levels, n_codes, bound, dtype):
    """Random items, doubles among them, in any type that holds the codes; `bound` bytes an item are enough."""
    if n_codes > 2**16 and dtype == torch.uint16:
        pytest.skip("the type is too small")
    codes = torch.randint(n_codes, (items, levels), generator=torch.Generator().manual_seed(0))
    codes = torch.cat([codes, codes[:500]]).to(dtype)
    before = codes.clone()
    trie = Trie(codes, n_codes)
    same_arrays(trie, codes, n_codes)
    assert torch.equal(codes, before), "the caller's codes were changed"
    held = sum(t.nbytes for t in trie.first + trie.code) / items
    assert held <= bound, f"{held:.1f} bytes an item"


def test_a_narrow_type_is_no_bound_on_n_codes():
    """int8, uint8 and int32 codes under an n_codes that those types do not hold."""
    for dtype, n_codes in ((torch.int8, 256), (torch.uint8, 2048), (torch.int16, 2**20), (torch.int32, 2**31)):
        assert Trie(torch.tensor([[0, 127]], dtype=dtype), n_codes).leaves == 1
        with pytest.raises(ValueError, match=r"0\.\.99, found 0\.\.127"):
            Trie(torch.tensor([[0, 127]], dtype=dtype), 100)


@pytest.mark.parametrize("n_codes", [2, 256, 257, 32_768, 32_769, 65_537])
def test_a_step_gives_int64_whatever_the_arrays_are(n_codes):
    """The largest code comes back as itself and a missing child as -1, though the arrays' types change with n_codes."""
    codes = torch.tensor([[0, 0], [0, n_codes - 1], [n_codes - 1, n_codes - 1]])
    trie = Trie(codes, n_codes)
    code, child = trie.step(torch.tensor([0, 1]), 1)
    assert code.dtype == child.dtype == torch.int64
    assert code.tolist() == [[0, n_codes - 1], [n_codes - 1, -1]] and child[:, 0].tolist() == [0, 2]


@pytest.mark.parametrize("levels", range(1, 9))
@pytest.mark.parametrize("corner", [0, 2047])
def test_large_codes_do_not_overflow(levels, corner):
    """2048 codes at 8 levels are 2^88 prefixes; items at the corners stay apart and are found."""
    codes = torch.full((3, levels), corner)
    codes[1, 0] = 2047 - corner
    codes[2, -1] = 1000
    trie = Trie(codes, 2048)
    assert trie.leaves == 3
    assert sorted(walk(trie, dict_trie(codes))) == [0, 1, 2]


def test_ten_thousand_items_against_membership():
    """A catalogue of the real size: random prefixes may go on exactly where an item has them."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(24, (10_000, 4), generator=generator)
    trie, nested = Trie(codes), dict_trie(codes)
    assert trie.leaves == len(set(map(tuple, codes.tolist()))) < 10_000
    prefixes = torch.randint(25, (2000, 4), generator=generator)
    for prefix in prefixes.tolist():
        node, state = nested, 0
        for level, code in enumerate(prefix):
            found = children(trie, state, level)
            assert (code in found) == (code in node)
            if code not in node:
                break
            node, state = node[code], found[code]


def test_one_item_is_one_path():
    """A single item: width 1 at every level and one leaf."""
    trie = Trie(torch.tensor([[5, 0, 255]]))
    assert trie.width == [1, 1, 1] and trie.leaves == 1
    for level, code in enumerate((5, 0, 255)):
        assert children(trie, 0, level) == {code: 0}


def test_arrays_lists_and_devices():
    """A list of lists and a numpy array are codes too; to() moves every array."""
    rows = [[0, 1], [0, 2], [3, 1]]
    for codes in (rows, torch.tensor(rows).numpy(), torch.tensor(rows, dtype=torch.int32)):
        assert list(walk(Trie(codes, 4), dict_trie(rows))) == [0, 1, 2]
    moved = Trie(rows, 4).to("meta")
    assert {t.device.type for t in moved.first + moved.code} == {"meta"}


@pytest.mark.parametrize("codes, word", [
    (torch.zeros(0, 4).long(), r"\(0, 4\)"), (torch.zeros(3).long(), r"\(3,\)"),
    (torch.zeros(3, 0).long(), r"\(3, 0\)"), (torch.zeros(1, 2, 2).long(), r"\(1, 2, 2\)"),
    (torch.tensor([[0, 16]]), r"0\.\.16"), (torch.tensor([[-1, 3]]), r"-1\.\.3")])
def test_what_is_no_set_of_codes_is_an_error(codes, word):
    """No item, no level, another shape, a code out of range: said with what was found."""
    with pytest.raises(ValueError, match=word):
        Trie(codes, 16)
