"""EvoRec: the located layers by brute force, what is forgotten by hand, what is untouched bit by bit."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from minipeso import continual
from minipeso.rivals import evorec, sasrec
from minipeso.rivals.evorec import EvoRec, forgotten, freeze_others, inactive, locate, pooled
from minipeso.lora import adapters
from minipeso.runs.run import Run, learn_first, learn_later
from minipeso.stages import Stage, examples
from tests.micro import micro, set_up

SILENT = lambda record: None  # noqa: E731


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Run:
    """After D_1; seven layers, of which floor(0.3 x 7) = 2 are located."""
    made = set_up(micro(tmp_path_factory.mktemp("micro"), layers=7, world_users=120, lr=1e-2, filter_epochs=2))
    continual.learn_first(made.model, made.data.stages[:1], made.template, made.cfg, SILENT)
    return made


def fresh(ready: Run, **changes) -> Run:
    return ready._replace(model=copy.deepcopy(ready.model), cfg=ready.cfg.__class__(**vars(ready.cfg) | changes))


# -- locate -----------------------------------------------------------------------------------------

def test_located_layers_are_those_of_a_loop_over_users(ready):
    """One user, one prompt, one layer at a time, without padding: count the layer of the lowest cosine similarity."""
    stage, layers = ready.data.stages[1], ready.model.model.layers
    votes = [0] * len(layers)
    for user in stage.users:
        past, now = stage.history[user], stage.current[user][:-2]
        if not past or not now:
            continue
        means = []
        for history in (past, past + now):
            outputs = []
            hooks = [layer.register_forward_hook(lambda module, args, x: outputs.append(x[0])) for layer in layers]
            with torch.no_grad():
                ready.model.eval().model(ready.template.prompt(history[-ready.cfg.window:])[None])
            [hook.remove() for hook in hooks]
            means.append([x.mean(0) for x in outputs])
        similar = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(*means)]
        votes[similar.index(min(similar))] += 1
    wanted = sorted(sorted(range(7), key=lambda k: (-votes[k], k))[:2])
    assert sum(votes) > 5 and locate(ready.model, stage, ready.template, ready.cfg) == wanted


def test_pooling_ignores_padding(ready):
    """A prompt beside longer ones has the mean it has alone."""
    prompts = [ready.template.prompt(h) for h in ([1, 2], [3, 4, 5, 6, 7], [8])]
    together = pooled(ready.model, prompts)
    for k, prompt in enumerate(prompts):
        assert torch.allclose(together[:, k], pooled(ready.model, [prompt])[:, 0], atol=1e-5)


def test_nobody_returns(ready):
    """A stage without returning users: no layer is located, no weight moves, and the stage can still be ranked."""
    now, records = fresh(ready), []
    alone = Stage(2, {u: [] for u in range(5)}, {u: [1, 2, 3, 4, 5] for u in range(5)})
    before = copy.deepcopy(now.model.state_dict())
    shown = EvoRec(len(now.data.keys), now.cfg).learn_stage(now.model, [now.data.stages[0], alone], now.template, records.append)
    assert records == [{"stage": 2, "located": [], "touched": 0.0}] and shown.current == alone.current
    assert all(torch.equal(value, before[name]) for name, value in now.model.state_dict().items())


# -- forget -----------------------------------------------------------------------------------------

def test_forgotten_by_hand():
    """The lowest 20 % of ten items go, ties to the older, order kept; the newest three stay although they score least."""
    past, score = list("abcdefghij"), [5, 1, 4, 3, 2, 9, 8, -1, -2, -3]
    assert "".join(forgotten(past, score, 0.2, 3)) == "acdfghij"
    assert "".join(forgotten(past, score, 0.2, 0)) == "abcdefgh"
    assert forgotten(past, score, 0.0, 3) == past and forgotten([1, 2, 3], [1, 1, 1], 0.9, 3) == [1, 2, 3]
    assert "".join(forgotten(past, [1] * 10, 0.4, 3)) == "efghij"


def test_the_filter_drops_what_does_not_belong():
    """Trained on users who stay in one of two departments, it forgets a stray item of the other one."""
    draw = torch.Generator().manual_seed(0)
    cart = lambda k: (10 * k + torch.randperm(10, generator=draw)[:8]).tolist()  # noqa: E731
    torch.manual_seed(0)
    model = sasrec.SASRec(20, d=16)
    sasrec.fit(model, [cart(k % 2) for k in range(300)], 25, 0, lr=5e-3)
    wrong = 0
    for k in range(20):
        past = cart(k % 2)
        past[2] = 10 * (1 - k % 2) + k % 10
        (score,) = sasrec.relevance(model, [past])
        kept = forgotten(past, score.tolist(), 0.125, 3)
        wrong += kept != past[:2] + past[3:]
    assert wrong <= 2, wrong


def test_forgetting_shortens_histories_and_nothing_else(ready):
    """Targets and the stage's own items stay; histories are subsequences, shorter by the share, newest three kept; the
    filter never sees a validation or test item of the stage."""
    stages = ready.data.stages[:2]
    system = EvoRec(len(ready.data.keys), fresh(ready, evo_forget=0.5).cfg)
    shorter = system.forget(stages)
    assert shorter.current == stages[1].current and shorter.number == 2
    for user, past in stages[1].history.items():
        kept = shorter.history[user]
        there = iter(past)
        assert all(item in there for item in kept) and kept[-3:] == past[-3:]
        assert len(kept) == len(past) - min(len(past) // 2, max(len(past) - 3, 0))
    assert [e.target for e in examples(shorter, "test")] == [e.target for e in examples(stages[1], "test")]


def test_relevance_and_padding(ready):
    """A sequence's scores do not depend on its neighbours in the batch; one beyond 50 items is scored whole."""
    torch.manual_seed(0)
    model = sasrec.SASRec(90)
    some = [list(range(60)), [4, 5], [7]]
    for one, score in zip(some, sasrec.relevance(model, some), strict=True):
        assert len(score) == len(one) and torch.allclose(score, sasrec.relevance(model, [one])[0], atol=1e-5)


