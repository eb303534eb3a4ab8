"""The trie beside nested dictionaries of tokens, the usual companion of generate(): time to build, memory held, and
what a step of decoding costs at several sizes of the catalogue.

    python -m tests.bench.trie ours|dictionary ITEMS LEVELS CODES     one contender, in a process of its own
"""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor

from tests.bench import race
from minipeso.trie import Trie

LEVELS, CODES, FIRST_TOKEN = 4, 256, 128_256
DEEP = (8, 2048)  # levels and codes of the largest semantic IDs in use
USERS, BEAMS, PREFIXES = 64, 10, 500
MOST = 1_000_000  # items that dictionaries are asked to hold


def catalogue(items: int, levels: int = LEVELS, n_codes: int = CODES) -> Tensor:
    """Random codes (items, L)."""
    kind = torch.uint8 if n_codes <= 256 else torch.int16
    return torch.randint(n_codes, (items, levels), generator=torch.Generator().manual_seed(0), dtype=kind)


def nested(tokens: Tensor) -> dict:
    """tree[token][token]... of tokens (items, L); a part at a time, so that no list of all stands beside it."""
    tree: dict = {}
    for part in tokens.split(10_000):
        for item in part.tolist():
            reduce(lambda node, token: node.setdefault(token, {}), item, tree)
    return tree


def dictionary(codes: Tensor) -> dict:
    """Of tokens: code c of level l is FIRST_TOKEN + CODES l + c."""
    return nested(codes.int() + FIRST_TOKEN + CODES * torch.arange(codes.shape[1], dtype=torch.int32))


CONTENDERS: dict[str, Callable] = {"ours": Trie, "dictionary": dictionary}


def same_children(trie: Trie, tree: dict, prefixes: Tensor) -> int:
    """How many prefixes of rows (n, L) have the same children on both sides; FloatingPointError if one has not."""
    checked = 0
    for prefix in prefixes.tolist():
        state, node = 0, tree
        for level, code in enumerate(prefix):
            codes, states = (x[0].tolist() for x in trie.step(torch.tensor([state]), level))
            found = {FIRST_TOKEN + CODES * level + c: s for c, s in zip(codes, states) if c >= 0}
            if found.keys() != node.keys():
                race.refuse("hold", f"after {prefix[:level]} {len(found)} codes follow in one, {len(node)} in the other")
            checked += 1
            token = FIRST_TOKEN + CODES * level + code
            if token not in node:
                break
            state, node = found[token], node[token]
    return checked


def check(items: int) -> str:
    """The children of prefixes of items, and of random ones, of which most end early."""
    codes = catalogue(min(items, MOST))
    drawn = torch.randint(CODES, (PREFIXES, LEVELS), generator=torch.Generator().manual_seed(1))
    prefixes = torch.cat([codes[torch.arange(PREFIXES) * 7919 % len(codes)], drawn.to(torch.uint8)])
    return f"the children of {same_children(Trie(codes), dictionary(codes), prefixes):,} prefixes"


def build_race(items: int, rounds: int) -> list[str]:
    """A line for every contender: time, memory held, and the highest while it was built."""
    names = list(CONTENDERS) if items <= MOST else ["ours"]
    found = race.compare_children("tests.bench.trie", {name: (name, items, LEVELS, CODES) for name in names}, rounds)
    shown = race.lines({name: [one.seconds for one in ones] for name, ones in found.items()}, items, "items")
    ours = found["ours"][0].said["held"]
    for name, ones in found.items():
        held, peak = (np.median([one.said[key] for one in ones]) for key in ("held", "peak"))
        shown.append(f"{name:29}{held / items:10.1f} bytes an item, {peak / items:.1f} at most while it is built   "
                     f"{held / ours:6.2f} x ours")
    deep = race.child("tests.bench.trie", "ours", items, *DEEP)
    shown.append(f"ours, {DEEP[0]} x {DEEP[1]:,} codes{'':9}{deep.seconds * 1e3:10.1f} ms, {deep.said['held'] / items:.1f} bytes an "
                 f"item, {deep.peak / items:.1f} at most while it is built")
    return shown + [f"ours alone: dictionaries are not asked to hold more than {MOST:,} items"] * (items > MOST)


def step_table(items: int, rounds: int) -> list[str]:
    """A step of 64 users x 10 beams at every level: its time and the children it returns for each beam, for
    catalogues of 10,000 items and ten times as many, up to `items`; they take turns."""
    sizes = [10**k for k in range(4, len(str(items))) if 10**k < items] + [items]
    tries = {f"{n:,}": Trie(catalogue(n)) for n in sizes}
    cells = {name: [] for name in tries}
    for level in range(LEVELS):
        runs = {name: partial(trie.step, torch.randint(len(trie.first[level]) - 1, (USERS, BEAMS)), level)
                for name, trie in tries.items()}
        for name, seconds in race.compare(runs, 20 * rounds).items():
            cells[name].append(f"{np.median(seconds) * 1e6:9,.0f} us x{tries[name].width[level]:4}")
    heads = "".join(f"{f'level {level + 1}':>17}" for level in range(LEVELS))
    return [f"{'a step, items':>14}{heads}   (x: children a beam)",
            *(f"{name:>14}{''.join(row)}" for name, row in cells.items())]


def main(name: str, items: int, levels: int, n_codes: int) -> None:
    """Builds one contender. A dictionary is Python's, and only grows: what it holds is what it needed at most."""
    codes, kept, seconds = catalogue(items, levels, n_codes), [], []
    make = partial(Trie, n_codes=n_codes) if name == "ours" else CONTENDERS[name]
    Trie(codes[:1000], n_codes)  # what torch sets up once

    def run() -> None:
        began = time.perf_counter()
        kept.append(make(codes))
        seconds.append(time.perf_counter() - began)

    peak = race.peak_of(run)
    held = sum(t.nbytes for t in kept[0].first + kept[0].code) if name == "ours" else peak
    print(json.dumps({"seconds": seconds[0], "held": held, "peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
