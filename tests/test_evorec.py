"""EvoRec: the located layers by brute force, what is forgotten by hand, what is untouched bit by bit."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minipeso import continual
from minipeso.config import Config
from minipeso.lora import adapters, inject
from minipeso.rivals import evorec
from minipeso.rivals.evorec import forget, freeze_others, kept, learn_stage, locate
from minipeso.stages import Stage
from minipeso.tokens import Template
from tests.reference import toy_llama

N_ITEMS = 60
EPOCHS = continual.train_stage.__defaults__[-1]  # every epoch, nothing kept


def stages() -> list[Stage]:
    """Three stages of random items; two thirds of a later stage's users return."""
    past, made, draw = {}, [], np.random.default_rng(0)
    for t, users in enumerate((range(24), range(12, 30), range(18, 36)), start=1):
        had = {u: past.get(u, []) for u in users}
        now = {u: [i for i in draw.permutation(N_ITEMS).tolist() if i not in had[u]][:5 + u % 4] for u in users}
        made.append(Stage(t, had, now))
        past |= {u: had[u] + items for u, items in now.items()}
    return made


class FakeRun:
    """What evorec.learn asks of a run, in memory. Seven layers, of which round(0.32 x 7) = 2 are located."""

    def __init__(self, **rivals):
        self.cfg = Config(lr=1e-2, later_lr=0.5, epochs=1, batch=8, rivals=rivals)
        self.template = Template.short(torch.randint(8, (N_ITEMS, 2), generator=torch.Generator().manual_seed(0)), 8)
        self.stages, self.n_items, self.found, self.done, self.shown = stages(), N_ITEMS, {"evorec": {}}, {}, {}
        self.model = toy_llama(dtype=torch.float32, num_hidden_layers=7)
        self.model.grow(2, torch.Generator().manual_seed(2), std=0.1)  # new tokens' rows, which must stay
        inject(self.model, 2, 4.0, dropout=0.1, generator=torch.Generator().manual_seed(1))
        self.log = lambda name: lambda record: None
        self.epochs = lambda phase: EPOCHS
        self.left = lambda name: (t for t in (2, 3) if t not in self.done)

    def recommend(self, t, stage):
        self.shown[t] = stage
        return torch.tensor([len(h) for h in stage.history.values()])

    def save(self, name, t, found):
        self.found[name][str(t)], self.done[t] = found, copy.deepcopy(self.model.state_dict())


def test_located_layers_are_those_of_a_loop_over_users():
    """One user, one prompt, one layer at a time, without padding: count the layer of the lowest cosine similarity."""
    run = FakeRun()
    stage, layers, votes = run.stages[1], run.model.model.layers, [0] * 7
    for user in (user for user, past in stage.history.items() if past):
        past, now, means = stage.history[user], stage.current[user][:-2], []
        for history in (past, past + now):
            outputs = []
            hooks = [layer.register_forward_hook(lambda *_: outputs.append(_[-1][0].mean(0))) for layer in layers]
            run.model.eval().model(run.template.prompt(history[-run.cfg.window:])[None])
            [hook.remove() for hook in hooks]
            means.append(outputs)
        similar = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(*means)]
        votes[similar.index(min(similar))] += 1
    wanted = sorted(sorted(range(7), key=lambda k: (-votes[k], k))[:2])
    some = [locate(run.model, stage, run.template, run.cfg, share) for share in (0.32, 0, 0.4, 1)]
    assert sum(votes) == 12 and some[0] == wanted and [len(layers) for layers in some[1:]] == [1, 3, 7]


def test_kept_by_hand():
    """The lowest 20 % of ten items go, ties to the older, order kept; the newest three stay though they score least."""
    past, score = list("abcdefghij"), [5, 1, 4, 3, 2, 9, 8, -1, -2, -3]
    assert "".join(kept(past, score, 0.2, 3)) == "acdfghij" and "".join(kept(past, score, 0.2, 0)) == "abcdefgh"
    assert kept(past, score, 0.0, 3) == past and kept([1, 2, 3], [1, 1, 1], 0.9, 3) == [1, 2, 3]
    assert "".join(kept(past, [1] * 10, 0.4, 3)) == "efghij"