# -- update -----------------------------------------------------------------------------------------

def test_only_located_adapters_move(ready):
    """After the stage every parameter outside the located layers' A and B has its bits; inside, all B have moved; the
    share touched is at most 30 %."""
    now, records = fresh(ready), []
    before = copy.deepcopy(now.model.state_dict())
    EvoRec(len(now.data.keys), now.cfg).learn_stage(now.model, now.data.stages[:2], now.template, records.append)
    located, touched = records[-1]["located"], records[-1]["touched"]
    moved = {name for name, value in now.model.state_dict().items() if not torch.equal(value, before[name])}
    inside = {f"{name}.{part}" for name, _ in adapters(now.model) for part in "AB"
              if int(name.split(".")[2]) in located}
    assert moved <= inside and {n for n in inside if n.endswith(".B")} <= moved
    assert len(located) == 2 and touched == pytest.approx(2 / 7) and touched <= 0.3


def test_inactive_users_are_the_earlier_ones(ready):
    """Everybody of D_1 .. D_{t-1} who is not in D_t, once, with the test question of the last stage that had them."""
    stages = ready.data.stages
    found = {e.user: e for e in inactive(stages)}
    assert set(found) == (set(stages[0].users) | set(stages[1].users)) - set(stages[2].users)
    for user, example in found.items():
        stage = stages[1] if user in stages[1].current else stages[0]
        assert (example.stage, example.target) == (stage.number, stage.current[user][-1])


def test_consistency_is_the_soft_cross_entropy(ready):
    """mu times the mean over answer tokens of -p_old . log p_new: at the start the old model's entropy, with no gradient
    but the entropy's minimum; larger once the adapter has moved."""
    now = fresh(ready, evo_consistency=2.0, batch=512)  # one batch: every step's
    users = inactive(now.data.stages[:2])
    term = evorec.consistency(now.model, users, now.template, now.cfg)
    start = term(now.model)
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(now.cfg.seed)).tolist()
    total, tokens = 0.0, 0
    for k in order[:now.cfg.batch]:
        prompt, answer = now.template.prompt(users[k].history).tolist(), now.template.answer(users[k].target)
        with torch.no_grad():
            log_p = now.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].log_softmax(-1)
        total, tokens = total - (log_p.exp() * log_p).sum().item(), tokens + len(answer)
    assert start.item() == pytest.approx(2 * total / tokens, rel=1e-4)
    with torch.no_grad():
        for _, layer in adapters(now.model):
            layer.B.add_(0.3)
    values = [term(now.model).item() for _ in range(16)]
    assert max(values) > start.item()


@pytest.mark.parametrize("field, value", [("evo_layers", 0.6), ("evo_forget", 0.6), ("evo_newest", 0),
                                          ("evo_consistency", 5.0), ("filter_epochs", 0)])
def test_every_evorec_setting_is_alive(ready, field, value):
    """Another value gives other adapters."""
    ends = []
    for changes in ({}, {field: value}):
        now = fresh(ready, **{"evo_forget": 0.4} | changes)
        system = EvoRec(len(now.data.keys), now.cfg)
        for t in (2, 3):
            system.learn_stage(now.model, now.data.stages[:t], now.template, SILENT)
        ends.append([p.detach().clone() for _, layer in adapters(now.model) for p in (layer.A, layer.B)])
    assert not all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


EVO_FIELDS = ["evo_layers", "evo_forget", "evo_newest", "evo_consistency", "filter_epochs"]


def test_freeze_others_counts(ready):
    """All layers located: everything may move, share 1."""
    now = fresh(ready)
    assert freeze_others(now.model, list(range(7))) == 1.0
    assert all(p.requires_grad for _, layer in adapters(now.model) for p in layer.trained())


def test_a_run_ranks_active_and_inactive_users(tmp_path):
    """learn_later: EvoRec ranks on the shortened histories; with everyone=True the inactive users' ranks follow, and the
    stage's own are what they were."""
    run = set_up(micro(tmp_path, layers=4, world_users=120, filter_epochs=1))
    first = learn_first(run)
    for all_of in (False, True):
        (tmp_path / f"{all_of}").mkdir()
    own, every = (learn_later(run._replace(out=tmp_path / f"{all_of}"), "evorec", first, everyone=all_of)
                  for all_of in (False, True))
    for t in (2, 3):
        n = len(run.data.stages[t - 1].users)
        assert len(own[str(t)]) == n and torch.equal(every[str(t)][:n], own[str(t)])
        assert len(every[str(t)]) == n + len(inactive(run.data.stages[:t]))
