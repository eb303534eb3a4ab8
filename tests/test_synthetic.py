"""The demo's world: real files, the paper's drift, and alpha as the known truth."""
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from minipeso import synthetic
from minipeso.files.reviews import read_items, read_reviews
from minipeso.stages import cut, statistics
from minipeso.runs import report
from minipeso.runs.run import Run
from minipeso.synthetic import FIRST_DAY, STAGE_MS, write_world
from tests.micro import micro, run, shared_ids


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


def test_the_readers_of_real_data_find_no_fault(tmp_path):
    """The files are the Hub's schema: no bad row, no double, every item with a title of its own. The paper's 60 % +
    4 x 10 % cut, with its five events a user, leaves no stage empty."""
    world = write_world(tmp_path, users=300, items=200, alpha=0.5, seed=0)
    read, rows = read_reviews(world), lines(world / "Demo.jsonl")
    assert (read.bad, read.duplicates, len(read.time)) == ({}, 0, len(rows))
    assert {"user_id", "parent_asin", "asin", "rating", "timestamp"} == set(rows[0])
    items = read_items(world)
    assert set(read.items) <= set(items) and len(items) == 200
    assert len({fields["title"] for fields in items.values()}) == 200, "titles are not distinct"
    assert {key: tuple(fields["categories"]) for key, fields in items.items()} == leaves(world)
    rows = statistics(cut(read))[:-1]
    assert len(rows) == 5 and all(row["users"] >= 20 for row in rows), rows
    assert all(row["new_items"] for row in rows[1:]) and all(0 < row["new_users"] < row["users"] for row in rows[1:])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_taste_is_eq_15s_mixture(alpha, tmp_path, monkeypatch):
    """P_t = alpha P_{t-1} + (1 - alpha) Q_t of every walk, Q_t = 0.7 of the stage's fashion + 0.3 of an own whim."""
    drawn, walks, peaked, past = [], [], synthetic._peaked, {}
    monkeypatch.setattr(synthetic, "_peaked", lambda k, rng: drawn.append((k, peaked(k, rng))) or drawn[-1][1])
    monkeypatch.setattr(synthetic, "_walk", lambda taste, shelves, owned, rng: walks.append((id(owned), taste)) or [])
    write_world(tmp_path, users=30, items=60, alpha=alpha)
    draws, stages = iter(drawn), 0
    for user, taste in walks:
        peaks, whim = next(draws)
        if peaks == 3:  # a stage begins: what all its users share
            fashion, (peaks, whim), stages = whim, next(draws), stages + 1
        own = next(draws)[1]
        past[user] = alpha * past.get(user, own) + (1 - alpha) * (0.7 * fashion + 0.3 * whim)
        assert peaks == 2 and np.allclose(taste, past[user], atol=1e-12) and abs(taste.sum() - 1) < 1e-9
    assert stages == 5 and len(walks) == 50 and len(past) == 42 and next(draws, None) is None


def test_the_oracle_knows_what_a_walk_draws(tmp_path):
    """First items, and second ones after a given first, come with next_items' probabilities to five standard errors;
    no item comes twice. The oracle of a world hits what was taken there as often as it says."""
    rng, taste, shelves = np.random.default_rng(0), np.zeros(30), [list(range(leaf, 300, 30)) for leaf in range(30)]
    taste[[3, 7, 20]], had = (0.2, 0.3, 0.5), {3, 33, 20, *range(7, 300, 30)}  # nothing is left of leaf 7
    walks = [synthetic._walk(taste, shelves, set(had), rng) for _ in range(6000)]
    assert all(len(walk) == len(set(walk)) <= 10 and not had & set(walk) for walk in walks)
    for start in ([], [50], [63]):  # a series goes on after 50 and after 63
        drawn = [walk[len(start)] for walk in walks if walk[:len(start)] == start and len(walk) > len(start)]
        p = synthetic.next_items(300, taste, shelves, had | {*start}, *start or [None])
        share = np.bincount(drawn, minlength=300) / len(drawn)
        assert len(drawn) > 300 and (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / len(drawn)) + 1e-9).all(), start
    said, taken = [], []
    keys = [(row["user_id"], row["parent_asin"]) for row in lines(write_world(tmp_path, 200, 200) / "Demo.jsonl")]
    items = [f"D{i:05d}" for i in reversed(range(200))]
    for (_, item), p in zip(keys, synthetic.oracle(200, 200, 0.5, 0, keys, items).numpy(), strict=True):
        best = np.argsort(-p)[:10]
        said.append(p[best].sum()), taken.append(item in [items[i] for i in best])
    assert abs(np.mean(said) - np.mean(taken)) < 5 * np.std(taken) / len(taken)**0.5


def test_what_the_demo_expects_of_every_method(tmp_path):
    """expected.json: for each user, present and then absent, the world's own probability of each of the ten items. The
    oracle's are the largest that there are; what is expected is what was sampled, to five standard errors. A run of
    other data in the same folder has nothing of it."""
    cfg = micro(tmp_path, world_users=400, compare="popularity,transitions,oracle")
    assert "| expected, D2 and later" in run(cfg)
    world = Run(cfg, writes=False)
    world.load_data(False)
    for method in cfg.methods:
        folder, said, taken = world.folder(method), [], []
        own, away = report.per_user(folder, ranks := report.load(folder)[1])
        for t, rows in json.loads((folder / "expected.json").read_text()).items():
            p, known = torch.tensor(rows, dtype=torch.double), world.known[int(t) - 1]
            truth = torch.stack([world.truth[e] for e in world.questions(int(t))[0]])
            assert p.shape == (len(truth), 10) and 0 <= p.min() and p.sum(1).max() <= 1 + 1e-9
            assert torch.equal(torch.cat([own[t], away.get(t, own[t][:0])]), torch.tensor(rows))
            best = truth[:, known].topk(10).values.sum(1)
            assert (p.sum(1) <= best + 1e-9).all() and (method != "oracle" or torch.allclose(p.sum(1), best))
            said += p.sum(1)[:len(ranks[t])].tolist()
            taken += [0 < rank <= 10 for rank in ranks[t].tolist()]
        assert len(taken) > 400 and abs(np.mean(said) - np.mean(taken)) < 5 * np.std(taken) / len(taken)**0.5, method
    printed = run(micro(tmp_path, dataset=str(shared_ids(tmp_path / "blocks")), compare="popularity"))
    assert "expected" not in printed and not [*tmp_path.rglob("expected.json")]
