"""The demo's world: real files, the paper's drift, and alpha as the known truth."""
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from minipeso.files.reviews import read_items, read_reviews
from minipeso.stages import cut, statistics
from minipeso.synthetic import FIRST_DAY, STAGE_MS, write_world


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder: Path) -> dict[str, dict[int, list[str]]]:
    """{user: {stage: items}}, read without the package's reader."""
    users = defaultdict(lambda: defaultdict(list))
    for row in lines(folder / "Demo.jsonl"):
        users[row["user_id"]][(row["timestamp"] - FIRST_DAY) // STAGE_MS + 1].append(row["parent_asin"])
    return users


def leaves(folder: Path) -> dict[str, tuple[str, ...]]:
    return {row["parent_asin"]: tuple(row["categories"]) for row in lines(folder / "meta_Demo.jsonl")}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), users=300, items=200, alpha=0.5, seed=0)


def test_the_seed_decides_every_byte(tmp_path):
    """One seed always writes the same two files; another seed, or another alpha, other events of one catalogue."""
    def made(name, **settings):
        folder = write_world(tmp_path / name, **dict(users=40, items=60, alpha=0.5, seed=0) | settings)
        return {path.name: path.read_bytes() for path in folder.iterdir()}
    first = made("a")
    assert sorted(first) == ["Demo.jsonl", "meta_Demo.jsonl"] and made("b") == first
    for name, other in (("c", dict(seed=1)), ("d", dict(alpha=0.6))):
        again = made(name, **other)
        assert again["Demo.jsonl"] != first["Demo.jsonl"] and again["meta_Demo.jsonl"] == first["meta_Demo.jsonl"]


def test_the_readers_of_real_data_find_no_fault(world):
    """The files are the Hub's schema: no bad row, no double, every item with a title of its own."""
    read, rows = read_reviews(world), lines(world / "Demo.jsonl")
    assert (read.bad, read.duplicates, len(read.time)) == ({}, 0, len(rows))
    assert {"user_id", "parent_asin", "asin", "rating", "timestamp"} == set(rows[0])
    items = read_items(world)
    assert set(read.items) <= set(items) and len(items) == 200
    assert len({fields["title"] for fields in items.values()}) == 200, "titles are not distinct"
    assert {key: tuple(fields["categories"]) for key, fields in items.items()} == leaves(world)


def test_the_protocols_cut_finds_users_in_every_stage(world):
    """The paper's 60 % + 4 x 10 % cut, with its five events a user, leaves no stage empty."""
    rows = statistics(cut(read_reviews(world)))[:-1]
    assert len(rows) == 5 and all(row["users"] >= 20 for row in rows), rows
    assert all(row["new_items"] for row in rows[1:]) and all(0 < row["new_users"] < row["users"] for row in rows[1:])


def test_time_never_runs_backwards_and_nobody_buys_twice(world):
    """A user's events lie in the order of the walk; no item is taken twice."""
    times = defaultdict(list)
    for row in lines(world / "Demo.jsonl"):
        times[row["user_id"]].append(row["timestamp"])
    assert all(t == sorted(t) for t in times.values())
    for stages in events(world).values():
        taken = [item for chosen in stages.values() for item in chosen]
        assert len(taken) == len(set(taken))


def drift(folder: Path) -> float:
    """The mean total variation between the leaves of a returning user's two first stages."""
    leaf, distances = leaves(folder), []
    for stages in events(folder).values():
        if len(stages) > 1:
            first, second = (Counter(leaf[item] for item in stages[t]) for t in sorted(stages)[:2])
            p, q = ({k: n / count.total() for k, n in count.items()} for count in (first, second))
            distances.append(sum(abs(p.get(k, 0) - q.get(k, 0)) for k in p.keys() | q.keys()) / 2)
    assert len(distances) > 100, "too few returning users to measure anything"
    return float(np.mean(distances))


def test_drift_falls_as_alpha_rises(tmp_path):
    """alpha of Eq. 15: at 1 a returning user draws from the taste of before, at 0 from a new one, steadily."""
    alphas = (0.0, 0.35, 0.7, 1.0)
    measured = [drift(write_world(tmp_path / str(a), users=800, items=300, alpha=a, seed=1)) for a in alphas]
    assert all(a > b + 0.01 for a, b in zip(measured, measured[1:])), f"drift at alpha {alphas}: {measured}"
    assert measured[0] > 0.9 and measured[-1] < 0.6, measured


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_alpha_outside_0_and_1_is_refused(alpha, tmp_path):
    """A share is a share; nothing is written."""
    with pytest.raises(ValueError, match="0..1"):
        write_world(tmp_path / "world", alpha=alpha)
    assert not (tmp_path / "world").exists()
