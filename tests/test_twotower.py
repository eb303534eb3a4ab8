"""Two-tower baselines: propagation as dense matrices, every loss as its written formula, weights at their limits."""
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from minipeso.config import Config
from minipeso.files.reviews import read_reviews
from minipeso.rivals import lightgcn, pisa as pisa_file, twotower
from minipeso.rivals.lightgcn import (Free, Lesson, Links, Questions, Settings, bpr_loss, fit, full_search, inner,
                                      propagate, sample_negatives)
from minipeso.rivals.pisa import PISA, PIW, Contrastive, info_nce, js_divergence
from minipeso.stages import Stage, cut, had, questions
from minipeso.synthetic import write_world
from tests.conftest import draws
from tests.micro import fingerprint, micro, run
from tests.reference import normal

U, I, D = 7, 9, 5


def edges(seed: int = 0, m: int = 20) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, U - 1, (m,), generator=draw), torch.randint(0, I - 1, (m,), generator=draw)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_propagation_is_the_mean_of_dense_powers(layers):
    """Value and gradient: (I + A + ... + A^layers) E / (layers + 1), by matrix powers of the dense D^-1/2 A D^-1/2."""
    A, E = torch.zeros(U + I, U + I, dtype=torch.float64), normal(U + I, D).requires_grad_(True)
    for u, i in zip(*edges()):
        A[u, U + i] = A[U + i, u] = 1.0  # the last user and item have no edge
    degree = A.sum(1).clamp(min=1)
    A = A / (degree[:, None] * degree).sqrt()
    powers = sum(torch.linalg.matrix_power(A, k) for k in range(layers + 1)) / (layers + 1)
    g = normal(U + I, D, seed=1)
    H = propagate(E, Links(*edges(), U, I).A.to(torch.float64), layers)
    assert torch.allclose(H, powers @ E, atol=1e-6) and torch.allclose(H[U - 1] * (layers + 1), E[U - 1])
    (gradient,) = torch.autograd.grad((H * g).sum(), E)
    assert torch.allclose(gradient, powers.T @ g, atol=1e-6)


def info_nce_by_hand(x, z, own, w, tau) -> float:
    cos = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    score = [[math.exp(cos(xb, zj) / tau) for zj in z] for xb in x]
    return -sum(float(w[b]) * math.log(score[b][own[b]] / sum(score[b])) for b in range(len(x))) / max(len(x), 1)


def test_losses_are_their_formulas():
    """-mean log sigmoid(s+ - s-) and InfoNCE term by term, gradients by finite differences, no reference: 0. JS: 0 for
    no shift, log 2 for a full one, half the sum of the textbook KLs to the middle."""
    u, p, n = normal(4, D), normal(4, D, seed=1), normal(4, 3, D, seed=2)
    terms = [math.log1p(math.exp(float(u[b] @ n[b, k]) - float(u[b] @ p[b]))) for b in range(4) for k in range(3)]
    assert bpr_loss(u, p, n).item() == pytest.approx(sum(terms) / 12, rel=1e-12)
    assert torch.autograd.gradcheck(bpr_loss, [x.requires_grad_(True) for x in (u, p, n)])
    x, z, own, w = normal(6, D), normal(4, D, seed=1), torch.tensor([0, 1, 2, 3, 3, 0]), normal(6, seed=2).abs()
    assert info_nce(x, z, own, w, 0.5).item() == pytest.approx(info_nce_by_hand(x, z, own, w, 0.5), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z, w: info_nce(x, z, own, w, 0.5), (z.requires_grad_(), w.requires_grad_()))
    assert info_nce(x[:0], z, own[:0], w[:0], 0.5).item() == 0
    p, q = normal(5, 4).softmax(-1), normal(5, 4, seed=1).softmax(-1)
    by_hand = [sum(a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b)) for a, b in zip(x, y)) / 2
               for x, y in zip(p.tolist(), q.tolist())]
    assert js_divergence(p, q).tolist() == pytest.approx(by_hand) and not js_divergence(p, p).any()
    assert js_divergence(torch.tensor([1.0, 1e-30]), torch.tensor([1e-30, 1.0])).item() == pytest.approx(math.log(2))


