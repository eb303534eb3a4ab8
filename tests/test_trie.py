"""The flat trie against nested dictionaries."""
import pytest
import torch
from hypothesis import given, strategies as st

from minipeso.trie import Trie
from tests.conftest import draws
from tests.reference import dict_trie


@st.composite
def code_sets(draw) -> tuple[torch.Tensor, int]:
    """(codes (n_items, L), n_codes): from one item to 40, doubles and long shared prefixes among them."""
    levels = draw(st.integers(1, 8))
    n_codes = draw(st.sampled_from([1, 2, 3, 7, 256, 2048, 40_000, 2**31]))
    used = draw(st.integers(1, min(n_codes, 4)))  # few codes: prefixes meet
    pool = draw(st.lists(st.integers(0, n_codes - 1), min_size=used, max_size=used))
    item = st.lists(st.sampled_from(pool), min_size=levels, max_size=levels)
    return torch.tensor(draw(st.lists(item, min_size=1, max_size=40))), n_codes


def children(trie: Trie, state: int, level: int) -> dict[int, int]:
    """{code: state} of one state, by the public step."""
    code, child = trie.step(torch.tensor([state]), level)
    assert code.shape == child.shape == (1, trie.width[level]) and code.dtype == child.dtype == torch.int64
    pairs = [(c, s) for c, s in zip(code[0].tolist(), child[0].tolist()) if c >= 0]
    assert len(dict(pairs)) == len(pairs), f"a code stands twice among {code[0].tolist()}"
    return dict(pairs)


def walk(trie: Trie, node: dict, state: int = 0, level: int = 0):
    """Compares trie and dictionaries below a node; yields the leaves' states, left to right."""
    if level == trie.levels:
        yield state
        return
    below = children(trie, state, level)
    assert list(below) == sorted(node), f"level {level}, state {state}: {list(below)} against {sorted(node)}"
    for code, child in below.items():
        yield from walk(trie, node[code], child, level + 1)


@draws(150)
@given(code_sets())
def test_step_is_the_dictionary_trie(sets):
    """From every state that can be reached: exactly the dictionary's codes, in order; every leaf is reached once, and
    its state is the rank of its codes among the distinct ones, whatever the order of the items and their doubles."""
    codes, n_codes = sets
    trie, distinct = Trie(codes, n_codes), set(map(tuple, codes.tolist()))
    assert trie.leaves == len(distinct) and trie.levels == codes.shape[1] and trie.n_codes == n_codes
    assert list(walk(trie, dict_trie(codes))) == list(range(len(distinct)))


@draws(150)
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
                single = trie.step(states[i, j], level)
                assert torch.equal(code[i, j], single[0]) and torch.equal(child[i, j], single[1])
        following = trie.first[level][-1]
        assert 0 <= child.min() and child.max() < following, "a state that cannot be stepped from"


@pytest.mark.parametrize("codes, word", [
    (torch.zeros(0, 4).long(), r"\(0, 4\)"), (torch.zeros(3).long(), r"\(3,\)"),
    (torch.zeros(3, 0).long(), r"\(3, 0\)"), (torch.zeros(1, 2, 2).long(), r"\(1, 2, 2\)"),
    (torch.tensor([[0, 16]]), r"0\.\.16"), (torch.tensor([[-1, 3]]), r"-1\.\.3")])
def test_what_is_no_set_of_codes_is_an_error(codes, word):
    """No item, no level, another shape, a code out of range: said with what stands there."""
    with pytest.raises(ValueError, match=word):
        Trie(codes, 16)
