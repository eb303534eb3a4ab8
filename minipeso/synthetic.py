"""The drifting world: reviews and titles drawn from the paper's own model of drift, with known alpha.

Eq. 15:  P_t(y | u) = alpha P_{t-1}(y | u) + (1 - alpha) Q_t(y | u)

A user's taste P_t is a distribution over the leaves of a topic tree (department > kind). Q_t is what
is new in stage t: part fashion, shared by everybody, part the user's own. Within a leaf, a user
walks along a series (volume 1, 2, ...), so that the order of a history tells something. At every
stage new users arrive and new items appear. Files are written in the Hub's own schema, so that the
demo takes the same way as real data.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

DEPARTMENTS = {
    "guitar": ("strings", "strap", "capo", "picks", "pedal", "tuner"),
    "drum": ("sticks", "cymbal", "practice pad", "throne", "snare head", "clamp"),
    "piano": ("bench", "cover", "sheet stand", "sustain pedal", "key labels", "lamp"),
    "studio": ("microphone", "headphones", "audio interface", "pop filter", "monitor", "cable"),
    "wind": ("reeds", "mouthpiece", "swab", "ligature", "mute", "valve oil"),
}
ADJECTIVES = ("amber", "birch", "cobalt", "dune", "ember", "fjord", "grove", "harbor", "indigo", "juniper")
STAGES = 5
FIRST_DAY = 1_546_300_800_000  # 2019-01-01, in ms
STAGE_MS = 365 * 24 * 3_600_000 // 2


def write_world(folder: str | Path, users: int = 1200, items: int = 600, alpha: float = 0.5, seed: int = 0) -> Path:
    """Writes Demo.jsonl and meta_Demo.jsonl into `folder`. `users` live in stage 1; each later stage
    has a sixth of its events (60 % + 4 x 10 %), half of them by users known before."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha of Eq. 15 must lie in 0..1\nfound {alpha}\nchoose e.g. 0.5")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    catalogue = _catalogue(items, rng)
    with open(folder / "meta_Demo.jsonl", "w") as file:
        file.writelines(json.dumps(item["meta"]) + "\n" for item in catalogue)
    with open(folder / "Demo.jsonl", "w") as file:
        for user, item, time in _events(users, catalogue, alpha, rng):
            file.write(json.dumps({"user_id": f"U{user:05d}", "parent_asin": catalogue[item]["meta"]["parent_asin"],
                                   "asin": catalogue[item]["meta"]["parent_asin"], "rating": 5.0,
                                   "timestamp": time}) + "\n")
    return folder


def _leaves() -> list[tuple[str, str]]:
    return [(department, kind) for department, kinds in DEPARTMENTS.items() for kind in kinds]


def _catalogue(n: int, rng: np.random.Generator) -> list[dict]:
    """Items in series: {"leaf", "series", "place", "born", "meta"}; a fifth is born after stage 1."""
    leaves, items = _leaves(), []
    for number in range(n):
        leaf = number % len(leaves)
        series, volume = divmod(number // len(leaves), 4)
        department, kind = leaves[leaf]
        adjective = ADJECTIVES[(series + leaf) % len(ADJECTIVES)]
        born = 1 if rng.random() < 0.8 else int(rng.integers(2, STAGES + 1))
        title = f"{adjective.title()} {department} {kind}, no. {volume + 1}"
        if series >= len(ADJECTIVES):
            title += f", edition {series // len(ADJECTIVES) + 1}"
        meta = {"parent_asin": f"D{number:05d}", "title": title, "store": f"{adjective.title()} & Co.",
                "categories": [department.title(), kind.title()], "description": [], "features": []}
        items.append({"leaf": leaf, "series": series, "volume": volume, "born": born, "meta": meta})
    return items


def _events(users: int, catalogue: list[dict], alpha: float, rng: np.random.Generator):
    """(user, item, time) of all stages; P_0 is the user's own taste, Q_t mixes fashion and own whim."""
    n_leaves = len(_leaves())
    shelves = [[i for i, item in enumerate(catalogue) if item["leaf"] == leaf] for leaf in range(n_leaves)]
    taste, bought, population = {}, {}, 0
    for stage in range(1, STAGES + 1):
        active = users if stage == 1 else max(users // 6, 1)
        known = rng.permutation(population)[:active // 2].tolist() if stage > 1 else []
        fresh = list(range(population, population + active - len(known)))
        population += len(fresh)
        fashion = _peaked(n_leaves, 3, rng)
        for user in [*known, *fresh]:
            whim = 0.7 * fashion + 0.3 * _peaked(n_leaves, 2, rng)  # Q_t
            before = taste.get(user, _peaked(n_leaves, 3, rng))  # P_{t-1}
            taste[user] = alpha * before + (1 - alpha) * whim
            start = FIRST_DAY + (stage - 1) * STAGE_MS + int(rng.integers(STAGE_MS // 2))
            walk = _walk(taste[user], shelves, catalogue, stage, bought.setdefault(user, set()), rng)
            for k, item in enumerate(walk):
                yield user, item, start + k * STAGE_MS // 40 + int(rng.integers(1000))


def _peaked(n: int, peaks: int, rng: np.random.Generator) -> np.ndarray:
    p = np.zeros(n)
    p[rng.choice(n, peaks, replace=False)] = rng.dirichlet(np.ones(peaks) * 2)
    return p


def _walk(taste, shelves, catalogue, stage, bought: set, rng) -> list[int]:
    """6 to 10 new items: mostly the next volume of the series last touched, else a taste-drawn leaf."""
    walk: list[int] = []
    for _ in range(int(rng.integers(6, 11))):
        leaf = int(rng.choice(len(taste), p=taste))
        choice = [i for i in shelves[leaf] if catalogue[i]["born"] <= stage and i not in bought]
        if walk and rng.random() < 0.6:  # continue the series, if a later volume is there
            last = catalogue[walk[-1]]
            later = [i for i in shelves[last["leaf"]] if catalogue[i]["series"] == last["series"]
                     and catalogue[i]["volume"] > last["volume"] and i not in bought and catalogue[i]["born"] <= stage]
            choice = later[:1] or choice
        if choice:
            fame = 1.0 / (1 + np.arange(len(choice)))
            walk.append(choice[int(rng.choice(len(choice), p=fame / fame.sum()))])
            bought.add(walk[-1])
    return walk
