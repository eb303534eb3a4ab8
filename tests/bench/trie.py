"""The trie beside nested dictionaries of tokens, the usual companion of generate(): time to build, and memory held."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor

from minipeso.trie import Trie
from tests.bench import race

LEVELS, CODES, FIRST_TOKEN = 4, 256, 128_256
PREFIXES, MOST = 500, 1_000_000  # to compare; items that a dictionary is asked to hold


def catalogue(items: int, levels: int = LEVELS, n_codes: int = CODES) -> Tensor:
    """Random codes (items, L)."""
    kind = torch.uint8 if n_codes <= 256 else torch.int16
    return torch.randint(n_codes, (items, levels), generator=torch.Generator().manual_seed(0), dtype=kind)


def nested(tokens: Tensor) -> dict:
    """tree[token][token]... of tokens (items, L); a part after the other, so that no list of all stands beside it."""
    tree: dict = {}
    for part in tokens.split(10_000):
        for item in part.tolist():
            reduce(lambda node, token: node.setdefault(token, {}), item, tree)
    return tree


def dictionary(codes: Tensor) -> dict:
    """Of tokens: code c of level l is FIRST_TOKEN + CODES l + c."""
    return nested(codes.int() + FIRST_TOKEN + CODES * torch.arange(codes.shape[1], dtype=torch.int32))


def same_children(trie: Trie, tree: dict, prefixes: Tensor) -> int:
    """How many prefixes of the items (n, L) have the same children on both sides; FloatingPointError if one has not."""
    checked = 0
    for prefix in prefixes.tolist():
        state, node = 0, tree
        for level, code in enumerate(prefix):
            codes, states = (x[0].tolist() for x in trie.step(torch.tensor([state]), level))
            children = {FIRST_TOKEN + CODES * level + c: s for c, s in zip(codes, states) if c >= 0}
            if children.keys() != node.keys():
                race.refuse("hold", f"after {prefix[:level]} {len(children)} codes follow in one, {len(node)} in other")
            checked += 1
            token = FIRST_TOKEN + CODES * level + code
            if token not in node:
                break
            state, node = children[token], node[token]
    return checked


def prepared(name: str, items: int, levels: int = LEVELS, n_codes: int = CODES) -> tuple[Callable, Callable]:
    """The digest is what is held; a dictionary is Python's, and only grows: it holds what it needed at most."""
    codes = catalogue(items, levels, n_codes)
    Trie(codes[:1000], n_codes)  # what torch sets up once
    if name == "dictionary":
        return partial(dictionary, codes), lambda tree: None
    return partial(Trie, codes, n_codes), lambda trie: sum(t.nbytes for t in trie.first + trie.code)


def run(args: Namespace) -> None:
    items, codes = args.items, catalogue(min(args.items, MOST))
    prefixes = torch.cat([codes[:PREFIXES], torch.randint(CODES, (PREFIXES, LEVELS))])  # of the latter most end early
    print(f"{race.machine()}\n{items:,} random items of {LEVELS} x {CODES} codes; no dictionary above {MOST:,}\n"
          f"equal: the children of {same_children(Trie(codes), dictionary(codes), prefixes):,} prefixes")
    names = ("ours", "dictionary") if items <= MOST else ("ours",)
    jobs = {name: (prepared, name, items) for name in names}
    jobs["ours, 8 x 2,048 codes"] = (prepared, "ours", items, 8, 2048)  # the largest semantic IDs in use

    def memory(rounds: list[race.Took]) -> str:
        held, most = rounds[0].made or rounds[0].above, max(one.above for one in rounds)
        return f"   {held / items:.1f} bytes per item, {most / items:.1f} at most while it is built"
    print(race.table(race.compare(jobs, args.rounds, race.child), items, "items", memory))