@draws(30)
@given(seed=st.integers(0, 10**6), known=st.sets(st.integers(0, I - 1), min_size=4))
def test_negatives_are_known_and_new_to_the_user(seed, known):
    """Every negative is an item known at the stage that the user has not had; all such items occur."""
    users, draw = torch.arange(3).repeat(40), torch.Generator().manual_seed(seed)
    taken = {u: set(sorted(known)[u:u + 2]) for u in range(3)}
    had = torch.tensor(sorted(u * I + i for u in taken for i in taken[u]))
    chosen = sample_negatives(users, 4, torch.tensor(sorted(known)), had, I, draw)
    for u in range(3):
        assert set(chosen[users == u].flatten().tolist()) == known - taken[u]


@draws(20)
@given(seed=st.integers(0, 10**6))
def test_full_search_is_a_loop_over_users(seed):
    """The ten best among known items less those had, ties to the smaller number."""
    draw, wanted = np.random.default_rng(seed), []
    H, known = torch.from_numpy(draw.integers(-2, 3, (U + 30, 3))).float(), sorted(draw.permutation(30)[:25].tolist())
    user, seen = draw.integers(U, size=9), draw.integers([[9], [30]], size=(2, 40))
    for k in range(9):
        score = {i: float(H[user[k]] @ H[U + i]) for i in known if i not in seen[1, seen[0] == k]}
        wanted.append((sorted(score, key=lambda i: (-score[i], i)) + [-1] * 10)[:10])
    asked = Questions(torch.from_numpy(user), None, torch.from_numpy(seen))
    for batch in (2, 4, 100):
        assert full_search(inner(H, U), torch.tensor(known), asked, len(H) - U, batch=batch).tolist() == wanted


def lesson(user: Tensor, item: Tensor, known: int) -> Lesson:
    check = Questions(torch.arange(4), torch.tensor([1, 2, 3, 4]), torch.zeros(2, 0, dtype=torch.long))
    return Lesson(user, item, Links(user, item, U, I), torch.arange(known), torch.unique(user * I + item), check)


@pytest.mark.parametrize("hits, kept, tried", [([.1, .5, .3, .5, .2], 4, 10), ([.4, .4, .1, .3], 2, 8),
                                               ([.1, .2, .1, .1, .3, .4], 12, 13)])
def test_fit_keeps_the_best_epoch_and_stops(hits, kept, tried, monkeypatch):
    """Validated after every second epoch and the last of 13: the first with the highest Hit@10 is returned, and three
    in a row without a new one end it. A training of so many epochs ends there."""
    def fitted(epochs: int) -> tuple[Tensor, int]:
        told, calls, watcher = iter([*hits, 0, 0]), [], Free()
        monkeypatch.setattr(lightgcn, "hit_at", lambda ranks, k: next(told) if k == 10 else math.nan)
        watcher.begin_epoch = calls.append
        s = Settings(tower_negatives=2, tower_batch=8, tower_epochs=epochs, tower_patience=3)
        task = lesson(*edges(m=18), I)
        return fit(normal(U + I, D).float(), task, s, torch.Generator().manual_seed(0), watcher), len(calls)
    best, n = fitted(13)
    assert n == tried and torch.equal(best, fitted(kept)[0])


def test_who_is_absent_stays_and_decay_is_half_a_square():
    """A user without an edge in the stage keeps every bit; weight decay inside Adam would shrink them. The loss is BPR
    + wd / 2 |E|^2 of user, item and negatives, per pair."""
    E, task = normal(U + I, D).float(), lesson(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3]), 6)
    s = Settings(tower_negatives=2, tower_weight_decay=0.1, tower_batch=2, tower_epochs=6, tower_patience=3)
    moved = (fit(E, task, s, torch.Generator().manual_seed(0)) != E).any(1)
    assert moved[:3].all() and not moved[3:U].any() and not moved[U + 6:].any()
    pull = type("Pull", (Free,), {"__call__": lambda self, H, user, item: 1e3 * H[user].square().sum()})()
    shrunk = fit(E, task, s, torch.Generator().manual_seed(0), pull)[:3]
    assert (shrunk.abs() < E[:3].abs()).all(), "a regulariser is added, not taken away"
    nodes, H = torch.tensor([[0, 9, 8, 12], [3, 7, 7, 10]]), normal(U + I, D, seed=1).float()
    squares = sum(float(x) ** 2 for row in nodes.tolist() for node in row for x in E[node])
    want = bpr_loss(H[nodes[:, 0]], H[nodes[:, 1]], H[nodes[:, 2:]]).item() + 0.3 / 2 * squares / 2
    assert lightgcn.batch_loss(E, H, nodes, 0.3).item() == pytest.approx(want, rel=1e-5)


