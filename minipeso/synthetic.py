"""The drifting world: reviews and titles drawn from the paper's own model of drift, with known alpha.

Eq. 15:  P_t(y | u) = alpha P_{t-1}(y | u) + (1 - alpha) Q_t(y | u)
A user's taste P_t is a distribution over leaves (department, kind); Q_t is new in stage t: fashion, which everybody
shares, and the user's own whim. Within a leaf a user walks along a series (volume 1, 2, ...), so that the order of a
history tells something. The files are in the Hub's own schema: the demo takes the same way as real data."""
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

DEPARTMENTS = {
    "guitar": ("strings", "strap", "capo", "picks", "pedal", "tuner"),
    "drum": ("sticks", "cymbal", "practice pad", "throne", "snare head", "clamp"),
    "piano": ("bench", "cover", "sheet stand", "sustain pedal", "key labels", "lamp"),
    "studio": ("microphone", "headphones", "audio interface", "pop filter", "monitor", "cable"),
    "wind": ("reeds", "mouthpiece", "swab", "ligature", "mute", "valve oil"),
}
LEAVES = [(department, kind) for department, kinds in DEPARTMENTS.items() for kind in kinds]
SERIES = 4 * len(LEAVES)  # item n is in leaf n % 30 and in series n // 120 of that leaf, four volumes each
ADJECTIVES = ("amber", "birch", "cobalt", "dune", "ember", "fjord", "grove", "harbor", "indigo", "juniper")
STAGES, FIRST_DAY, STAGE_MS = 5, 1_546_300_800_000, 365 * 24 * 3_600_000 // 2  # 2019-01-01 and half a year, in ms


def write_world(folder: str | Path, users: int = 1200, items: int = 600, alpha: float = 0.5, seed: int = 0) -> Path:
    """Writes Demo.jsonl and meta_Demo.jsonl. `users` live in stage 1; a sixth as many, half of them known, later."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "meta_Demo.jsonl", "w") as file:
        file.writelines(json.dumps(_meta(item)) + "\n" for item in range(items))
    with open(folder / "Demo.jsonl", "w") as file:
        for user, item, time, *_ in _events(users, items, alpha, rng):
            keys = {"user_id": f"U{user:05d}", "parent_asin": f"D{item:05d}", "asin": f"D{item:05d}"}
            file.write(json.dumps(keys | {"rating": 5.0, "timestamp": time}) + "\n")
    return folder


def oracle(users: int, items: int, alpha: float, seed: int, events: Sequence[tuple[str, str]], keys: Sequence[str]):
    """p (n, I): at each of these events (user key, item key) of the same world, the true probability of every one of
    these items to be taken. Nobody who does not know it can hit more often."""
    rng, owned, last, p = np.random.default_rng(seed), {}, {}, dict.fromkeys(events)
    for user, item, time, taste, shelves in _events(users, items, alpha, rng):
        stage, key = (time - FIRST_DAY) // STAGE_MS, (f"U{user:05d}", f"D{item:05d}")
        before, (then, previous) = owned.setdefault(user, set()), last.get(user, (None, None))
        if key in p:
            p[key] = next_items(items, taste, shelves, before, previous if then == stage else None)
        before.add(item)
        last[user] = stage, item
    return torch.from_numpy(np.stack([p[key] for key in events])[:, [int(key[1:]) for key in keys]])


def next_items(items: int, taste: np.ndarray, shelves: list[list[int]], owned: set[int], last: int | None):
    """What `_walk` draws next, as probabilities (items,), computed and not drawn."""
    p = np.zeros(items)
    for leaf in np.flatnonzero(taste):
        choice = [i for i in shelves[leaf] if i not in owned]
        fame = 1.0 / (1 + np.arange(len(choice)))
        p[choice] += taste[leaf] * fame / fame.sum()  # nothing where the user has all
    if last is not None and (series := _volumes(shelves, owned, last)):
        p *= 0.4
        p[series] += 0.6
    return p / p.sum()


def _volumes(shelves: list[list[int]], owned: set[int], last: int) -> list[int]:
    """The next volume of the series that `last` belongs to, if it is on sale: [item] or []."""
    return [i for i in shelves[last % len(LEAVES)] if i > last and i // SERIES == last // SERIES and i not in owned][:1]


def _meta(item: int) -> dict:
    """The item's line of metadata, in the Hub's schema; no two titles are alike."""
    leaf, series, volume = item % len(LEAVES), item // SERIES, item % SERIES // len(LEAVES) + 1
    department, kind = LEAVES[leaf]
    adjective = ADJECTIVES[(series + leaf) % len(ADJECTIVES)].title()
    edition = f", edition {series // len(ADJECTIVES) + 1}" if series >= len(ADJECTIVES) else ""
    return {"parent_asin": f"D{item:05d}", "title": f"{adjective} {department} {kind}, no. {volume}{edition}",
            "store": f"{adjective} & Co.", "categories": [department.title(), kind.title()],
            "description": [], "features": []}


def _events(users: int, items: int, alpha: float, rng: np.random.Generator):
    """Yields (user, item, time, P_t, what is on sale) of all stages. One item in five appears after the first stage."""
    born = np.array([1 if rng.random() < 0.8 else int(rng.integers(2, STAGES + 1)) for _ in range(items)])  # (items,)
    taste, owned, population = {}, {}, 0
    for stage in range(1, STAGES + 1):
        active = users if stage == 1 else max(users // 6, 1)
        known = rng.permutation(population)[:active // 2].tolist()
        fresh = range(population, population + active - len(known))
        population += len(fresh)
        on_sale = (born <= stage).nonzero()[0]
        shelves = [on_sale[on_sale % len(LEAVES) == leaf].tolist() for leaf in range(len(LEAVES))]
        fashion = _peaked(3, rng)
        for user in [*known, *fresh]:
            whim, before = 0.7 * fashion + 0.3 * _peaked(2, rng), taste.get(user, _peaked(3, rng))  # Q_t, P_{t-1}
            taste[user] = alpha * before + (1 - alpha) * whim
            start = FIRST_DAY + (stage - 1) * STAGE_MS + int(rng.integers(STAGE_MS // 2))
            for k, item in enumerate(_walk(taste[user], shelves, owned.setdefault(user, set()), rng)):
                yield user, item, start + k * STAGE_MS // 40 + int(rng.integers(1000)), taste[user], shelves


def _peaked(peaks: int, rng: np.random.Generator) -> np.ndarray:
    """A random distribution over the leaves that lives on `peaks` of them. -> (leaves,)"""
    p = np.zeros(len(LEAVES))
    p[rng.choice(len(LEAVES), peaks, replace=False)] = rng.dirichlet(np.ones(peaks) * 2)
    return p


def _walk(taste: np.ndarray, shelves: list[list[int]], owned: set[int], rng: np.random.Generator) -> list[int]:
    """6 to 10 new items: mostly the next volume of the series last touched, else a taste-drawn leaf."""
    walk: list[int] = []
    for _ in range(int(rng.integers(6, 11))):
        leaf = int(rng.choice(len(taste), p=taste))
        choice = [i for i in shelves[leaf] if i not in owned]
        if walk and rng.random() < 0.6:  # go on with the series, if a later volume is there
            choice = _volumes(shelves, owned, walk[-1]) or choice
        if choice:
            fame = 1.0 / (1 + np.arange(len(choice)))
            walk.append(choice[int(rng.choice(len(choice), p=fame / fame.sum()))])
            owned.add(walk[-1])
    return walk
