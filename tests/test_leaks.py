"""Nothing of the future is learnt: every method of METHODS on a small world, of which one part is exchanged."""
import contextlib
import io
import itertools
from pathlib import Path

import pytest
import torch

import train
from minipeso import continual
from minipeso.methods import METHODS
from minipeso.rivals import counts, lightgcn, twotower
from minipeso.runs.run import FIRST, Run
from minipeso.runs.setup import Dataset
from minipeso.semantic_ids import SemanticIDs
from minipeso.snapshot import restore
from minipeso.stages import Example, Stage
from minipeso.state import every_epoch
from tests.micro import micro

METHODS = {name: method for name, method in METHODS.items() if name != "oracle"}  # which learns nothing: it knows
STILL = ("pretrain", "lightgcn-pretrain", "transitions-first")  # after D_1
ITEMS, USERS = 24, {1: range(14), 2: range(8, 18), 3: range(4, 12)}
CFG = micro(Path(), shape=(8, 2, 2, 1, 8), epochs=2, batch=64, later_lr=1.0, rivals=dict(
    evo_forget=0.5, evo_newest=0, tower_width=4, tower_epochs=2, tower_batch=16))


def world(held_out: int = 0, after: int = 3) -> list[Stage]:
    """Three stages of random items; others are validated and tested in D_held_out, and all are others after D_after."""
    made, past, draw = [], {}, torch.Generator().manual_seed(0)
    for t, users in USERS.items():
        current = {}
        for n, u in ((5 + u % 3, u) for u in users):
            items, others = (torch.randperm(ITEMS, generator=draw).tolist() for _ in range(2))
            held = others if t == held_out else items
            current[u] = others[:8 - u % 2] if t > after else items[:n - 2] + held[n - 2:n]
        made.append(Stage(t, {u: past.get(u, []) for u in users}, current))
        past |= {u: past.get(u, []) + items for u, items in current.items()}
    return made


class InMemory(Run):
    """A run without a disk that ranks nobody and keeps, as text, what is learnt at every stage. Held apart: catalogue
    and users are known from the start, and validation prefers the last epoch."""

    def __init__(self, stages: list[Stage]):
        super().__init__(CFG, writes=False)
        ids = SemanticIDs(torch.stack([torch.arange(ITEMS) % 8, torch.arange(ITEMS) // 8], 1), 8)
        self.tokenizer, self.stages, self.known, self.n_items = None, stages, [list(range(ITEMS))] * 3, ITEMS
        self.data, self.seen, self.kept = Dataset(stages, [], Path(), ids=ids), [], {}
        self.done, self.once, self.epochs = lambda *_: False, lambda phase, learn: learn(), lambda phase: every_epoch
        self.recommend = lambda t, shown=None: self.seen.append(str(shown and shown.history))  # EvoRec's, shortened
        self.log = lambda name: lambda said: self.seen.append(str({k: said[k] for k in said if k != "valid_ce"}))

    def left(self, name: str) -> range:
        restore(self.model, self.first)
        return range(2, 4)

    def questions(self, t: int) -> tuple[list[Example], list[set[int]]]:
        return [Example(0, (1, 2, item), 0, t) for item in range(ITEMS)], []  # the same ones in every world

    def keep(self, tensors: dict[str, torch.Tensor]) -> None:
        self.seen.append(str({name: x.tolist() for name, x in tensors.items()}))

    def save(self, name: str, t: int, ranks: None) -> None:
        self.keep(self.model.state_dict())
        self.kept[name, t], self.seen = self.seen, []


def learnt(stages: list[Stage], patch) -> dict[tuple[str, int], list[str]]:
    """{(method, t): what it learns at D_t}; the base and the adapter of D_1 under the name of who learns them."""
    now, falling = InMemory(stages), itertools.count(0, -1)
    patch.setattr(continual, "mean_loss", lambda *rest: next(falling))
    patch.setattr(lightgcn, "hit_at", lambda *rest: -next(falling))
    patch.setattr(twotower, "inner", lambda H, n_users: now.keep({"H": H}))
    patch.setattr(twotower, "recommended", lambda *rest: None)
    patch.setattr(counts, "recommended", lambda run, t, score: now.keep({"scores": score(run.questions(t)[0])}))
    with contextlib.redirect_stdout(io.StringIO()):
        train.make_base(now, CFG)
        train.learn_first(now, CFG)
    for name, method in METHODS.items():
        now.seen, now.found[name] = [], {}
        method.learn(now, name) if method.learn else train.learn_later(now, name, method, method.settings(CFG))
        if not method.language:
            now.kept |= {(name, t): [seen] for t, seen in enumerate(now.seen, start=1)}
    return now.kept


@pytest.fixture(scope="module")
def usual() -> dict[tuple[str, int], list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        return learnt(world(), patch)


def test_every_method_does_what_it_says(usual):
    """All start from one model of D_1 (of their kind); some keep its bits, others move at every stage, each its way:
    at stage 2, with one past adapter, `all` and `latest` are the same yet."""
    ends = {name: [(usual.get((name, t)) or usual[FIRST, t])[-1] for t in (1, 2, 3)] for name in METHODS}
    for name in METHODS:
        assert len(set(ends[name])) == (1 if name in STILL else 3), name
    alike = sum(name.endswith(("latest", "latest-inherit")) for name in METHODS)
    assert [len(set(some)) for some in zip(*ends.values())] == [4, len(METHODS) - alike, len(METHODS)]


@pytest.mark.parametrize("what, t", [("held_out", 1), ("held_out", 2), ("held_out", 3), ("after", 1), ("after", 2)])
def test_nothing_of_the_future_is_learnt(usual, what, t, monkeypatch):
    """Other validation and test items of D_t, or others in all later stages, leave every bit that any method learns at
    D_1 .. D_t, and every number in its log; what is learnt from them later differs."""
    other = learnt(world(**{what: t}), monkeypatch)
    assert other.keys() == usual.keys() and {name for name, _ in other} == {*METHODS, FIRST}
    for (name, stage), seen in usual.items():
        assert seen == other[name, stage] or stage > t, f"{name} at D{stage} has seen the future"
    later = {name for name, stage in usual if usual[name, stage] != other[name, stage]}
    counted = counts.NAMES if what == "held_out" else ()  # what is held out is never counted, not even later
    assert later >= {*METHODS} - {*STILL, *counted} or t == 3, later