@draws(20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
def test_neighbours_are_sampled_from_the_lists(seed, k):
    """All neighbours of a node with at most k, k of them otherwise, none of anybody else's."""
    (user, item), draw = edges(seed), torch.Generator().manual_seed(seed)
    nodes = torch.cat([torch.arange(U), U + item[:1]])
    place, neighbour = Links(user, item, U, I).sample(nodes, k, draw)
    for u, node in enumerate(nodes.tolist()):
        own = {*(U + item[user == node]).tolist(), *user[U + item == node].tolist()}
        drawn = neighbour[place == u].tolist()
        assert len(drawn) == min(k, len(own)) and set(drawn) <= own and (len(own) > k or set(drawn) == own)


SETTINGS = Settings(contrast=2.0, pisa_alpha=2.0, tower_neighbours=50, tower_clusters=3, tower_share=0.5)


def held(s: Settings = SETTINGS):
    """Everything a regulariser is made from, in float32; the last user and the last two items are new."""
    old = torch.ones(U + I, dtype=torch.bool)
    old[[U - 1, U + I - 2, U + I - 1]] = False
    return normal(U + I, D).float(), Links(*edges(), U, I), old, s, torch.Generator().manual_seed(0)


def near_by_hand(reference: Tensor, H: Tensor, nodes: Tensor, w: list[float], pairs: tuple[Tensor, Tensor]) -> float:
    """I(neighbours of a node, the node; w), every neighbour once, by loops over the edges."""
    both = {(int(a), int(b)) for u, i in zip(*pairs) for a, b in ((u, U + i), (U + i, u))}
    near = [(k, b, w[k]) for k, node in enumerate(nodes.tolist()) for a, b in sorted(both) if a == node]
    own, neighbour, weight = zip(*near) if near else ((), (), ())
    return info_nce_by_hand(reference[list(neighbour)], H[nodes], own, weight, 0.5)


def test_contrastive_is_its_four_terms():
    """beta [ I(u_prev, u) + I(i_prev, i) + I(items of u, u) + I(users of i, i) ]: only old nodes of the batch."""
    prev, H = held()[0], normal(U + I, D, seed=9).float()
    got = Contrastive(*held())(H, torch.tensor([0, 3, 3, U - 1]), torch.tensor([2, 5, I - 1, 2]))
    total, ones = 0.0, [1.0, 1.0]
    for nodes in (torch.tensor([0, 3]), U + torch.tensor([2, 5])):
        total += info_nce_by_hand(prev[nodes], H[nodes], [0, 1], ones, .5) + near_by_hand(prev, H, nodes, ones, edges())
    assert got.item() == pytest.approx(2.0 * total, rel=1e-5)


def test_piw_weighs_a_user_by_the_shift():
    """softplus(MLP(delta)), delta_k = (g_prev(k) - g(k))^2, user by user: without a shift one weight for all. The
    weights learn, but not from the neighbours."""
    (piw, again), bounds = (PIW(*held()) for _ in range(2)), (3**-0.5, 50**-0.5)
    assert all(map(torch.equal, piw.parameters(), again.parameters())), "drawn from the generator alone"
    assert all(0.9 * most < w.abs().max() <= most for w, most in zip(piw.mlp, bounds))
    with torch.no_grad():
        piw.bias[0].add_(0.1)
    piw.begin_epoch(piw.prev)
    H = piw.prev * torch.tensor([1.0, 1.0, -3.0] + [1.0] * (U + I - 3))[:, None]
    w, by_hand = piw.weights(H, torch.arange(5)), []
    for u in range(5):
        before, now = (torch.stack([c @ W @ h[u] for c, W in zip(piw.centres, piw.W)]).exp() for h in (piw.prev, H))
        delta = (before / before.sum() - now / now.sum()) ** 2
        out = piw.mlp[1] @ (piw.mlp[0] @ delta + piw.bias[0]).clamp(min=0) + piw.bias[1]
        by_hand.append(math.log1p(out.exp().item()))
    assert w.tolist() == pytest.approx(by_hand, rel=1e-4) and by_hand[0] == by_hand[1] != by_hand[2]
    learnt = lambda: torch.autograd.grad(piw(H, torch.arange(5), torch.arange(5)), piw.parameters())  # noqa: E731
    whole, piw.s = learnt(), Settings(contrast=2.0, tower_neighbours=0)  # neighbours give the weights no gradient
    assert all(torch.equal(a, b) for a, b in zip(whole, learnt())) and any(g.any() for g in whole)


NEXT = torch.cat([torch.stack(edges(3)), torch.tensor([[U - 1, U - 1], [0, I - 1]])], 1)  # the new user is there


def pisa(**changes) -> PISA:
    return PISA(*held(dataclasses.replace(SETTINGS, **changes)), next_model=normal(U + I, D, seed=5).float(),
                next_links=Links(*NEXT, U, I))


def test_preferences_are_over_clusters_of_items(monkeypatch):
    """PISA's: of all items as they are now; PIW's: of those that were there before."""
    monkeypatch.setattr(pisa_file, "kmeans", lambda *given: given)
    for model, items in ((pisa(), (H := normal(U + I, D))[U:]), (PIW(*held()), H[U:-2])):
        model.begin_epoch(H)
        assert torch.equal(model.centres[0], items) and model.centres[1:] == (3, model.draw)


def test_pisa_weights_by_hand():
    """sigmoid(s - mean s), s = JSD over clusters, and 1 - w, for the largest share; neighbours' have no gradient."""
    both = pisa(tower_share=1.0)
    both.begin_epoch(both.prev)
    assert all(torch.equal(w, torch.full((6,), 0.5)) for w in both.split(both.prev, torch.arange(6)))
    H = both.prev.clone()
    H[4] *= -3
    plus, minus = both.split(H, torch.arange(6))
    p, q = ((h[:6] @ both.centres.T).softmax(-1) for h in (both.prev, H))
    shift = js_divergence(p, q).tolist()
    w = [1 / (1 + math.exp(sum(shift) / 6 - s)) for s in shift]
    assert plus.tolist() == pytest.approx(w, rel=1e-5) and minus.tolist() == pytest.approx([1 - x for x in w], rel=1e-5)
    few = pisa(tower_share=0.1)
    few.centres = both.centres
    plus, minus = few.split(H, torch.arange(6))
    assert plus.nonzero().flatten().tolist() == [4] and minus[4] == 0

    def gradient(neighbours: int) -> Tensor:
        both.s, leaf = dataclasses.replace(both.s, tower_neighbours=neighbours), H.clone().requires_grad_()
        return torch.autograd.grad(both(leaf, torch.arange(6), torch.arange(6)), leaf)[0]
    live, fixed = [gradient(k) for k in (50, 0)], both.split(H, torch.arange(6))
    both.split = lambda *given: fixed
    constant = [gradient(k) for k in (50, 0)]
    assert torch.allclose(live[0] - live[1], constant[0] - constant[1], atol=1e-5)
    assert (live[1] - constant[1]).abs().max() > 1e-4 < (live[0] - live[1]).abs().max()


@pytest.mark.parametrize("users", [[0, 3, 2, U - 1], [U - 1]])
def test_pisa_is_its_four_terms(users):
    """I(u_next, u; w+) + I(items_next, u; w+) + I(u_prev, u; w-) + I(items_prev, u; w-); newcomers: 2nd, w+ = 1/2."""
    model, H = pisa(), normal(U + I, D, seed=9).float()
    model.begin_epoch(H)
    got = model(leaf := H.clone().requires_grad_(True), torch.tensor(users), torch.ones(len(users), dtype=torch.long))
    us, everyone = torch.tensor(sorted({*users} - {U - 1}), dtype=torch.long), torch.tensor(sorted(users))
    plus, minus = (w.tolist() for w in model.split(H, us))
    own = range(len(us))
    total = sum(info_nce_by_hand(x[us], H[us], own, w, 0.5) for x, w in ((model.next, plus), (model.prev, minus)))
    total += near_by_hand(model.prev, H, us, minus, edges()) + near_by_hand(model.next, H, everyone, [*plus, 0.5], NEXT)
    assert got.item() == pytest.approx(2.0 * total, rel=1e-4) and torch.autograd.grad(got, leaf)[0].isfinite().all()


ALL = ["lightgcn-pretrain", "lightgcn-finetune", "lightgcn-contrastive", "lightgcn-piw", "lightgcn-pisa"]
TOWER = dict(tower_width=8, tower_batch=64, tower_epochs=4, tower_patience=2)


def world(folder: Path, users: int, items: int, stages: int, **rivals) -> SimpleNamespace:
    """All that a method asks of a run: the drifting world's stages, and a finished phase from memory."""
    events, kept, cfg = read_reviews(write_world(folder, users, items)), {}, Config(rivals=rivals)
    stages = cut(events, stages=stages)
    known = [sorted(set().union(*(s.items for s in stages[:t]))) for t in range(1, len(stages) + 1)]
    once = lambda phase, compute: kept.get(phase) or kept.setdefault(phase, compute())  # noqa: E731
    asked = lambda t: (questions(stages[:t]), [had(stages[:t])[e.user] for e in questions(stages[:t])])  # noqa: E731
    return SimpleNamespace(stages=stages, known=known, n_items=len(events.items), cfg=cfg, once=once, kept=kept,
                           questions=asked)


def test_methods_share_the_model_of_d1_and_do_not_depend_on_their_order(tmp_path):
    """Each goes on from the same model and state of the generator, learnt or read; they part at D_2."""
    one, other = (world(tmp_path, 60, 60, 3, **TOWER) for _ in range(2))
    found, alone = {name: twotower.learn(one, name) for name in ALL}, twotower.learn(other, "lightgcn-pisa")
    assert list(one.kept) == ["towers-first"] and list(alone) == ["1", "2", "3"]
    assert all(torch.equal(alone[t], found["lightgcn-pisa"][t]) for t in alone)
    assert all(torch.equal(f["1"], alone["1"]) and len(f["2"]) == len(one.questions(2)[0]) for f in found.values())
    assert len({str([f["2"].tolist(), f["3"].tolist()]) for f in found.values()}) == 5


def test_a_run_of_two_towers_needs_no_language_model(tmp_path):
    """train.py --method lightgcn-pisa: stages, ranks and results as always, seeded; no base, no semantic IDs."""
    for out in (tmp_path / "a", tmp_path / "b"):
        run(micro(out, method="lightgcn-pisa", compare=",".join(ALL), rivals=TOWER))
    kept = fingerprint(tmp_path / "a")
    assert kept == fingerprint(tmp_path / "b") and not (tmp_path / "a" / "semantic_ids.json").exists()
    assert all(list(kept[f"{folder}results.json"]["stages"]) == ["1", "2", "3"] for folder in ("", "lightgcn-piw/"))


PROVED = [
    ("tower_width", 12, ALL), ("tower_init", 0.5, ALL), ("tower_layers", 1, ALL), ("tower_negatives", 2, ALL),
    ("tower_lr", 0.2, ALL), ("tower_weight_decay", 3.0, ALL), ("tower_batch", 16, ALL), ("tower_epochs", 1, None),
    ("tower_patience", 1, None), ("tower_tau", .05, ALL[2:]), ("contrast", 50.0, ALL[2:4]), ("tower_share", 1, ALL[4:]),
    ("pisa_alpha", 50.0, ALL[4:]), ("tower_neighbours", 1, ALL[2:]), ("tower_clusters", 2, ALL[3:])]


@pytest.mark.parametrize("field, value, methods", PROVED)
def test_every_tower_setting_is_alive(field, value, methods, tmp_path, monkeypatch):
    """Another value changes the embeddings of the methods that it concerns, and of no other; no setting is left out."""
    assert {name for name, *_ in PROVED} == {f.name for f in dataclasses.fields(Settings)}
    ends, kept, base = [], [], TOWER | dict(tower_lr=0.05, contrast=5.0, pisa_alpha=5.0, tower_epochs=12)
    monkeypatch.setattr(twotower, "fit", lambda *task: kept.append(fit(*task)) or kept[-1])
    for changes in ({}, {field: value}):
        now = world(tmp_path, 60, 60, 3, **base | changes)
        ends.append({name: twotower.learn(now, name) and kept[-1] for name in ALL})  # pretrain's is that of D_1
    moved = [name for name in ALL if not torch.equal(ends[0][name], ends[1][name])]
    assert moved == methods if methods else moved, moved


def test_what_a_stage_teaches_asks_and_is_held_to_by_hand(monkeypatch):
    """Training items alone are pairs, edges and old; a question sees all before it; references are on the new graph."""
    stages = [Stage(1, {0: [], 1: []}, {0: [0, 1, 2, 3, 4], 1: [5, 1]}), Stage(2, {
        0: [0, 1, 2, 3, 4], 2: []}, {0: [6, 5, 7, 8], 2: [1, 6, 0]}), Stage(3, {1: [5, 1]}, {1: [9, 2, 3]})]
    known, asked, draw = [list(range(6)), list(range(9)), list(range(10))], [], torch.Generator()
    of = dict(stages=stages, known=known, n_items=10, questions=lambda t: (questions(stages[:t]), []))
    towers = twotower.TwoTowers(SimpleNamespace(**of, cfg=Config(rivals=dict(tower_layers=1, tower_tau=.3))))
    task, E = towers.lesson(2), normal(13, D).float()
    assert torch.stack([task.user, task.item]).tolist() == [[0, 0, 2], [6, 5, 1]] and task.known.tolist() == known[1]
    assert task.links.node.tolist() == [0, 0, 2, 4, 8, 9] and task.links.neighbour.tolist() == [8, 9, 4, 2, 0, 0]
    assert task.had.tolist() == [0, 1, 2, 3, 4, 5, 6, 21]
    valid = [[0, i] for i in (0, 1, 2, 3, 4, 6, 5)] + [[1, 1]]
    told = lambda q: (q.user.tolist(), q.target.tolist(), sorted(q.seen.mT.tolist()))  # noqa: E731
    assert told(task.check) == ([0, 2], [7, 6], sorted(valid))
    other = twotower.TwoTowers(SimpleNamespace(**of, cfg=Config(seen="include")))
    assert told(other.ask(stages[1])) == ([0, 2], [7, 6], [])
    monkeypatch.setattr(twotower, "fit", lambda E, task, s, draw, held=None: -E)
    held = towers.regulariser("lightgcn-pisa", E, task, 2, draw)
    assert torch.equal(held.prev, propagate(E, task.links.A, 1)) and held.s == towers.s and held.draw is draw
    assert torch.equal(held.next, propagate(-E, task.links.A, 1)) and held.next_links is task.links
    assert held.old.nonzero().flatten().tolist() == [0, 3, 4, 5] and held.links.neighbour.tolist() == [3, 4, 5, 0, 0, 0]
    monkeypatch.setattr(twotower, "inner", lambda H, n_users: lambda nodes: (H, nodes))
    monkeypatch.setattr(twotower, "recommended", lambda run, t, scores: asked.append(scores(run.questions(t)[0])))
    towers.learn("lightgcn-finetune", {"E": E, "generator": draw.get_state()})
    for k, (H, _) in enumerate(asked):
        assert torch.equal(H, propagate((-1)**k * E, towers.lesson(k + 1).links.A, 1))
    assert [nodes.tolist() for _, nodes in asked] == [[0, 1], [0, 2, 1], [1, 0, 2]]  # U_A, then U_I