def test_the_filter_drops_what_does_not_belong():
    """Of users who stay in one of two departments, a stray item of the other one is forgotten."""
    draw, wrong = np.random.default_rng(0), 0
    carts = [(10 * (k % 2) + draw.permutation(10)[:9]).tolist() for k in range(300)]
    pasts = [(10 * (k % 2) + draw.permutation(10)[:8]).tolist() for k in range(300)]
    for k, past in enumerate(pasts):
        past[2] = 10 * (1 - k % 2) + k % 10
    shown = forget([Stage(1, {}, {}), Stage(2, dict(enumerate(pasts)), dict(enumerate(carts)))], 20, 0.125, 3)
    for k, past in enumerate(pasts):
        wrong += shown.history[k] != past[:2] + past[3:]
    assert wrong <= 3, wrong


def test_forgetting_shortens_histories_and_nothing_else():
    """Histories are subsequences, shorter by the share, newest three kept; what is held out has no say."""
    first, before = stages()[:2]
    after = forget([first, before], N_ITEMS, 0.5, 3)
    assert after.current == before.current and after.number == 2
    for user, past in before.history.items():
        shorter, there = after.history[user], iter(past)
        assert all(item in there for item in shorter) and shorter[-3:] == past[-3:]
        assert len(shorter) == len(past) - min(len(past) // 2, max(len(past) - 3, 0))
    other = Stage(2, before.history, {u: items[:-2] + [59, 58] for u, items in before.current.items()})
    assert forget([first, other], N_ITEMS, 0.5, 3).history == after.history


def test_only_located_adapters_move():
    """Every parameter outside the located layers' A and B has its bits; inside, all B have moved; 2 of 7 layers."""
    run, records = FakeRun(), []
    before = copy.deepcopy(run.model.state_dict())
    run.log = lambda name: records.append
    learn_stage(run, "evorec", 2)
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    inside = {f"{name}.{part}" for name, _ in adapters(run.model) for part in "AB"
              if int(name.split(".")[2]) in records[0]["located"]}
    assert moved <= inside and {n for n in inside if n.endswith(".B")} <= moved
    assert len(records[0]["located"]) == 2 and records[0]["touched"] == pytest.approx(2 / 7)
    assert freeze_others(run.model, list(range(7))) == 1.0


def test_nobody_returns():
    """A stage without returning users: no layer is located, no weight moves, and the stage can still be ranked."""
    run, records = FakeRun(), []
    fresh, before = Stage(2, {7: []}, {7: [1, 2, 3, 4, 5]}), copy.deepcopy(run.model.state_dict())
    run.stages[1], run.log = fresh, lambda name: records.append
    shown = learn_stage(run, "evorec", 2)
    assert records == [{"stage": 2, "located": [], "touched": 0.0}] and shown.current == fresh.current
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_run_ranks_on_shortened_histories_and_goes_on_to_the_same_bits(monkeypatch):
    """Interrupted after D_2: D_3 ends with the same adapters and histories."""
    whole, later, real, told = FakeRun(), FakeRun(), continual.train_stage, []
    monkeypatch.setattr(continual, "train_stage", lambda *task: told.append((task[2], task[3])) or real(*task))
    found = evorec.learn(whole, "evorec")
    assert [(t, cfg.lr, cfg.proximal) for t, cfg in told] == [(2, 5e-3, "none"), (3, 5e-3, "none")]
    assert list(found) == ["2", "3"] and sum(found["3"]) < sum(len(h) for h in whole.stages[2].history.values())
    later.done[2], later.found["evorec"]["2"] = whole.done[2], found["2"]
    later.model.load_state_dict(whole.done[2])
    assert all(torch.equal(r, found[t]) for t, r in evorec.learn(later, "evorec").items()) and list(later.shown) == [3]
    assert later.shown[3].history == whole.shown[3].history
    assert all(torch.equal(value, whole.done[3][name]) for name, value in later.done[3].items())


OTHER = {"evo_layers": 0.6, "evo_forget": 0.6, "evo_newest": 0}


@pytest.mark.parametrize("field, value", [*OTHER.items()])
def test_every_evorec_setting_is_alive(field, value):
    """Another value gives other adapters."""
    before, after = FakeRun(evo_forget=0.4), FakeRun(**{"evo_forget": 0.4, field: value})
    evorec.learn(before, "evorec"), evorec.learn(after, "evorec")
    assert not all(torch.equal(value, after.done[3][name]) for name, value in before.done[3].items())
